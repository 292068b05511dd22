"""`Conv1D` and `ConvTranspose1D` as modules of `max.experimental.nn`, which has only `Conv2d`; packed filters.

`Module.compile` of MAX builds a graph in which the kernels rearrange every filter on every call. Here `compile` and
`trace` build a `PackedGraph` from any `max.experimental.nn.Module` instead, so filters are rearranged once.

`ShiftedConv1d` and `SubPixelConvTranspose1d` have the arguments, weights and results of the layers of that name in
`max.pipelines.architectures.minimax_music3`: only the import has to change.
"""

from collections.abc import Callable, Mapping
from typing import Any, Literal

import numpy as np
from max import tree
from max.driver import Buffer, Device
from max.dtype import DType
from max.experimental.functional.spmd_ops import functional
from max.experimental.nn import Module
from max.experimental.realization_context import GraphRealizationContext, in_graph_context
from max.experimental.tensor import Tensor, defaults, realization_context
from max.graph import DeviceRef, Graph, TensorType, TensorValue, Weight, ops

from ..conv.arrays import as_buffer, as_float64
from ..conv.geometry import Padding
from ..conv.graph import PackedGraph, argument_names, derived
from ..conv.nn import Conv1D as PlainConv1D
from ..conv.nn import ConvolutionLayer
from ..conv.nn import ConvTranspose1D as PlainConvTranspose1D
from ..conv.ops import conv1d, conv_transpose1d
from ..runtime import Model
from ..runtime import compile as compile_graph


def _on_tensors(op: Callable[..., TensorValue]) -> Callable[..., Tensor]:
    """Wraps an operation on graph values for tensors. A `Weight` stays one, which MAX's own conversion would not do."""

    def on_tensors(*operands: Any, **options: Any) -> TensorValue:
        return op(*(None if operand is None else operand.__tensorvalue__() for operand in operands), **options)

    wrapped: Callable[..., Tensor] = functional(on_tensors)
    return wrapped


def _zeros(shape: list[int], dtype: DType | None = None, device: Device | None = None) -> Tensor:
    """Returns initial values. Outside a graph, NumPy makes them: MAX would compile a graph, for seconds to minutes."""
    if in_graph_context():  # this is true under `lazy`, too
        return Tensor.zeros(shape, dtype=dtype, device=device)
    kind, mesh = defaults(dtype, device)
    return Tensor(storage=as_buffer(np.zeros(shape), kind)).to(mesh)


class _Convolution(Module[..., Tensor]):
    """The common part of both layers: the arguments, the weights and their initial values."""

    weight: Tensor
    bias: Tensor | Literal[0]
    operation: Callable[..., Tensor]
    casts: bool = False
    """Whether weights are cast to the dtype of the input."""

    def _start(
        self, layer: ConvolutionLayer, dtype: DType | None, device: Any, has_bias: bool, name: str | None
    ) -> None:
        """Copies the checked arguments from the layer of `max_conv.conv.nn` that computes the same."""
        if device is not None:
            self.device = device
        self.in_channels, self.out_channels = layer.in_channels, layer.out_channels
        self.kernel_size, self.stride, self.padding = layer.kernel_size, layer.stride, layer.padding
        self.dilation, self.num_groups, self.permute = layer.dilation, layer.num_groups, layer.permute
        self.dtype, self.has_bias, self.name, self.exact = dtype, has_bias, name, layer.exact
        self._orders = {"layout": layer.layout, "filter_layout": layer.filter_layout}
        place = None if device is None else self.device
        self.weight = _zeros([int(size) for size in getattr(layer, layer.filter_attribute).shape], dtype, place)
        self.bias = _zeros([self.out_channels], dtype, place) if has_bias else 0

    def _filter(self) -> Tensor:
        return self.weight

    def _beside(self, x: Tensor, value: Tensor) -> Tensor:
        """Returns a weight on the device of `x`. A weight that is there already stays as it is: a copy cannot be packed."""
        value = value if value.device == x.device else value.to(x.device)
        return value.cast(x.dtype) if self.casts and value.dtype != x.dtype else value

    def _convolve(self, x: Tensor, **options: Any) -> Tensor:
        bias = self._beside(x, self.bias) if isinstance(self.bias, Tensor) else None
        return type(self).operation(
            x,
            self._beside(x, self._filter()),
            bias,
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            groups=self.num_groups,
            exact=self.exact,
            **self._orders,
            **options,
        )


class Conv1D(_Convolution):
    """Convolves a sequence, with the arguments of `max.experimental.nn.Conv2d`.

    `L_out = (L + left + right - dilation * (kernel_size - 1) - 1) // stride + 1`

    Args:
        kernel_size: Taps of the filter.
        in_channels: Channels of the input, C.
        out_channels: Channels of the output, F.
        dtype: Of the weights and of the input: float32, float64, float16 or bfloat16; None is MAX's default.
        stride: Input positions from one output to the next.
        padding: Positions on both sides, (left, right), "same", "valid" or "causal".
        dilation: Input positions from one tap to the next.
        num_groups: Groups of channels that are convolved separately.
        device: Where the weights are; None is MAX's default. They follow the input.
        has_bias: Whether a bias is added.
        permute: Whether to use PyTorch's axis orders: data (N, C, L), filter (F, C / num_groups, K).
        name: Is stored and not used: MAX names weights by their path in a model.
        padding_mode: "zeros", "reflect", "replicate" or "circular".
        exact: As in `max_conv.conv1d`.

    Attributes:
        weight: The filter, (K, C / num_groups, F), or (F, C / num_groups, K) with `permute`.
        bias: (F,), or 0. Both start with zeros.

    Raises:
        TypeError, ValueError: One sentence that names the argument.

    >>> layer = Conv1D(3, 80, 384, padding=1, has_bias=True)
    >>> {name: [int(n) for n in value.shape] for name, value in layer.parameters}
    {'weight': [3, 80, 384], 'bias': [384]}

    Source: `max.experimental.nn.Conv2d`.
    """

    operation = staticmethod(_on_tensors(conv1d))

    def __init__(
        self,
        kernel_size: int,
        in_channels: int,
        out_channels: int,
        dtype: DType | None = None,
        stride: int = 1,
        padding: Padding = 0,
        dilation: int = 1,
        num_groups: int = 1,
        device: Device | DeviceRef | None = None,
        has_bias: bool = False,
        permute: bool = False,
        name: str | None = None,
        *,
        padding_mode: str = "zeros",
        exact: bool = False,
    ) -> None:
        layer = PlainConv1D(
            kernel_size,
            in_channels,
            out_channels,
            defaults(dtype)[0],
            stride,
            padding,
            dilation,
            num_groups,
            permute=permute,
            padding_mode=padding_mode,
            exact=exact,
        )
        self.padding_mode = padding_mode
        self._start(layer, dtype, device, has_bias, name)

    def forward(self, x: Tensor) -> Tensor:
        """Convolves `x`, (N, L, C), or (N, C, L) with `permute`; the batch axis may be missing."""
        return self._convolve(x, padding_mode=self.padding_mode)


class ConvTranspose1D(_Convolution):
    """Convolves a sequence transposed, as upsampling layers do.

    `L_out = (L - 1) * stride - left - right + dilation * (kernel_size - 1) + output_padding + 1`

    Args:
        kernel_size, in_channels, out_channels, dtype, num_groups, device, has_bias, name, exact: As in `Conv1D`.
        stride: Outputs from one input position to the next.
        padding: Outputs removed on both sides, (left, right), or "causal", which removes outputs beyond `L * stride`.
        dilation: Outputs from one tap to the next.
        output_padding: Outputs added on the right, fewer than stride or dilation.
        permute: Whether to use PyTorch's axis orders: data (N, C, L), filter (C, F / num_groups, K).

    Attributes:
        weight: The filter, (K, F / num_groups, C), or (C, F / num_groups, K) with `permute`.
        bias: (F,), or 0. Both start with zeros.

    >>> layer = ConvTranspose1D(16, 512, 256, stride=8, padding=4)
    >>> {name: [int(n) for n in value.shape] for name, value in layer.parameters}
    {'weight': [16, 256, 512]}

    Source: `max_conv.ConvTranspose1D`.
    """

    operation = staticmethod(_on_tensors(conv_transpose1d))

    def __init__(
        self,
        kernel_size: int,
        in_channels: int,
        out_channels: int,
        dtype: DType | None = None,
        stride: int = 1,
        padding: Any = 0,
        dilation: int = 1,
        output_padding: int = 0,
        device: Device | DeviceRef | None = None,
        has_bias: bool = False,
        permute: bool = False,
        name: str | None = None,
        *,
        num_groups: int = 1,
        exact: bool = False,
    ) -> None:
        layer = PlainConvTranspose1D(
            kernel_size,
            in_channels,
            out_channels,
            defaults(dtype)[0],
            stride,
            padding,
            dilation,
            output_padding,
            permute=permute,
            num_groups=num_groups,
            exact=exact,
        )
        self.output_padding = layer.output_padding
        self._start(layer, dtype, device, has_bias, name)

    def forward(self, x: Tensor, output_size: int | None = None) -> Tensor:
        """Convolves `x`, (N, L, C) or (N, C, L), transposed; `output_size` decides `output_padding`."""
        return self._convolve(x, output_padding=self.output_padding, output_size=output_size)


class ShiftedConv1d(Conv1D):
    """A `Conv1D` that keeps the length, for the layer of that name in MiniMax Music 3, which is a sum of matmuls.

    Args:
        kernel_size: Taps of the filter; an odd number.
        in_channels, out_channels: Channels of the input, C, and of the output, F.
        dilation: Input positions from one tap to the next.

    Attributes:
        weight: (K, C, F).
        bias: (F,). Weights are cast to the dtype of the input.

    Raises:
        ValueError: If `kernel_size` is even.

    >>> layer = ShiftedConv1d(7, 32, 32, dilation=9)
    >>> layer.padding
    (27, 27)

    Source: `max.pipelines.architectures.minimax_music3.layers.conv`.
    """

    casts = True

    def __init__(self, kernel_size: int, in_channels: int, out_channels: int, dilation: int = 1) -> None:
        if kernel_size % 2 == 0:
            raise ValueError(f"conv1d: kernel_size must be odd to keep the length, but is {kernel_size}; use Conv1D.")
        super().__init__(kernel_size, in_channels, out_channels, padding="same", dilation=dilation, has_bias=True)


class SubPixelConvTranspose1d(ConvTranspose1D):
    """A `ConvTranspose1D` of `2 * stride` taps that makes a signal `stride` times longer, for MiniMax Music 3.

    The weights are MAX's two halves of the filter, so a checkpoint of that layer loads, also as part of a model. A
    graph puts them together; in a `PackedGraph` that is done once.

    Args:
        in_channels, out_channels: Channels of the input, C, and of the output, F.
        stride: Outputs from one input position to the next; an even number.

    Attributes:
        weight_lo, weight_hi: Taps 0 to `stride` and `stride` to `2 * stride`, (C, stride * F) each.
        bias: (F,). Weights are cast to the dtype of the input.

    Raises:
        ValueError: If `stride` is odd.

    >>> layer = SubPixelConvTranspose1d(32, 16, stride=4)
    >>> sorted((name, [int(n) for n in value.shape]) for name, value in layer.parameters)
    [('bias', [16]), ('weight_hi', [32, 64]), ('weight_lo', [32, 64])]

    Source: `max.pipelines.architectures.minimax_music3.layers.conv`.
    """

    weight_lo: Tensor
    weight_hi: Tensor
    casts = True

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        if stride % 2:
            raise ValueError(f"conv_transpose1d: stride must be even, but is {stride}; use ConvTranspose1D.")
        super().__init__(2 * stride, in_channels, out_channels, stride=stride, padding=stride // 2, has_bias=True)
        del self.weight
        self.weight_lo, self.weight_hi = (_zeros([in_channels, stride * out_channels]) for _ in range(2))

    def _filter(self) -> Tensor:
        return _whole_filter(self.weight_lo, self.weight_hi, stride=self.stride)


def _join(low: TensorValue, high: TensorValue, *, stride: int) -> TensorValue:
    """Returns the filter (2 * stride, F, C) of two halves (C, stride * F); on the CPU, `compile` makes it once."""
    channels, columns = (int(size) for size in low.shape)
    halves = [channels, stride, columns // stride]
    if isinstance(low, Weight) and isinstance(high, Weight) and low.device.is_cpu():
        name = f"{low.name}.joined"

        def make(*parts: Buffer) -> Buffer:
            filter = np.concatenate([as_float64(part, name=name).reshape(halves) for part in parts], 1)
            return as_buffer(filter.transpose(1, 2, 0), low.dtype)

        joined = Weight(name, low.dtype, [2 * stride, columns // stride, channels], low.device)
        if made := derived(joined, (low, high), make):
            return made
    parts = [ops.reshape(part, halves) for part in (low, high)]
    return ops.permute(ops.concat(parts, 1), [1, 2, 0])


_whole_filter = _on_tensors(_join)


def trace(module: Module[..., Any], *input_types: TensorType) -> PackedGraph:
    """Builds a graph from a module of `max.experimental.nn`; filters of this package's layers in it are packed once.

    In the graph each parameter is a weight, named by its path in the module, as `Module.compile` names it. Its value is
    not read.

    Args:
        module: Any module whose parameters are on one device each. It is left as it was.
        input_types: The types of the tensors that its `forward` accepts, in order.

    Returns:
        The graph. Its outputs are the tensors that `forward` returns. A plain MAX session loads it with
        `session.load(graph, weights_registry=max_conv.registry(graph, weights))`.

    Raises:
        ValueError: If a parameter is spread over several devices.

    >>> x = TensorType(DType.float32, ["batch", "length", 80], DeviceRef.CPU())
    >>> graph = trace(Conv1D(3, 80, 384, padding=1), x)
    >>> [entry.sources[0].name for entry in graph.derived.values()]
    ['weight']

    Source: `max.experimental.nn.Module.trace`.
    """
    found = tree.paths(module, leaf=Tensor, shared=True)
    if spread := [name for name, tensor in found.items() if tensor.is_distributed]:
        raise ValueError(f"trace: the parameter {spread[0]!r} is spread over several devices; move the module to one.")

    def forward(*values: TensorValue) -> list[TensorValue]:
        with realization_context(GraphRealizationContext(Graph.current)):
            weights = iter([Tensor.from_graph_value(_weight(*entry)) for entry in found.items()])
            traced = tree.map(lambda _: next(weights), module, leaf=Tensor, shared=True)
            results = traced(*(Tensor.from_graph_value(value) for value in values))
            return [tensor.__tensorvalue__() for tensor in tree.leaves(results, leaf=Tensor)]

    return PackedGraph(type(module).__name__, forward, input_types=input_types)


def _weight(name: str, tensor: Tensor) -> Weight:
    return Weight(name, tensor.dtype, [int(size) for size in tensor.shape], DeviceRef.from_device(tensor.device))


def compile(module: Module[..., Any], *input_types: TensorType, weights: Mapping[str, Any] | None = None) -> Model:
    """Compiles a module of `max.experimental.nn` as `max_conv.compile` does: with packed filters, kept in the cache.

    Args:
        module, input_types: As in `trace`.
        weights: Arrays by the names that `module.parameters` has; None uses the module's own values.

    Returns:
        A `Model`: arrays in, arrays out. A `Tensor` is accepted, too, for which it returns a `max.driver.Buffer`.

    Raises:
        TypeError, ValueError: As in `trace` and `max_conv.compile`.

    >>> layer = Conv1D(3, 1, 1, padding=1)
    >>> x = TensorType(DType.float32, ["batch", "length", 1], DeviceRef.CPU())
    >>> model = compile(layer, x, weights={"weight": np.ones((3, 1, 1), np.float32)})
    >>> model(np.ones((1, 4, 1), np.float32)).ravel().tolist()
    [2.0, 3.0, 3.0, 2.0]

    Source: `max.experimental.nn.Module.compile`.
    """
    values = dict(module.parameters) if weights is None else weights
    arrays = {name: Buffer.from_dlpack(v) if isinstance(v, Tensor) else v for name, v in values.items()}
    names = argument_names(module.forward, len(input_types))
    return compile_graph(trace(module, *input_types), names, weights=arrays)
