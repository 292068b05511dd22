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
    from .packing import PackedGraph
    from .session import Model, compile, load, registry
    from .weight_norm import (
        WeightNormConv1D,
        WeightNormConvTranspose1D,
        WeightNormConvTranspose1d,
        remove_weight_norm,
    )

__version__ = "0.1.0"
__all__ = [
    "Conv1D",
    "ConvTranspose1D",
    "ConvTranspose1d",
    "Model",
    "PackedGraph",
    "WeightNormConv1D",
    "WeightNormConvTranspose1D",
    "WeightNormConvTranspose1d",
    "compile",
    "conv1d",
    "conv_transpose1d",
    "explain",
    "frontends",
    "load",
    "registry",
    "remove_weight_norm",
]

# MAX takes a second to import: each name is loaded when it is first used.
_HOMES = {
    "Conv1D": "nn",
    "ConvTranspose1D": "nn",
    "ConvTranspose1d": "nn",
    "Model": "session",
    "PackedGraph": "packing",
    "compile": "session",
    "conv1d": "ops",
    "conv_transpose1d": "ops",
    "explain": "dispatch",
    "load": "session",
    "registry": "session",
    "WeightNormConv1D": "weight_norm",
    "WeightNormConvTranspose1D": "weight_norm",
    "WeightNormConvTranspose1d": "weight_norm",
    "remove_weight_norm": "weight_norm",
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
