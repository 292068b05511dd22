"""Compiled models, which are called on arrays, saved and loaded."""

from .session import Model, compile, load, registry

__all__ = [
    "Model",
    "compile",
    "load",
    "registry",
]
