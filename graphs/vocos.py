"""Vocos, a vocoder: from a mel spectrogram to the spectrum of sound, and to sound.

ConvNeXt blocks, depthwise convolutions between pointwise ones, keep the frames of the spectrogram; then the inverse
short-time Fourier transform is one transposed convolution, whose filters are windowed waves.
Source: Siuzdak, Vocos, 2023, https://arxiv.org/abs/2306.00814, https://github.com/gemelo-ai/vocos (MIT licence).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from max.dtype import DType
from max.graph import DeviceRef, TensorValue, ops

from max_conv import PackedGraph, conv1d, conv_transpose1d
from max_conv.conv import signals
from max_conv.serving import Task
from max_conv.weights import LayerMap

from .parts import Ports, Weights, begin, gelu, load, sine

LAYERS = LayerMap(
    conv=("backbone.embed.weight", "backbone.convnext.*.dwconv.weight"),
    copy=("backbone.*norm.*", "backbone.*.bias", "backbone.*.pwconv?.*", "backbone.*.gamma", "head.*"),
    ignore=("feature_extractor.*",),  # the spectrogram is the input
)
EPSILON = 1e-6


@dataclass(frozen=True)
class Config:
    """The network's sizes; the defaults are the published charactr/vocos-mel-24khz."""

    mels: int = 100
    channels: int = 512
    hidden: int = 1536
    layers: int = 8
    window: int = 1024
    hop: int = 256
    center: bool = True
    """Whether frames are centred on their sample, so that (frames - 1) * hop samples come out; else frames * hop."""
    rate: int = 24000
    """Samples per second."""

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "Config":
        """Reads the published config.yaml, as a dictionary.

        Raises:
            ValueError: If the backbone depends on a bandwidth, as in vocos-encodec-24khz.
        """
        backbone, head = config["backbone"]["init_args"], config["head"]["init_args"]
        if backbone.get("adanorm_num_embeddings"):
            raise ValueError("vocos: backbones with adanorm_num_embeddings are not supported; use a mel model.")
        return cls(
            mels=backbone["input_channels"],
            channels=backbone["dim"],
            hidden=backbone["intermediate_dim"],
            layers=backbone["num_layers"],
            window=head["n_fft"],
            hop=head["hop_length"],
            center=head.get("padding", "same") == "center",
            rate=config.get("feature_extractor", {}).get("init_args", {}).get("sample_rate", 24000),
        )

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Returns the native weights' shapes."""
        shapes: dict[str, tuple[int, ...]] = {}

        def layer(name: str, bias: int, *weight: int) -> None:
            shapes[f"{name}.weight"], shapes[f"{name}.bias"] = weight, (bias,)

        c = self.channels
        layer("backbone.embed", c, 7, self.mels, c)
        layer("backbone.norm", c, c)
        for i in range(self.layers):
            block = f"backbone.convnext.{i}"
            layer(f"{block}.dwconv", c, 7, 1, c)
            layer(f"{block}.norm", c, c)
            layer(f"{block}.pwconv1", self.hidden, self.hidden, c)
            layer(f"{block}.pwconv2", c, c, self.hidden)
            shapes[f"{block}.gamma"] = (c,)
        layer("backbone.final_layer_norm", c, c)
        layer("head.out", self.window + 2, self.window + 2, c)
        shapes["head.istft.window"] = (self.window,)
        return shapes


def load_weights(reference: str | Path, config: Config = Config()) -> dict[str, np.ndarray]:
    """Reads a published checkpoint (`pytorch_model.bin`) into native weights."""
    return load(reference, LAYERS, "vocos", config.shapes())


def build(
    config: Config,
    weights: Mapping[str, np.ndarray],
    device: DeviceRef | None = None,
    dtype: DType = DType.float32,
    *,
    exact: bool = False,
    ragged: bool = False,
) -> PackedGraph:
    """Builds the graph: a log mel spectrogram (batch, frames, mels) to sound (batch, samples), about -1 to 1.

    Args:
        config: The sizes.
        weights: The result of `load_weights`; only its names and shapes go into the graph.
        device: Where the graph runs; None is the CPU.
        dtype: The dtype of the computation; the Fourier transform is always float32. Input and output are float32.
        exact: As in `max_conv.conv1d`.
        ragged: Whether signals differ in length: then the last input is `lengths`, (batch,) int64.

    Raises:
        ValueError: If the weights do not fit the config.
    """
    graph, w = begin(
        Ports("vocos", {"mels": ["batch", "frames", config.mels]}, ["sound"]),
        config.shapes(),
        weights,
        device,
        dtype,
        exact=exact,
        ragged=ragged,
    )
    with graph:
        x = ops.cast(graph.inputs[0].tensor, dtype)
        backbone = w / "backbone"
        x = backbone.layer_norm(backbone.conv(x, "embed", padding=3), "norm", EPSILON)
        for i in range(config.layers):
            x = _block(backbone / "convnext" / i, x)
        x = (w / "head").linear(backbone.layer_norm(x, "final_layer_norm", EPSILON), "out")
        graph.output(_sound(config, Weights(weights, w.device, DType.float32), ops.cast(x, DType.float32)))
    return graph


def _block(w: Weights, x: TensorValue) -> TensorValue:
    """Applies a ConvNeXt block to (N, L, C). Its last scale, gamma, is folded into the matrix before it."""
    y = w.layer_norm(w.conv(x, "dwconv", padding=3, groups=int(x.shape[2])), "norm", EPSILON)
    y = gelu(w.linear(y, "pwconv1"))
    scaled = w.make("pwconv2.scaled", lambda m, gamma: (gamma[:, None] * m).T[None], "pwconv2.weight", "gamma")
    bias = w.make("pwconv2.bias.scaled", np.multiply, "pwconv2.bias", "gamma")
    return x + conv1d(y, scaled, bias)


def _sound(config: Config, w: Weights, x: TensorValue) -> TensorValue:
    """Returns the inverse transform, (N, samples), of logarithmic magnitudes and phases, (N, T, 2 * bins)."""
    bins = config.window // 2 + 1
    magnitude = ops.min(ops.exp(x[:, :, :bins]), 100.0)
    phase = x[:, :, bins:]
    spectrum = ops.concat([magnitude * sine(phase + math.pi / 2), magnitude * sine(phase)], axis=2)
    trim = config.window // 2 if config.center else (config.window - config.hop) // 2
    options: dict[str, Any] = {"stride": config.hop, "padding": trim}
    window = "head.istft.window"
    sound = conv_transpose1d(spectrum, w.make("head.istft.waves", _waves, window), **options)
    # Where windows overlap their squares add up: to a constant inside, to less at the ends.
    overlap = conv_transpose1d(signals().ones_like(x), w.make("head.istft.squares", _squares, window), **options)
    return ops.squeeze(sound / overlap, 2)


def _squares(window: np.ndarray) -> np.ndarray:
    return (window * window)[:, None, None]


def _waves(window: np.ndarray) -> np.ndarray:
    """Returns a windowed wave for the real part of every bin, and for every imaginary part: SFC, (K, 1, 2 * bins)."""
    size = len(window)
    bins = np.arange(size // 2 + 1)
    angles = 2 * np.pi / size * (np.arange(size)[:, None] * bins % size)
    # All bins but the first and the last count twice: the spectrum of real sound is symmetric.
    weights = np.where((bins == 0) | (bins == size // 2), 1, 2) / size
    waves = np.concatenate([np.cos(angles) * weights, -np.sin(angles) * weights], axis=1)
    return (window.astype(np.float64)[:, None] * waves)[:, None].astype(np.float32)


TASK = Task(kind="vocoder", input="mels", output="sound, (batch, samples), -1 to 1")
