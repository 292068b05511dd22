"""`conv1d` and `conv_transpose1d`: check the arguments, compute the geometry, emit the operation into the graph."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from max.dtype import DType
from max.graph import DeviceRef, Dim, StaticDim, TensorType, TensorValue, ops

from .accelerators import accelerated
from .checks import Operands, check_lengths
from .dispatch import Form, Layer, choose
from .geometry import Geometry, Padding, TransposedGeometry, positive
from .graph import Emitted, custom_op, in_graph, packed_graph, record, weight_name
from .layouts import FilterLayout, Layout, TransposedFilterLayout
from .lines import WHOLE
from .packing import filter_operand, held
from .ragged import inside, ragged_input
from .whole import signals


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
    lengths: TensorValue | None = None,
    exact: bool = False,
) -> TensorValue:
    """Convolves an NLC sequence with an SCF filter.

    `L_out = (L + left + right - dilation * (K - 1) - 1) // stride + 1`

    Args:
        x: (N, L, C), or (N, C, L) with layout "NCL"; the batch axis may be missing. Any dimension may be symbolic.
        filter: (K, C / groups, F), or another order named by `filter_layout`: "FCS" is PyTorch's, "FSC" is MLX's.
        bias: (F,) or None.
        stride: Input positions from one output to the next.
        padding: Positions added on both sides, (left, right), "same" (keeps the length, stride 1 only), "causal"
            (all on the left, so that no output depends on future inputs) or "valid" (none).
        dilation: Input positions from one tap to the next.
        groups: Output channel f depends only on the channels of its group, f // (F / groups).
        padding_mode: The values in the padding: "zeros", "reflect", "replicate" or "circular".
        lengths: (N,) int64, if signals differ in length: each signal is computed as if it were alone, to the bit, and
            zeros follow its own outputs.
        exact: Whether only direct kernels are allowed: then no bit of an output depends on inputs outside its filter's
            reach. Winograd's kernel, which is up to twice as fast, guarantees this for inputs that are not finite or
            exceed 1e16. A smaller input changes neighbouring outputs, which do not depend on it, by about 1e-6 of
            itself.

    Returns:
        (N, L_out, F), or (N, F, L_out) with layout "NCL", in the dtype of `x`. Sixteen-bit types are summed in float32.

    Raises:
        TypeError, ValueError: Before anything is emitted, in one sentence. Errors that depend on the run-time length
            (an input shorter than the filter) are raised by the kernel when the graph runs.

    >>> from max.dtype import DType
    >>> from max.graph import BufferValue, DeviceRef, Graph, TensorType
    >>> x = TensorType(DType.float32, ["batch", "length", 80], DeviceRef.CPU())
    >>> w = TensorType(DType.float32, [3, 80, 384], DeviceRef.CPU())
    >>> with Graph("stem", input_types=[x, w]) as graph:
    ...     y = conv1d(graph.inputs[0].tensor, graph.inputs[1].tensor, stride=2, padding=1)
    >>> y.shape[2]
    Dim(384)

    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.Conv1d.html
    """
    given = Operands.of("conv1d", x, filter, bias, groups, layout, filter_layout)
    geometry = Geometry.of(given.taps, stride, padding, dilation, padding_mode)
    given.check_sizes()
    length = given.length
    if isinstance(length, StaticDim):
        geometry.check_length(int(length))
    return _convolve(given, geometry, Dim(geometry.output_length(length)), lengths, exact)


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
    lengths: TensorValue | None = None,
    exact: bool = False,
) -> TensorValue:
    """Convolves an NLC sequence transposed, with an SFC filter.

    `L_out = (L - 1) * stride - left - right + dilation * (K - 1) + output_padding + 1`

    Args:
        x: (N, L, C), or (N, C, L) with layout "NCL"; the batch axis may be missing. Any dimension may be symbolic.
        filter: (K, F / groups, C), or another order named by `filter_layout`: "CFS" is PyTorch's; "FSC" is MLX's, which
            has all filters and the channels of one group: (F, K, C / groups).
        bias: (F,) or None.
        stride: Outputs from one input position to the next.
        padding: Outputs removed on both sides, (left, right), or "causal", which removes outputs beyond `L * stride`.
        output_padding: Outputs added on the right, fewer than stride or dilation.
        dilation: Outputs from one tap to the next.
        groups: Output channel f depends only on the channels of its group, f // (F / groups).
        output_size: L_out, from which `output_padding` is computed.
        lengths: As in `conv1d`.
        exact: As in `conv1d`.

    Returns:
        (N, L_out, F), or (N, F, L_out) with layout "NCL", in the dtype of `x`. Sixteen-bit types are summed in float32.

    Raises:
        TypeError, ValueError: Before anything is emitted, in one sentence. Errors that depend on the run-time length
            (padding that leaves no output) are raised by the kernel when the graph runs.

    >>> from max.dtype import DType
    >>> from max.graph import BufferValue, DeviceRef, Graph, TensorType
    >>> x = TensorType(DType.float32, ["batch", 100, 512], DeviceRef.CPU())
    >>> w = TensorType(DType.float32, [16, 256, 512], DeviceRef.CPU())
    >>> with Graph("upsample", input_types=[x, w]) as graph:
    ...     y = conv_transpose1d(graph.inputs[0].tensor, graph.inputs[1].tensor, stride=8, padding=4)
    >>> y.shape[1:]
    [Dim(800), Dim(256)]

    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.ConvTranspose1d.html
    """
    given = Operands.of("conv_transpose1d", x, filter, bias, groups, layout, filter_layout)
    geometry = TransposedGeometry.of(given.taps, stride, padding, output_padding, dilation)  # type: ignore[arg-type]
    given.check_sizes()
    length = given.length
    if output_size is not None:
        output_size = positive("output_size", output_size, "conv_transpose1d")
    if isinstance(length, StaticDim):
        if output_size is not None:
            geometry = geometry.with_output(int(length), output_size)
        geometry.check_length(int(length))
    outputs = Dim(geometry.output_length(length) if output_size is None else output_size)
    return _convolve(given, geometry, outputs, lengths, exact)


def _convolve(
    given: Operands, geometry: Geometry | TransposedGeometry, outputs: Dim, lengths: TensorValue | None, exact: bool
) -> TensorValue:
    """Chooses the kernel of a layer that has been checked, and emits it."""
    sizes = (given.group_channels, given.group_filters, given.groups, given.x.dtype.name)
    layer = Layer.of(geometry, given.layout, *sizes)
    graph = packed_graph()
    if given.x.device.is_cpu():
        choice = choose(
            layer,
            *(int(size) if isinstance(size, StaticDim) else None for size in (given.batch, outputs)),
            packed=held(given.filter),
            exact=exact or (graph is not None and graph.exact),
            timed=held(given.filter),
        )
    else:
        choice = accelerated(layer, held(given.filter))
    x = in_graph(given.x)
    x = x if given.batched else ops.unsqueeze(x, 0)
    if lengths is None:
        x, read, outputs = signals().layer_input(x, geometry, given.layout, outputs)
    else:
        check_lengths(given, lengths)
        x, read = ragged_input(x, lengths, geometry, given.layout)
    filter, order = filter_operand(given.filter, given.filter_layout, layer, choice.kernel)
    bias = ops.constant([], x.dtype, device=x.device) if given.bias is None else in_graph(given.bias)
    length = int(outputs) if isinstance(outputs, StaticDim) else None
    form = Form.of(layer, choice.kernel, order)
    record(Emitted(weight_name(given.filter), layer, choice.kernel, length, form=form, sizes=(given.batch, outputs)))
    numbers = ops.constant(
        np.array(Layer.of(read, given.layout, *sizes).numbers, np.int64), DType.int64, device=DeviceRef.CPU()
    )
    axes = {"N": given.batch, "L": outputs, "C": Dim(given.filters)}
    y = emit(x, filter, bias, numbers, [axes[axis] for axis in layer.layout], form)
    if lengths is None:
        signals().layer_output(y)
    else:
        y = inside(y, lengths, given.layout.index("L"), WHOLE.through(geometry))
    return y if given.batched else ops.squeeze(y, 0)


def emit(
    x: TensorValue,
    filter: TensorValue,
    bias: TensorValue,
    geometry: TensorValue,
    shape: Sequence[Any],
    form: Form,
) -> TensorValue:
    """Emits the operation; its arguments are not checked.

    Args:
        bias: (F,), or (0,) for no bias.
        geometry: `Layer.numbers`, int64, on the CPU.
        shape: The output's shape.
        form: The properties that are compiled into the operation.
    """
    parameters: dict[str, str | int | bool] = {"kernel": form.kernel, "least": form.least, "whole": form.whole}
    parameters |= {"layout": form.layout, "filter_layout": form.filter_layout}
    (y,) = custom_op(
        "max_conv.conv_transpose1d" if form.transposed else "max_conv.conv1d",
        x.device,
        [x, filter, bias, geometry],
        [TensorType(x.dtype, shape, x.device)],
        parameters | {"full": form.full} if form.transposed else parameters,
    )
    return y
