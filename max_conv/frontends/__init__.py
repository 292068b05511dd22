"""`Conv1d` as PyTorch and MLX spell it.

`frontends.torch.Conv1d` and `frontends.mlx.Conv1d` take those libraries' arguments, layouts and start values. Called
with a graph value they emit; called with an array they compile once, with symbolic batch and length, and run.
"""

from typing import TYPE_CHECKING

from .. import lazily

if TYPE_CHECKING:
    from . import mlx, torch

__all__ = ["mlx", "torch"]
__getattr__ = lazily(__name__, {"mlx": "mlx", "torch": "torch"})
