"""`Conv1d` as PyTorch and MLX spell it.

`frontends.torch.Conv1d` and `frontends.mlx.Conv1d` take those libraries' arguments, layouts and start values. Called
with a graph value they emit; called with an array they compile once, with symbolic batch and length, and run.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import mlx, torch

__all__ = ["mlx", "torch"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
