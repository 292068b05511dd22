"""`torch.nn.Conv1d` and `torch.nn.ConvTranspose1d`, on MAX."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from max.graph import DeviceRef

from .eager import EagerConv1D, EagerConvTranspose1D, one
from .torch_module import check_plain, dtype_of, padding_of, values_of


class Conv1d(EagerConv1D):
    """Convolves an NCL sequence with an FCS filter, with the arguments of `torch.nn.Conv1d`.

    `L_out = (L + 2 * padding - dilation * (kernel_size - 1) - 1) // stride + 1`

    Args:
        in_channels, out_channels: Channels of the input, C, and of the output, F.
        kernel_size, stride, dilation: Ints or 1-tuples.
        padding: An int, a 1-tuple, "same" or "valid"; also (left, right) and "causal".
        groups: Groups of channels that are convolved separately.
        bias: Whether a bias is added.
        padding_mode: "zeros", "reflect", "replicate" or "circular".
        device: Where the layer runs; None is the CPU.
        dtype: MAX's, PyTorch's or NumPy's dtype, or its name; None is float32.
        generator: Seeds the initial values, which are U(-sqrt(k), sqrt(k)), k = groups / (C * kernel_size).
        exact: As in `max_conv.conv1d`.
        name: The weights are named `{name}.weight` and `{name}.bias`, without a name `weight` and `bias`.

    Call:
        x (N, C, L) or (C, L), an array or a graph value; returns (N, F, L_out) or (F, L_out).

    >>> conv = Conv1d(16, 33, 3, stride=2, generator=0)
    >>> conv
    Conv1d(16, 33, kernel_size=(3,), stride=(2,))
    >>> conv(np.zeros((20, 16, 50), np.float32)).shape
    (20, 33, 24)

    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.Conv1d.html
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] | str = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: DeviceRef | None = None,
        dtype: Any = None,
        *,
        generator: np.random.Generator | int | None = None,
        name: str | None = None,
        exact: bool = False,
    ) -> None:
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            _sides(padding),
            dilation,
            groups,
            bias,
            dtype,
            device,
            generator,
            permute=True,
            padding_mode=padding_mode,
            exact=exact,
            name=name,
        )
        self._spelled_padding = padding

    def __repr__(self) -> str:
        return _repr(self)


class ConvTranspose1d(EagerConvTranspose1D):
    """Convolves an NCL sequence transposed with a CFS filter, with the arguments of `torch.nn.ConvTranspose1d`.

    `L_out = (L - 1) * stride - 2 * padding + dilation * (kernel_size - 1) + output_padding + 1`

    Args:
        in_channels, out_channels: Channels of the input, C, and of the output, F.
        kernel_size, stride, output_padding, dilation: Ints or 1-tuples.
        padding: An int or a 1-tuple; also (left, right) and "causal".
        groups: Groups of channels that are convolved separately.
        bias: Whether a bias is added.
        padding_mode: "zeros".
        device: Where the layer runs; None is the CPU.
        dtype: MAX's, PyTorch's or NumPy's dtype, or its name; None is float32.
        generator: Seeds the initial values: U(-sqrt(k), sqrt(k)), k = groups / (F * kernel_size).
        exact: As in `max_conv.conv1d`.
        name: The weights are named `{name}.weight` and `{name}.bias`, without a name `weight` and `bias`.

    Call:
        x (N, C, L) or (C, L), an array or a graph value; `output_size=` is L_out, alone or after N and F. Returns
        (N, F, L_out) or (F, L_out).

    >>> conv = ConvTranspose1d(16, 33, 4, stride=2, padding=1, generator=0)
    >>> conv
    ConvTranspose1d(16, 33, kernel_size=(4,), stride=(2,), padding=(1,))
    >>> conv(np.zeros((20, 16, 50), np.float32), output_size=101).shape
    (20, 33, 101)

    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.ConvTranspose1d.html
    """

    padding_mode = "zeros"

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] | str = 0,
        output_padding: int | Sequence[int] = 0,
        groups: int = 1,
        bias: bool = True,
        dilation: int | Sequence[int] = 1,
        padding_mode: str = "zeros",
        device: DeviceRef | None = None,
        dtype: Any = None,
        *,
        generator: np.random.Generator | int | None = None,
        name: str | None = None,
        exact: bool = False,
    ) -> None:
        if padding_mode != "zeros":
            raise ValueError(f"{self.op}: padding_mode must be zeros, but is {padding_mode!r}.")
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            _sides(padding),
            output_padding,
            dilation,
            groups,
            bias,
            dtype,
            device,
            permute=True,
            exact=exact,
            name=name,
        )
        self._spelled_padding = padding
        self._start(self.out_channels // self.num_groups * self.kernel_size, True, generator)

    def __repr__(self) -> str:
        return _repr(self)


def _sides(padding: Any) -> Any:
    """Returns (left, right) unchanged, and for a 1-tuple its value."""
    return padding if isinstance(padding, tuple | list) and len(padding) == 2 else one("padding", padding)


def _repr(layer: Conv1d | ConvTranspose1d) -> str:
    """Returns the text that PyTorch prints for a layer."""
    text = f"{layer.in_channels}, {layer.out_channels}, kernel_size=({layer.kernel_size},), stride=({layer.stride},)"
    left, right = layer.padding
    if isinstance(layer._spelled_padding, str):
        text += f", padding={layer._spelled_padding}"
    elif left or right:
        text += f", padding=({left},)" if left == right else f", padding=({left}, {right})"
    if layer.dilation != 1:
        text += f", dilation=({layer.dilation},)"
    if getattr(layer, "output_padding", 0):
        text += f", output_padding=({layer.output_padding},)"  # type: ignore[union-attr]
    if layer.num_groups != 1:
        text += f", groups={layer.num_groups}"
    if layer.bias is None:
        text += ", bias=False"
    if layer.padding_mode != "zeros":
        text += f", padding_mode={layer.padding_mode}"
    return f"{type(layer).__name__}({text})"


def from_torch(
    module: Any, device: DeviceRef | None = None, *, name: str | None = None, exact: bool = False
) -> Conv1d | ConvTranspose1d:
    """Makes a layer from a `torch.nn.Conv1d` or a `torch.nn.ConvTranspose1d`: it computes the same as `module.eval()`.

    PyTorch's weight norm, spectral norm and pruning are supported, as hooks and as parametrizations, on the weight and
    on the bias. In train mode PyTorch's spectral norm improves its estimate on every call; here the current one is
    used.

    Args:
        module: The PyTorch layer.
        device: Where the layer runs; None is the CPU.
        name: The weights are named `{name}.weight` and `{name}.bias`, without a name `weight` and `bias`.
        exact: As in `max_conv.conv1d`.

    Returns:
        A `Conv1d` or `ConvTranspose1d` with copies of the weights. The module is left as it was.

    Raises:
        TypeError: If the module is something else, or may compute something else: a subclass that overrides `forward`,
            other hooks or parametrizations, a quantised or a lazy module. Only PyTorch's code is run.

    >>> import torch
    >>> module = torch.nn.utils.parametrizations.weight_norm(torch.nn.Conv1d(4, 8, 3))
    >>> from_torch(module, name="encoder.first")
    Conv1d(4, 8, kernel_size=(3,), stride=(1,))
    """
    import torch

    kinds = {torch.nn.Conv1d: Conv1d, torch.nn.ConvTranspose1d: ConvTranspose1d}
    theirs = next((kind for kind in kinds if isinstance(module, kind)), None)
    if theirs is None:
        kind = f"{type(module).__module__}.{type(module).__qualname__}"
        raise TypeError(f"from_torch: takes a torch.nn.Conv1d or ConvTranspose1d, but got a {kind}.")
    check_plain(module, theirs)
    state = values_of(module)
    options = {
        option: getattr(module, option)
        for option in ("in_channels", "out_channels", "kernel_size", "stride", "dilation", "groups", "padding_mode")
    }
    if theirs is torch.nn.ConvTranspose1d:
        options["output_padding"] = module.output_padding
    options |= {"padding": padding_of(module), "bias": "bias" in state, "dtype": dtype_of(module)}
    conv = kinds[theirs](**options, device=device, name=name, exact=exact)
    conv.load_state_dict({conv._prefix + part: value for part, value in state.items()})
    return conv
