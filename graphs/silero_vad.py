"""Silero VAD, the 16 kHz network: the probability of speech in every 32 ms of sound.

A short-time spectrum, itself a convolution, goes through four convolutions that leave one vector a chunk, and an LSTM
that carries memory from chunk to chunk. The memory is an input and an output of the graph, so one compiled graph serves
a whole file in one call and a live chunk of 32 ms. Source of the network and its weights:
https://github.com/snakers4/silero-vad (MIT licence).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from max.dtype import DType
from max.graph import DeviceRef, Graph, TensorType, TensorValue, Weight, ops

from max_conv import conv1d
from max_conv.assets import resolve
from max_conv.layouts import permute
from max_conv.recurrent import lstm

# The wheel's ONNX and TorchScript files hold the same network with other values than this checkpoint; under the
# checkpoint's names, `native_weights` takes those as well.
WEIGHTS = (
    "pypi://silero-vad==6.2.3/silero_vad/data/silero_vad_16k.safetensors"
    "#sha256=7b7f5436cfcb02fae583a05b512ea96467fd449fe54cb49a5e4f06c51a1e43b8"
)

# Two people on the telephone, 30 s, and who speaks when, by hand.
_PYANNOTE = "pypi://pyannote.audio==4.0.7/pyannote/audio/sample/sample.{}#sha256={}"
_PYANNOTE_WHEEL = "852ea15c4d85bc34773e618267603ffca6a521669a74d33742692cc67fc700d6"
SAMPLE_AUDIO = _PYANNOTE.format("wav", _PYANNOTE_WHEEL)
SAMPLE_LABELS = _PYANNOTE.format("rttm", _PYANNOTE_WHEEL)

Weights = Mapping[str, np.ndarray]


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
    def bins(self) -> int:
        """Frequencies of the spectrum."""
        return self.window // 2 + 1

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Returns the native weights' shapes: filters SCF, matrices (in, out)."""
        shapes: dict[str, tuple[int, ...]] = {"stft_conv.weight": (self.window, 1, 2 * self.bins)}
        channels = self.bins
        for i, (filters, _) in enumerate(self.layers, 1):
            shapes |= {f"conv{i}.weight": (self.kernel_size, channels, filters), f"conv{i}.bias": (filters,)}
            channels = filters
        gates = 4 * self.units
        shapes |= {"lstm_cell.weight_ih": (channels, gates), "lstm_cell.weight_hh": (self.units, gates)}
        shapes |= {"lstm_cell.bias": (gates,), "final_conv.weight": (1, self.units, 1), "final_conv.bias": (1,)}
        return shapes


def load_weights(reference: str | Path = WEIGHTS, config: Config = Config()) -> dict[str, np.ndarray]:
    """Reads the network's checkpoint into native weights.

    Args:
        reference: A `.safetensors` file, or what `max_conv.assets.resolve` takes.
        config: The sizes that the weights must have.

    Returns:
        What `native_weights` returns.

    Raises:
        ImportError: If safetensors is not installed.
        ValueError: If the file is not a safetensors file, or does not hold this network.
    """
    try:
        from safetensors import SafetensorError
        from safetensors.numpy import load_file
    except ImportError:
        raise ImportError(
            "silero_vad: reading weights needs safetensors; run pip install 'max-conv[safetensors]'."
        ) from None
    path = resolve(reference)
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"silero_vad: {path} cannot be read as a safetensors file ({error}).") from None
    return native_weights(tensors, config)


def native_weights(tensors: Mapping[str, np.ndarray], config: Config = Config()) -> dict[str, np.ndarray]:
    """Turns a checkpoint's tensors into native weights: filters SCF, matrices (in, out), the LSTM's biases added.

    Returns:
        Contiguous float32 arrays by name.

    Raises:
        ValueError: If a tensor is missing, unknown or of another shape.
    """
    weights = {}
    for name, tensor in tensors.items():
        order = {3: ("FCS", "SCF"), 2: ("FC", "CF")}.get(tensor.ndim, ("F", "F"))
        weights[name] = permute(np.ascontiguousarray(tensor, np.float32), *order)
    biases = ("lstm_cell.bias_ih", "lstm_cell.bias_hh")
    if all(name in weights for name in biases):
        weights["lstm_cell.bias"] = weights.pop(biases[0]) + weights.pop(biases[1])
    _check(config, weights)
    return weights


def build(config: Config, weights: Weights, *, device: DeviceRef | None = None, dtype: DType = DType.float32) -> Graph:
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
    _check(config, weights)
    device = device or DeviceRef.CPU()
    sizes: list[list[Any]] = [["time", config.hop], [config.context], [config.units], [config.units]]
    inputs = [TensorType(DType.float32, ["batch", *size], device) for size in sizes]
    with Graph("silero_vad", input_types=inputs) as graph:
        chunks, context, hidden, cell = (value.tensor for value in graph.inputs)

        def w(name: str) -> TensorValue:
            weight = Weight(name, DType.float32, list(weights[name].shape), device)
            return ops.cast(TensorValue(weight), dtype)

        sound, context = _with_context(config, chunks, context)
        features = _features(config, ops.cast(sound, dtype), w)
        features = ops.reshape(features, [chunks.shape[0], chunks.shape[1], features.shape[2]])
        memory = (ops.cast(hidden, dtype), ops.cast(cell, dtype))
        matrices = (w("lstm_cell.weight_ih"), w("lstm_cell.weight_hh"), w("lstm_cell.bias"))
        outputs, *memory_after = lstm(features, *matrices, *memory)
        score = conv1d(ops.relu(outputs), w("final_conv.weight"), w("final_conv.bias"))
        probability = ops.sigmoid(ops.squeeze(score, 2))
        graph.output(*(ops.cast(value, DType.float32) for value in (probability, context, *memory_after)))
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
    signals = np.asarray(audio)
    if not np.issubdtype(signals.dtype, np.floating):
        raise TypeError(f"silero_vad: audio must be floating point, -1 to 1, but is {signals.dtype}.")
    if signals.ndim not in (1, 2) or not signals.size:
        raise ValueError(f"silero_vad: audio must have shape (samples,) or (batch, samples), but has {signals.shape}.")
    if not np.isfinite(signals).all():
        raise ValueError("silero_vad: audio must be finite, but holds an infinity or a NaN.")
    lines = np.atleast_2d(signals).astype(np.float32, copy=False)
    batch, samples = lines.shape
    lines = np.pad(lines, ((0, 0), (0, -samples % config.hop)))
    probability, *_ = model(lines.reshape(batch, -1, config.hop), *initial_state(batch, config))
    return probability[0] if signals.ndim == 1 else probability


def _with_context(config: Config, chunks: TensorValue, context: TensorValue) -> tuple[TensorValue, TensorValue]:
    """Returns every chunk behind the end of the one before, (B, T, 576), and the end of the last, (B, 64)."""
    ends = ops.concat([ops.unsqueeze(context, 1), chunks[:, :, config.hop - config.context :]], axis=1)
    before = ops.rebind(ends[:, :-1], [chunks.shape[0], chunks.shape[1], config.context])
    return ops.concat([before, chunks], axis=2), ends[:, -1]


def _features(config: Config, sound: TensorValue, w: Callable[[str], TensorValue]) -> TensorValue:
    """Returns one vector a chunk, (B * T, 1, 128). Chunks are padded one by one, so they stand in the batch here."""
    batch, time, samples = sound.shape
    x = ops.reshape(sound, [batch * time, samples, 1])
    reflected = (0, config.reflected)
    x = conv1d(x, w("stft_conv.weight"), stride=config.stride, padding=reflected, padding_mode="reflect")
    real, imaginary = x[:, :, : config.bins], x[:, :, config.bins :]
    x = ops.sqrt(real * real + imaginary * imaginary)
    padding = config.kernel_size // 2
    for i, (_, stride) in enumerate(config.layers, 1):
        x = ops.relu(conv1d(x, w(f"conv{i}.weight"), w(f"conv{i}.bias"), stride=stride, padding=padding))
    return x


def _check(config: Config, weights: Weights) -> None:
    shapes = config.shapes()
    for names, fault in (
        (shapes.keys() - weights.keys(), "lack"),
        (weights.keys() - shapes.keys(), "hold the unknown"),
    ):
        if names:
            raise ValueError(
                f"silero_vad: the weights {fault} {', '.join(sorted(names))}; pass those of Silero's 16 kHz network."
            )
    for name, shape in shapes.items():
        if weights[name].shape != shape:
            raise ValueError(f"silero_vad: the weight {name} must have shape {shape}, but has {weights[name].shape}.")
