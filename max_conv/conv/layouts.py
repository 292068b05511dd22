"""Axis orders of sequences and filters, and the only code that permutes them.

Letters: N batch, L length, C channels in, F filters (channels out), S steps of the kernel (its taps). PyTorch has NCL
data and FCS filters, MAX has NLC and SCF, MLX has NLC and FSC. A filter has the channels of one group and all filters.
A transposed filter, SFC in MAX and CFS in PyTorch, has all channels and the filters of one group; MLX's, FSC, has the
channels of one group and all filters, too.
"""

from typing import Any, Literal, get_args

import numpy as np

Layout = Literal["NLC", "NCL"]
FilterLayout = Literal["SCF", "FCS", "FSC", "CFS", "SFC"]
TransposedFilterLayout = Literal["SFC", "CFS", "FSC"]


def check_layout(layout: str, op: str = "conv1d") -> None:
    """Raises ValueError unless `layout` is an axis order of sequences."""
    if layout not in get_args(Layout):
        raise ValueError(f"{op}: layout must be one of {', '.join(get_args(Layout))}, but is {layout!r}.")


def check_filter_layout(layout: str, op: str = "conv1d") -> None:
    """Raises ValueError unless `layout` is an axis order of the operation's filters."""
    known = get_args(FilterLayout if op == "conv1d" else TransposedFilterLayout)
    if layout not in known:
        raise ValueError(f"{op}: filter_layout must be one of {', '.join(known)}, but is {layout!r}.")


def permutation(source: str, target: str) -> tuple[int, ...]:
    """Returns the axes of `source` in the order of `target`.

    >>> permutation("FCS", "SCF")
    (2, 1, 0)
    """
    if sorted(source) != sorted(target):
        raise ValueError(
            f"layouts: {source} and {target} do not name the same axes; pass two orders of the same letters."
        )
    return tuple(source.index(axis) for axis in target)


def permute(value: Any, source: str, target: str) -> Any:
    """Permutes an array, a torch tensor or a graph value from one axis order to another.

    Args:
        value: An object with a `permute` method, or a NumPy array.
        source: The axis order that `value` has, such as "FCS".
        target: The axis order wanted, such as "SCF".

    Returns:
        The permuted value; arrays are contiguous. If the orders are the same, `value` itself.

    >>> permute(np.zeros((8, 4, 3)), "FCS", "SCF").shape
    (3, 4, 8)
    """
    axes = permutation(source, target)
    if source == target:
        return value
    if hasattr(value, "permute"):
        return value.permute(list(axes))
    return np.ascontiguousarray(np.transpose(value, axes))


def by_group(filter: np.ndarray, layout: str, groups: int) -> np.ndarray:
    """Returns a transposed convolution's filter as (K, groups, C / groups, F / groups).

    >>> by_group(np.zeros((8, 3, 4)), "CFS", 2).shape, by_group(np.zeros((6, 4, 4)), "FSC", 2).shape
    ((4, 2, 4, 3), (4, 2, 4, 3))
    """
    taps, filters, channels = (filter.shape[layout.index(axis)] for axis in "SFC")
    whole = np.transpose(filter, permutation(layout, "SFC"))
    if layout == "FSC":  # all filters, the channels of one group
        return whole.reshape(taps, groups, filters // groups, channels).swapaxes(2, 3)
    return whole.reshape(taps, filters, groups, channels // groups).transpose(0, 2, 3, 1)
