"""`conv1d` and `conv_transpose1d`: check their arguments, work out the geometry, emit the operation into the graph."""

from collections.abc import Mapping, Sequence
from typing import Any

from max.dtype import DType
from max.graph import DeviceRef, Dim, Graph, StaticDim, TensorType, TensorValue, Weight, ops

from .checks import check_axes, check_bias, check_channels, check_types, graph_value
from .dispatch import LANES, LEAST_OUTPUTS, PANELS, Layer, choose
from .geometry import PADDING_MODES, Geometry, Padding, TransposedGeometry, positive
from .layouts import FilterLayout, Layout, TransposedFilterLayout, check_filter_layout, check_layout, permute
from .library import kernel_library
from .packing import Emitted, another, packable, packed, packed_graph, record, weight_name


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
    exact: bool = False,
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
        exact: Whether only direct kernels compute it: then no output depends on a value that it does not see, bit for bit.
            Winograd's kernel, which is up to twice as fast, promises that for values that are not finite or beyond 1e16;
            smaller ones move the outputs next to those that see them by about 1e-6 of themselves.

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
    x = graph_value("conv1d", "x", x)
    filter = graph_value("conv1d", "filter", filter)
    bias = None if bias is None else graph_value("conv1d", "bias", bias)
    axes = check_axes("conv1d", x, filter, layout, filter_layout)
    check_bias("conv1d", bias, int(filter.shape[filter_layout.index("F")]))
    check_types("conv1d", x, filter, bias)
    groups = positive("groups", groups)
    geometry = Geometry.of(int(filter.shape[filter_layout.index("S")]), stride, padding, dilation, padding_mode)
    _, group_channels, group_filters = check_channels("conv1d", x, filter, groups, axes, filter_layout)
    length = x.shape[axes.index("L")]
    if isinstance(length, StaticDim):
        geometry.check_length(int(length))

    layer = Layer(geometry, layout, group_channels, group_filters, groups, x.dtype.name)
    mode = PADDING_MODES.index(padding_mode)
    numbers = (geometry.stride, geometry.dilation, geometry.left, geometry.right, mode, groups, geometry.kernel_size)
    return _emit_layer(x, filter, bias, layer, numbers, Dim(geometry.output_length(length)), filter_layout, exact)


def conv_transpose1d(
    x: TensorValue,
    filter: TensorValue,
    bias: TensorValue | None = None,
    *,
    stride: int = 1,
    padding: int | Sequence[int] | str = 0,
    output_padding: int = 0,
    dilation: int = 1,
    groups: int = 1,
    output_size: int | None = None,
    layout: Layout = "NLC",
    filter_layout: TransposedFilterLayout = "SFC",
    exact: bool = False,
) -> TensorValue:
    """Convolves an NLC sequence transposed, with an SFC filter.

    `L_out = (L - 1) * stride - left - right + dilation * (K - 1) + output_padding + 1`

    Args:
        x: (N, L, C), or (N, C, L) with layout "NCL"; without the batch axis, too. Any dimension may be symbolic.
        filter: (K, F / groups, C), or another order named by `filter_layout`: "CFS" is PyTorch's; "FSC" is MLX's, which
            holds all filters and the channels of a group: (F, K, C / groups).
        bias: (F,) or None.
        stride: Outputs from one input position to the next.
        padding: Outputs taken off both sides, (left, right), or "causal": what exceeds `L * stride` is taken off the right.
        output_padding: Outputs added on the right, fewer than stride or dilation.
        dilation: Outputs from one tap to the next.
        groups: Output channel f sees only the channels of its group, f // (F / groups).
        output_size: L_out, from which `output_padding` is worked out.
        exact: As in `conv1d`.

    Returns:
        (N, L_out, F), or (N, F, L_out) with layout "NCL", in the dtype of `x`. Sixteen-bit types are summed in float32.

    Raises:
        TypeError, ValueError: Before anything is emitted, in one sentence. What only the run-time length can tell
            (padding that leaves no output) is raised by the kernel when the graph runs.

    >>> from max.dtype import DType
    >>> from max.graph import DeviceRef, Graph, TensorType
    >>> x = TensorType(DType.float32, ["batch", 100, 512], DeviceRef.CPU())
    >>> w = TensorType(DType.float32, [16, 256, 512], DeviceRef.CPU())
    >>> with Graph("upsample", input_types=[x, w]) as graph:
    ...     y = conv_transpose1d(graph.inputs[0].tensor, graph.inputs[1].tensor, stride=8, padding=4)
    >>> y.shape[1:]
    [Dim(800), Dim(256)]

    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.ConvTranspose1d.html
    """
    op = "conv_transpose1d"
    check_layout(layout, op)
    check_filter_layout(filter_layout, op)
    x = graph_value(op, "x", x)
    filter = graph_value(op, "filter", filter)
    bias = None if bias is None else graph_value(op, "bias", bias)
    axes = check_axes(op, x, filter, layout, filter_layout)
    check_types(op, x, filter, bias)
    groups = positive("groups", groups, op)
    taps, group_channels, group_filters = check_channels(op, x, filter, groups, axes, filter_layout, transposed=True)
    check_bias(op, bias, groups * group_filters)
    geometry = TransposedGeometry.of(taps, stride, padding, output_padding, dilation)  # type: ignore[arg-type]
    length = x.shape[axes.index("L")]
    if output_size is not None:
        output_size = positive("output_size", output_size, op)
    if isinstance(length, StaticDim):
        if output_size is not None:
            geometry = geometry.with_output(int(length), output_size)
        geometry.check_length(int(length))

    layer = Layer.of(geometry, layout, group_channels, group_filters, groups, x.dtype.name)
    numbers = (geometry.stride, geometry.dilation, geometry.left, geometry.right, groups, geometry.kernel_size)
    outputs = Dim(geometry.output_length(length) if output_size is None else output_size)
    return _emit_layer(x, filter, bias, layer, numbers, outputs, filter_layout, exact)


def _emit_layer(
    x: TensorValue,
    filter: TensorValue,
    bias: TensorValue | None,
    layer: Layer,
    numbers: Sequence[int],
    outputs: Dim,
    filter_layout: str,
    exact: bool,
) -> TensorValue:
    """Chooses the kernel of a layer that has been checked, and emits it."""
    x = in_graph(x)
    if batched := x.rank == 3:
        batch = x.shape[0]
    else:
        x, batch = ops.unsqueeze(x, 0), Dim(1)
    known = [int(size) if isinstance(size, StaticDim) else None for size in (batch, outputs)]
    graph = packed_graph()
    exact = exact or (graph is not None and graph.exact)
    kernel = choose(layer, *known, packed=packable(filter), exact=exact).kernel
    operand, order = _operand(filter, kernel, layer, filter_layout)
    bias = ops.constant([], x.dtype, device=x.device) if bias is None else in_graph(bias)
    scalars = [ops.constant(number, DType.int64, device=DeviceRef.CPU()) for number in numbers]
    sizes = {"N": batch, "L": outputs, "C": Dim(layer.group_filters * layer.groups)}
    shape = [sizes[axis] for axis in layer.layout]
    transposed = layer.transposed is not None
    kinds = {"whole": layer.whole(kernel), "full": layer.group_filters % LANES == 0, "transposed": transposed}
    record(Emitted(weight_name(filter), layer, kernel, known[1]))
    y = emit(x, operand, bias, scalars, shape, kernel, layer.layout, order, **kinds)
    return y if batched else ops.squeeze(y, 0)


def _operand(filter: TensorValue, kernel: str, layer: Layer, filter_layout: str) -> tuple[TensorValue, str]:
    """Returns the filter as the kernel reads it, and its layout."""
    depthwise = kernel == "depthwise" and filter.device.is_cpu()  # a GPU's kernel takes any layout
    needs_scf = depthwise or (layer.layout == "NLC" and kernel != "lengthwise")
    permuted = needs_scf and filter_layout != "SCF" and not layer.transposed
    if packable(filter, kernel) and (kernel in PANELS or permuted or layer.transposed):
        return packed(filter, kernel, layer, filter_layout)
    filter = in_graph(filter)
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
    transposed: bool = False,
    full: bool = False,
) -> TensorValue:
    """Emits the operation, unchecked.

    Args:
        bias: (F,), or (0,) for none.
        scalars: stride, dilation, left, right, the number of the padding mode, groups and kernel_size, int64, on the CPU;
            the padding mode only of `conv1d`.
        shape: The output's.
        filter_layout: Of the filter, or "packed" or "phased" for what `Packing` made of it.
        least: Outputs below which "winograd" gives way to another kernel; 0 takes it always.
        whole: Whether the filters of a group are a multiple of 32: less has to be compiled.
        transposed: Whether it is `conv_transpose1d`.
        full: Whether the filters of a phase are a multiple of 16: less has to be compiled.
    """
    parameters: dict[str, str | int | bool] = {"kernel": kernel, "least": least, "whole": whole}
    parameters |= {"layout": layout, "filter_layout": filter_layout}
    (y,) = custom_op(
        "max_conv.conv_transpose1d" if transposed else "max_conv.conv1d",
        x.device,
        [x, filter, bias, *scalars],
        [TensorType(x.dtype, shape, x.device)],
        parameters | {"full": full} if transposed else parameters,
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


def in_graph(value: TensorValue) -> TensorValue:
    """Returns a weight as a value of the current graph, and any other value as it is."""
    if isinstance(value, Weight) and value.shard_idx is None:
        # A weight remembers the first graph it was used in; asking the graph lets a layer be traced again.
        known = Graph.current._weights.get(value.name)
        if known is not None and known.weight is not value:
            raise another(value)
        return Graph.current.add_weight(value, force_initial_weight_on_host=not value._has_alias)
    return value
