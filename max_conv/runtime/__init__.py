"""Compiled models, which are called on arrays, saved and loaded."""

from .kernel_check import Checked, check, last_check
from .ports import Port
from .session import Model, compile, load, registry

__all__ = [
    "Checked",
    "Model",
    "Port",
    "check",
    "compile",
    "last_check",
    "load",
    "registry",
]
