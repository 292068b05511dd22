"""wav2vec 2.0 and HuBERT, encoders of speech: the convolutions that turn sound into the input of their transformer.

Seven convolutions make a vector of every 20 ms of sound at 16 kHz, a matrix widens it, and a grouped convolution of 128
taps adds positions. The transformer layers and everything after them are left out. `Config` covers all models: the base ones
normalise the first layer over time, the large ones all layers over channels.

The norm over time follows from the 10 x 10 products of the first layer's windows. So the layer's output, 65 MB for 10 s, is
written once, instead of written, read and written again.
Source: Baevski and others, wav2vec 2.0, 2020, https://arxiv.org/abs/2006.11477; Hsu and others, HuBERT, 2021,
https://arxiv.org/abs/2106.07447; names and checkpoints: https://github.com/huggingface/transformers.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from max.dtype import DType
from max.graph import DeviceRef, TensorValue, ops

from max_conv import PackedGraph, conv1d
from max_conv.serving import Task
from max_conv.sound import as_signals
from max_conv.weights import LayerMap

from .parts import Ports, Weights, begin, gelu, load

EPSILON = 1e-5
"""The epsilon of the norms inside the feature encoder, which no config sets."""

LAYERS = LayerMap(
    conv=("feature_extractor.conv_layers.*.conv.weight", "encoder.pos_conv_embed.conv.weight"),
    copy=("feature_*.bias", "feature_*.weight", "encoder.pos_conv_embed.conv.bias", "encoder.layer_norm.*"),
    ignore=(
        "encoder.layers.*",
        "masked_spec_embed",
        "quantizer.*",
        "project_hid.*",
        "project_q.*",
        "projector.*",
        "classifier.*",
        "lm_head.*",
        "adapter.*",
    ),
    rename=((r"^(wav2vec2|hubert)\.", ""),),
)


_SOUND: dict[str, list[str | int]] = {"sound": ["batch", "samples"]}
_VECTORS = ["vectors"]


@dataclass(frozen=True)
class Config:
    """The network's sizes; the defaults are facebook/wav2vec2-base and facebook/hubert-base-ls960."""

    channels: tuple[int, ...] = (512, 512, 512, 512, 512, 512, 512)
    kernel_sizes: tuple[int, ...] = (10, 3, 3, 3, 3, 2, 2)
    strides: tuple[int, ...] = (5, 2, 2, 2, 2, 2, 2)
    bias: bool = False
    """Whether the feature encoder's convolutions have a bias."""
    norm: str = "group"
    """"group": the first layer's channels are normalised over time. "layer": every layer's vectors over channels."""
    hidden: int = 768
    projection_norm: bool = True
    """Whether features are normalised before they are projected."""
    positions: int = 128
    """Taps of the positional convolution."""
    position_groups: int = 16
    stable: bool = False
    """Whether transformer layers normalise their inputs, not their outputs; then `encoder.layer_norm` follows the last."""
    epsilon: float = 1e-5
    rate: int = 16000
    """Samples per second."""

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "Config":
        """Reads the config.json of transformers' Wav2Vec2Model or HubertModel.

        Raises:
            ValueError: If the model is one that this file does not know.
        """
        get = config.get
        for key, known in (("feat_extract_activation", ("gelu",)), ("feat_extract_norm", ("group", "layer"))):
            if (given := get(key, known[0])) not in known:
                raise ValueError(f"wav2vec2: {key} must be {' or '.join(known)}, but the config has {given!r}.")
        if get("conv_pos_batch_norm", False):
            raise ValueError("wav2vec2: positions normalised over the batch (conv_pos_batch_norm) are not supported.")
        return cls(
            channels=tuple(get("conv_dim", cls.channels)),
            kernel_sizes=tuple(get("conv_kernel", cls.kernel_sizes)),
            strides=tuple(get("conv_stride", cls.strides)),
            bias=get("conv_bias", False),
            norm=get("feat_extract_norm", "group"),
            hidden=get("hidden_size", 768),
            projection_norm=get("feat_proj_layer_norm", True),
            positions=get("num_conv_pos_embeddings", 128),
            position_groups=get("num_conv_pos_embedding_groups", 16),
            stable=get("do_stable_layer_norm", False),
            epsilon=get("layer_norm_eps", 1e-5),
        )

    @property
    def hop(self) -> int:
        """Samples per frame."""
        return math.prod(self.strides)

    @property
    def receptive(self) -> int:
        """Samples that one frame depends on: the shortest sound with a frame."""
        samples = 1
        for taps, stride in zip(reversed(self.kernel_sizes), reversed(self.strides), strict=True):
            samples = (samples - 1) * stride + taps
        return samples

    def normalised(self, layer: int) -> bool:
        """Returns whether a layer of the feature encoder has a norm."""
        return self.norm == "layer" or layer == 0

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Returns the native weights' shapes."""
        shapes: dict[str, tuple[int, ...]] = {}

        def norm(name: str, channels: int) -> None:
            shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = (channels,)

        before = 1
        for i, (channels, taps) in enumerate(zip(self.channels, self.kernel_sizes, strict=True)):
            name = f"feature_extractor.conv_layers.{i}"
            shapes[f"{name}.conv.weight"] = (taps, before, channels)
            if self.bias:
                shapes[f"{name}.conv.bias"] = (channels,)
            if self.normalised(i):
                norm(f"{name}.layer_norm", channels)
            before = channels
        if self.projection_norm:
            norm("feature_projection.layer_norm", before)
        shapes["feature_projection.projection.weight"] = (self.hidden, before)
        shapes["feature_projection.projection.bias"] = (self.hidden,)
        positions = "encoder.pos_conv_embed.conv"
        shapes[f"{positions}.weight"] = (self.positions, self.hidden // self.position_groups, self.hidden)
        shapes[f"{positions}.bias"] = (self.hidden,)
        norm("encoder.layer_norm", self.hidden)
        return shapes


def load_weights(reference: str | Path, config: Config = Config()) -> dict[str, np.ndarray]:
    """Reads a checkpoint of transformers, of either model and with any head, into native weights."""
    return load(reference, LAYERS, "wav2vec2", config.shapes())


def build(
    config: Config,
    weights: Mapping[str, np.ndarray],
    device: DeviceRef | None = None,
    dtype: DType = DType.float32,
    *,
    exact: bool = False,
    ragged: bool = False,
) -> PackedGraph:
    """Builds the graph: sound (batch, samples) to the input of the first transformer layer, (batch, frames, hidden).

    `frames = (samples - 400) // 320 + 1`, with the published sizes. The models expect sound of mean 0 and deviation 1.

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

    def whole(w: Weights, sound: TensorValue) -> TensorValue:
        x = _features(config, w / "feature_extractor.conv_layers", sound)
        if config.projection_norm:
            x = w.layer_norm(x, "feature_projection.layer_norm", config.epsilon)
        x = w.linear(x, "feature_projection.projection")
        x = x + _positional(config, w, x)
        return x if config.stable else w.layer_norm(x, "encoder.layer_norm", config.epsilon)

    return _graph(Ports("wav2vec2", _SOUND, _VECTORS), whole, config, weights, device, dtype, exact, ragged)


def build_features(
    config: Config,
    weights: Mapping[str, np.ndarray],
    device: DeviceRef | None = None,
    dtype: DType = DType.float32,
    *,
    exact: bool = False,
    ragged: bool = False,
) -> PackedGraph:
    """Builds the feature encoder alone: sound (batch, samples) to (batch, frames, channels). Arguments are `build`'s."""

    def features(w: Weights, sound: TensorValue) -> TensorValue:
        return _features(config, w / "feature_extractor.conv_layers", sound)

    return _graph(Ports("wav2vec2_features", _SOUND, _VECTORS), features, config, weights, device, dtype, exact, ragged)


def build_positional(
    config: Config,
    weights: Mapping[str, np.ndarray],
    device: DeviceRef | None = None,
    dtype: DType = DType.float32,
    *,
    exact: bool = False,
    ragged: bool = False,
) -> PackedGraph:
    """Builds the positional convolution alone: (batch, frames, hidden) to the same shape. Arguments are `build`'s."""

    def positional(w: Weights, x: TensorValue) -> TensorValue:
        return _positional(config, w, x)

    return _graph(
        Ports("wav2vec2_positions", {"x": ["batch", "frames", config.hidden]}, _VECTORS),
        positional,
        config,
        weights,
        device,
        dtype,
        exact,
        ragged,
    )


def _graph(
    ports: Ports,
    network: Callable[[Weights, TensorValue], TensorValue],
    config: Config,
    weights: Mapping[str, np.ndarray],
    device: DeviceRef | None,
    dtype: DType,
    exact: bool,
    ragged: bool,
) -> PackedGraph:
    graph, w = begin(ports, config.shapes(), weights, device, dtype, exact=exact, ragged=ragged)
    with graph:
        graph.output(ops.cast(network(w, ops.cast(graph.inputs[0].tensor, dtype)), DType.float32))
    return graph


def _features(config: Config, layers: Weights, sound: TensorValue) -> TensorValue:
    """Returns the features (batch, frames, channels) of sound (batch, samples)."""
    x = ops.unsqueeze(sound, 2)
    for i, stride in enumerate(config.strides):
        if config.norm == "group" and i == 0:
            x = _normalised_over_time(config, layers, sound)
        else:
            x = layers.conv(x, f"{i}.conv", stride=stride)
            if config.norm == "layer":
                x = layers.layer_norm(x, f"{i}.layer_norm", EPSILON)
        x = gelu(x)
    return x


def _normalised_over_time(config: Config, layers: Weights, sound: TensorValue) -> TensorValue:
    """Convolves sound of one channel, and normalises every filter's output over time.

    The mean and deviation of an output follow from the means of the windows that filters read, and of their products, 10
    and 100 numbers. So the output, 65 MB for ten seconds, is written once and never read to be normalised. Sums are
    float64: if the sound is loud in the bass, the output of a filter for the treble has a millionth of its variance.
    """
    taps, stride = config.kernel_sizes[0], config.strides[0]
    # The result depends neither on a constant in the sound nor on the bias; without them no large values cancel.
    sound = sound - ops.cast(ops.mean(ops.cast(sound, DType.float32), 1), sound.dtype)
    identity = ops.constant(np.eye(taps, dtype=np.float32)[:, None], DType.float32, device=sound.device)
    signal = ops.cast(ops.unsqueeze(sound, 1), DType.float32)
    windows = conv1d(signal, identity, stride=stride, layout="NCL", filter_layout="FCS")
    windows = ops.cast(windows, DType.float64)
    # Not the covariance: if its subtrahend enters the next sum, MAX 26.7 uses the first signal's for every signal.
    squares = ops.mean(ops.unsqueeze(windows, 1) * ops.unsqueeze(windows, 2), 3)  # (batch, taps, taps, 1)
    filter = ops.cast(layers.make("0.conv.taps", lambda array: array[:, 0], "0.conv.weight"), DType.float64)
    mean = ops.sum(ops.mean(windows, 2) * filter, 1)
    square = ops.sum(ops.squeeze(ops.sum(squares * filter, 2), 2) * filter, 1)
    scale = ops.cast(layers["0.layer_norm.weight"], DType.float64) * ops.rsqrt(square - mean * mean + EPSILON)
    shift = ops.cast(layers["0.layer_norm.bias"], DType.float64) - mean * scale
    scale, shift = (ops.cast(value, sound.dtype) for value in (scale, shift))
    return conv1d(ops.unsqueeze(sound, 2), layers["0.conv.weight"], stride=stride) * scale + shift


def _positional(config: Config, w: Weights, x: TensorValue) -> TensorValue:
    """Returns the positional embedding of (batch, frames, hidden)."""
    # An even number of taps, padded equally, would make one frame too many; PyTorch drops the last.
    padding = (config.positions // 2, (config.positions - 1) // 2)
    return gelu(w.conv(x, "encoder.pos_conv_embed.conv", padding=padding, groups=config.position_groups))


def hear(model: Callable[..., Any], audio: Any, config: Config = Config()) -> Any:
    """Returns the vectors of whole signals, each scaled to mean 0 and variance 1, as transformers does.

    Args:
        model: The compiled graph.
        audio: (samples,) or (B, samples), at 16 kHz.
        config: The sizes.

    Returns:
        float32, (B, frames, hidden).

    Raises:
        TypeError, ValueError: As `max_conv.sound.as_signals` does.
    """
    signals = as_signals("wav2vec2", audio)
    mean, variance = (moment(signals, axis=1, keepdims=True, dtype=np.float64) for moment in (np.mean, np.var))
    return model(np.ascontiguousarray((signals - mean) / np.sqrt(variance + 1e-7), np.float32))


TASK = Task(kind="features", input="sound", output="vectors, (batch, frames, hidden)", run=hear)
