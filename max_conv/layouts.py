"""Axis orders of sequences and filters, and the one place that permutes them.

Letters: N batch, L length, C channels in (of one group, in a filter), F filters (channels out), S steps of the
kernel (its taps). PyTorch has NCL data and FCS filters, MAX has NLC and SCF, MLX has NLC and FSC.
"""

from typing import Any, Literal, get_args

import numpy as np

Layout = Literal["NLC", "NCL"]
FilterLayout = Literal["SCF", "FCS", "FSC", "CFS", "SFC"]


def check_layout(layout: str) -> None:
    """Raises ValueError unless `layout` is an axis order of sequences."""
    if layout not in get_args(Layout):
        raise ValueError(f"conv1d: layout must be one of {', '.join(get_args(Layout))}, but is {layout!r}.")


def check_filter_layout(layout: str) -> None:
    """Raises ValueError unless `layout` is an axis order of filters."""
    if layout not in get_args(FilterLayout):
        raise ValueError(
            f"conv1d: filter_layout must be one of {', '.join(get_args(FilterLayout))}, but is {layout!r}."
        )


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
        value: Anything with a `permute` method, or a NumPy array.
        source: The axis order that `value` has, such as "FCS".
        target: The axis order wanted, such as "SCF".

    Returns:
        The permuted value; arrays come back contiguous. `value` itself where the orders are the same.

    >>> permute(np.zeros((8, 4, 3)), "FCS", "SCF").shape
    (3, 4, 8)
    """
    axes = permutation(source, target)
    if source == target:
        return value
    if hasattr(value, "permute"):
        return value.permute(list(axes))
    return np.ascontiguousarray(np.transpose(value, axes))
