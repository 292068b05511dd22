"""`Conv1D`, the layer: it holds weights, `conv1d` does the rest."""

from max import nn
from max.dtype import DType
from max.graph import DeviceRef, TensorType, TensorValue, Weight

from .geometry import Geometry, Padding, positive
from .layouts import FilterLayout, Layout
from .checks import check_dtype
from .ops import conv1d


class Conv1D(nn.Module):
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
        permute: Takes PyTorch's orders: data (N, C, L), filter (F, C / num_groups, K).
        name: The weights are named `{name}.weight` and `{name}.bias`, without a name `weight` and `bias`.
        padding_mode: "zeros", "reflect", "replicate" or "circular".

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

    filter: Weight
    bias: Weight | None = None

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
    ) -> None:
        super().__init__()
        geometry = Geometry.of(kernel_size, stride, padding, dilation, padding_mode)
        in_channels = positive("in_channels", in_channels)
        out_channels = positive("out_channels", out_channels)
        groups = positive("num_groups", num_groups)
        check_dtype("dtype", dtype)
        if in_channels % groups or out_channels % groups:
            raise ValueError(
                f"conv1d: {groups} groups must divide in_channels={in_channels} and out_channels={out_channels}."
            )
        self.kernel_size = geometry.kernel_size
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.dtype = dtype
        self.stride = geometry.stride
        self.padding = (geometry.left, geometry.right)
        self.dilation = geometry.dilation
        self.num_groups = groups
        self.device = device
        self.permute = permute
        self.padding_mode = padding_mode
        sizes = {"S": geometry.kernel_size, "C": in_channels // groups, "F": out_channels}
        where = device or DeviceRef.CPU()
        prefix = f"{name}." if name else ""
        self.filter = Weight(f"{prefix}weight", dtype, [sizes[axis] for axis in self.filter_layout], where)
        if has_bias:
            self.bias = Weight(f"{prefix}bias", dtype, [out_channels], where)

    @property
    def layout(self) -> Layout:
        """The data's axis order."""
        return "NCL" if self.permute else "NLC"

    @property
    def filter_layout(self) -> FilterLayout:
        """The filter's axis order."""
        return "FCS" if self.permute else "SCF"

    def input_types(self) -> tuple[TensorType]:
        """Returns the type of the input, with symbolic batch and length."""
        sizes: dict[str, int | str] = {"N": "batch", "L": "length", "C": self.in_channels}
        return (TensorType(self.dtype, [sizes[axis] for axis in self.layout], self.device or DeviceRef.CPU()),)

    def __call__(self, x: TensorValue) -> TensorValue:
        """Emits the convolution of `x` into the current graph.

        Args:
            x: (N, L, C), or (N, C, L) with `permute`; without the batch axis, too.

        Returns:
            (N, L_out, F), or (N, F, L_out) with `permute`.
        """
        return conv1d(
            x,
            self.filter,
            self.bias,
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            groups=self.num_groups,
            padding_mode=self.padding_mode,
            layout=self.layout,
            filter_layout=self.filter_layout,
        )
