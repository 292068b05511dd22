"""`conv1d`: checks its arguments, works out the geometry, emits the operation into the current graph."""

from collections.abc import Mapping, Sequence
from typing import Any

from max.dtype import DType
from max.graph import DeviceRef, Dim, Graph, StaticDim, TensorType, TensorValue, Weight, ops

from .dispatch import LEAST_OUTPUTS, Layer, choose
from .geometry import PADDING_MODES, Geometry, Padding, positive
from .kernel_library import kernel_library
from .layouts import FilterLayout, Layout, check_filter_layout, check_layout, permute
from .packing import PACK, PACKED, packable, packed

DTYPES = (DType.float32, DType.float64, DType.float16, DType.bfloat16)


def conv1d(
    x: TensorValue,
    filter: TensorValue,
    bias: TensorValue | None = None,
    *,
    stride: int = 1,
    padding: Padding = 0,
    dilation: int = 1,
    groups: int = 1,
    padding_mode: str = "zeros",
    layout: Layout = "NLC",
    filter_layout: FilterLayout = "SCF",
) -> TensorValue:
    """Convolves an NLC sequence with an SCF filter.

    `L_out = (L + left + right - dilation * (K - 1) - 1) // stride + 1`

    Args:
        x: (N, L, C), or (N, C, L) with layout "NCL"; without the batch axis, too. Any dimension may be symbolic.
        filter: (K, C / groups, F), or another order named by `filter_layout`: "FCS" is PyTorch's, "FSC" is MLX's.
        bias: (F,) or None.
        stride: Input positions from one output to the next.
        padding: Positions added on both sides, (left, right), "same" (keeps the length, stride 1 only), "causal"
            (all on the left, so that no output sees the future) or "valid" (none).
        dilation: Input positions from one tap to the next.
        groups: Output channel f sees only the channels of its group, f // (F / groups).
        padding_mode: What stands in the padding: "zeros", "reflect", "replicate" or "circular".

    Returns:
        (N, L_out, F), or (N, F, L_out) with layout "NCL", in the dtype of `x`. Sixteen-bit types are summed in float32.

    Raises:
        TypeError, ValueError: Before anything is emitted, in one sentence. What only the run-time length can tell
            (an input shorter than the filter) is raised by the kernel when the graph runs.

    >>> from max.dtype import DType
    >>> from max.graph import DeviceRef, Graph, TensorType
    >>> x = TensorType(DType.float32, ["batch", "length", 80], DeviceRef.CPU())
    >>> w = TensorType(DType.float32, [3, 80, 384], DeviceRef.CPU())
    >>> with Graph("stem", input_types=[x, w]) as graph:
    ...     y = conv1d(graph.inputs[0].tensor, graph.inputs[1].tensor, stride=2, padding=1)
    >>> y.shape[2]
    Dim(384)

    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.Conv1d.html
    """
    check_layout(layout)
    check_filter_layout(filter_layout)
    x = _value("x", x)
    filter = _value("filter", filter)
    bias = None if bias is None else _value("bias", bias)
    axes = _check_axes(x, filter, bias, layout, filter_layout)
    _check_types(x, filter, bias)
    taps, group_channels, filters = (int(filter.shape[filter_layout.index(axis)]) for axis in "SCF")
    groups = positive("groups", groups)
    geometry = Geometry.of(taps, stride, padding, dilation, padding_mode)
    _check_channels(x, filter, group_channels, filters, groups, axes, filter_layout)
    length = x.shape[axes.index("L")]
    if isinstance(length, StaticDim):
        geometry.check_length(int(length))

    x = _in_graph(x)
    if batched := x.rank == 3:
        batch = x.shape[0]
    else:
        x, batch = ops.unsqueeze(x, 0), Dim(1)
    layer = Layer(geometry, layout, group_channels, filters // groups, groups, x.dtype.name)
    outputs = Dim(geometry.output_length(length))
    known = [int(size) if isinstance(size, StaticDim) else None for size in (batch, outputs)]
    kernel = choose(layer, *known, packed=packable(filter)).kernel
    operand, order = _operand(filter, kernel, layer, filter_layout)
    bias = ops.constant([], x.dtype, device=x.device) if bias is None else _in_graph(bias)
    mode = PADDING_MODES.index(padding_mode)
    numbers = (geometry.stride, geometry.dilation, geometry.left, geometry.right, mode, groups, taps)
    scalars = [ops.constant(number, DType.int64, device=DeviceRef.CPU()) for number in numbers]
    sizes = {"N": batch, "L": outputs, "C": Dim(filters)}
    shape = [sizes[axis] for axis in layout]
    y = emit(x, operand, bias, scalars, shape, kernel, layout, order, whole=filters // groups % PACK == 0)
    return y if batched else ops.squeeze(y, 0)


def _operand(filter: TensorValue, kernel: str, layer: Layer, filter_layout: str) -> tuple[TensorValue, str]:
    """Returns the filter as the kernel reads it, and its layout."""
    depthwise = kernel == "depthwise" and filter.device.is_cpu()  # a GPU's kernel takes any layout
    needs_scf = depthwise or (layer.layout == "NLC" and kernel != "lengthwise")
    permuted = needs_scf and filter_layout != "SCF"
    if packable(filter, kernel) and (kernel in PACKED or permuted):
        return packed(filter, kernel, layer, filter_layout)
    filter = _in_graph(filter)
    return (permute(filter, filter_layout, "SCF"), "SCF") if permuted else (filter, filter_layout)


def emit(
    x: TensorValue,
    filter: TensorValue,
    bias: TensorValue,
    scalars: Sequence[TensorValue],
    shape: Sequence[Any],
    kernel: str,
    layout: str,
    filter_layout: str,
    *,
    least: int = LEAST_OUTPUTS,
    whole: bool = False,
) -> TensorValue:
    """Emits the operation, unchecked.

    Args:
        bias: (F,), or (0,) for none.
        scalars: stride, dilation, left, right, the number of the padding mode, groups and kernel_size, int64, on the CPU.
        shape: The output's.
        filter_layout: Of the filter, or "packed" for what `Packing` made of it.
        least: Outputs below which "winograd" gives way to another kernel; 0 takes it always.
        whole: Whether the filters of a group are a multiple of 32: less has to be compiled.
    """
    (y,) = custom_op(
        "max_conv.conv1d",
        x.device,
        [x, filter, bias, *scalars],
        [TensorType(x.dtype, shape, x.device)],
        {"kernel": kernel, "least": least, "whole": whole, "layout": layout, "filter_layout": filter_layout},
    )
    return y


def custom_op(
    name: str,
    device: DeviceRef,
    operands: Sequence[TensorValue],
    results: Sequence[TensorType],
    parameters: Mapping[str, str | int | bool] | None = None,
) -> list[TensorValue]:
    """Emits one of this package's kernels into the current graph, and tells the graph where they are."""
    graph = Graph.current
    library = kernel_library()
    if library not in graph.kernel_libraries_paths:
        graph._import_kernels([library])
    return [value.tensor for value in ops.custom(name, device, operands, results, parameters)]


def _value(name: str, value: Any) -> TensorValue:
    if isinstance(value, Weight):
        return value
    try:
        return TensorValue(value)
    except (TypeError, ValueError):
        raise TypeError(
            f"conv1d: {name} must be a graph value, but is a {type(value).__name__}; "
            "call max_conv.compile or a front end to run on arrays."
        ) from None


def _in_graph(value: TensorValue) -> TensorValue:
    if isinstance(value, Weight) and value.shard_idx is None:
        # A weight remembers the first graph it was used in; asking the graph lets a layer be traced again.
        return Graph.current.add_weight(value, force_initial_weight_on_host=not value._has_alias)
    return value


def _check_axes(x: TensorValue, filter: TensorValue, bias: TensorValue | None, layout: str, filter_layout: str) -> str:
    """Checks the shapes on their own, and returns the axes of x: those of `layout`, or without the batch."""
    if len(x.shape) not in (2, 3):
        raise ValueError(f"conv1d: x must have 3 axes ({layout}) or 2 (no batch), but has shape {_shape(x)}.")
    if len(filter.shape) != 3:
        raise ValueError(f"conv1d: the filter must have 3 axes ({filter_layout}), but has shape {_shape(filter)}.")
    if not all(isinstance(size, StaticDim) for size in filter.shape):
        raise ValueError(f"conv1d: the filter's shape must be known when the graph is built, but is {_shape(filter)}.")
    if not all(int(size) for size in filter.shape):
        raise ValueError(
            f"conv1d: the filter must not be empty, but has shape {_shape(filter)}, layout {filter_layout}."
        )
    filters = filter.shape[filter_layout.index("F")]
    if bias is not None and (len(bias.shape) != 1 or bias.shape[0] != filters):
        raise ValueError(f"conv1d: the bias must have shape ({filters},), one value a filter, but has {_shape(bias)}.")
    return layout if len(x.shape) == 3 else layout.replace("N", "")


def check_dtype(name: str, dtype: Any) -> None:
    """Raises TypeError unless the kernels compute in `dtype`."""
    if dtype not in DTYPES:
        names = ", ".join(known.name for known in DTYPES)
        raise TypeError(f"conv1d: {name} must be one of {names}, but is {getattr(dtype, 'name', repr(dtype))}.")


def _check_types(x: TensorValue, filter: TensorValue, bias: TensorValue | None) -> None:
    check_dtype("the dtype of x", x.dtype)
    for name, value in (("filter", filter), ("bias", bias)):
        if value is None:
            continue
        if value.dtype != x.dtype:
            raise TypeError(f"conv1d: x is {x.dtype.name} but the {name} is {value.dtype.name}; cast one to the other.")
        if value.device != x.device:
            raise ValueError(f"conv1d: x is on {x.device} but the {name} is on {value.device}; move one to the other.")


def _check_channels(
    x: TensorValue,
    filter: TensorValue,
    group_channels: int,
    filters: int,
    groups: int,
    axes: str,
    filter_layout: str,
) -> None:
    if filters % groups:
        raise ValueError(
            f"conv1d: groups={groups} must divide the {filters} filters "
            f"(filter shape {_shape(filter)}, layout {filter_layout})."
        )
    channels = x.shape[axes.index("C")]
    if not isinstance(channels, StaticDim):
        return  # the kernel checks it
    if int(channels) % groups:
        raise ValueError(
            f"conv1d: groups={groups} must divide the {channels} channels of x (shape {_shape(x)}, layout {axes})."
        )
    if int(channels) != group_channels * groups:
        raise ValueError(
            f"conv1d: the filter takes {int(channels) // groups} channels per group (x has {channels} channels, "
            f"groups={groups}) but has {group_channels} (filter shape {_shape(filter)}, layout {filter_layout})."
        )


def _shape(value: TensorValue) -> str:
    return f"({', '.join(str(dim) for dim in value.shape)}{',' * (len(value.shape) == 1)})"
