"""The layers `Conv1D` and `ConvTranspose1D`: they hold the weights; `conv1d` and `conv_transpose1d` do the rest."""

from collections.abc import Mapping, Sequence
from typing import Any

from max.dtype import DType
from max.graph import DeviceRef, TensorType, TensorValue, Weight

from .arrays import buffer_of
from .checks import check_dtype
from .geometry import Geometry, Padding, TransposedGeometry, positive
from .graph import packed_graph
from .layouts import FilterLayout, Layout, TransposedFilterLayout
from .max_nn import nn
from .ops import conv1d, conv_transpose1d


class ConvolutionLayer(nn.Module):
    """The base class of both layers: their channels, weights, names and input types."""

    op: str
    filter_attribute: str
    filter_layout: Any
    geometry: Geometry | TransposedGeometry
    bias: Weight | None = None
    exact: bool = False

    def __init__(
        self,
        geometry: Geometry | TransposedGeometry,
        in_channels: int,
        out_channels: int,
        dtype: DType,
        groups: int,
        device: DeviceRef | None,
        permute: bool,
        name: str | None,
    ) -> None:
        super().__init__()
        self.geometry = geometry
        self.kernel_size = geometry.kernel_size
        self.stride = geometry.stride
        self.padding = (geometry.left, geometry.right)
        self.dilation = geometry.dilation
        self.in_channels = positive("in_channels", in_channels, self.op)
        self.out_channels = positive("out_channels", out_channels, self.op)
        self.num_groups = positive("num_groups", groups, self.op)
        check_dtype("dtype", dtype, self.op)
        if in_channels % groups or out_channels % groups:
            raise ValueError(
                f"{self.op}: {groups} groups must divide in_channels={in_channels} and out_channels={out_channels}."
            )
        self.dtype = dtype
        self.device = device
        self.permute = permute
        self._prefix = f"{name}." if name else ""

    def _declare(self, name: str, shape: Sequence[int]) -> Weight:
        """Returns a new weight of the layer's dtype and device."""
        return Weight(f"{self._prefix}{name}", self.dtype, shape, self.device or DeviceRef.CPU())

    def _filter(self) -> TensorValue:
        """Returns the filter that the layer convolves with."""
        return self._named(getattr(self, self.filter_attribute))

    def _bias(self) -> TensorValue | None:
        return None if self.bias is None else self._named(self.bias)

    def _named(self, weight: Weight) -> Weight:
        """Returns a weight under the name that it has in the current graph: layers without a name would share one."""
        graph = packed_graph()
        return weight if graph is None else graph.named(weight, self, not self._prefix and "." not in weight.name)

    @property
    def layout(self) -> Layout:
        """The data's axis order."""
        return "NCL" if self.permute else "NLC"

    def input_types(self) -> tuple[TensorType]:
        """Returns the type of the input, with symbolic batch and length."""
        sizes: dict[str, int | str] = {"N": "batch", "L": "length", "C": self.in_channels}
        return (TensorType(self.dtype, [sizes[axis] for axis in self.layout], self.device or DeviceRef.CPU()),)

    def load_state_dict(self, state_dict: Mapping[str, Any], **options: Any) -> None:
        """Sets the weights from arrays by name: NumPy arrays, or anything with DLPack."""
        buffers = {name: buffer_of(value, f"{self.op}: weight", name) for name, value in state_dict.items()}
        super().load_state_dict(buffers, **options)


class Conv1D(ConvolutionLayer):
    """Convolves a sequence; a drop-in for `max.nn.Conv1D`.

    `L_out = (L + left + right - dilation * (kernel_size - 1) - 1) // stride + 1`

    Args:
        kernel_size: Taps of the filter.
        in_channels: Channels of the input, C.
        out_channels: Channels of the output, F.
        dtype: Of the weights and of the input: float32, float64, float16 or bfloat16.
        stride: Input positions from one output to the next.
        padding: Positions on both sides, (left, right), "same", "valid" or "causal".
        dilation: Input positions from one tap to the next.
        num_groups: Groups of channels that are convolved separately.
        device: Where the layer runs; None is the CPU.
        has_bias: Whether a bias is added.
        permute: Whether to use PyTorch's axis orders: data (N, C, L), filter (F, C / num_groups, K).
        name: The weights are named `{name}.weight` and `{name}.bias`, without a name `weight` and `bias`.
        padding_mode: "zeros", "reflect", "replicate" or "circular".
        exact: As in `conv1d`.

    Attributes:
        filter: The weight, (K, C / num_groups, F), or (F, C / num_groups, K) with `permute`.
        bias: The weight, (F,), or None.

    Raises:
        TypeError, ValueError: One sentence that names the argument.

    >>> from max.dtype import DType
    >>> layer = Conv1D(3, 80, 384, DType.float32, padding=1, has_bias=True)
    >>> {name: [int(n) for n in weight.shape] for name, weight in layer.raw_state_dict().items()}
    {'weight': [3, 80, 384], 'bias': [384]}

    Source: `max.nn.Conv1D`, whose arguments these are.
    """

    op, filter_attribute = "conv1d", "filter"
    filter: Weight

    def __init__(
        self,
        kernel_size: int,
        in_channels: int,
        out_channels: int,
        dtype: DType,
        stride: int = 1,
        padding: Padding = 0,
        dilation: int = 1,
        num_groups: int = 1,
        device: DeviceRef | None = None,
        has_bias: bool = False,
        permute: bool = False,
        name: str | None = None,
        *,
        padding_mode: str = "zeros",
        exact: bool = False,
    ) -> None:
        geometry = Geometry.of(kernel_size, stride, padding, dilation, padding_mode)
        super().__init__(geometry, in_channels, out_channels, dtype, num_groups, device, permute, name)
        self.exact = exact
        self.padding_mode = padding_mode
        sizes = {"S": geometry.kernel_size, "C": self.in_channels // self.num_groups, "F": self.out_channels}
        self.filter = self._declare("weight", [sizes[axis] for axis in self.filter_layout])
        if has_bias:
            self.bias = self._declare("bias", [self.out_channels])

    @property
    def filter_layout(self) -> FilterLayout:
        """The filter's axis order."""
        return "FCS" if self.permute else "SCF"

    def __call__(self, x: TensorValue) -> TensorValue:
        """Emits the convolution of `x` into the current graph.

        Args:
            x: (N, L, C), or (N, C, L) with `permute`; the batch axis may be missing.

        Returns:
            (N, L_out, F), or (N, F, L_out) with `permute`.
        """
        return conv1d(
            x,
            self._filter(),
            self._bias(),
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            groups=self.num_groups,
            padding_mode=self.padding_mode,
            layout=self.layout,
            filter_layout=self.filter_layout,
            exact=self.exact,
        )


class ConvTranspose1D(ConvolutionLayer):
    """Convolves a sequence transposed, as upsampling layers do; `max.nn.ConvTranspose1d` with groups and dilation.

    `L_out = (L - 1) * stride - left - right + dilation * (kernel_size - 1) + output_padding + 1`

    Args:
        kernel_size: Taps of the filter.
        in_channels: Channels of the input, C.
        out_channels: Channels of the output, F.
        dtype: Of the weights and of the input: float32, float64, float16 or bfloat16.
        stride: Outputs from one input position to the next.
        padding: Outputs removed on both sides, (left, right), or "causal", which removes outputs beyond `L * stride`.
        dilation: Outputs from one tap to the next.
        output_padding: Outputs added on the right, fewer than stride or dilation.
        device: Where the layer runs; None is the CPU.
        has_bias: Whether a bias is added.
        permute: Whether to use PyTorch's axis orders: data (N, C, L), filter (C, F / num_groups, K).
        name: The weights are named `{name}.weight` and `{name}.bias`, without a name `weight` and `bias`.
        num_groups: Groups of channels that are convolved separately.
        exact: As in `conv1d`.

    Attributes:
        weight: The filter, (K, F / num_groups, C), or (C, F / num_groups, K) with `permute`.
        bias: The weight, (F,), or None.

    Raises:
        TypeError, ValueError: One sentence that names the argument.

    >>> from max.dtype import DType
    >>> layer = ConvTranspose1D(16, 512, 256, DType.float32, stride=8, padding=4, has_bias=True)
    >>> {name: [int(n) for n in weight.shape] for name, weight in layer.raw_state_dict().items()}
    {'weight': [16, 256, 512], 'bias': [256]}

    Source: `max.nn.ConvTranspose1d` and
    https://docs.pytorch.org/docs/stable/generated/torch.nn.ConvTranspose1d.html
    """

    op, filter_attribute = "conv_transpose1d", "weight"
    geometry: TransposedGeometry
    weight: Weight

    def __init__(
        self,
        kernel_size: int,
        in_channels: int,
        out_channels: int,
        dtype: DType,
        stride: int = 1,
        padding: Any = 0,
        dilation: int = 1,
        output_padding: int = 0,
        device: DeviceRef | None = None,
        has_bias: bool = False,
        permute: bool = False,
        name: str | None = None,
        *,
        num_groups: int = 1,
        exact: bool = False,
    ) -> None:
        geometry = TransposedGeometry.of(kernel_size, stride, padding, output_padding, dilation)
        super().__init__(geometry, in_channels, out_channels, dtype, num_groups, device, permute, name)
        self.exact = exact
        self.output_padding = geometry.output_padding
        self.weight = self._declare("weight", self.filter_shape)
        if has_bias:
            self.bias = self._declare("bias", [self.out_channels])

    @property
    def filter_layout(self) -> TransposedFilterLayout:
        """The filter's axis order."""
        return "CFS" if self.permute else "SFC"

    @property
    def filter_shape(self) -> list[int]:
        """The filter's shape: all channels, one group's filters; in MLX's order, all filters, one group's channels."""
        channels, filters = self.in_channels, self.out_channels // self.num_groups
        if self.filter_layout == "FSC":
            channels, filters = self.in_channels // self.num_groups, self.out_channels
        sizes = {"S": self.kernel_size, "C": channels, "F": filters}
        return [sizes[axis] for axis in self.filter_layout]

    def __call__(self, x: TensorValue, output_size: int | None = None) -> TensorValue:
        """Emits the transposed convolution of `x` into the current graph.

        Args:
            x: (N, L, C), or (N, C, L) with `permute`; the batch axis may be missing.
            output_size: L_out, from which `output_padding` is then computed.

        Returns:
            (N, L_out, F), or (N, F, L_out) with `permute`.
        """
        return self._emit(x, output_padding=self.output_padding, output_size=output_size)

    def _emit(self, x: TensorValue, **lengths: int | None) -> TensorValue:
        return conv_transpose1d(
            x,
            self._filter(),
            self._bias(),
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            groups=self.num_groups,
            layout=self.layout,
            filter_layout=self.filter_layout,
            exact=self.exact,
            **lengths,  # type: ignore[arg-type]
        )


class ConvTranspose1d(ConvTranspose1D):
    """`ConvTranspose1D` with the argument list of `max.nn.ConvTranspose1d`: only the import has to change.

    Args:
        length: Taps of the filter.
        stride, dilation, output_padding: Ints, or MAX's pairs for two dimensions: the second value is used.
        padding: As in `ConvTranspose1D`, or MAX's four numbers: the last two are left and right.

    >>> from max.dtype import DType
    >>> ConvTranspose1d(length=4, in_channels=8, out_channels=6, dtype=DType.float32, stride=(1, 2)).stride
    2
    """

    def __init__(
        self,
        length: int,
        in_channels: int,
        out_channels: int,
        dtype: DType,
        stride: int | tuple[int, int] = 1,
        padding: Any = 0,
        dilation: int | tuple[int, int] = 1,
        output_padding: int | tuple[int, int] = 0,
        device: DeviceRef | None = None,
        has_bias: bool = False,
        permute: bool = False,
        name: str | None = None,
        *,
        num_groups: int = 1,
        exact: bool = False,
    ) -> None:
        sides = tuple(padding) if isinstance(padding, tuple | list) else padding
        super().__init__(
            length,
            in_channels,
            out_channels,
            dtype,
            _last("stride", stride, 1),
            sides[2:] if isinstance(sides, tuple) and len(sides) == 4 and sides[:2] == (0, 0) else padding,
            _last("dilation", dilation, 1),
            _last("output_padding", output_padding, 0),
            device,
            has_bias,
            permute,
            name,
            num_groups=num_groups,
            exact=exact,
        )


def _last(name: str, value: Any, first: int) -> Any:
    """Returns the second value of MAX's pair; the first one belongs to a dimension that 1-D data lacks."""
    if not isinstance(value, tuple | list):
        return value
    if len(value) != 2 or value[0] != first:
        raise ValueError(f"conv_transpose1d: {name} must be an int or ({first}, int), but is {value!r}.")
    return value[1]
