"""PESTO, a light pitch tracker: a constant-Q transform, and a small network over the pitches of each frame.

The transform is a convolution with complex filters, three per semitone. The network's convolutions run along the pitches,
and its last layer is a Toeplitz matrix, so a transposed sound gives shifted activations. The weights are `mir-1k_g7` of the
package pesto-pitch (LGPL-3.0), which does not have to be installed.
Source: Riou, Lattner, Hadjeres and Peeters, PESTO: Pitch Estimation with Self-supervised Transposition-equivariant
Objective, 2023, https://arxiv.org/abs/2309.02265, https://github.com/SonyCSLParis/pesto.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from max.dtype import DType
from max.graph import DeviceRef, TensorValue, ops

from max_conv import PackedGraph, conv1d
from max_conv.conv import signals
from max_conv.serving import Task
from max_conv.sound import Pitch, Track, as_signals
from max_conv.weights import LayerMap, read_native, resolve, to_native

from .parts import Ports, Weights, begin, check_weights, leaky_relu

WEIGHTS = (
    "pypi://pesto-pitch==2.0.1/pesto/weights/mir-1k_g7.ckpt"
    "#sha256=2eb1e5ac1c2f78f7563f4800cccd73daf04d52717ff0d95ea30257a56f3f9d37"
)

LAYERS = LayerMap(
    conv=("encoder.conv*.weight", "encoder.prefilt_layers.*.weight", "encoder.fc.weight", "confidence.conv.weight"),
    copy=("*.bias", "encoder.layernorm.weight", "confidence.linear.weight", "shift"),
)

_LEAST = float(np.finfo(np.float32).eps) ** 2
"""The least power of a band."""
_SLOPE = 0.3  # of the leaky ReLUs


@dataclass(frozen=True)
class Config:
    """The network's sizes, as in `mir-1k_g7`. Samples are at `rate`."""

    rate: int = 16000
    hop: int = 160  # a frame every 10 ms
    steps: int = 3  # bands per semitone
    bands: int = 251
    lowest: float = 27.5
    """The pitch of the first semitone, whose bands are around it, in Hz."""
    gamma: float = 7.0
    """A width in Hz that is added to each band: the filters of low bands get shorter."""
    cropped: int = 16  # bands that the network does not read, on each side
    channels: tuple[int, ...] = (40, 30, 30, 10, 3)
    prefilters: int = 3
    kernel_size: int = 39
    pitches: int = 384  # 128 semitones

    @property
    def seen(self) -> int:
        """Bands that the network reads."""
        return self.bands - 2 * self.cropped

    def bank(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns the bands' frequencies in Hz, and the lengths of their filters in samples."""
        octave = 12 * self.steps
        first = self.lowest / 2 ** ((self.steps - 1) / (2 * octave))
        frequencies = first * 2.0 ** (np.arange(self.bands) / octave)
        width = 2 ** (1 / octave) - 1
        return frequencies, np.ceil(self.rate / (width * frequencies + self.gamma)).astype(int)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Returns the native weights' shapes."""
        first, *_, last = self.channels
        taps = int(self.bank()[1].max())
        shapes: dict[str, tuple[int, ...]] = {"transform.weight": (taps, 1, 2 * self.bands), "shift": ()}
        shapes |= {f"encoder.layernorm.{name}": (1, self.seen) for name in ("weight", "bias")}

        def layer(name: str, taps: int, channels: int, filters: int) -> None:
            shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (taps, channels, filters), (filters,)

        layer("encoder.conv1.0", self.kernel_size, 1, first)
        for i in range(self.prefilters - 1):
            layer(f"encoder.prefilt_layers.{i}.0", self.kernel_size, first, first)
        for i, (channels, filters) in enumerate(zip(self.channels, self.channels[1:], strict=False)):
            layer(f"encoder.conv_layers.{3 * i}", 1, channels, filters)
        shapes["encoder.fc.weight"] = (self.seen * last + self.pitches - 1, 1, 1)
        layer("confidence.conv", 39, 1, 1)
        features = (self.bands - 39) // 3 + 2
        shapes["confidence.linear.weight"], shapes["confidence.linear.bias"] = (1, features), (1,)
        return shapes


def transform(config: Config = Config()) -> np.ndarray:
    """Returns the filters of the constant-Q transform, (taps, 1, 2 * bands): the real parts, then the imaginary.

    Each is a wave with a Hann window, in the middle of the taps. Filters have different lengths, with zeros around them.

    >>> transform().shape
    (2127, 1, 502)

    Source: Brown, Calculation of a constant Q spectral transform, 1991, https://doi.org/10.1121/1.400476
    """
    frequencies, lengths = config.bank()
    taps = int(lengths.max())
    filters = np.zeros((taps, config.bands), np.complex128)
    for band, (frequency, length) in enumerate(zip(frequencies, lengths, strict=True)):
        times = np.arange(length) - (length + 1) // 2
        window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(length) / length)
        wave = window * np.exp(2j * np.pi * frequency / config.rate * times)
        start = (taps + 1) // 2 - (length + 1) // 2
        filters[start : start + length, band] = wave * (np.sqrt(length) / window.sum())
    return np.concatenate([filters.real, -filters.imag], axis=1).astype(np.float32)[:, None]


def load_weights(reference: str | Path = WEIGHTS, config: Config = Config()) -> dict[str, np.ndarray]:
    """Reads the package's checkpoint, or a native one, into native weights, and adds the transform.

    Raises:
        ImportError: If PyTorch is not installed, which reads .ckpt files.
        ValueError: If the file is damaged, or does not hold this network.
    """
    if str(reference).partition("#")[0].endswith(".ckpt"):
        weights = to_native(_state(resolve(reference)), LAYERS, "pesto")
    else:
        weights = read_native(reference, LAYERS, "pesto")
    weights["transform.weight"] = transform(config)
    check_weights("pesto", weights, config.shapes())
    return weights


def _state(path: Path) -> dict[str, np.ndarray]:
    """Reads the state dict from a Lightning file, whose hyper-parameters are objects of another package."""
    try:
        import torch
    except ImportError:
        raise ImportError(f"pesto: reading {path.name} needs PyTorch; install torch.") from None
    inert = (
        "dictconfig.DictConfig",
        "listconfig.ListConfig",
        "nodes.AnyNode",
        "base.ContainerMetadata",
        "base.Metadata",
    )
    # Empty classes replace the package's classes: no code of the file is run.
    stand_ins: list[Any] = [(type("Inert", (), {}), f"omegaconf.{name}") for name in inert]
    stand_ins += [(type("Inert", (), {}), "typing.Any"), defaultdict, dict, list, int]
    try:
        with torch.serialization.safe_globals(stand_ins):
            state = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
        return {name: value.numpy() for name, value in state.items()}
    # Damaged files may raise any error.
    except Exception as error:
        raise ValueError(f"pesto: {path} is not a checkpoint of PESTO ({str(error).splitlines()[0]:.120}).") from None


def build(
    config: Config,
    weights: Mapping[str, np.ndarray],
    device: DeviceRef | None = None,
    dtype: DType = DType.float32,
    *,
    exact: bool = False,
    ragged: bool = False,
) -> PackedGraph:
    """Builds the graph: sound (batch, samples) of at least 1065 samples to the pitch of each frame.

    Outputs, in order, all float32, with `frames = samples // 160 + 1`:
        pitch: (batch, frames), Hz.
        confidence: (batch, frames), 0 to 1, that there is a pitch; unlike the pitch, it depends on the level.
        volume: (batch, frames), the power of all bands.
        activations: (batch, frames, 384), how likely each third of a semitone is, from MIDI's key 0 on.

    Args:
        config: The sizes.
        weights: The result of `load_weights`; only its names and shapes go into the graph.
        device: Where the graph runs; None is the CPU.
        dtype: The dtype of the network's computation; the transform is always float32.
        exact: As in `max_conv.conv1d`.
        ragged: Whether signals differ in length: then the last input is `lengths`, (batch,) int64.

    Raises:
        ValueError: If the weights do not fit the config.
    """
    graph, w = begin(
        Ports("pesto", {"sound": ["batch", "samples"]}, ["pitch", "confidence", "volume", "activations"]),
        config.shapes(),
        weights,
        device,
        dtype,
        exact=exact,
        ragged=ragged,
    )
    full = Weights(weights, w.device, DType.float32)
    with graph:
        sound = ops.unsqueeze(graph.inputs[0].tensor, 2)
        taps = full.shape("transform.weight")[0]
        x = conv1d(
            sound,
            full["transform.weight"],
            stride=config.hop,
            padding=((taps + 1) // 2, taps // 2),
            padding_mode="reflect",
        )
        real, imaginary = x[:, :, : config.bands], x[:, :, config.bands :]
        power = ops.max(real * real + imaginary * imaginary, _LEAST)
        levels = ops.log(power)
        confidence = _confidence(full / "confidence", power, levels)
        activations = ops.softmax(_encoded(config, w, levels))
        volume = ops.squeeze(ops.sum(power, axis=2), 2)
        graph.output(_pitch(config, activations), confidence, volume, activations)
    return graph


def _confidence(w: Weights, power: TensorValue, levels: TensorValue) -> TensorValue:
    """Returns how sure it is that frames have a pitch, (batch, frames)."""
    # The geometric mean over the arithmetic one: 1 for noise, near 0 for a tone.
    flatness = ops.exp(ops.mean(levels, axis=2)) / ops.max(ops.mean(power, axis=2), 1e-8)
    x = ops.relu(w.conv(ops.unsqueeze(signals().each_frame(power), 2), "conv", stride=3))
    x = ops.concat([signals().of_frames(ops.squeeze(x, 2), power), flatness], axis=2)
    return ops.squeeze(ops.sigmoid(w.linear(x, "linear")), 2)


def _encoded(config: Config, w: Weights, levels: TensorValue) -> TensorValue:
    """Returns the scores of all pitches, (batch, frames, pitches), in float32."""
    x = levels[:, :, config.cropped : config.bands - config.cropped]
    scale, shift = (
        w.make(f"encoder.layernorm.{name}.flat", np.ravel, f"encoder.layernorm.{name}") for name in ("weight", "bias")
    )
    x = ops.layer_norm(ops.cast(x, w.dtype), scale, shift, 1e-5)
    x = ops.unsqueeze(signals().each_frame(x), 2)
    inner = w / "encoder"
    padding = config.kernel_size // 2
    x = leaky_relu(inner.conv(x, "conv1.0", padding=padding), _SLOPE)
    for i in range(config.prefilters - 1):
        x = x + leaky_relu(inner.conv(x, f"prefilt_layers.{i}.0", padding=padding), _SLOPE)
    for i in range(len(config.channels) - 1):
        x = leaky_relu(inner.conv(x, f"conv_layers.{3 * i}"), _SLOPE)
    x = signals().of_frames(ops.reshape(x, [x.shape[0], config.seen * config.channels[-1]]), levels)

    def matrix(filter: np.ndarray, shift: np.ndarray) -> np.ndarray:
        # Row (band, channel), column pitch; the constant shift of all pitches is a turn of the columns.
        channels, pitches = np.arange(config.channels[-1]), np.arange(config.pitches)
        rows = channels * config.seen + np.arange(config.seen)[:, None]
        toeplitz = filter.ravel()[rows.reshape(-1, 1) - pitches + config.pitches - 1]
        return np.roll(toeplitz, -round(float(shift) * config.steps), axis=1)[None]

    last = w.make("encoder.fc.matrix", matrix, "encoder.fc.weight", "shift")
    return ops.cast(conv1d(x, last), DType.float32)


def _pitch(config: Config, activations: TensorValue) -> TensorValue:
    """Returns the mean pitch around the likeliest, in Hz, (batch, frames)."""
    # Two constants: MAX compiles another graph to turn one into the other.
    numbers, device = np.arange(config.pitches), activations.device
    bins = ops.constant(numbers.astype(np.int64), DType.int64, device=device)
    values = ops.constant(numbers.astype(np.float32), DType.float32, device=device)
    middle = ops.argmax(activations, axis=2)
    near = ops.cast(ops.greater(config.steps, ops.abs(bins - middle)), DType.float32) * activations
    semitone = ops.sum(near * values, axis=2) / (ops.sum(near, axis=2) * config.steps)
    return ops.squeeze(440 * ops.exp((semitone - 69) * (np.log(2) / 12)), 2)


def frequency(bins: Any, config: Config = Config()) -> np.ndarray:
    """Returns the frequency in Hz of pitch `bins`, which may be fractions.

    >>> frequency([60, 207]).round(2).tolist()
    [25.96, 440.0]
    """
    return 440 * 2 ** ((np.asarray(bins) / config.steps - 69) / 12)


def listen(model: Callable[..., Any], audio: Any, config: Config = Config()) -> tuple[Track, np.ndarray]:
    """Finds the pitch of whole signals.

    Args:
        model: The compiled graph.
        audio: (samples,) or (B, samples), at 16 kHz.
        config: The sizes.

    Returns:
        The track, whose periodicity is the confidence, and the activations, (T, 384) or (B, T, 384).

    Raises:
        TypeError: If the audio holds integers.
        ValueError: As `max_conv.sound.audio.as_signals` does, and if there are fewer samples than half a filter.
    """
    signals = as_signals("pesto", audio)
    least = (int(config.bank()[1].max()) + 1) // 2 + 1
    if signals.shape[1] < least:
        raise ValueError(f"pesto: audio must have at least {least} samples, but has {signals.shape[1]}.")
    pitch, confidence, _, activations = model(np.ascontiguousarray(signals))
    times = np.arange(pitch.shape[1]) * (config.hop / config.rate)
    if np.ndim(audio) == 1:
        pitch, confidence, activations = pitch[0], confidence[0], activations[0]
    return Track(times, pitch, confidence), activations


def follow(model: Callable[..., Any], audio: Any, config: Config = Config()) -> Pitch:
    """Finds the pitch of whole signals, as `listen` does."""
    track, activations = listen(model, audio, config)
    return Pitch(track, activations, *frequency([0, config.pitches - 1], config).tolist())


TASK = Task(kind="pitch", input="sound", output="a `Pitch`, a frame every 10 ms", run=follow)
