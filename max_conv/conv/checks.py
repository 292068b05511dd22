"""What is wrong with the operands of a convolution, in one sentence, before anything is emitted."""

from typing import Any

from max.dtype import DType
from max.graph import StaticDim, TensorValue, Weight

DTYPES = (DType.float32, DType.float64, DType.float16, DType.bfloat16)


def graph_value(op: str, name: str, value: Any) -> TensorValue:
    """Returns a graph value, or raises an error that names the operand."""
    if isinstance(value, Weight):
        return value
    try:
        return TensorValue(value)
    except (TypeError, ValueError):
        raise TypeError(
            f"{op}: {name} must be a graph value, but is a {type(value).__name__}; "
            "call max_conv.compile or a front end to run on arrays."
        ) from None


def check_axes(op: str, x: TensorValue, filter: TensorValue, layout: str, filter_layout: str) -> str:
    """Checks the shapes of x and filter on their own, and returns the axes of x: those of `layout`, or without the batch."""
    if len(x.shape) not in (2, 3):
        raise ValueError(f"{op}: x must have 3 axes ({layout}) or 2 (no batch), but has shape {_shape(x)}.")
    if len(filter.shape) != 3:
        raise ValueError(f"{op}: the filter must have 3 axes ({filter_layout}), but has shape {_shape(filter)}.")
    if not all(isinstance(size, StaticDim) for size in filter.shape):
        raise ValueError(f"{op}: the filter's shape must be known when the graph is built, but is {_shape(filter)}.")
    if not all(int(size) for size in filter.shape):
        raise ValueError(f"{op}: the filter must not be empty, but has shape {_shape(filter)}, layout {filter_layout}.")
    return layout if len(x.shape) == 3 else layout.replace("N", "")


def check_bias(op: str, bias: TensorValue | None, filters: int) -> None:
    """Raises ValueError unless a bias has one value a filter."""
    if bias is not None and (len(bias.shape) != 1 or bias.shape[0] != filters):
        raise ValueError(f"{op}: the bias must have shape ({filters},), one value a filter, but has {_shape(bias)}.")


def check_dtype(name: str, dtype: Any, op: str = "conv1d") -> None:
    """Raises TypeError unless the kernels compute in `dtype`."""
    if dtype not in DTYPES:
        names = ", ".join(known.name for known in DTYPES)
        raise TypeError(f"{op}: {name} must be one of {names}, but is {getattr(dtype, 'name', repr(dtype))}.")


def check_types(op: str, x: TensorValue, filter: TensorValue, bias: TensorValue | None) -> None:
    """Raises an error unless all operands have one of the kernels' dtypes, the same, on one device."""
    check_dtype("the dtype of x", x.dtype, op)
    for name, value in (("filter", filter), ("bias", bias)):
        if value is None:
            continue
        if value.dtype != x.dtype:
            raise TypeError(f"{op}: x is {x.dtype.name} but the {name} is {value.dtype.name}; cast one to the other.")
        if value.device != x.device:
            raise ValueError(f"{op}: x is on {x.device} but the {name} is on {value.device}; move one to the other.")


def check_channels(
    op: str, x: TensorValue, filter: TensorValue, groups: int, axes: str, filter_layout: str, transposed: bool = False
) -> tuple[int, int, int]:
    """Checks groups against channels and filters.

    Returns:
        Taps, channels of a group, filters of a group.
    """
    taps, channels, filters = (int(filter.shape[filter_layout.index(axis)]) for axis in "SCF")
    all_channels = transposed and filter_layout != "FSC"
    kind, count = ("channels", channels) if all_channels else ("filters", filters)
    if count % groups:
        raise ValueError(
            f"{op}: groups={groups} must divide the {count} {kind} "
            f"(filter shape {_shape(filter)}, layout {filter_layout})."
        )
    group_channels, group_filters = (channels // groups, filters) if all_channels else (channels, filters // groups)
    given = x.shape[axes.index("C")]
    if not isinstance(given, StaticDim):
        return taps, group_channels, group_filters  # the kernel checks it
    if int(given) % groups:
        raise ValueError(
            f"{op}: groups={groups} must divide the {given} channels of x (shape {_shape(x)}, layout {axes})."
        )
    if int(given) != group_channels * groups:
        raise ValueError(
            f"{op}: the filter takes {int(given) // groups} channels per group (x has {given} channels, "
            f"groups={groups}) but has {group_channels} (filter shape {_shape(filter)}, layout {filter_layout})."
        )
    return taps, group_channels, group_filters


def _shape(value: TensorValue) -> str:
    return f"({', '.join(str(dim) for dim in value.shape)}{',' * (len(value.shape) == 1)})"
