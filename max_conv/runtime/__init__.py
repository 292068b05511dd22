"""Compiled models, which are called on arrays, saved and loaded."""

from .ports import Port
from .session import Model, compile, load, registry

__all__ = [
    "Model",
    "Port",
    "compile",
    "load",
    "registry",
]
