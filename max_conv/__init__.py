"""1-D convolution for Modular MAX: right on every shape, complete, and fast.

`conv1d` and `conv_transpose1d` emit an operation into a graph, `Conv1D` and `ConvTranspose1D` are the layers, `compile`
turns a layer into a callable on arrays, and `frontends.torch` and `frontends.mlx` have PyTorch's and MLX's argument
lists.
"""

import importlib
import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import frontends
    from .conv.explanation import explain
    from .conv.graph import PackedGraph
    from .conv.nn import Conv1D, ConvTranspose1D, ConvTranspose1d
    from .conv.ops import conv1d, conv_transpose1d
    from .conv.weight_norm import (
        WeightNormConv1D,
        WeightNormConvTranspose1D,
        WeightNormConvTranspose1d,
        remove_weight_norm,
    )
    from .runtime.session import Model, compile, load, registry
    from .streaming.graph import streaming

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
    "streaming",
]


def lazily(package: str, homes: Mapping[str, str]) -> Callable[[str], Any]:
    """Returns a package's `__getattr__`, which loads a name when it is first used: importing MAX takes a second.

    Args:
        package: The package's `__name__`.
        homes: The module of each name, relative to the package; the name itself for a module.
    """

    def getattribute(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        module = importlib.import_module(f"{package}.{homes[name]}")
        value = module if homes[name] == name else getattr(module, name)
        setattr(sys.modules[package], name, value)
        return value

    return getattribute


__getattr__ = lazily(
    __name__,
    {
        "Conv1D": "conv.nn",
        "ConvTranspose1D": "conv.nn",
        "ConvTranspose1d": "conv.nn",
        "Model": "runtime.session",
        "PackedGraph": "conv.graph",
        "WeightNormConv1D": "conv.weight_norm",
        "WeightNormConvTranspose1D": "conv.weight_norm",
        "WeightNormConvTranspose1d": "conv.weight_norm",
        "compile": "runtime.session",
        "conv1d": "conv.ops",
        "conv_transpose1d": "conv.ops",
        "explain": "conv.explanation",
        "frontends": "frontends",
        "load": "runtime.session",
        "registry": "runtime.session",
        "remove_weight_norm": "conv.weight_norm",
        "streaming": "streaming",
    },
)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
