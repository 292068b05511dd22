"""Arrays in, arrays out: compiled models, saved and loaded."""

from .session import Model, compile, load, registry

__all__ = [
    "Model",
    "compile",
    "load",
    "registry",
]
