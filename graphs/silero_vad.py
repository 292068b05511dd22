"""Silero VAD, the 16 kHz network: the probability of speech in every 32 ms of sound.

A short-time spectrum, itself a convolution, goes through four convolutions, which reduce a chunk to one vector, and an LSTM,
which carries memory from chunk to chunk. The memory is an input and an output of the graph, so one compiled graph serves a
whole file in one call and a live chunk of 32 ms.

On a CPU, but for float64, the network is one operation (`max_conv/conv/kernels/models/silero_vad.mojo`): a live chunk needs 20 us
to compute, and MAX about 2 us to pass from one operation to the next, of which there were 14. A few chunks go through all
layers together, in the cache. Each layer computes one position of all of them at a time, so taps in the padding cost nothing.
The STFT filters are symmetric sines and cosines, and the filters of two mirrored frequencies differ in the sign of every
second sample; so mirrored samples are added first, and only a quarter of the multiplications remain. If the filters are not
exactly of this form, the layer-by-layer graph is used. The LSTM of a single signal follows the layers closely: its thread
helps with the chunks that it waits for. All state is one tensor, since each input and output costs 2 us per call. On other
devices and in float64 the graph is built layer by layer; a test compares the two.

Source of the network and its weights: https://github.com/snakers4/silero-vad (MIT licence).
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from max.dtype import DType
from max.graph import DeviceRef, TensorType, TensorValue, ops

from max_conv import PackedGraph, conv1d
from max_conv.conv import PANEL, Emitted, Geometry, Layer, custom_op, is_live, record, signals
from max_conv.serving import Task
from max_conv.sound import as_signals
from max_conv.weights import LayerMap, read_onnx, resolve, to_native

from .parts import Ports, Weights, begin, check_weights, load

_WHEEL = "pypi://silero-vad==6.2.3/silero_vad/data/{}#sha256=7b7f5436cfcb02fae583a05b512ea96467fd449fe54cb49a5e4f06c51a1e43b8"

WEIGHTS = _WHEEL.format("silero_vad.onnx")
"""The weights that the package silero-vad runs: its ONNX and its TorchScript files hold these values."""
SAFETENSORS = _WHEEL.format("silero_vad_16k.safetensors")
"""The same network with other values, which the package holds, but does not run."""

# Two people on the telephone, 30 s, and who speaks when, by hand.
_PYANNOTE = "pypi://pyannote.audio==4.0.7/pyannote/audio/sample/sample.{}#sha256={}"
_PYANNOTE_WHEEL = "852ea15c4d85bc34773e618267603ffca6a521669a74d33742692cc67fc700d6"
SAMPLE_AUDIO = _PYANNOTE.format("wav", _PYANNOTE_WHEEL)
SAMPLE_LABELS = _PYANNOTE.format("rttm", _PYANNOTE_WHEEL)

FREQUENCIES = 16
"""Frequencies of the spectrum that `silero_vad.mojo` computes together."""

LAYERS = LayerMap(
    conv=("stft_conv.weight", "conv?.weight", "final_conv.weight"),
    copy=("*.bias", "lstm_cell.*"),
    # Also in the ONNX and TorchScript files: the 8 kHz network, and numbers of the graph.
    ignore=("_model_8k.*", "model_8k.*", "If_0_else_branch__*", "val_*"),
    rename=(  # the names in the ONNX and TorchScript files
        (r"^(_?model\.|If_0_then_branch__Inline_0__)", ""),
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
    hop: int = 512  # samples of a chunk, which has one probability
    context: int = 64  # samples of the chunk before that are read again
    window: int = 256  # of the short-time spectrum, as are the next two
    stride: int = 128
    reflected: int = 64  # samples mirrored after the end
    layers: tuple[tuple[int, int], ...] = ((128, 1), (64, 2), (64, 2), (128, 1))  # filters and stride
    kernel_size: int = 3
    units: int = 128  # of the LSTM

    @property
    def framing(self) -> tuple[int, int]:
        """The samples that a chunk reads, and from one chunk to the next."""
        return self.context + self.hop, self.hop

    @property
    def bins(self) -> int:
        """Frequencies of the spectrum."""
        return self.window // 2 + 1

    @property
    def state(self) -> int:
        """Values that pass from one call to the next."""
        return self.context + 2 * self.units

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
    """Reads the network's weights into native weights; by default the weights that the package silero-vad runs.

    Args:
        reference: An ONNX file of Silero's, a checkpoint, or a reference for `max_conv.weights.resolve`, such as
            `SAFETENSORS`, whose probabilities differ from the package's by up to 0.37.
        config: The sizes.

    Raises:
        FileNotFoundError: If there is no such file.
        ImportError: If the package that reads the file is not installed.
        ValueError: If the file is not a checkpoint, or does not hold this network.

    >>> load_weights("gone.onnx")
    Traceback (most recent call last):
    FileNotFoundError: assets: gone.onnx does not exist; pass the path of a file, ...
    """
    if re.search(r"\.onnx(#sha256=\w+)?$", str(reference)):
        return native_weights(read_onnx(resolve(reference)), config)
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
    *,
    exact: bool = False,
) -> PackedGraph:
    """Builds the graph; its weights are filled in when it is compiled, `max_conv.compile(graph, weights=weights)`.

    Inputs, in order, all float32, with symbolic B and T of at least 1:
        chunks: (B, T, 512), the sound, -1 to 1: T chunks in a row of each of B signals.
        state: (B, 320), from before the first chunk: 64 samples, then the LSTM's hidden and cell state.

    Outputs, in order, all float32:
        probability: (B, T).
        state: The same after the last chunk, to be passed on with the next.

    Args:
        config: The sizes.
        weights: The result of `load_weights`; only its names and shapes go into the graph.
        device: Where the graph runs; None is the CPU.
        dtype: The dtype of the computation. On a CPU the network is one operation, which computes 16 bits in float32: it
            is faster than layers of 16 bits, and more exact.
        exact: As in `max_conv.conv1d`.

    Returns:
        The graph.

    Raises:
        ValueError: If the weights do not fit the config.
    """
    live = is_live()
    inputs: dict[str, list[str | int]] = {"chunks": ["batch", "time", config.hop], "state": ["batch", config.state]}
    if live:
        inputs = {"sound": ["batch", "samples"]}
    graph, w = begin(
        Ports("silero_vad", inputs, ["probability"] if live else ["probability", "state"]),
        config.shapes(),
        weights,
        device,
        dtype,
        exact=exact,
    )
    with graph:
        if live:
            chunks = signals().whole_frames(graph.inputs[0].tensor, config.hop)
            state, place = signals().recall(chunks, config.state)
        else:
            chunks, state = (value.tensor for value in graph.inputs)
        panels = all(filters % PANEL == 0 for filters in (*(f for f, _ in config.layers), 4 * config.units))
        panels &= config.window % (2 * PANEL) == 0 and _mirrored(weights["stft_conv.weight"])
        if w.device.is_cpu() and dtype != DType.float64 and panels:
            probability, last = _in_one(config, Weights(weights, w.device, DType.float32), chunks, state)
        else:
            probability, last = _in_layers(config, w, chunks, state)
        if live:
            signals().keep(last, place)
        graph.output(*([probability] if live else [probability, last]))
    return graph


def initial_state(batch: int, config: Config = Config()) -> np.ndarray:
    """Returns the state before any sound: zeros.

    >>> initial_state(2).shape
    (2, 320)
    """
    return np.zeros((batch, config.state), np.float32)


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
    probability, _ = model(lines.reshape(batch, -1, config.hop), initial_state(batch, config))
    return probability[0] if np.ndim(audio) == 1 else probability


def _layers(config: Config) -> list[Emitted]:
    """Returns the layers from a chunk's sound to the LSTM's gates."""
    kernel, pad = config.kernel_size, config.kernel_size // 2
    layers = [("stft_conv.weight", Geometry.of(config.window, config.stride, (0, config.reflected)), 2 * config.bins)]
    for i, (filters, stride) in enumerate(config.layers, 1):
        layers.append((f"conv{i}.weight", Geometry.of(kernel, stride, pad), filters))
    layers.append(("lstm_cell.weight_ih", Geometry.of(1), 4 * config.units))
    positions, channels, found = config.context + config.hop, 1, []
    for name, geometry, filters in layers:
        positions = geometry.output_length(positions)
        found.append(Emitted(name, Layer(geometry, "NLC", channels, filters, 1), "silero", positions))
        channels = config.bins if channels == 1 else filters
    return found


def _in_layers(config: Config, w: Weights, chunks: TensorValue, state: TensorValue) -> list[TensorValue]:
    """Returns the outputs, computed layer by layer."""
    batch, time, hop = chunks.shape
    context, hidden, cell = ops.split(state, [config.context, config.units, config.units], axis=1)
    row = time * hop
    before = ops.concat([context, ops.reshape(chunks, [batch, row])], axis=1)[:, (slice(0, -config.context), row)]
    before = ops.reshape(before, chunks.shape)[:, :, : config.context]
    x = ops.concat([before, chunks], axis=2)
    x = ops.cast(ops.reshape(x, [batch * time, config.context + config.hop, 1]), w.dtype)
    end = (0, config.reflected)
    x = conv1d(x, w["stft_conv.weight"], stride=config.stride, padding=end, padding_mode="reflect")
    real, imaginary = x[:, :, : config.bins], x[:, :, config.bins :]
    x = ops.sqrt(real * real + imaginary * imaginary)
    for i, (_, stride) in enumerate(config.layers, 1):
        x = ops.relu(w.conv(x, f"conv{i}", stride=stride, padding=config.kernel_size // 2))
    features = ops.reshape(x, [batch, time, x.shape[2]])
    hidden, cell = (ops.cast(value, w.dtype) for value in (hidden, cell))
    outputs, hidden, cell = (w / "lstm_cell").lstm_from(features, hidden, cell)
    probability = ops.sigmoid(ops.squeeze(w.conv(ops.relu(outputs), "final_conv"), 2))
    context = chunks[:, -1, config.hop - config.context :]
    state = ops.concat([context, *(ops.cast(value, DType.float32) for value in (hidden, cell))], axis=1)
    return [ops.cast(probability, DType.float32), state]


def _in_one(config: Config, w: Weights, chunks: TensorValue, state: TensorValue) -> list[TensorValue]:
    """Returns the outputs, computed in one operation, which `kernels/models/silero_vad.mojo` describes."""
    layers = _layers(config)
    rows = []
    for emitted in layers:
        assert emitted.layer is not None
        geometry = emitted.layer.geometry
        rows.append((geometry.kernel_size, geometry.stride, geometry.left, emitted.layer.group_filters))
    rows[0] = (*rows[0][:3], config.bins)
    convolutions = [f"conv{i}.{kind}" for i in range(1, len(config.layers) + 1) for kind in ("weight", "bias")]
    gates = [f"lstm_cell.{name}" for name in ("weight_ih", "bias_ih", "bias_hh")]
    panels = w.make("silero_vad.panels", _panels, "stft_conv.weight", *convolutions, *gates)
    w_hh = w.transposed("lstm_cell.weight_hh")
    head = w.make("final_conv", np.append, "final_conv.weight", "final_conv.bias")
    numbers = [ops.constant(value, DType.int64, device=w.device) for value in (np.array(rows), config.reflected)]
    record(
        *layers,
        Emitted("lstm_cell.weight_hh", units=config.units),
        Emitted("final_conv.weight", Layer(Geometry.of(1), "NLC", config.units, 1, 1), "silero"),
    )
    results = [TensorType(DType.float32, chunks.shape[:2], w.device), state.type]
    operands = [chunks, state, numbers[0], panels, w_hh, head, numbers[1]]
    probability, last = custom_op("max_conv.silero_vad", w.device, operands, results)
    return [signals().same_positions(probability, chunks), last]


def _mirrored(spectrum: np.ndarray) -> bool:
    """Whether the filters are windowed waves: cosines and then sines, of frequencies 0 to half of the sampling rate.

    With a symmetric window, each wave is symmetric about its middle. The waves of two frequencies that mirror each other
    about a quarter of the rate differ only in the sign of every second sample.
    """
    cosines, sines = np.split(spectrum[:, 0], 2, axis=1)
    signs = np.where(np.arange(len(spectrum)) % 2, -1, 1)[:, None]
    return (
        all(
            np.array_equal(waves[1:], sign * waves[:0:-1]) and np.array_equal(waves, sign * signs * waves[:, ::-1])
            for waves, sign in ((cosines, 1), (sines, -1))
        )
        and not sines[0].any()
    )


def _panels(spectrum: np.ndarray, *arrays: np.ndarray) -> np.ndarray:
    """Returns the layers' filters in panels of 32, and each layer's bias after its filters, in one array.

    A panel of the spectrum holds 16 frequencies up to a quarter of the rate: half of the cosines, a row of zeros, and
    half of the sines; `kernels/models/silero_vad.mojo` computes the other frequencies from these.

    Raises:
        ValueError: If the spectrum's filters are not waves, but the filters that the graph was built for were.
    """
    if not _mirrored(spectrum):
        raise ValueError("silero_vad: stft_conv.weight is no windowed transform; build the graph with these weights.")
    *convolutions, w_ih, bias_ih, bias_hh = arrays
    arrays = (*convolutions, w_ih.T[None], bias_ih + bias_hh)
    half, count = len(spectrum) // 2, len(spectrum) // 4 + 1
    cosines, sines = np.split(spectrum[:, 0], 2, axis=1)
    waves = np.zeros((2 * half + 2, -(-count // FREQUENCIES) * FREQUENCIES))
    waves[: half + 1, :count] = cosines[: half + 1, :count]
    waves[half + 2 :, :count] = sines[:half, :count]
    parts = [waves.reshape(len(waves), -1, FREQUENCIES).swapaxes(0, 1).ravel()]
    for filter, bias in zip(arrays[::2], arrays[1::2], strict=True):
        rows = filter.reshape(-1, len(bias) // PANEL, PANEL)
        parts += [rows.swapaxes(0, 1).ravel(), bias]
    return np.concatenate(parts).astype(np.float32)


TASK = Task(
    kind="speech",
    input="sound",
    output="the probability of speech in each chunk of 512 samples, (chunks,) or (batch, chunks)",
    run=detect,
    state=initial_state,
)
