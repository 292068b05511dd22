"""`mlx.nn.Conv1d` and `mlx.nn.ConvTranspose1d`, on MAX."""

from typing import Any

import numpy as np
from max.graph import DeviceRef

from ..conv.layouts import FilterLayout, TransposedFilterLayout
from .eager import EagerConv1D, EagerConvTranspose1D


class Conv1d(EagerConv1D):
    """Convolves an NLC sequence with an FSC filter, with the arguments of `mlx.nn.Conv1d`.

    `L_out = (L + 2 * padding - dilation * (kernel_size - 1) - 1) // stride + 1`

    Args:
        in_channels, out_channels: Channels of the input, C, and of the output, F.
        kernel_size: Taps of the filter.
        stride: Input positions from one output to the next.
        padding: An int; also (left, right), "same", "valid" and "causal".
        dilation: Input positions from one tap to the next.
        groups: Groups of channels that are convolved separately.
        bias: Whether a bias is added.
        dtype: MAX's or NumPy's dtype, or its name; None is float32.
        device: Where the layer runs; None is the CPU.
        generator: Seeds the initial values: the filter is U(-sqrt(k), sqrt(k)), k = groups / (C * kernel_size), the
            bias is 0.
        exact: As in `max_conv.conv1d`.

    Call:
        x (N, L, C) or (L, C), an array or a graph value; returns (N, L_out, F) or (L_out, F).

    >>> conv = Conv1d(16, 33, 3, stride=2, generator=0)
    >>> conv
    Conv1d(16, 33, kernel_size=3, stride=2, padding=0, dilation=1, groups=1, bias=True)
    >>> conv(np.zeros((20, 50, 16), np.float32)).shape
    (20, 24, 33)

    Source: https://ml-explore.github.io/mlx/build/html/python/nn/_autosummary/mlx.nn.Conv1d.html
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        padding: Any = 0,
        dilation: int = 1,
        groups: int = 1,
        bias: bool = True,
        *,
        dtype: Any = None,
        device: DeviceRef | None = None,
        generator: np.random.Generator | int | None = None,
        exact: bool = False,
    ) -> None:
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            bias,
            dtype,
            device,
            generator,
            random_bias=False,
            exact=exact,
        )

    @property
    def filter_layout(self) -> FilterLayout:
        """The filter's axis order."""
        return "FSC"

    def __repr__(self) -> str:
        left, right = self.padding
        return (
            f"Conv1d({self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"padding={left if left == right else self.padding}, dilation={self.dilation}, groups={self.num_groups}, "
            f"bias={self.bias is not None})"
        )


class ConvTranspose1d(EagerConvTranspose1D):
    """Convolves an NLC sequence transposed with an FSC filter, with the arguments of `mlx.nn.ConvTranspose1d`.

    `L_out = (L - 1) * stride - 2 * padding + dilation * (kernel_size - 1) + output_padding + 1`

    Args:
        in_channels, out_channels: Channels of the input, C, and of the output, F.
        kernel_size: Taps of the filter.
        stride: Outputs from one input position to the next.
        padding: An int; also (left, right) and "causal".
        dilation: Outputs from one tap to the next.
        output_padding: Outputs added on the right.
        bias: Whether a bias is added.
        groups: Groups of channels that are convolved separately, as in `mlx.core.conv_transpose1d`.
        dtype: MAX's or NumPy's dtype, or its name; None is float32.
        device: Where the layer runs; None is the CPU.
        generator: Seeds the initial values: the filter is U(-sqrt(k), sqrt(k)), k = groups / (C * kernel_size), the
            bias is 0.
        exact: As in `max_conv.conv1d`.

    Call:
        x (N, L, C) or (L, C), an array or a graph value; returns (N, L_out, F) or (L_out, F).

    >>> conv = ConvTranspose1d(16, 33, 4, stride=2, padding=1, generator=0)
    >>> conv(np.zeros((20, 50, 16), np.float32)).shape
    (20, 100, 33)

    Source: https://ml-explore.github.io/mlx/build/html/python/nn/_autosummary/mlx.nn.ConvTranspose1d.html
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        padding: Any = 0,
        dilation: int = 1,
        output_padding: int = 0,
        bias: bool = True,
        *,
        groups: int = 1,
        dtype: Any = None,
        device: DeviceRef | None = None,
        generator: np.random.Generator | int | None = None,
        exact: bool = False,
    ) -> None:
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            output_padding,
            dilation,
            groups,
            bias,
            dtype,
            device,
            exact=exact,
        )
        self._start(self.in_channels // self.num_groups * self.kernel_size, False, generator)

    @property
    def filter_layout(self) -> TransposedFilterLayout:
        """The filter's axis order, for all filters and the channels of one group."""
        return "FSC"

    def __repr__(self) -> str:
        left, right = self.padding
        return (
            f"ConvTranspose1d({self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, "
            f"stride={self.stride}, padding={left if left == right else self.padding}, dilation={self.dilation}, "
            f"output_padding={self.output_padding}, bias={self.bias is not None})"
        )
