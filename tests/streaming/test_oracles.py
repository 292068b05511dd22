"""Live layers against the tests of streaming that other projects have, and a case in which one of them is wrong.

- Moshi: the checks of `moshi/modules/conv.py` and of `conv_test.py`. Both files come from its wheel.
- ONNX: the cases of the node CausalConvWithState, as the installed package makes them.
- cached_conv: two layers that see ahead, at the begin of a signal.

Layers run on kernels and windows of the property tests, so that nothing is compiled for this file alone. Every stream
begins with NaN in its state, or with what a signal before has left there.
"""

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from max.driver import Buffer
from max.dtype import DType

from live import windows
from max_conv.conv.dispatch import Layer
from max_conv.conv.geometry import Geometry, TransposedGeometry
from max_conv.conv.layouts import permute
from max_conv.conv.lines import Line, Window
from max_conv.conv.packing import Packing
from max_conv.conv.reference import conv1d_ref
from max_conv.runtime.kinds import ready
from max_conv.streaming import Stream, Timing
from max_conv.streaming.live import ALIGNMENT
from max_conv.streaming.timing import Chunk, Signal
from originals import from_wheel
from properties import Execute, Way, kinds_of, operands_of

MOSHI = "pypi://moshi==0.2.13/{}#sha256=beeb3ebc1d769a800e22b26bf4ec0d25f9525d54ae77979b37c86a2f782f4e64"
LIMIT = 1e-6
"""Moshi's own tolerance: the norm of the difference, divided by the norm of the answer."""
PAIRS = [(k, s) for k, s in itertools.product((1, 3, 4, 8, 15, 16), range(1, 10)) if s <= k]
"""Kernel sizes and strides of Moshi's checks."""
LENGTHS = {frames: [n for n in (1, 2, 8) if frames % n == 0] for frames in (1, 4, 8, 32, 54, 65, 128)}
"""Frames of its signals, and of the chunks that each is cut into."""
TESTS = list(itertools.product((False, True), range(4)))
"""The layers of Moshi's `conv_test.py`: whether transposed, and the number. Each has two tests."""

CASES = [
    "basic",
    "with_bias",
    "with_past_state",
    "silu",
    "swish_alias",
    "decode_step",
    "kernel_size_one",
    "with_bias_and_past_state",
    "silu_with_past_state",
    "b1_c1_degenerate",
    "short_input_no_past_state",
    "fp16",
    "silu_fp16",
]
"""ONNX's, after `test_causal_conv_with_state_`."""

PLAIN: tuple[Way, ...] = (("dense", "NLC", "packed"), ("lengthwise", "NCL", "FCS"), ("winograd", "NLC", "packed"))
TRANSPOSED: tuple[Way, ...] = (PLAIN[0], ("lengthwise", "NCL", "phased"), PLAIN[2])
DEPTHWISE: tuple[Way, ...] = (("depthwise", "NLC", "SCF"), ("depthwise", "NCL", "SCF"), *PLAIN[:2])
HALF: tuple[Way, ...] = (DEPTHWISE[0], PLAIN[1])
"""In float16; all others in float32 alone."""


@functools.cache
def kernels() -> dict[tuple[bool, DType, Way], Execute]:
    """Returns the functions that run the kinds, by whether they are transposed; see `properties.kinds_of`."""
    kinds = {
        (transposed, dtype, way): kind
        for transposed, ways in ((False, {*PLAIN, *DEPTHWISE}), (True, {*TRANSPOSED}))
        for (dtype, way), kind in kinds_of(dict.fromkeys(sorted(ways), transposed)).items()
        if dtype == DType.float32 or (dtype == DType.float16 and way in HALF and not transposed)
    }
    return {key: found.execute for key, found in zip(kinds, ready(*kinds.values()), strict=True)}


@dataclass(frozen=True)
class Part:
    """A layer, its weights in PyTorch's layout, and the activation after it."""

    geometry: Geometry | TransposedGeometry
    weight: np.ndarray
    bias: np.ndarray | None = None
    groups: int = 1
    after: Callable[[np.ndarray], np.ndarray] | None = None

    @property
    def channels(self) -> int:
        return self.weight.shape[0] if self.transposed else self.weight.shape[1] * self.groups

    @property
    def filters(self) -> int:
        return self.weight.shape[1] * self.groups if self.transposed else self.weight.shape[0]

    @property
    def transposed(self) -> bool:
        return isinstance(self.geometry, TransposedGeometry)


class Step:
    """One layer of a live network, on a kernel: the steps of one call."""

    def __init__(self, way: Way, part: Part, line: Line, offset: int) -> None:
        """Plans the layer's window, whose rows are stored in the state from a byte on."""
        kernel, layout, filter_layout = way
        self.part, self.dtype, self.layout = part, DType[str(part.weight.dtype)], layout
        self.window, self.after = Window.of(line, part.geometry), line.through(part.geometry)
        self.end = offset + self.window.kept * part.channels * part.weight.itemsize
        self.plan = buffer(np.array(self.window.numbers(offset), np.int64))
        self.bias = buffer(np.empty(0, part.weight.dtype) if part.bias is None else part.bias)
        assert self.window.emitted is not None
        sizes = (part.channels // part.groups, part.filters // part.groups, part.groups, self.dtype.name)
        own, emitted = (
            Layer.of(geometry, "NLC" if layout == "NLC" else "NCL", *sizes)
            for geometry in (part.geometry, self.window.emitted)
        )
        given, like_max = ("CFS", "SFC") if part.transposed else ("FCS", "SCF")
        if filter_layout in ("packed", "phased"):
            self.filter = buffer(Packing("weight", kernel, own, like_max)(permute(part.weight, given, like_max)))
        else:
            self.filter = buffer(permute(part.weight, given, filter_layout))
        self.numbers = emitted.numbers
        self.execute = kernels()[part.transposed, self.dtype, way]

    def __call__(
        self, x: np.ndarray, ticks: int, counts: Sequence[Buffer], state: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        rows = buffer(np.empty((self.window.size(ticks), 0), np.int8))
        lay_out = windows()["live", self.dtype, self.layout]
        read, new = lay_out([buffer(x), *counts, buffer(state), self.plan, rows])
        shape = (len(x), ticks * self.after.per_tick, self.part.filters)
        (y,) = self.execute(operands_of(read, self.filter, self.bias, self.numbers, shape))
        values = y.to_numpy()
        return values if self.part.after is None else self.part.after(values), new.to_numpy()


def buffer(array: np.ndarray) -> Buffer:
    return Buffer.from_numpy(np.ascontiguousarray(array))


def stream_of(ways: Sequence[Way], parts: Sequence[Part], batch: int, tick: int = 1) -> Stream:
    """Returns a stream of layers one after the other, each on its kernel, with all their outputs. Its state is NaN."""
    layout = ways[0][1]
    axis = layout.index("L")
    line, size = Line(tick), 0
    steps: list[Step] = []
    for way, part in zip(ways, parts, strict=True):
        steps.append(Step(way, part, line, -(-size // ALIGNMENT) * ALIGNMENT))
        line, size = steps[-1].after, steps[-1].end

    def run(x: np.ndarray, ticks: np.ndarray, ends: np.ndarray, state: np.ndarray) -> list[np.ndarray]:
        count, outputs = x.shape[axis], []
        if tick > 1:
            x = x.reshape(*x.shape[:axis], count * tick, *x.shape[axis + 2 :])
        for step in steps:
            x, state = step(x, count, (buffer(ticks), buffer(ends)), state)
            outputs.append(x)
        return [*outputs, state]

    timing = Timing(tick, line.first, (axis,), tuple(Signal(axis, step.after) for step in steps), size, None, None)
    dtype = str(parts[0].weight.dtype)
    shapes = [
        tuple(channels if a == "C" else None for a in layout)
        for channels in (parts[0].channels, *(part.filters for part in parts))
    ]
    chunk, *results = (Chunk("x", dtype, shape, axis) for shape in shapes)
    stream = Stream(run, timing, [chunk], results, batch)
    stream._state[...] = 0xFF
    return stream


def turned(y: Any, stream: Stream) -> list[np.ndarray]:
    """Returns each layer's answer as (N, C, L)."""
    values = y if isinstance(y, tuple) else (y,)
    return [value.transpose(0, 2, 1) if stream.timing.axes[0] == 1 else value for value in values]


def push(stream: Stream, x: np.ndarray) -> list[np.ndarray]:
    """Returns each layer's answer to the next chunk, (N, C, L)."""
    return turned(stream.push(np.ascontiguousarray(turned(x, stream)[0])), stream)


def split(x: np.ndarray, sizes: Iterable[int]) -> list[np.ndarray]:
    """Returns (N, C, L) in chunks of these sizes, and the rest in one."""
    return np.split(x, [end for end in itertools.accumulate(sizes) if end < x.shape[2]], axis=2)


def answers(stream: Stream, x: np.ndarray, sizes: Iterable[int]) -> list[np.ndarray]:
    """Returns each layer's answer to a new signal in chunks. None may be later than its delay."""
    stream.reset()
    found: list[list[np.ndarray]] = []
    seen = 0
    lines = [output.line for output in stream.timing.outputs]
    there = [0] * len(lines)
    for chunk in split(x, sizes):
        found.append(push(stream, chunk))
        seen += chunk.shape[2]
        before, there = there, [max(0, seen // stream.timing.tick * line.per_tick - line.delay) for line in lines]
        assert [y.shape[2] for y in found[-1]] == [n - m for n, m in zip(there, before, strict=True)]
    found.append(turned(stream.flush(), stream))
    return [np.concatenate(parts, axis=2) for parts in zip(*found, strict=True)]


def part_of(layer: Any) -> Part:
    """Returns Moshi's causal layer."""
    module = layer.conv.conv if hasattr(layer, "conv") else layer.convtr.convtr
    (kernel,), (stride,) = module.kernel_size, module.stride
    weight, bias = (value.detach().numpy() for value in (module.weight, module.bias))
    if isinstance(module, torch.nn.ConvTranspose1d):
        return Part(TransposedGeometry.of(kernel, stride, "causal"), weight, bias)
    return Part(Geometry.of(kernel, stride, (kernel - stride, 0)), weight, bias)


@pytest.fixture(scope="module")
def moshi() -> Iterator[tuple[Any, Any]]:
    """Returns Moshi's modules `conv` and `conv_test`.

    `conv_test` turns cuDNN off, which PyTorch forbids once its own test cases are imported, as test_torch_oracle.py does.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(torch.backends.flags_frozen.__globals__, "__allow_nonbracketed_mutation_flag", True)
        *_, conv, tests = from_wheel(
            MOSHI, "moshi", ["utils.compile", "modules.streaming", "modules.conv", "modules.conv_test"]
        )
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.no_grad():
        yield conv, tests
    torch.set_num_threads(threads)


def check_moshi(name: str, got: np.ndarray, *answers: torch.Tensor) -> None:
    for want in answers:
        assert got.shape == want.shape, f"{name}: {got.shape}, not {tuple(want.shape)}"
        off = np.linalg.norm(got - want.numpy()) / np.linalg.norm(want.numpy())
        assert off <= LIMIT, f"{name}: off by {off:.2g}"


@pytest.mark.parametrize(("kernel", "stride"), PAIRS)
def test_moshi(moshi: tuple[Any, Any], kernel: int, stride: int) -> None:
    """A layer, and a transposed one after it, against Moshi's answers to the whole signal and to the same chunks.

    The pairs of frames and chunk use the kernels alternately.
    """
    torch.manual_seed(1234)
    conv = moshi[0].StreamingConv1d(6, 12, kernel, stride, causal=True)
    transposed = moshi[0].StreamingConvTranspose1d(12, 6, kernel, stride, causal=True)
    parts = [part_of(conv), part_of(transposed)]
    streams = [stream_of(ways, parts, 3, stride) for ways in zip(PLAIN, TRANSPOSED, strict=True)]
    turn = itertools.islice(itertools.cycle(streams), PAIRS.index((kernel, stride)), None)
    for frames, sizes in LENGTHS.items():
        x = torch.randn(3, 6, frames * stride)
        y = conv(x)
        z = transposed(y)
        for size, stream in zip(sizes, turn):
            with conv.streaming(3), transposed.streaming(3):
                ys = [conv(chunk) for chunk in x.split(size * stride, dim=2)]
                zs = [transposed(chunk) for chunk in ys]
            got = answers(stream, x.numpy(), [size * stride] * (frames // size))
            check_moshi(f"{frames} frames by {size}", got[0], y, torch.cat(ys, dim=2))
            check_moshi(f"{frames} frames by {size}, transposed", got[1], z, torch.cat(zs, dim=2))


def test_these_are_all_of_moshi(moshi: tuple[Any, Any]) -> None:
    assert len(PAIRS) == 34 and sum(map(len, LENGTHS.values())) == 15
    assert len(moshi[1].CONV1D_DATA) == len(moshi[1].CONV1D_TRANSPOSE_DATA) == 4


@pytest.mark.parametrize(("transposed", "number"), TESTS)
def test_moshi_conv_test(moshi: tuple[Any, Any], transposed: bool, number: int) -> None:
    """Its two tests of a layer: position by position after the first filter, and one signal after the other, cut off."""
    conv, tests = moshi
    values = (tests.CONV1D_TRANSPOSE_DATA if transposed else tests.CONV1D_DATA)[number].values
    batch, channels, filters, length, kernel, *stride = values
    layer = (conv.StreamingConvTranspose1d if transposed else conv.StreamingConv1d)(
        channels, filters, kernel, *stride, causal=True
    )
    random = torch.Generator().manual_seed(41)
    layer.apply(functools.partial(tests._init_weights, generator=random))
    x = torch.rand((batch, channels, length), generator=random)
    want = layer(x)
    streams = [stream_of([way], [part_of(layer)], batch) for way in (TRANSPOSED if transposed else PLAIN)]
    for stream in streams:
        (got,) = answers(stream, x.numpy(), [kernel, *[1] * (length - kernel)])
        torch.testing.assert_close(torch.from_numpy(got), want)
    ends = [*range(kernel, length, max(1, length // 32)), length]  # of the large layer every eighth
    for end, stream in zip(ends, itertools.cycle(streams)):
        (got,) = answers(stream, x[:, :, :end].numpy(), [])
        torch.testing.assert_close(torch.from_numpy(got), want[:, :, : end * (stride or [1])[0]])


@functools.cache
def onnx_cases() -> dict[str, tuple[Any, list[Any], list[np.ndarray]]]:
    """Returns the nodes, inputs and outputs of ONNX's cases.

    The module is imported while a test runs: `collect_testcases`, which test_onnx_oracle.py calls, returns all cases of all
    modules so far.
    """
    module = pytest.importorskip(
        "onnx.backend.test.case.node.causal_conv_with_state", reason="the installed onnx has no CausalConvWithState"
    )
    found: dict[str, tuple[Any, list[Any], list[np.ndarray]]] = {}

    def expect(node: Any, inputs: list[Any], outputs: list[np.ndarray], name: str, **_: Any) -> None:
        given = dict(zip((name for name in node.input if name), inputs, strict=True))
        found[name] = node, [given.get(name) for name in (*node.input, "", "")[:4]], outputs

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "expect", expect)
        for name in vars(module.CausalConvWithState):
            if name.startswith("export"):
                np.random.seed(0)  # as ONNX does
                getattr(module.CausalConvWithState, name)()
    return found


def test_these_are_all_of_onnx() -> None:
    assert [f"test_causal_conv_with_state_{name}" for name in CASES] == list(onnx_cases())


@pytest.mark.parametrize("case", CASES)
def test_onnx_causal_conv_with_state(case: str) -> None:
    """Output and state, in one chunk as in ONNX's graph, in two, and position by position."""
    node, (x, weight, bias, past), (want, present) = onnx_cases()[f"test_causal_conv_with_state_{case}"]
    active = [a.s for a in node.attribute] in ([b"silu"], [b"swish"])
    assert active or not node.attribute, "an attribute that the case does not carry"
    batch, channels, length = x.shape
    kept = weight.shape[2] - 1
    part = Part(Geometry.of(kept + 1, padding="causal"), weight, bias, channels)
    ways = HALF if weight.dtype == np.float16 else DEPTHWISE
    for way, sizes in itertools.product(ways, ([length], [max(1, length - 2)], [1] * length)):
        stream = stream_of([way], [part], batch)
        if past is not None:
            rows = np.ascontiguousarray(turned(past, stream)[0])
            state = stream.state() | {"state": rows.reshape(batch, -1).view(np.uint8)}
            stream.put(range(batch), state | dict.fromkeys(("ticks", "seen"), np.full(batch, kept)))
        got = np.concatenate([push(stream, chunk)[0] for chunk in split(x, sizes)], axis=2)
        if active:
            got = (got / (1 + np.exp(-got.astype(np.float32)))).astype(x.dtype)
        rtol, atol = (1e-3, 1e-7) if x.dtype == np.float16 else (1e-5, 1e-6)
        assert got.dtype == want.dtype
        np.testing.assert_allclose(got, want, rtol=rtol, atol=atol, err_msg=f"{way} {sizes}")
        # ONNX pads a short signal in its state; here nothing before the first position is kept.
        there = kept if past is not None else min(kept, length)
        assert not present[:, :, : kept - there].any()
        held = stream.take(range(batch))["state"].reshape(-1).view(x.dtype)
        (held,) = turned(held.reshape(turned(present, stream)[0].shape), stream)
        np.testing.assert_array_equal(held[:, :, kept - there :], present[:, :, kept - there :])


def test_the_begin_of_a_signal() -> None:
    """Two layers that see ahead equal the whole from the first sample on.

    cached_conv's do not: each begins with a state of zeros, computes what comes before its first output, and the next layer
    reads that where the whole signal has zeros. In NumPy: causal layers, and their output earlier.
    """
    random = np.random.default_rng(0)
    shapes = {(8, 4, 5): 20, (8,): 20, (4, 8, 7): 56, (4,): 56}  # uniform, as PyTorch makes them
    weights = [(random.uniform(-1, 1, shape) / n**0.5).astype(np.float32) for shape, n in shapes.items()]
    x = random.standard_normal((2, 4, 256)).astype(np.float32)

    def whole(first: tuple[int, int], second: tuple[int, int]) -> np.ndarray:
        w, b, w2, b2 = (permute(a, "FCS", "SCF") if a.ndim == 3 else a for a in weights)
        h = np.tanh(conv1d_ref(x.transpose(0, 2, 1), w, b, padding=first))
        return conv1d_ref(h, w2, b2, padding=second).transpose(0, 2, 1)

    want = whole((2, 2), (3, 3))
    cached = whole((4, 0), (6, 0))
    off = np.abs(cached[:, :, 5:] - want[:, :, :-5]).max(axis=(0, 1))
    assert off[:3].min() > 0.03 and off[3:].max() < 1e-12

    parts = [
        Part(Geometry.of(5, padding=2), weights[0], weights[1], after=np.tanh),
        Part(Geometry.of(7, padding=3), weights[2], weights[3]),
    ]
    for way in PLAIN:
        stream = stream_of([way, way], parts, 2)
        assert stream.timing.outputs[1].line.delay == 5
        for sizes in ([16] * 16, [1] * 256, [3, 1, 40, 7, 100], random.integers(0, 12, 40).tolist(), [256]):
            _, got = answers(stream, x, sizes)
            np.testing.assert_allclose(got, want, rtol=0, atol=2e-6, err_msg=f"{way} {sizes}")
