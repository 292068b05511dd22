"""`torch.nn.Conv1d`, on MAX."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from max.driver import Buffer
from max.graph import DeviceRef

from ..checkpoint import fold_weight_norm
from .eager import EagerConv1D, as_buffer, as_dtype, one


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
        generator: Seeds the start values, which are U(-sqrt(k), sqrt(k)), k = groups / (C * kernel_size).

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
    ) -> None:
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding if isinstance(padding, tuple | list) and len(padding) == 2 else one("padding", padding),
            dilation,
            groups,
            bias,
            dtype,
            device,
            generator,
            permute=True,
            padding_mode=padding_mode,
        )
        self._spelled_padding = padding

    def __repr__(self) -> str:
        text = f"{self.in_channels}, {self.out_channels}, kernel_size=({self.kernel_size},), stride=({self.stride},)"
        left, right = self.padding
        if isinstance(self._spelled_padding, str):
            text += f", padding={self._spelled_padding}"
        elif left or right:
            text += f", padding=({left},)" if left == right else f", padding=({left}, {right})"
        if self.dilation != 1:
            text += f", dilation=({self.dilation},)"
        if self.num_groups != 1:
            text += f", groups={self.num_groups}"
        if self.bias is None:
            text += ", bias=False"
        if self.padding_mode != "zeros":
            text += f", padding_mode={self.padding_mode}"
        return f"Conv1d({text})"


def from_torch(module: Any, device: DeviceRef | None = None) -> Conv1d:
    """Makes a `Conv1d` of a `torch.nn.Conv1d`, with its weights; weight norm in either spelling is folded.

    Args:
        module: A `torch.nn.Conv1d`.
        device: Where the layer runs; None is the CPU.

    Returns:
        A `Conv1d` with copies of the weights. The module is left as it was.

    Raises:
        TypeError: If the module is something else.

    >>> import torch
    >>> module = torch.nn.utils.parametrizations.weight_norm(torch.nn.Conv1d(4, 8, 3))
    >>> from_torch(module)
    Conv1d(4, 8, kernel_size=(3,), stride=(1,))
    """
    import torch

    if not isinstance(module, torch.nn.Conv1d):
        raise TypeError(f"from_torch: takes a torch.nn.Conv1d, but got a {type(module).__name__}.")
    conv = Conv1d(
        module.in_channels,
        module.out_channels,
        module.kernel_size,
        module.stride,
        module.padding,
        module.dilation,
        module.groups,
        module.bias is not None,
        module.padding_mode,
        device,
        module.weight.dtype,
    )
    state = {"weight": _weight(module)}
    if module.bias is not None:
        state["bias"] = Buffer.from_dlpack(module.bias.detach().cpu().clone())
    conv.load_state_dict(state)
    return conv


def _weight(module: Any) -> Any:
    """Returns the module's filter, with weight norm folded in float64."""
    import torch

    magnitude: Any = None
    direction: Any = None
    dim = 0
    if hasattr(module, "weight_g"):
        # The old spelling recomputes `weight` before each call only: it may be stale here.
        magnitude, direction = module.weight_g, module.weight_v
        hooks = module._forward_pre_hooks.values()
        dim = next((hook.dim for hook in hooks if type(hook).__name__ == "WeightNorm"), 0)
    elif torch.nn.utils.parametrize.is_parametrized(module, "weight"):
        steps = module.parametrizations.weight
        if len(steps) == 1 and type(steps[0]).__name__ == "_WeightNorm":
            magnitude, direction, dim = steps.original0, steps.original1, steps[0].dim
    if magnitude is None:
        return Buffer.from_dlpack(module.weight.detach().cpu().contiguous().clone())
    g, v = (part.detach().cpu().double().numpy() for part in (magnitude, direction))
    return as_buffer(fold_weight_norm(g, v, dim), as_dtype(module.weight.dtype))
