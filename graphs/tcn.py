"""A temporal convolutional network with WaveNet's gates: causal, dilated, with skip connections.

Each block is a dilated convolution to twice the channels, of which one half gates the other, a second convolution, and a
residual connection; the outputs of all second convolutions are added to give the output.
Sources: van den Oord and others, WaveNet, 2016, https://arxiv.org/abs/1609.03499; Bai, Kolter and Koltun, 2018,
https://arxiv.org/abs/1803.01271; names and order of operations: https://github.com/paul-krug/pytorch-tcn (MIT licence).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from max.dtype import DType
from max.graph import DeviceRef, TensorValue, ops

from max_conv import PackedGraph
from max_conv.serving import Task
from max_conv.weights import LayerMap

from .parts import Ports, Weights, begin, load

LAYERS = LayerMap(
    conv=(
        "network.*.conv?.weight",
        "network.*.downsample.weight",
        "downsample_skip_connection.*.weight",
        "projection_out.weight",
    ),
    copy=("*.bias",),
    ignore=("*.buffer",),  # the state of pytorch-tcn's streams
    optional=("network.*.downsample.weight", "downsample_skip_connection.*.weight", "projection_out.weight"),
)


@dataclass(frozen=True)
class Config:
    """The arguments of pytorch-tcn's `TCN` that concern a causal, gated network with ReLU and weight norm.

    Args:
        inputs: Channels of the input.
        channels: Channels of every block.
        kernel_size: Taps of all convolutions of the blocks.
        dilations: The dilation of every block; None for 1, 2, 4, and so on.
        outputs: Channels of a last pointwise convolution; None for none.
    """

    inputs: int = 80
    channels: tuple[int, ...] = (256,) * 8
    kernel_size: int = 4
    dilations: tuple[int, ...] | None = None
    outputs: int | None = None

    def __post_init__(self) -> None:
        if self.dilations is not None and len(self.dilations) != len(self.channels):
            raise ValueError(f"tcn: {len(self.channels)} blocks need as many dilations, but got {self.dilations}.")

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "Config":
        """Reads the keyword arguments of pytorch-tcn's `TCN`.

        Raises:
            ValueError: If they describe another kind of network.
        """
        ours = {"causal": True, "use_gate": True, "use_skip_connections": True, "use_norm": "weight_norm"}
        defaults = {"causal": True, "use_gate": False, "use_skip_connections": False, "use_norm": "weight_norm"}
        fixed = ours | {"activation": "relu", "embedding_shapes": None, "output_activation": None}
        for name, value in fixed.items():
            got = config.get(name, defaults.get(name, value))
            if got != value:
                raise ValueError(f"tcn: {name} must be {value!r}, but is {got!r}.")
        dilations = config.get("dilations")
        return cls(
            inputs=config["num_inputs"],
            channels=tuple(config["num_channels"]),
            kernel_size=config.get("kernel_size", 4),
            dilations=None if dilations is None else tuple(dilations),
            outputs=config.get("output_projection"),
        )

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Returns the native weights' shapes."""
        shapes: dict[str, tuple[int, ...]] = {}

        def layer(name: str, *filter: int) -> None:
            shapes[f"{name}.weight"], shapes[f"{name}.bias"] = filter, (filter[-1],)

        before = self.inputs
        for i, channels in enumerate(self.channels):
            layer(f"network.{i}.conv1", self.kernel_size, before, 2 * channels)
            layer(f"network.{i}.conv2", self.kernel_size, channels, channels)
            if before != channels:
                layer(f"network.{i}.downsample", 1, before, channels)
            if channels != self.channels[-1]:
                layer(f"downsample_skip_connection.{i}", 1, channels, self.channels[-1])
            before = channels
        if self.outputs is not None:
            layer("projection_out", 1, before, self.outputs)
        return shapes


def load_weights(reference: str | Path, config: Config = Config()) -> dict[str, np.ndarray]:
    """Reads a state dict of pytorch-tcn's `TCN` into native weights."""
    return load(reference, LAYERS, "tcn", config.shapes())


def build(
    config: Config,
    weights: Mapping[str, np.ndarray],
    device: DeviceRef | None = None,
    dtype: DType = DType.float32,
    *,
    exact: bool = False,
    ragged: bool = False,
) -> PackedGraph:
    """Builds the graph: (batch, length, inputs) to (batch, length, outputs), no output depends on later inputs.

    Args:
        config: The sizes.
        weights: The result of `load_weights`; only its names and shapes go into the graph.
        device: Where the graph runs; None is the CPU.
        dtype: The dtype of the computation. Input and output are float32.
        exact: As in `max_conv.conv1d`.
        ragged: Whether signals differ in length: then the last input is `lengths`, (batch,) int64.

    Raises:
        ValueError: If the weights do not fit the config.
    """
    graph, w = begin(
        Ports("tcn", {"x": ["batch", "length", config.inputs]}, ["y"]),
        config.shapes(),
        weights,
        device,
        dtype,
        exact=exact,
        ragged=ragged,
    )
    with graph:
        x = ops.cast(graph.inputs[0].tensor, dtype)
        total = None
        dilations = config.dilations or [2**i for i in range(len(config.channels))]
        last = len(dilations) - 1
        for i, dilation in enumerate(dilations):
            x, skip = _block(w / "network" / i, x, dilation)
            if f"downsample_skip_connection.{i}.weight" in w:
                skip = w.conv(skip, f"downsample_skip_connection.{i}")
            skip = x if i == last else skip
            total = skip if total is None else total + skip
        assert total is not None, "there are blocks"
        y = ops.relu(total)
        graph.output(ops.cast(y if config.outputs is None else w.conv(y, "projection_out"), DType.float32))
    return graph


def _block(w: Weights, x: TensorValue, dilation: int) -> tuple[TensorValue, TensorValue]:
    """Returns a block's output for the next block, and its share of the network's output."""
    y = w.conv(x, "conv1", dilation=dilation, padding="causal")
    half = int(y.shape[2]) // 2
    y = y[:, :, :half] * ops.sigmoid(y[:, :, half:])
    y = ops.relu(w.conv(y, "conv2", dilation=dilation, padding="causal"))
    x = w.conv(x, "downsample") if "downsample.weight" in w else x
    return ops.relu(x + y), y


TASK = Task(kind="features", input="inputs", output="vectors, (batch, length, outputs)")
