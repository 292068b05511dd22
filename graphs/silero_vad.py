"""Silero VAD, the 16 kHz network: the probability of speech in every 32 ms of sound.

A short-time spectrum, itself a convolution, goes through four convolutions that leave one vector a chunk, and an LSTM
that carries memory from chunk to chunk. The memory is an input and an output of the graph, so one compiled graph serves
a whole file in one call and a live chunk of 32 ms. Source of the network and its weights:
https://github.com/snakers4/silero-vad (MIT licence).
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from max.dtype import DType
from max.graph import DeviceRef, Dim, TensorType, TensorValue, ops

from max_conv import PackedGraph, conv1d
from max_conv.audio import as_signals
from max_conv.convert import LayerMap, to_native

from .parts import Weights, check_weights, load

# The wheel's ONNX and TorchScript files hold the same network with other values than this checkpoint.
WEIGHTS = (
    "pypi://silero-vad==6.2.3/silero_vad/data/silero_vad_16k.safetensors"
    "#sha256=7b7f5436cfcb02fae583a05b512ea96467fd449fe54cb49a5e4f06c51a1e43b8"
)

# Two people on the telephone, 30 s, and who speaks when, by hand.
_PYANNOTE = "pypi://pyannote.audio==4.0.7/pyannote/audio/sample/sample.{}#sha256={}"
_PYANNOTE_WHEEL = "852ea15c4d85bc34773e618267603ffca6a521669a74d33742692cc67fc700d6"
SAMPLE_AUDIO = _PYANNOTE.format("wav", _PYANNOTE_WHEEL)
SAMPLE_LABELS = _PYANNOTE.format("rttm", _PYANNOTE_WHEEL)

LAYERS = LayerMap(
    conv=("stft_conv.weight", "conv?.weight", "final_conv.weight"),
    copy=("*.bias", "lstm_cell.*"),
    ignore=("_model_8k.*",),
    rename=(  # the names in the ONNX files, and behind "_model." in the TorchScript file
        (r"^_?model\.", ""),
        (r"^stft\.forward_basis_buffer$", "stft_conv.weight"),
        *((rf"^encoder\.{i}\.reparam_conv\.", f"conv{i + 1}.") for i in range(4)),
        (r"^decoder\.rnn\.", "lstm_cell."),
        (r"^decoder\.decoder\.2\.", "final_conv."),
    ),
)


@dataclass(frozen=True)
class Config:
    """The network's sizes. Samples are at `rate`."""

    rate: int = 16000
    hop: int = 512  # a chunk: the samples that one probability stands for
    context: int = 64  # samples of the chunk before that are seen again
    window: int = 256  # of the short-time spectrum, as the next two
    stride: int = 128
    reflected: int = 64  # samples mirrored behind the end
    layers: tuple[tuple[int, int], ...] = ((128, 1), (64, 2), (64, 2), (128, 1))  # filters and stride
    kernel_size: int = 3
    units: int = 128  # of the LSTM

    @property
    def framing(self) -> tuple[int, int]:
        """The samples that a chunk takes, and from one chunk to the next."""
        return self.context + self.hop, self.hop

    @property
    def bins(self) -> int:
        """Frequencies of the spectrum."""
        return self.window // 2 + 1

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Returns the native weights' shapes."""
        shapes: dict[str, tuple[int, ...]] = {"stft_conv.weight": (self.window, 1, 2 * self.bins)}
        channels = self.bins
        for i, (filters, _) in enumerate(self.layers, 1):
            shapes |= {f"conv{i}.weight": (self.kernel_size, channels, filters), f"conv{i}.bias": (filters,)}
            channels = filters
        gates = 4 * self.units
        shapes |= {"lstm_cell.weight_ih": (gates, channels), "lstm_cell.weight_hh": (gates, self.units)}
        shapes |= {
            "lstm_cell.bias_ih": (gates,),
            "lstm_cell.bias_hh": (gates,),
            "final_conv.weight": (1, self.units, 1),
            "final_conv.bias": (1,),
        }
        return shapes


def load_weights(reference: str | Path = WEIGHTS, config: Config = Config()) -> dict[str, np.ndarray]:
    """Reads the network's checkpoint into native weights.

    Raises:
        ImportError: If the package that reads the file is not installed.
        ValueError: If the file is no checkpoint, or does not hold this network.
    """
    return load(reference, LAYERS, "silero_vad", config.shapes())


def native_weights(tensors: Mapping[str, np.ndarray], config: Config = Config()) -> dict[str, np.ndarray]:
    """Turns tensors under the names of Silero's checkpoint, its ONNX or its TorchScript files into native weights.

    Raises:
        ValueError: If a tensor is missing, unknown or of another shape.
    """
    weights = to_native(tensors, LAYERS, "silero_vad")
    check_weights("silero_vad", weights, config.shapes())
    return weights


def build(
    config: Config,
    weights: Mapping[str, np.ndarray],
    device: DeviceRef | None = None,
    dtype: DType = DType.float32,
) -> PackedGraph:
    """Builds the graph; its weights are filled in when it is compiled, `max_conv.compile(graph, weights=weights)`.

    Inputs, in order, all float32, with symbolic B and T of at least 1:
        chunks: (B, T, 512), the sound, -1 to 1: T chunks in a row of each of B signals.
        context: (B, 64), the last samples before the first chunk.
        hidden, cell: (B, 128), the memory before the first chunk.

    Outputs, in order, all float32:
        probability: (B, T).
        context, hidden, cell: The same after the last chunk, to be passed on with the next.

    Args:
        config: The sizes.
        weights: What `load_weights` returns; only its names and shapes go into the graph.
        device: Where the graph runs; None is the CPU.
        dtype: What it computes in.

    Returns:
        The graph.

    Raises:
        ValueError: If the weights do not fit the config.
    """
    check_weights("silero_vad", weights, config.shapes())
    device = device or DeviceRef.CPU()
    sizes: list[list[Any]] = [["time", config.hop], [config.context], [config.units], [config.units]]
    inputs = [TensorType(DType.float32, ["batch", *size], device) for size in sizes]
    w = Weights(weights, device, dtype)
    with PackedGraph("silero_vad", input_types=inputs) as graph:
        chunks, context, *memory = (value.tensor for value in graph.inputs)
        sound, context = _joined(config, chunks, context)
        features = _features(config, w, ops.cast(sound, dtype), chunks.shape[1])
        hidden, cell = (ops.cast(value, dtype) for value in memory)
        outputs, hidden, cell = (w / "lstm_cell").lstm_from(features, hidden, cell)
        probability = ops.sigmoid(ops.squeeze(w.conv(ops.relu(outputs), "final_conv"), 2))
        graph.output(*(ops.cast(value, DType.float32) for value in (probability, context, hidden, cell)))
    return graph


def initial_state(batch: int, config: Config = Config()) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns context, hidden and cell before any sound: zeros.

    >>> [state.shape for state in initial_state(2)]
    [(2, 64), (2, 128), (2, 128)]
    """
    context, memory = (np.zeros((batch, size), np.float32) for size in (config.context, config.units))
    return context, memory, memory.copy()


def detect(model: Callable[..., Any], audio: Any, config: Config = Config()) -> np.ndarray:
    """Returns the probability of speech in every chunk of whole signals.

    Args:
        model: The compiled graph.
        audio: (samples,) or (B, samples), -1 to 1, at 16 kHz. The last chunk is filled up with zeros.

    Returns:
        float32, (T,) or (B, T), T = ceil(samples / 512).

    Raises:
        TypeError: If the audio holds integers.
        ValueError: If the audio has more axes, no samples, or one that is not finite.
    """
    lines = as_signals("silero_vad", audio)
    batch, samples = lines.shape
    lines = np.pad(lines, ((0, 0), (0, -samples % config.hop)))
    probability, *_ = model(lines.reshape(batch, -1, config.hop), *initial_state(batch, config))
    return probability[0] if np.ndim(audio) == 1 else probability


def _joined(config: Config, chunks: TensorValue, context: TensorValue) -> tuple[TensorValue, TensorValue]:
    """Returns the chunks in a row behind the context, (B, 64 + T * 512), and the end of the last, (B, 64)."""
    batch, time, _ = chunks.shape
    sound = ops.concat([context, ops.reshape(chunks, [batch, time * config.hop])], axis=1)
    return sound, chunks[:, -1, config.hop - config.context :]


def _features(config: Config, w: Weights, sound: TensorValue, time: Dim) -> TensorValue:
    """Returns one vector a chunk, (B, T, 128)."""
    x = _spectrum(config, w, sound, time)
    batch, _, length, channels = x.shape
    for i, (_, stride) in enumerate(config.layers, 1):
        padding = config.kernel_size // 2
        if i == 1:
            x = ops.reshape(x, [batch * time, length, channels])
            x = ops.relu(w.conv(x, "conv1", stride=stride, padding=padding))
            x = ops.reshape(x, [batch, time, x.shape[1] * x.shape[2]])
            continue
        # Later layers see a chunk's few positions at once: a matrix of all of them is multiplied faster than such short
        # convolutions, half of which is padding.
        positions = int(x.shape[2]) // w.shape(f"conv{i}.weight")[1]
        outputs = (positions - 1) // stride + 1
        unrolled = functools.partial(_unrolled, length=positions, stride=stride, padding=padding)
        matrix = w.make(f"conv{i}.weight.unrolled", unrolled, f"conv{i}.weight")
        bias = w.make(f"conv{i}.bias.unrolled", functools.partial(np.tile, reps=outputs), f"conv{i}.bias")
        x = ops.relu(conv1d(x, matrix, bias))
    return x


def _spectrum(config: Config, w: Weights, sound: TensorValue, time: Dim) -> TensorValue:
    """Returns the magnitudes of every chunk's spectra, (B, T, 4, 129).

    All but the last spectrum of a chunk are those of the sound in a row. The last one sees the chunk mirrored at its end:
    its waves are folded there.
    """
    sound = ops.unsqueeze(sound, 2)
    count = (config.hop + config.context + config.reflected - config.window) // config.stride + 1
    last = config.stride * (count - 1)
    row = conv1d(
        sound, w["stft_conv.weight"], stride=config.stride, padding=(0, count * config.stride - last - config.context)
    )
    row = ops.reshape(row, [sound.shape[0], time, count, row.shape[2]])[:, :, : count - 1]
    folded = w.make(
        "stft_conv.weight.folded", functools.partial(_folded, reflected=config.reflected), "stft_conv.weight"
    )
    end = conv1d(sound[:, last:], folded, stride=config.hop)
    x = ops.concat([row, ops.unsqueeze(end, 2)], axis=2)
    real, imaginary = x[:, :, :, : config.bins], x[:, :, :, config.bins :]
    return ops.sqrt(real * real + imaginary * imaginary)


def _folded(filter: np.ndarray, reflected: int) -> np.ndarray:
    """Returns a filter whose last taps, which see what is mirrored, are added to those that see it unmirrored."""
    kept = filter[:-reflected].copy()
    kept[-1 - reflected : -1] += filter[: -reflected - 1 : -1]
    return kept


def _unrolled(filter: np.ndarray, length: int, stride: int, padding: int) -> np.ndarray:
    """Returns a convolution of `length` positions as one of a single position that holds them all."""
    taps, channels, filters = filter.shape
    outputs = (length + 2 * padding - taps) // stride + 1
    matrix = np.zeros((length, channels, outputs, filters), np.float32)
    for output in range(outputs):
        for tap in range(taps):
            if 0 <= (position := output * stride - padding + tap) < length:
                matrix[position, :, output] = filter[tap]
    return matrix.reshape(1, length * channels, outputs * filters)
