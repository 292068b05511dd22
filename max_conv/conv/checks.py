"""Checks of the operands of a convolution: an error is one sentence, raised before anything is emitted."""

from dataclasses import dataclass
from typing import Any

from max.dtype import DType
from max.graph import Dim, StaticDim, TensorValue, Weight

from .geometry import positive
from .layouts import Layout, check_filter_layout, check_layout

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


def check_axes(op: str, x: TensorValue, filter: TensorValue, layout: str, filter_layout: str) -> None:
    """Checks the shapes of x and filter separately."""
    if len(x.shape) not in (2, 3):
        raise ValueError(f"{op}: x must have 3 axes ({layout}) or 2 (no batch), but has shape {_shape(x)}.")
    if len(filter.shape) != 3:
        raise ValueError(f"{op}: the filter must have 3 axes ({filter_layout}), but has shape {_shape(filter)}.")
    if not all(isinstance(size, StaticDim) for size in filter.shape):
        raise ValueError(f"{op}: the filter's shape must be known when the graph is built, but is {_shape(filter)}.")
    if not all(int(size) for size in filter.shape):
        raise ValueError(f"{op}: the filter must not be empty, but has shape {_shape(filter)}, layout {filter_layout}.")


def check_bias(op: str, bias: TensorValue | None, filters: int) -> None:
    """Raises ValueError unless a bias has one value per filter."""
    if bias is not None and (len(bias.shape) != 1 or bias.shape[0] != filters):
        raise ValueError(f"{op}: the bias must have shape ({filters},), one value per filter, but has {_shape(bias)}.")


def check_dtype(name: str, dtype: Any, op: str = "conv1d") -> None:
    """Raises TypeError unless the kernels compute in `dtype`."""
    if dtype not in DTYPES:
        names = ", ".join(known.name for known in DTYPES)
        raise TypeError(f"{op}: {name} must be one of {names}, but is {getattr(dtype, 'name', repr(dtype))}.")


def check_types(op: str, x: TensorValue, filter: TensorValue, bias: TensorValue | None) -> None:
    """Raises an error unless all operands are on one device and have the same dtype, one that the kernels support."""
    check_dtype("the dtype of x", x.dtype, op)
    for name, value in (("filter", filter), ("bias", bias)):
        if value is None:
            continue
        if value.dtype != x.dtype:
            raise TypeError(f"{op}: x is {x.dtype.name} but the {name} is {value.dtype.name}; cast one to the other.")
        if value.device != x.device:
            raise ValueError(f"{op}: x is on {x.device} but the {name} is on {value.device}; move one to the other.")


def check_lengths(given: "Operands", lengths: Any) -> None:
    """Raises an error unless `lengths` has a number for each signal of the batch."""
    lengths = graph_value(given.op, "lengths", lengths)
    if lengths.dtype != DType.int64:
        raise TypeError(f"{given.op}: lengths must be int64, but is {lengths.dtype.name}; cast it first.")
    if not given.batched:
        raise ValueError(f"{given.op}: lengths needs a batch axis in x, which has shape {_shape(given.x)}.")
    if len(lengths.shape) != 1 or lengths.shape[0] != given.batch:
        raise ValueError(f"{given.op}: lengths must have shape ({given.batch},), but has {_shape(lengths)}.")


@dataclass(frozen=True)
class Operands:
    """The checked operands of a layer: the values, what their axes mean, and the sizes that follow.

    Attributes:
        op: "conv1d" or "conv_transpose1d"; every error begins with it.
        x: (N, L, C) or (N, C, L), as `layout` says; the batch axis may be missing.
        filter: Three axes in the order of `filter_layout`, with known sizes.
        bias: (F,) or None.
        layout, filter_layout: The axis orders.
        groups: The number of groups.
        taps: K.
        group_channels, group_filters: Channels and filters per group.
    """

    op: str
    x: TensorValue
    filter: TensorValue
    bias: TensorValue | None
    layout: Layout
    filter_layout: str
    groups: int
    taps: int
    group_channels: int
    group_filters: int

    @classmethod
    def of(cls, op: str, x: Any, filter: Any, bias: Any, groups: int, layout: Layout, filter_layout: str) -> "Operands":
        """Checks the arguments of `conv1d` or `conv_transpose1d`, as far as they need no geometry."""
        check_layout(layout, op)
        check_filter_layout(filter_layout, op)
        x = graph_value(op, "x", x)
        filter = graph_value(op, "filter", filter)
        bias = None if bias is None else graph_value(op, "bias", bias)
        check_axes(op, x, filter, layout, filter_layout)
        check_types(op, x, filter, bias)
        groups = positive("groups", groups, op)
        taps, channels, filters = (int(filter.shape[filter_layout.index(axis)]) for axis in "SCF")
        # The filter of a transposed convolution has all channels, except MLX's. MLX's and plain ones have all filters.
        all_channels = op == "conv_transpose1d" and filter_layout != "FSC"
        kind, count = ("channels", channels) if all_channels else ("filters", filters)
        if count % groups:
            raise ValueError(
                f"{op}: groups={groups} must divide the {count} {kind} "
                f"(filter shape {_shape(filter)}, layout {filter_layout})."
            )
        sizes = (channels // groups, filters) if all_channels else (channels, filters // groups)
        return cls(op, x, filter, bias, layout, filter_layout, groups, taps, *sizes)

    def check_sizes(self) -> None:
        """Raises ValueError unless the sizes of x, filter and bias fit together; called when the geometry is checked."""
        self._check_channels()
        check_bias(self.op, self.bias, self.filters)

    def _check_channels(self) -> None:
        given = self.x.shape[self.axes.index("C")]
        if not isinstance(given, StaticDim):
            return  # the kernel checks it
        if int(given) % self.groups:
            raise ValueError(
                f"{self.op}: groups={self.groups} must divide the {given} channels of x "
                f"(shape {_shape(self.x)}, layout {self.axes})."
            )
        if int(given) != self.group_channels * self.groups:
            raise ValueError(
                f"{self.op}: the filter takes {int(given) // self.groups} channels per group (x has {given} channels, "
                f"groups={self.groups}) but has {self.group_channels} (filter shape {_shape(self.filter)}, "
                f"layout {self.filter_layout})."
            )

    @property
    def batched(self) -> bool:
        """Whether x has a batch axis."""
        return len(self.x.shape) == 3

    @property
    def axes(self) -> str:
        """The axes of x: `layout`, or without N."""
        return self.layout if self.batched else self.layout.replace("N", "")

    @property
    def length(self) -> Dim:
        """L of x."""
        return self.x.shape[self.axes.index("L")]

    @property
    def batch(self) -> Dim:
        """N of x, or 1 if x has no batch axis."""
        return self.x.shape[0] if self.batched else Dim(1)

    @property
    def filters(self) -> int:
        """F."""
        return self.groups * self.group_filters


def _shape(value: TensorValue) -> str:
    return f"({', '.join(str(dim) for dim in value.shape)}{',' * (len(value.shape) == 1)})"
