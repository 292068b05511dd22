"""HiFi-GAN, a vocoder: from a mel spectrogram to sound.

A convolution, then stages, each of which upsamples by a transposed convolution and averages three parallel residual blocks
of dilated convolutions. `Config` covers V1, V2 and V3 of the paper, SpeechT5's vocoder and similar networks.

MAX interleaves the three blocks of a stage, so 15 of the largest activations were live at once. Here `Weights.conv(...,
after=...)` runs them one after another: 577 -> 404 MB of memory, at the same speed. Only activated values are kept, as a
residual sum can undo a leaky ReLU; so the sum and its activation are written by the convolution before them (1.79 -> 1.73 s).
Source: Kong, Kim and Bae, HiFi-GAN, 2020, https://arxiv.org/abs/2010.05646, https://github.com/jik876/hifi-gan.
"""

import math
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

from .parts import Ports, Weights, begin, in_float32, inverse_leaky_relu, leaky_relu, load, tanh

# In SpeechT5's names upsampling layers are `upsampler.0`, and each block counts its own convolutions.
LAYERS = LayerMap(
    conv=("conv_pre.weight", "conv_post.weight", "resblocks.*.convs*.*.weight"),
    conv_transpose=("ups.*.weight",),
    copy=("*.bias", "mean", "scale"),
    optional=("mean", "scale"),
    rename=((r"^upsampler\.", "ups."),),
)


@dataclass(frozen=True)
class Config:
    """The network's sizes; the defaults are V1, of the published LJ Speech and universal models."""

    mels: int = 80
    channels: int = 512
    rates: tuple[int, ...] = (8, 8, 2, 2)
    rate_kernel_sizes: tuple[int, ...] = (16, 16, 4, 4)
    kernel_sizes: tuple[int, ...] = (3, 7, 11)
    dilations: tuple[tuple[int, ...], ...] = ((1, 3, 5), (1, 3, 5), (1, 3, 5))
    block: int = 1
    """1: a plain convolution follows each dilated one. 2: dilated convolutions only, as in V3."""
    slope: float = 0.1
    rate: int = 22050
    """Samples per second."""
    normalised: bool = False
    """Whether the spectrogram is normalised first, with `mean` and `scale` of the checkpoint."""

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "Config":
        """Reads config.json of the original, or of transformers' SpeechT5HifiGan."""
        get = config.get
        return cls(
            mels=get("model_in_dim", get("num_mels", 80)),
            channels=config["upsample_initial_channel"],
            rates=tuple(config["upsample_rates"]),
            rate_kernel_sizes=tuple(config["upsample_kernel_sizes"]),
            kernel_sizes=tuple(config["resblock_kernel_sizes"]),
            dilations=tuple(tuple(row) for row in config["resblock_dilation_sizes"]),
            block=int(get("resblock", 1)),
            slope=get("leaky_relu_slope", 0.1),
            rate=config["sampling_rate"],
            normalised=get("normalize_before", False),
        )

    @property
    def hop(self) -> int:
        """Samples per frame of the spectrogram."""
        return math.prod(self.rates)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Returns the native weights' shapes."""
        shapes: dict[str, tuple[int, ...]] = {}

        def layer(name: str, bias: int, *filter: int) -> None:
            shapes[f"{name}.weight"], shapes[f"{name}.bias"] = filter, (bias,)

        layer("conv_pre", self.channels, 7, self.mels, self.channels)
        channels = self.channels
        for i, kernel_size in enumerate(self.rate_kernel_sizes):
            layer(f"ups.{i}", channels // 2, kernel_size, channels // 2, channels)
            channels //= 2
            for j, (taps, dilations) in enumerate(zip(self.kernel_sizes, self.dilations, strict=True)):
                for k in range(len(dilations)):
                    for convs in ("convs1", "convs2") if self.block == 1 else ("convs",):
                        name = f"resblocks.{i * len(self.kernel_sizes) + j}.{convs}.{k}"
                        layer(name, channels, taps, channels, channels)
        layer("conv_post", 1, 7, channels, 1)
        if self.normalised:
            shapes["mean"] = shapes["scale"] = (self.mels,)
        return shapes


def load_weights(reference: str | Path, config: Config = Config()) -> dict[str, np.ndarray]:
    """Reads a generator's checkpoint, of the original or of SpeechT5HifiGan, into native weights."""
    return load(reference, LAYERS, "hifigan", config.shapes())


def build(
    config: Config,
    weights: Mapping[str, np.ndarray],
    device: DeviceRef | None = None,
    dtype: DType = DType.float32,
    *,
    exact: bool = False,
    ragged: bool = False,
) -> PackedGraph:
    """Builds the graph: a spectrogram (batch, frames, mels) to sound (batch, frames * hop), -1 to 1.

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
        Ports("hifigan", {"mels": ["batch", "frames", config.mels]}, ["sound"]),
        config.shapes(),
        weights,
        device,
        dtype,
        exact=exact,
        ragged=ragged,
    )
    with graph:
        x = ops.cast(graph.inputs[0].tensor, dtype)
        if config.normalised:
            x = (x - w["mean"]) / w["scale"]
        x = w.conv(x, "conv_pre", padding=3)
        for i, (rate, taps) in enumerate(zip(config.rates, config.rate_kernel_sizes, strict=True)):
            padding = (taps - rate) // 2
            x = w.conv_transpose(leaky_relu(x, config.slope), f"ups.{i}", stride=rate, padding=padding)
            x = _blocks(config, w, leaky_relu(x, config.slope), i * len(config.kernel_sizes))
        x = tanh(w.conv(leaky_relu(x, 0.01), "conv_post", padding=3))
        graph.output(ops.cast(ops.squeeze(x, 2), DType.float32))
    return graph


def _blocks(config: Config, w: Weights, begin: TensorValue, first: int) -> TensorValue:
    """Returns the mean of a stage's residual blocks.

    Their input has been through the leaky ReLU. A residual sum undoes that, so no other value is kept. The convolution
    before the sum writes both the sum and its activation.
    """
    total = None
    for j, (taps, dilations) in enumerate(zip(config.kernel_sizes, config.dilations, strict=True)):
        block, x, y = w / "resblocks" / (first + j), begin, begin
        for k, dilation in enumerate(dilations):
            before = None if k else total
            if config.block == 1:
                z = leaky_relu(_conv(block, x, f"convs1.{k}", taps, dilation, before), config.slope)
                z = _conv(block, z, f"convs2.{k}", taps, 1)
            else:
                z = _conv(block, x, f"convs.{k}", taps, dilation, before)
            y = _sum(x, z, config.slope)
            x = leaky_relu(y, config.slope)
        total = y if total is None else total + y
    assert total is not None, "a stage has blocks"
    # A product, because MAX would compile a second graph to divide 1 by the constant.
    return total * (1 / len(config.kernel_sizes))


@in_float32
def _sum(activated: TensorValue, z: TensorValue, slope: float) -> TensorValue:
    return inverse_leaky_relu(activated, slope) + z


def _conv(
    w: Weights, x: TensorValue, name: str, taps: int, dilation: int, before: TensorValue | None = None
) -> TensorValue:
    return w.conv(x, name, after=before, dilation=dilation, padding=dilation * (taps - 1) // 2)


TASK = Task(kind="vocoder", input="mels", output="sound, (batch, samples), -1 to 1")
