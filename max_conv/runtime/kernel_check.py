"""Checks the kernels on this machine: random layers against the reference in float64."""

import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from max.driver import CPU, accelerator_count
from max.dtype import DType
from max.graph import DeviceRef, TensorType, TensorValue

from ..cache import cache_dir, whole_file
from ..conv.accelerators import accelerated, architecture, check_file, trying
from ..conv.arrays import as_buffer, as_float64
from ..conv.dispatch import Layer, choose, only
from ..conv.geometry import PADDING_MODES, Geometry
from ..conv.graph import PackedGraph
from ..conv.library import kernel_key
from ..conv.nn import Conv1D, ConvolutionLayer, ConvTranspose1D
from ..conv.ops import conv1d
from ..conv.processor import cpu_features
from ..conv.reference import conv1d_ref, conv_transpose1d_ref
from ..streaming.graph import streaming
from .kinds import Kind, ready
from .session import compile

EPS = {DType.float32: 2.0**-23, DType.float64: 2.0**-52, DType.float16: 2.0**-23, DType.bfloat16: 2.0**-23}
"""Machine epsilon of the sums."""
ROUNDING = {DType.float32: 0.0, DType.float64: 0.0, DType.float16: 2.0**-11, DType.bfloat16: 2.0**-8}
"""The relative error of the result's last rounding."""
LONG = 66_000
"""Positions of one layer of each row, more than 65,536."""
CHANNELS = (1, 2, 3, 8, 15, 16, 17, 31, 32, 33, 48, 64, 65)
LENGTHS = (1, 5, 13, 14, 15, 47, 48, 49, 97, 130)

SIGNAL_LAYER: dict[str, Any] = {"stride": 2, "padding": (3, 2), "padding_mode": "reflect"}
"""The layer of live and ragged signals."""

Key = tuple[str, str, str]
"""The operation and its kernel, the layout of the data, the dtype."""


@dataclass(frozen=True)
class Checked:
    """The layers that one kernel computed.

    Attributes:
        kernel: The operation and its kernel.
        layout: The data's layout: "NLC" or "NCL".
        dtype: The data's dtype.
        layers: The number of layers that were compared.
        error: The largest error, divided by the error that the kernel may have. Above 1, the kernel is wrong here.
        worst: The layer with that error.
        gflops: Operations per nanosecond in the longest layer, if it was timed.
    """

    kernel: str
    layout: str
    dtype: str
    layers: int
    error: float
    worst: str
    gflops: float | None = None

    @property
    def right(self) -> bool:
        """Whether no error is larger than it may be."""
        return self.error <= 1


@dataclass(frozen=True)
class _Case:
    """A layer with loaded weights, and the data for it."""

    layer: ConvolutionLayer
    weights: dict[str, Any]
    x: Any

    def __str__(self) -> str:
        layer = self.layer
        sizes = f"{layer.in_channels} -> {layer.out_channels} k{layer.kernel_size} s{layer.stride} d{layer.dilation}"
        mode = getattr(layer, "padding_mode", "zeros")
        return f"{sizes} g{layer.num_groups}, padding {layer.padding} {mode}, data {tuple(self.x.shape)}"


def check(
    layers: int | None = None,
    *,
    device: str = "cpu",
    timed: bool = False,
    step: Callable[[str], Any] = lambda text: None,
) -> list[Checked]:
    """Compares this machine's kernels with the reference, in every layout and dtype.

    Each kernel computes random layers whose sizes are near its tiles' sizes, in all padding modes, with strides, dilations
    and groups, and one of more than 65,536 positions. Signals in chunks and ragged batches are compared, too. The first
    check on a machine compiles its graphs, which takes a minute or two; later checks take seconds. The result is kept in
    the user's cache.

    Args:
        layers: The number of layers of each row: 8 for a CPU, and 2 for a GPU, which compiles each layer.
        device: "cpu" or "gpu". If all kernels are right on a GPU, layers get its fast kernels from then on.
        timed: Whether the longest layer of each row is timed.
        step: Called with a description of each step.

    Returns:
        A row for each kernel, layout and dtype.
    """
    host = device == "cpu"
    layers = layers or (8 if host else 2)
    if not host and not accelerator_count():
        raise ValueError("check: this machine has no accelerator that MAX can use; check the CPU.")
    token = trying.set(not host)
    try:
        groups = _drawn(layers, None if host else DeviceRef.GPU())
        step(f"compiling {len(groups)} kernels that this machine has not compiled yet")
        ready(*(_kind(cases[0].layer) for cases in groups.values() if host))
        answers = {} if host else _answers(groups)
        step("comparing layers with the reference")
        rows = [_compared(key, groups[key], timed, answers.get(key)) for key in sorted(groups)]
        step("comparing signals in chunks and ragged batches")
        rows += [_live(layers, device), _ragged(layers, device)]
    finally:
        trying.reset(token)
    path = _path(device)
    path.parent.mkdir(parents=True, exist_ok=True)
    if not host:
        check_file().unlink(missing_ok=True)
        if all(row.right for row in rows):
            check_file().touch()
    with whole_file(path) as whole:
        whole.write_text(json.dumps([asdict(row) for row in rows]))
    return rows


def last_check(device: str = "cpu") -> list[Checked] | None:
    """Returns the rows of the last check of these kernels on this processor or GPU; None if there was none."""
    try:
        return [Checked(**row) for row in json.loads(_path(device).read_text())]
    except (OSError, ValueError, TypeError):
        return None


def _path(device: str) -> Path:
    processor = sorted(cpu_features()) if device == "cpu" else [architecture()]
    facts = "\n".join([kernel_key(), version("max"), *processor])
    return cache_dir() / "checks" / f"{hashlib.sha256(facts.encode()).hexdigest()[:16]}.json"


def _graph(layer: ConvolutionLayer) -> PackedGraph:
    """Returns the graph of a layer on the CPU, with its usual kernel, even if another kernel was faster on this machine."""
    with only(_usual(layer)):
        return PackedGraph("check", layer, input_types=layer.input_types())


def _usual(layer: ConvolutionLayer) -> str:
    """Returns the kernel that a layer gets on the CPU if nothing was timed."""
    return choose(_described(layer), packed=True, exact=layer.exact).kernel


def _described(layer: ConvolutionLayer) -> Layer:
    sizes = (layer.in_channels // layer.num_groups, layer.out_channels // layer.num_groups, layer.num_groups)
    return Layer.of(layer.geometry, layer.layout, *sizes, layer.dtype.name)


def _kind(layer: ConvolutionLayer) -> Kind:
    (emitted,) = _graph(layer).emitted[0]
    assert emitted.form is not None, "a layer alone has a form"
    return Kind.of(emitted.form, layer.dtype)


def _drawn(count: int, gpu: DeviceRef | None = None) -> dict[Key, list[_Case]]:
    """Returns `count` random layers for each kernel, layout and dtype, the last of them long; the same in every check."""
    groups: dict[Key, list[_Case]] = {}
    random = np.random.default_rng(0)
    for number in range(4000 * count):
        layer, long = _random_layer(random, gpu), number % 3 == 0
        described = _described(layer)
        kernel = accelerated(described, True).kernel if gpu else _usual(layer)
        cases = groups.setdefault((f"{layer.op} {kernel}", layer.layout, layer.dtype.name), [])
        full = len(cases) == count - 1
        heavy = described.group_channels * described.group_filters > 4500
        if len(cases) < count and long == full and not (long and heavy):
            cases.append(_loaded(layer, LONG if long else 0, random))
    return groups


def _random_layer(random: np.random.Generator, gpu: DeviceRef | None) -> ConvolutionLayer:
    pick = random.choice
    groups = int(pick([1, 1, 1, 2, 4]))
    channels, filters = (int(pick(CHANNELS)) * groups for _ in range(2))
    if random.random() < 0.2:  # depthwise
        groups = channels = filters = int(pick([8, 16, 33, 64]))
    dtype = list(EPS)[int(random.integers(len(EPS)))]
    taps, stride, dilation = int(pick([1, 2, 3, 5, 7, 11])), int(pick([1, 1, 2, 3])), int(pick([1, 1, 2]))
    left = int(random.integers(0, taps))
    options: dict[str, Any] = {"has_bias": bool(random.random() < 0.7), "permute": bool(random.random() < 0.5)}
    options |= {"num_groups": groups, "exact": bool(random.random() < 0.5), "device": gpu}
    if random.random() < 0.5:
        return ConvTranspose1D(taps, channels, filters, dtype, stride, min(left, taps // 2), dilation, **options)
    options["padding_mode"] = str(pick(PADDING_MODES))
    return Conv1D(taps, channels, filters, dtype, stride, left, dilation, **options)


def _loaded(layer: ConvolutionLayer, length: int, random: np.random.Generator) -> _Case:
    """Returns a layer with random weights and data; without a length, a short signal or two."""
    weights = {
        name: as_buffer(random.standard_normal([int(n) for n in weight.shape]), layer.dtype)
        for name, weight in layer.raw_state_dict().items()
    }
    layer.load_state_dict(weights)
    sizes = {"N": 1, "L": length, "C": layer.in_channels}
    if not length:
        sizes |= {
            "N": int(random.integers(1, 3)),
            "L": int(random.choice(LENGTHS)) + layer.dilation * layer.kernel_size,
        }
    return _Case(layer, weights, as_buffer(random.standard_normal([sizes[axis] for axis in layer.layout]), layer.dtype))


def _answers(groups: Mapping[Key, Sequence[_Case]]) -> dict[Key, list[Any]]:
    """Returns a GPU's outputs of all layers. They are one graph: each graph takes seconds, a layer in it less than one."""
    cases = [case for key in sorted(groups) for case in groups[key]]

    def network(*values: TensorValue) -> list[TensorValue]:
        return [case.layer(value) for case, value in zip(cases, values, strict=True)]

    types = []
    for number, case in enumerate(cases):
        sizes: dict[str, int | str] = {"N": f"n{number}", "L": f"l{number}", "C": case.layer.in_channels}
        shape = [sizes[axis] for axis in case.layer.layout]
        types.append(TensorType(case.layer.dtype, shape, DeviceRef.GPU()))
    results = iter(compile(network, types)(*(case.x for case in cases)))
    return {key: [next(results) for _ in groups[key]] for key in sorted(groups)}


def _compared(key: Key, cases: Sequence[_Case], timed: bool, answers: Sequence[Any] | None = None) -> Checked:
    """Compares the layers of a kernel with the reference; runs them if their answers are not given."""
    errors, gflops = [], None
    for number, case in enumerate(cases):
        if answers is None:
            graph = _graph(case.layer)
            model = compile(graph, weights=graph.loaded())
        got = as_float64(model(case.x) if answers is None else answers[number].to(CPU()))
        want, allowed, work = _reference(case)
        errors.append(_error(got, want, allowed))
    if timed and answers is None:
        gflops = work / _seconds(lambda: model(case.x)) / 1e9
    worst = int(np.argmax(errors))
    return Checked(*key, len(cases), errors[worst], str(cases[worst]), gflops)


def _error(got: np.ndarray, want: np.ndarray, allowed: np.ndarray) -> float:
    """Returns the largest error, divided by the error that is allowed."""
    if got.shape != want.shape or not np.isfinite(got).all():
        return math.inf
    return float(np.max(np.abs(got - want) / np.maximum(allowed, 1e-300), initial=0.0))


def _reference(case: _Case) -> tuple[np.ndarray, np.ndarray, float]:
    """Returns the right answer, the error that each value may have, and the number of operations."""
    layer, x = case.layer, as_float64(case.x)
    arrays = {name: as_float64(value) for name, value in case.weights.items()}
    filter, bias = arrays["weight"], arrays.get("bias")
    options: dict[str, Any] = {"stride": layer.stride, "padding": layer.padding, "dilation": layer.dilation}
    options |= {"groups": layer.num_groups, "layout": layer.layout, "filter_layout": layer.filter_layout}
    reference: Callable[..., np.ndarray] = conv_transpose1d_ref
    if isinstance(layer, Conv1D):
        reference = conv1d_ref
        options["padding_mode"] = layer.padding_mode
    want = reference(x, filter, bias, **options)
    sums = reference(np.abs(x), np.abs(filter), None, **options).max(initial=0.0)
    terms = layer.kernel_size * layer.in_channels // layer.num_groups
    largest = np.abs(x).max(initial=0.0) * np.abs(filter).max(initial=0.0)
    eps = EPS[layer.dtype]
    allowed = 4 * eps * (math.sqrt(terms) * largest + sums) + (eps + ROUNDING[layer.dtype]) * np.abs(want)
    moves = (x if isinstance(layer, ConvTranspose1D) else want).shape
    positions = moves[0] * moves[layer.layout.index("L")]
    return want, allowed, 2.0 * positions * filter.size


def _seconds(run: Callable[[], Any]) -> float:
    """Returns the least time of some runs."""
    times = []
    for _ in range(5):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


def _device(name: str) -> DeviceRef:
    return DeviceRef.CPU() if name == "cpu" else DeviceRef.GPU()


def _signals(count: int) -> tuple[np.ndarray, list[np.ndarray]]:
    """Returns a filter, and signals of different length."""
    random = np.random.default_rng(1)
    filter = random.standard_normal((5, 8, 17)).astype(np.float32)
    return filter, [random.standard_normal((n, 8)).astype(np.float32) for n in random.integers(9, 90, count)]


def _whole(key: Key, got: Sequence[np.ndarray], signals: Sequence[np.ndarray], filter: np.ndarray) -> Checked:
    """Compares the answers to signals with the reference."""
    errors = []
    for answer, signal in zip(got, signals, strict=True):
        want = conv1d_ref(signal, filter, **SIGNAL_LAYER)
        errors.append(_error(answer, want, np.full(want.shape, 8 * EPS[DType.float32] * 40 * np.abs(want).max())))
    worst = int(np.argmax(errors))
    return Checked(*key, len(signals), errors[worst], f"a signal of {len(signals[worst])} positions")


def _live(count: int, device: str) -> Checked:
    """Compares signals that come in chunks of any size."""
    filter, signals = _signals(count)
    layer = Conv1D(5, 8, 17, DType.float32, **SIGNAL_LAYER, device=_device(device))
    layer.load_state_dict({"weight": filter})
    stream = compile(streaming(layer)).stream()
    random, got = np.random.default_rng(2), []
    for signal in signals:
        stream.reset()
        cuts = np.sort(random.integers(0, len(signal), 3))
        pieces = [stream.push(piece[None])[0] for piece in np.split(signal, cuts)]
        got.append(np.concatenate([*pieces, stream.flush()[0]]))
    return _whole(("conv1d in chunks", "NLC", "float32"), got, signals, filter)


def _ragged(count: int, device: str) -> Checked:
    """Compares signals of different length in one batch, which NaN fills up."""
    filter, signals = _signals(count)

    def layer(x: TensorValue, w: TensorValue, lengths: TensorValue) -> TensorValue:
        return conv1d(x, w, **SIGNAL_LAYER, lengths=lengths)

    place = _device(device)
    types = {
        "x": TensorType(DType.float32, ["batch", "length", 8], place),
        "w": TensorType(DType.float32, [5, 8, 17], place),
        "lengths": TensorType(DType.int64, ["batch"], place),
    }
    lengths = np.array([len(signal) for signal in signals])
    batch = np.full((len(signals), lengths.max(), 8), np.nan, np.float32)
    for row, signal in zip(batch, signals, strict=True):
        row[: len(signal)] = signal
    answers = compile(layer, types)(batch, filter, lengths)
    own = Geometry.of(5, **SIGNAL_LAYER).output_length
    got = [answer[: own(n)] for answer, n in zip(answers, lengths.tolist(), strict=True)]
    return _whole(("conv1d, ragged", "NLC", "float32"), got, signals, filter)
