"""1-D convolution for Modular MAX: right on every shape, complete, and fast.

`conv1d` and `conv_transpose1d` emit an operation into a graph, `Conv1D` and `ConvTranspose1D` are the layers, `compile`
makes a callable on arrays of them, and `frontends.torch` and `frontends.mlx` speak PyTorch's and MLX's argument lists.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import frontends
    from .dispatch import explain
    from .nn import Conv1D, ConvTranspose1D, ConvTranspose1d
    from .ops import conv1d, conv_transpose1d
    from .session import Model, compile, load

__version__ = "0.1.0"
__all__ = [
    "Conv1D",
    "ConvTranspose1D",
    "ConvTranspose1d",
    "Model",
    "compile",
    "conv1d",
    "conv_transpose1d",
    "explain",
    "frontends",
    "load",
]

# MAX takes a second to import: each name is loaded when it is first used.
_HOMES = {
    "Conv1D": "nn",
    "ConvTranspose1D": "nn",
    "ConvTranspose1d": "nn",
    "Model": "session",
    "compile": "session",
    "conv1d": "ops",
    "conv_transpose1d": "ops",
    "explain": "dispatch",
    "load": "session",
}


def __getattr__(name: str) -> Any:
    if name == "frontends":
        return importlib.import_module(f"{__name__}.{name}")
    if home := _HOMES.get(name):
        value = globals()[name] = getattr(importlib.import_module(f"{__name__}.{home}"), name)
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *__all__]
