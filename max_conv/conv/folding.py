"""Weight norm, spectral norm and batch norm, folded into the filter in float64."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np


def fold_weight_norm(g: np.ndarray, v: np.ndarray, dim: int | None = 0) -> np.ndarray:
    """Returns the filter that weight norm's magnitude `g` and direction `v` define: `g * v / |v|`, in float64.

    Args:
        g: Broadcasts against `v`: size 1 in every axis but `dim`.
        v: The direction, any shape.
        dim: The axis along which each index has its own norm; None and -1 are one norm of the whole, as in PyTorch.

    >>> fold_weight_norm(np.array([[10.0]]), np.array([[3.0, 4.0]])).tolist()
    [[6.0, 8.0]]

    Source: Salimans and Kingma, Weight Normalization, 2016, https://arxiv.org/abs/1602.07868
    """
    v = np.asarray(v, np.float64)
    if dim is not None and dim < -1:
        dim += v.ndim  # in PyTorch -1 also means one norm of the whole
    axes = tuple(axis for axis in range(v.ndim) if axis != dim)
    with np.errstate(divide="ignore", invalid="ignore"):  # a direction of zeros gives NaN, as in PyTorch
        filter = v / np.sqrt(np.sum(v * v, axis=axes, keepdims=True))
        filter *= np.asarray(g, np.float64)
    return filter


def weight_norm_names(state: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a state dict with weight norm's parts under PyTorch's older names, `weight_g` and `weight_v`.

    >>> list(weight_norm_names({"up.parametrizations.weight.original0": 1, "up.bias": 2}))
    ['up.weight_g', 'up.bias']
    """
    parts = {"parametrizations.weight.original0": "weight_g", "parametrizations.weight.original1": "weight_v"}
    renamed = {}
    for name, value in state.items():
        for spelling, part in parts.items():
            if name == spelling or name.endswith(f".{spelling}"):
                name = name.removesuffix(spelling) + part
        renamed[name] = value
    return renamed


def weight_norm_dim(g: tuple[int, ...], v: tuple[int, ...]) -> int | None:
    """Returns the axis along which each index has its own norm, from the shapes of weight norm's parts.

    Args:
        g, v: The shapes of the magnitude and of the direction.

    Raises:
        ValueError: If no axis explains them.

    >>> weight_norm_dim((8, 1, 1), (8, 4, 3)), weight_norm_dim((), (8, 4, 3)), weight_norm_dim((1, 1, 1), (1, 4, 3))
    (0, None, None)
    """
    # One norm along an axis of size 1 is one norm of the whole.
    own = [axis for axis, size in enumerate(g) if size != 1]
    if (not own and len(g) in (0, len(v))) or g == (1,):
        return None
    if len(g) == len(v) and len(own) == 1 and g[own[0]] == v[own[0]]:
        return own[0]
    raise ValueError(f"a magnitude of shape {g} does not belong to a direction of shape {v}")


def fold_spectral_norm(weight: np.ndarray, u: np.ndarray, v: np.ndarray, dim: int = 0) -> np.ndarray:
    """Returns the filter that spectral norm computes in eval mode: `weight / (u W v)`, in float64.

    W is the weight as a matrix with axis `dim` first; u and v are the buffers, left and right singular vectors.

    Args:
        weight: Any shape.
        u: (weight.shape[dim],).
        v: (the product of the other sizes,).
        dim: 0; for PyTorch's transposed convolutions 1.

    >>> fold_spectral_norm(np.array([[6.0, 8.0]]), np.ones(1), np.array([0.6, 0.8])).tolist()
    [[0.6, 0.8]]

    Source: Miyato et al., Spectral Normalization, 2018, https://arxiv.org/abs/1802.05957
    """
    weight = np.asarray(weight, np.float64)
    matrix = np.moveaxis(weight, dim, 0).reshape(weight.shape[dim], -1)
    sigma = np.asarray(u, np.float64) @ (matrix @ np.asarray(v, np.float64))
    with np.errstate(divide="ignore", invalid="ignore"):
        return weight / sigma


class BatchNorm(NamedTuple):
    """A batch norm in eval mode, which uses its running mean and variance: each array is (F,), in float64."""

    weight: np.ndarray
    bias: np.ndarray
    mean: np.ndarray
    variance: np.ndarray
    eps: float

    @property
    def scale(self) -> np.ndarray:
        """The factor of each filter, (F,)."""
        return self.weight / np.sqrt(self.variance + self.eps)

    def fold_filter(self, filter: np.ndarray, order: str) -> np.ndarray:
        """Returns the filter, whose axes are in `order`, scaled by the batch norm after it.

        >>> norm = BatchNorm(np.array([2.0]), np.zeros(1), np.zeros(1), np.ones(1), 0.0)
        >>> norm.fold_filter(np.ones((1, 1, 2)), "FCS").tolist()
        [[[2.0, 2.0]]]
        """
        if len(self.scale) == filter.shape[order.index("F")]:
            return filter * self.scale.reshape([-1 if axis == "F" else 1 for axis in order])
        # CFS has the filters of one group: the channels of each group have separate filters.
        channels, filters, taps = filter.shape
        groups = len(self.scale) // filters
        parts = filter.reshape(groups, channels // groups, filters, taps)
        return (parts * self.scale.reshape(groups, 1, filters, 1)).reshape(filter.shape)

    def fold_bias(self, bias: np.ndarray | float = 0.0) -> np.ndarray:
        """Returns the bias of the layer combined with the batch norm after it, (F,).

        >>> BatchNorm(np.array([2.0]), np.array([1.0]), np.array([3.0]), np.ones(1), 0.0).fold_bias().tolist()
        [-5.0]
        """
        return (bias - self.mean) * self.scale + self.bias
