"""Networks of the gallery live, in chunks of any size, against their own answer to the whole signal."""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import floor
from typing import Any

import numpy as np
import pytest
from max_conv.graphs import dac, encodec, hifigan, mamba, tcn, vocos, wav2vec2

import max_conv
from harness import compile_together
from max_conv.streaming import Stream, Timing

VOCODER = hifigan.Config(
    mels=20, channels=64, rates=(4, 2), rate_kernel_sizes=(8, 4), kernel_sizes=(3, 7), dilations=((1, 3), (1, 3))
)
DAC = dac.Config(channels=8, decoder_channels=64, ratios=(2, 3), codebooks=2, quantizers=2, codebook_size=32)
ENCODEC = encodec.Config(channels=4, ratios=(4, 3, 2, 2), hidden=16, codebooks=2, codebook_size=32, quantizers=2)
TCN = tcn.Config(inputs=20, channels=(32, 32, 32), kernel_size=3)
VOCOS = vocos.Config(mels=20, channels=32, hidden=64, layers=2, window=64, hop=16)
MAMBA = mamba.Config(hidden=32, intermediate=64, layers=1)
FEATURES = wav2vec2.Config(channels=(32,) * 3, kernel_sizes=(10, 3, 2), strides=(5, 2, 2), norm="layer", hidden=32)


@dataclass(frozen=True)
class Case:
    """A network, the shape of a position of its input, and the largest code if it reads codes."""

    build: Callable[..., Any]
    config: Any
    position: tuple[int, ...]
    codes: int = 0
    shortest: int = 40

    @property
    def name(self) -> str:
        return f"{self.build.__module__.rpartition('.')[2]}.{self.build.__name__}"

    @property
    def axis(self) -> int:
        return 2 if self.codes else 1


CASES = [
    Case(hifigan.build, VOCODER, (20,)),
    Case(tcn.build, TCN, (20,)),
    Case(vocos.build, VOCOS, (20,)),
    Case(mamba.build, MAMBA, (32,)),
    Case(wav2vec2.build_features, FEATURES, (), shortest=100),
    Case(encodec.build, ENCODEC, (), shortest=48 * 8),
    Case(dac.build, DAC, (), shortest=100),
]
NAMES = [case.name for case in CASES]


def weights_of(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """Returns random weights with which signals neither vanish nor explode."""
    rng, weights = np.random.default_rng(5), {}
    for name, shape in shapes.items():
        if name.endswith("window"):
            weights[name] = np.hanning(shape[0]).astype(np.float32)
        elif name.endswith(("alpha", "gamma")) or ("norm" in name and name.endswith("weight")):
            weights[name] = rng.uniform(0.5, 1.5, shape).astype(np.float32)
        else:
            size = 0.1 if len(shape) == 1 else 1 / np.sqrt(np.prod(shape[:-1]))
            weights[name] = (size * rng.standard_normal(shape)).astype(np.float32)
    return weights


@functools.cache
def models() -> dict[str, tuple[max_conv.Model, max_conv.Model]]:
    """Returns every network compiled live and whole."""
    graphs = []
    for case in CASES:
        weights = weights_of(case.config.shapes())
        graphs.append((max_conv.streaming(case.build, case.config, weights), weights))
        graphs.append((case.build(case.config, weights), weights))
    made = compile_together(*graphs)
    return dict(zip(NAMES, zip(made[::2], made[1::2], strict=True), strict=True))


def signal(case: Case, rng: np.random.Generator, length: int) -> np.ndarray:
    """Returns a signal of one row."""
    if case.codes:
        return rng.integers(0, case.codes, (1, *case.position, length))
    return rng.standard_normal((1, length, *case.position)).astype(np.float32)


def cut(array: np.ndarray, axis: int, start: int, stop: int) -> np.ndarray:
    return array[(slice(None),) * axis + (slice(start, stop),)]


def answers(stream: Stream, signals: list[np.ndarray], axis: int, rng: np.random.Generator) -> list[list[np.ndarray]]:
    """Pushes signals of different length, in chunks of any size; returns each row's outputs."""
    size, at = [array.shape[axis] for array in signals], [0] * len(signals)
    pieces: list[list[list[np.ndarray]]] = [[] for _ in signals]
    while any(n < end for n, end in zip(at, size, strict=True)):
        counts = [min(end - n, int(rng.choice([0, 1, 3, 20, 70]))) for n, end in zip(at, size, strict=True)]
        chunks = []
        for array, n, count in zip(signals, at, counts, strict=True):
            room = list(array.shape)
            room[axis] = max(counts)
            chunk = np.full(room, 7, array.dtype)  # what lies beyond a row's own positions is never read
            cut(chunk, axis, 0, count)[...] = cut(array, axis, n, n + count)
            chunks.append(chunk)
        last = np.array([n + count == end > n for n, count, end in zip(at, counts, size, strict=True)])
        got = stream.push(np.concatenate(chunks), last=last, lengths=np.array(counts))
        results = got if isinstance(got, tuple) else (got,)
        for row, count in enumerate(counts):
            own = [
                cut(result[row : row + 1], out.axis, 0, int(stream.lengths[row]))
                for result, out in zip(results, stream.timing.outputs, strict=True)
            ]
            pieces[row].append(own)
            at[row] += count
    return [
        [
            np.concatenate(parts, out.axis)
            for parts, out in zip(zip(*row, strict=True), stream.timing.outputs, strict=True)
        ]
        for row in pieces
    ]


def near(got: np.ndarray, want: np.ndarray, message: str) -> None:
    assert got.shape == want.shape, f"{message}: {got.shape}, not {want.shape}"
    if want.dtype.kind == "i":
        np.testing.assert_array_equal(got, want, message)
        return
    off = np.abs(got - want).max(initial=0)
    assert off <= 1e-5 * np.abs(want).max(initial=1e-30), f"{message}: off by {off:.2g}"


@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_a_network_in_chunks_is_the_network(case: Case) -> None:
    live, whole = models()[case.name]
    rng = np.random.default_rng(3)
    stream = live.stream(2)
    # The second row begins with another signal, which is given up: nothing of it is left.
    lost = np.concatenate(
        [signal(case, rng, 55), 1e3 * signal(case, rng, 55) if not case.codes else signal(case, rng, 55)]
    )
    stream.push(lost)
    for _ in range(2):
        stream.reset()
        signals = [signal(case, rng, case.shortest + int(rng.integers(0, 60))) for _ in range(2)]
        for row, (got, given) in enumerate(zip(answers(stream, signals, case.axis, rng), signals, strict=True)):
            want = whole(given)
            for number, (one, other) in enumerate(zip(got, want if isinstance(want, tuple) else (want,), strict=True)):
                near(one, other, f"{case.name}, row {row}, output {number}")


@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_the_delay_is_the_least_possible(case: Case) -> None:
    live, _ = models()[case.name]
    timing = live.timing
    assert isinstance(timing, Timing)
    assert timing.lookahead is not None
    assert timing.delay == floor(timing.lookahead * timing.per_tick / timing.tick)
