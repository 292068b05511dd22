"""The smallest graph: one convolution, from native weights or from a PyTorch checkpoint."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from max.dtype import DType
from max.graph import DeviceRef

from max_conv import Conv1D, PackedGraph
from max_conv.conv import Padding


@dataclass(frozen=True)
class Config:
    """The layer's settings along the length; its sizes come from the weights.

    With `permute` the weights are PyTorch's, (F, C / groups, K), and so is the data, (N, C, L); without it they are
    native, (K, C / groups, F), and the data is (N, L, C).
    """

    stride: int = 1
    padding: Padding = 0
    dilation: int = 1
    groups: int = 1
    padding_mode: str = "zeros"
    permute: bool = False


def build(
    config: Config,
    weights: Mapping[str, Any],
    device: DeviceRef | None = None,
    dtype: DType = DType.float32,
    *,
    exact: bool = False,
) -> PackedGraph:
    """Builds the graph of one convolution.

    Args:
        config: The layer's settings.
        weights: "weight", and "bias" if there is one. Only their shapes matter here.
        device: Where the graph runs; None is the CPU.
        dtype: The dtype of the weights and the data.
        exact: As in `max_conv.conv1d`.

    Returns:
        A graph with the input x, (batch, length, C) or (batch, C, length), and one output. Its weights are named as
        in `weights`.

    >>> import numpy as np, max_conv
    >>> weights = {"weight": np.ones((3, 1, 1), np.float32)}
    >>> model = max_conv.compile(build(Config(padding=1), weights), weights=weights)
    >>> model(np.ones((1, 4, 1), np.float32)).ravel().tolist()
    [2.0, 3.0, 3.0, 2.0]
    """
    axes = "FCS" if config.permute else "SCF"
    if "weight" not in weights or len(weights["weight"].shape) != 3:
        raise ValueError(f"conv1d: the weights must hold a 'weight' with 3 axes ({axes}), but hold {sorted(weights)}.")
    size = dict(zip(axes, (int(n) for n in weights["weight"].shape), strict=True))
    layer = Conv1D(
        size["S"],
        size["C"] * config.groups,
        size["F"],
        dtype,
        stride=config.stride,
        padding=config.padding,
        dilation=config.dilation,
        num_groups=config.groups,
        device=device,
        has_bias="bias" in weights,
        permute=config.permute,
        padding_mode=config.padding_mode,
        exact=exact,
    )
    return PackedGraph("conv1d", layer, layer.input_types())
