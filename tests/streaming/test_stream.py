"""`Stream` on a network of NumPy: a moving sum of three positions, one ahead, in ticks of two. Nothing is compiled."""

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from max_conv.conv.geometry import Geometry
from max_conv.conv.lines import Line, Window
from max_conv.streaming import Stream, Timing
from max_conv.streaming.timing import Chunk, Signal

TICK = 2
SUM = Geometry.of(3, padding=1)
LINE = Line(TICK).through(SUM)
WINDOW = Window.of(Line(TICK), SUM)
TIMING = Timing(TICK, 1, (1,), (Signal(1, LINE),), 4 * WINDOW.kept, None, 3, rate=1000)
NUMBERS = Chunk("x", "float32", (None, None), 1)


def run(x: np.ndarray, ticks: np.ndarray, ends: np.ndarray, state: np.ndarray) -> list[np.ndarray]:
    """Computes some ticks, as a compiled graph does: the state holds the rows before."""
    rows = x.reshape(len(x), -1)
    both = np.concatenate([state.view(np.float32), rows], axis=1)
    first = ticks * TICK - WINDOW.kept
    position = first[:, None] + np.arange(both.shape[1])
    held = np.where((position >= 0) & (position < ends[:, None]), both, 0)
    size = rows.shape[1]
    answer = held[:, :size] + held[:, 1 : size + 1] + held[:, 2 : size + 2]
    return [answer.astype(np.float32), np.ascontiguousarray(both[:, -WINDOW.kept :]).view(np.uint8)]


def stream(batch: int = 1, function: Callable[..., Any] = run) -> Stream:
    return Stream(function, TIMING, [NUMBERS], [NUMBERS], batch)


def whole(signal: np.ndarray) -> np.ndarray:
    return np.convolve(signal, np.ones(3, np.float32))[1:-1] if len(signal) else signal


def numbers(*signals: Any) -> np.ndarray:
    return np.array(signals, np.float32)


def test_timing() -> None:
    assert (TIMING.per_tick, TIMING.delay, TIMING.latency, TIMING.milliseconds) == (2, 1, 3, 3.0)
    assert Timing.from_json(TIMING.to_json()) == TIMING


@pytest.mark.parametrize("size", [1, 2, 3, 7, 50])
def test_chunks_of_any_size(size: int) -> None:
    signal = np.arange(1, 24, dtype=np.float32)
    s = stream()
    got = [s.push(signal[None, n : n + size]) for n in range(0, len(signal), size)]
    got += [s.push(signal[None, :0]), s.flush()]
    np.testing.assert_array_equal(np.concatenate(got, 1)[0], whole(signal))


def test_rows_begin_and_end_when_they_like() -> None:
    s = stream(2)
    found: list[list[np.ndarray]] = [[], []]

    def take(answer: np.ndarray) -> None:
        for n in range(2):
            found[n].append(answer[n, : s.lengths[n]])

    take(s.push(numbers([1, 2, 3, 4, 5], [9, 9, 9, 9, 9])))
    found[1].clear()
    take(s.push(numbers([6, 0], [1, 2]), reset=[False, True], last=[True, False], lengths=[1, 2]))
    np.testing.assert_array_equal(np.concatenate(found[0]), whole(np.arange(1, 7, dtype=np.float32)))
    take(s.push(numbers([0, 0, 0], [3, 4, 5]), lengths=[0, 3], last=[False, True]))
    np.testing.assert_array_equal(np.concatenate(found[1]), whole(np.arange(1, 6, dtype=np.float32)))
    assert s.lengths.tolist() == [0, 4]


def test_a_row_that_ended_takes_nothing_before_it_is_reset() -> None:
    s = stream()
    s.push(numbers([1, 2, 3]))
    s.flush()
    with pytest.raises(ValueError, match=r"^stream: the signal was flushed; call reset\(\) first"):
        s.push(numbers([1]))
    with pytest.raises(ValueError, match=r"^stream: was flushed; call reset\(\) first\.$"):
        s.flush()
    assert s.push(numbers([])).shape == (1, 0)
    s.reset()
    np.testing.assert_array_equal(s.push(numbers([5, 6])), [[11]])


def test_a_call_that_failed_can_be_repeated() -> None:
    fails = threading.Event()

    def sometimes(*arrays: np.ndarray) -> list[np.ndarray]:
        if fails.is_set():
            raise ValueError("no memory")
        return run(*arrays)

    s, calm = stream(2, sometimes), stream(2)
    for chunk in (numbers([1, 2, 3], [4, 5, 6]), numbers([7, 8], [9, 1]), numbers([2, 2], [3, 3])):
        fails.set()
        with pytest.raises(ValueError, match="no memory"):
            s.push(chunk, last=[True, False])
        fails.clear()
        np.testing.assert_array_equal(s.push(chunk), calm.push(chunk))
    np.testing.assert_array_equal(s.flush(), calm.flush())


def test_rows_move_from_stream_to_stream() -> None:
    pool, single = stream(4), stream()
    signal = np.arange(1, 12, dtype=np.float32)
    got = [single.push(signal[None, :5])]
    pool.push(np.full((4, 5), 9, np.float32))
    pool.put([2], single.take([0]))
    chunk = np.full((4, 6), 7, np.float32)
    chunk[2] = signal[5:]
    got.append(pool.push(chunk, last=[False, False, True, False])[2:3, : pool.lengths[2]])
    np.testing.assert_array_equal(np.concatenate(got, 1)[0], whole(signal))
    other = stream(4)
    other.put(range(4), pool.state())
    np.testing.assert_array_equal(
        other.push(chunk[:, :2], reset=[False, False, True, False]),
        pool.push(chunk[:, :2], reset=[False, False, True, False]),
    )


def test_some_rows_alone() -> None:
    """A pool of slots: each push has the rows of some slots, in any order; the others wait."""
    random, pool = np.random.default_rng(0), stream(5)
    signals = random.integers(1, 99, (5, 40)).astype(np.float32)
    at, got = [0] * 5, [np.zeros(0, np.float32) for _ in range(5)]
    while min(at) < 40:
        rows = random.permutation(5)[: random.integers(1, 6)].tolist()
        sizes = [min(int(random.integers(0, 6)), 40 - at[n]) for n in rows]
        chunk = np.full((len(rows), max(sizes)), np.nan, np.float32)
        for i, (n, size) in enumerate(zip(rows, sizes)):
            chunk[i, :size] = signals[n, at[n] : at[n] + size]
            at[n] += size
        last = [at[n] == 40 and size > 0 for n, size in zip(rows, sizes)]
        answer = pool.push(chunk, rows=rows, lengths=sizes, last=last)
        assert len(answer) == len(pool.lengths) == len(rows)
        for i, n in enumerate(rows):
            got[n] = np.append(got[n], answer[i, : pool.lengths[i]])
    for signal, answer in zip(signals, got):
        np.testing.assert_array_equal(answer, whole(signal))


def test_the_callers_chunk_may_be_used_again() -> None:
    s, room, signal, got = stream(), np.zeros((1, 1), np.float32), np.arange(1, 9, dtype=np.float32), []
    for value in signal:  # fewer positions than a tick has
        room[:] = value
        got.append(s.push(room))
        room[:] = np.nan
    np.testing.assert_array_equal(np.concatenate([*got, s.flush()], 1)[0], whole(signal))


def test_what_was_taken_or_put_stays_as_it_is() -> None:
    s = stream(2)
    s.push(numbers([1, 2, 3], [4, 5, 6]))
    kept = s.state()
    before = kept["state"].copy()
    s.put([0, 1], kept)
    s.push(numbers([7, 8, 9]), rows=[1])
    np.testing.assert_array_equal(kept["state"], before)


def test_an_endless_signal_neither_drifts_nor_grows() -> None:
    s = stream()
    s._rows[0] = type(s._rows[0])(10**9, 2 * 10**9, False, s._rows[0].held)
    s.push(numbers([1, 1]))
    for _ in range(50):
        np.testing.assert_array_equal(s.push(numbers([1, 1])), [[3, 3]])
    assert s._rows[0].held[0].size == 0
    assert s.state()["state"].nbytes == TIMING.state


@pytest.mark.parametrize(
    ("kind", "message", "call"),
    [
        (TypeError, "stream: takes 1 inputs (x), but got 2.", lambda s: s.push(numbers([1]), numbers([1]))),
        (
            TypeError,
            "stream: input 'x' must be float32, but is float64; cast it first.",
            lambda s: s.push(np.ones((2, 1))),
        ),
        (
            ValueError,
            "stream: input 'x' must have shape (2, any), but has (2, 1, 1).",
            lambda s: s.push(np.ones((2, 1, 1), np.float32)),
        ),
        (ValueError, "stream: input 'x' has 1 rows, but the stream was made for 2.", lambda s: s.push(numbers([1]))),
        (
            ValueError,
            "stream: lengths must be 0 to the chunk's 1 positions, but are [2, 0].",
            lambda s: s.push(numbers([1], [1]), lengths=[2, 0]),
        ),
        (
            ValueError,
            "stream: last must be 2 booleans, one for each row, but is [1, 0].",
            lambda s: s.push(numbers([1], [1]), last=[1, 0]),
        ),
        (
            ValueError,
            "stream: the state has shape (1, 8), but 2 rows of this model have (2, 8).",
            lambda s: s.put([0, 1], stream().state()),
        ),
        (
            ValueError,
            "stream: rows must be numbers from 0 to 1, each once, but are [1, 1].",
            lambda s: s.push(numbers([1], [1]), rows=[1, 1]),
        ),
        (
            ValueError,
            "stream: input 'x' has 2 rows, but rows= names 1.",
            lambda s: s.push(numbers([1], [1]), rows=[1]),
        ),
        (ValueError, "stream: batch must be a number of signals from 1 on, but is 0.", lambda s: stream(0)),
    ],
)
def test_errors(kind: type[Exception], message: str, call: Callable[[Stream], Any]) -> None:
    s = stream(2)
    before = s.state()
    with pytest.raises(kind) as error:
        call(s)
    assert str(error.value) == message
    assert all(np.array_equal(s.state()[name], value) for name, value in before.items() if name != "held")
