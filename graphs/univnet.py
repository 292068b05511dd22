"""UnivNet, a vocoder: from a mel spectrogram and noise to sound.

Noise goes through stages that upsample by a transposed convolution and run residual blocks: a dilated convolution, and one
with a different filter in every frame. A second network, the kernel predictor, computes these filters from the spectrogram.
Source: Jang and others, UnivNet, 2021, https://arxiv.org/abs/2106.07889, https://github.com/maum-ai/univnet, and
transformers' UnivNetModel. Location-variable convolution: Zeng and others, LVCNet, 2021, https://arxiv.org/abs/2102.10815.
"""

import functools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from max.dtype import DType
from max.graph import DeviceRef, TensorValue, ops

from max_conv import PackedGraph, conv1d
from max_conv.conv import signals
from max_conv.serving import Task
from max_conv.weights import LayerMap

from .parts import Ports, Weights, begin, leaky_relu, load, tanh

LAYERS = LayerMap(
    conv=("conv_pre.weight", "conv_post.weight", "*.conv.weight", "*_conv.weight", "*.conv1.weight", "*.conv2.weight"),
    conv_transpose=("resblocks.*.convt_pre.weight",),
    copy=("*.bias",),
    rename=(  # the original's names
        (r"^res_stack\.", "resblocks."),
        (r"\.convt_pre\.1\.", ".convt_pre."),
        (r"\.input_conv\.0\.", ".input_conv."),
        (r"\.residual_convs\.(\d+)\.1\.", r".resblocks.\1.conv1."),
        (r"\.residual_convs\.(\d+)\.3\.", r".resblocks.\1.conv2."),
        (r"\.conv_blocks\.(\d+)\.1\.", r".resblocks.\1.conv."),
        (r"^conv_post\.1\.", "conv_post."),
    ),
)


@dataclass(frozen=True)
class Config:
    """The network's sizes; the defaults are the published ones, of Tortoise, too."""

    mels: int = 100
    noise: int = 64
    """Channels of the noise, which has one vector per frame of the spectrogram."""
    channels: int = 32
    rates: tuple[int, ...] = (8, 8, 4)
    kernel_sizes: tuple[int, ...] = (3, 3, 3)
    dilations: tuple[tuple[int, ...], ...] = ((1, 3, 9, 27), (1, 3, 9, 27), (1, 3, 9, 27))
    predictor_blocks: int = 3
    predictor_channels: int = 64
    predictor_kernel_size: int = 3
    slope: float = 0.2
    rate: int = 24000
    """Samples per second."""

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "Config":
        """Reads the config.json of transformers' UnivNetModel."""
        return cls(
            mels=config["num_mel_bins"],
            noise=config["model_in_channels"],
            channels=config["model_hidden_channels"],
            rates=tuple(config["resblock_stride_sizes"]),
            kernel_sizes=tuple(config["resblock_kernel_sizes"]),
            dilations=tuple(tuple(row) for row in config["resblock_dilation_sizes"]),
            predictor_blocks=config["kernel_predictor_num_blocks"],
            predictor_channels=config["kernel_predictor_hidden_channels"],
            predictor_kernel_size=config["kernel_predictor_conv_size"],
            slope=config["leaky_relu_slope"],
        )

    @property
    def hop(self) -> int:
        """Samples per frame of the spectrogram."""
        return math.prod(self.rates)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Returns the native weights' shapes."""
        shapes: dict[str, tuple[int, ...]] = {}

        def layer(name: str, taps: int, channels: int, filters: int) -> None:
            shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (taps, channels, filters), (filters,)

        size, inner, taps = self.channels, self.predictor_channels, self.predictor_kernel_size
        layer("conv_pre", 7, self.noise, size)
        for i, (rate, kernel_size, dilations) in enumerate(
            zip(self.rates, self.kernel_sizes, self.dilations, strict=True)
        ):
            layer(f"resblocks.{i}.convt_pre", 2 * rate, size, size)
            predictor = f"resblocks.{i}.kernel_predictor"
            layer(f"{predictor}.input_conv", 5, self.mels, inner)
            for j in range(self.predictor_blocks):
                layer(f"{predictor}.resblocks.{j}.conv1", taps, inner, inner)
                layer(f"{predictor}.resblocks.{j}.conv2", taps, inner, inner)
            layer(f"{predictor}.kernel_conv", taps, inner, len(dilations) * size * 2 * size * kernel_size)
            layer(f"{predictor}.bias_conv", taps, inner, len(dilations) * 2 * size)
            for j in range(len(dilations)):
                layer(f"resblocks.{i}.resblocks.{j}.conv", kernel_size, size, size)
        layer("conv_post", 7, size, 1)
        return shapes


def load_weights(reference: str | Path, config: Config = Config()) -> dict[str, np.ndarray]:
    """Reads a generator's checkpoint, of the original or of transformers' UnivNetModel, into native weights."""
    return load(reference, LAYERS, "univnet", config.shapes())


def build(
    config: Config,
    weights: Mapping[str, np.ndarray],
    device: DeviceRef | None = None,
    dtype: DType = DType.float32,
    *,
    exact: bool = False,
    ragged: bool = False,
) -> PackedGraph:
    """Builds the graph: a spectrogram (batch, frames, mels) and noise (batch, frames, 64) to (batch, frames * hop), -1 to 1.

    There must be at least 4 frames: the noise is mirrored at its ends.

    Args:
        config: The sizes.
        weights: The result of `load_weights`; only its names and shapes go into the graph.
        device: Where the graph runs; None is the CPU.
        dtype: The dtype of the computation. Inputs and output are float32.
        exact: As in `max_conv.conv1d`.
        ragged: Whether signals differ in length: then the last input is `lengths`, (batch,) int64.

    Raises:
        ValueError: If the weights do not fit the config.
    """
    mels, noise = (("batch", "frames", size) for size in (config.mels, config.noise))
    graph, w = begin(
        Ports("univnet", {"mels": mels, "noise": noise}, ["sound"]),
        config.shapes(),
        weights,
        device,
        dtype,
        exact=exact,
        ragged=ragged,
    )
    with graph:
        spectrogram, x = (ops.cast(value.tensor, dtype) for value in graph.inputs)
        x = w.conv(x, "conv_pre", padding=3, padding_mode="reflect")
        for i in range(len(config.rates)):
            x = _stage(config, w / "resblocks" / i, x, spectrogram, i)
        x = w.conv(leaky_relu(x, config.slope), "conv_post", padding=3, padding_mode="reflect")
        graph.output(ops.cast(ops.squeeze(tanh(x), 2), DType.float32))
    return graph


def _stage(config: Config, w: Weights, x: TensorValue, mels: TensorValue, i: int) -> TensorValue:
    """Upsamples, and runs the residual blocks with the filters that are predicted for each frame."""
    batch, frames, _ = mels.shape
    rate, taps, dilations = config.rates[i], config.kernel_sizes[i], config.dilations[i]
    padding = rate // 2 + rate % 2
    x = leaky_relu(x, config.slope)
    x = w.conv_transpose(x, "convt_pre", stride=rate, padding=padding, output_padding=rate % 2)
    hop = math.prod(config.rates[: i + 1])
    x = ops.rebind(x, [batch, frames * hop, config.channels])
    predicted = _predicted(config, w / "kernel_predictor", mels, taps, len(dilations))
    for j, (dilation, (filters, bias)) in enumerate(zip(dilations, predicted, strict=True)):
        y = leaky_relu(x, config.slope)
        y = w.conv(y, f"resblocks.{j}.conv", dilation=dilation, padding=dilation * (taps - 1) // 2)
        y = _varied(leaky_relu(y, config.slope), filters, bias, hop, taps)
        x = x + ops.sigmoid(y[:, :, : config.channels]) * tanh(y[:, :, config.channels :])
    return x


def _predicted(
    config: Config, w: Weights, mels: TensorValue, taps: int, layers: int
) -> Iterator[tuple[TensorValue, TensorValue]]:
    """Yields each layer's filters, (batch, frames, taps * channels * 2 channels), and its biases."""
    x = leaky_relu(w.conv(mels, "input_conv", padding=2), config.slope)
    pad = (config.predictor_kernel_size - 1) // 2
    for j in range(config.predictor_blocks):
        y = leaky_relu(w.conv(x, f"resblocks.{j}.conv1", padding=pad), config.slope)
        x = x + leaky_relu(w.conv(y, f"resblocks.{j}.conv2", padding=pad), config.slope)
    sizes = (layers, config.channels, 2 * config.channels, taps)
    for j in range(layers):
        both = []
        for name, part in (
            ("kernel_conv", functools.partial(_filters_of, layer=j, sizes=sizes)),
            ("bias_conv", functools.partial(_biases_of, layer=j, layers=layers)),
        ):
            filter, bias = (w.make(f"{name}.{kind}.{j}", part, f"{name}.{kind}") for kind in ("weight", "bias"))
            both.append(conv1d(x, filter, bias, padding=pad))
        yield both[0], both[1]


def _filters_of(array: np.ndarray, layer: int, sizes: tuple[int, ...]) -> np.ndarray:
    """Returns a layer's part of the weights that predict filters; its last axis is in the order (taps, channels, filters)."""
    own = np.moveaxis(array.reshape(*array.shape[:-1], *sizes)[..., layer, :, :, :], -1, -3)
    return np.ascontiguousarray(own).reshape(*array.shape[:-1], -1)


def _biases_of(array: np.ndarray, layer: int, layers: int) -> np.ndarray:
    """Returns a layer's part of the weights that predict biases."""
    return np.ascontiguousarray(np.split(array, layers, -1)[layer])


def _varied(x: TensorValue, filters: TensorValue, bias: TensorValue, hop: int, taps: int) -> TensorValue:
    """Convolves each frame of (batch, frames * hop, C) with its own filters, which also read the neighbouring frames."""
    (batch, frames, _), channels = filters.shape, int(x.shape[2])
    seen = signals().neighbours(x, taps // 2, taps // 2)
    windows = signals().in_frames(ops.concat(seen, axis=2), hop, filters)
    matrices = ops.reshape(filters, [batch, frames, taps * channels, 2 * channels])
    return signals().from_frames(windows @ matrices + ops.unsqueeze(bias, 2))


def speak(model: Callable[..., Any], mels: np.ndarray, config: Config = Config(), *, seed: int = 0) -> Any:
    """Makes sound from a spectrogram and from noise with this `seed`.

    Args:
        model: The compiled graph.
        mels: (batch, frames, config.mels), float32; at least 4 frames.
        config: The sizes.
        seed: The seed of NumPy's generator.

    Returns:
        float32, (batch, frames * hop), -1 to 1.
    """
    return model(*with_noise(mels, config, np.random.default_rng(seed)))


def with_noise(mels: np.ndarray, config: Config, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Returns frames of a spectrogram, and noise for them."""
    return mels, random.standard_normal((*mels.shape[:2], config.noise), np.float32)


TASK = Task(
    kind="vocoder",
    input="mels",
    output="sound, (batch, samples), -1 to 1",
    run=speak,
    options=("seed",),
    inputs=with_noise,
)
