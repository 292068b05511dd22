"""`Conv1d` and `ConvTranspose1d` with the arguments of PyTorch and of MLX; modules of `max.experimental.nn`.

The classes of `frontends.torch` and `frontends.mlx` accept those libraries' arguments, and use their layouts and
initial values. Called with a graph value, a layer emits its operation. Called with an array, it compiles once, with
symbolic batch and length, and runs. The layers of `frontends.experimental` are modules of MAX's experimental kind.
"""

from typing import TYPE_CHECKING

from .. import lazily

if TYPE_CHECKING:
    from . import experimental, mlx, torch

__all__ = ["experimental", "mlx", "torch"]
__getattr__ = lazily(__name__, {"experimental": "experimental", "mlx": "mlx", "torch": "torch"})
