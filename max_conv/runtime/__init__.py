"""Compiled models, which are called on arrays, saved and loaded."""

from .kernel_check import Checked, check, last_check
from .ports import Port
from .session import Model, compile, load, registry
from .tuning import Timed, tune

__all__ = [
    "Checked",
    "Model",
    "Port",
    "Timed",
    "check",
    "compile",
    "last_check",
    "load",
    "registry",
    "tune",
]
