"""The answers of a served model, with models in NumPy: batches, states, sequences, live signals. Nothing is compiled."""

import asyncio
import json
import threading
from collections.abc import Callable, Coroutine, Iterator, Sequence
from typing import Any, ClassVar

import numpy as np
import pytest

from max_conv.conv.geometry import Geometry
from max_conv.conv.lines import Line, Window
from max_conv.runtime.ports import Port
from max_conv.serving.live import LiveServed
from max_conv.serving.metrics import Metrics
from max_conv.serving.protocol import Refused, decode
from max_conv.serving.served import Options, Served, Whole
from max_conv.streaming import Stream, Timing
from max_conv.streaming.timing import Chunk, Signal


class Plain:
    """Twice the input, and a running sum as state. It refuses 13 and notes the batches that it gets."""

    timing = None
    facts: ClassVar[dict[str, Any]] = {}
    inputs = (Port("x", "float32", ("batch", "length", 2)), Port("total", "float32", ("batch", 2)))
    outputs = (Port("y", "float32", ("batch", "length", 2)), Port("total", "float32", ("batch", 2)))

    def __init__(self) -> None:
        self.batches: list[int] = []
        self.go = threading.Event()
        self.go.set()

    def __call__(self, x: np.ndarray, total: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        self.go.wait(20)
        self.batches.append(len(x))
        if (x == 13).any():
            raise ValueError("model: 13 is not taken.")
        return 2 * x, total + x.sum(1)


class Ragged:
    """The sum of a position and its two neighbours, with stride 2, for signals of different length."""

    timing = None
    facts: ClassVar[dict[str, Any]] = {}
    inputs = (Port("x", "float32", ("batch", "length", 1)), Port("lengths", "int64", ("batch",)))
    outputs = (Port("y", "float32", ("batch", "((length + 1) // 2)", 1)),)

    def __init__(self) -> None:
        self.shapes: list[tuple[int, ...]] = []
        self.go = threading.Event()
        self.go.set()

    def __call__(self, x: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        self.go.wait(20)
        self.shapes.append(x.shape)
        y = np.zeros((len(x), (x.shape[1] + 1) // 2, 1), np.float32)
        for row, signal, length in zip(y, x, lengths):
            assert not signal[length:].any()
            row[: (length + 1) // 2, 0] = np.convolve(signal[:length, 0], np.ones(3))[1:-1][::2]
        return y


class Fixed:
    """Not made for batches: its first dimension has another name."""

    timing = None
    facts: ClassVar[dict[str, Any]] = {}
    inputs = (Port("x", "float32", ("length",)),)
    outputs = (Port("y", "float32", ("length",)),)

    def __init__(self) -> None:
        self.shapes: list[tuple[int, ...]] = []

    def __call__(self, x: np.ndarray) -> np.ndarray:
        self.shapes.append(x.shape)
        return x[::-1]


TICK = 2
SUM = Geometry.of(3, padding=1)
LINE = Line(TICK).through(SUM)
WINDOW = Window.of(Line(TICK), SUM)


class Live:
    """A moving sum of three positions, one ahead, in ticks of two."""

    facts: ClassVar[dict[str, Any]] = {"kind": "features"}
    timing = Timing(TICK, 1, (1,), (Signal(1, LINE),), 4 * WINDOW.kept, None, 3, rate=1000)
    inputs = (
        Port("x", "float32", ("batch", "ticks", TICK)),
        Port("ticks", "int64", ("batch",)),
        Port("ends", "int64", ("batch",)),
        Port("state", "uint8", ("batch", "state")),
    )
    outputs = (Port("y", "float32", ("batch", "positions")), Port("state", "uint8", ("batch", "state")))

    def __init__(self) -> None:
        self.batches: list[int] = []
        self.go = threading.Event()
        self.go.set()

    def __call__(self, x: np.ndarray, ticks: np.ndarray, ends: np.ndarray, state: np.ndarray) -> list[np.ndarray]:
        self.go.wait(20)
        self.batches.append(len(x))
        rows = x.reshape(len(x), -1)
        both = np.concatenate([state.view(np.float32), rows], axis=1)
        position = (ticks * TICK - WINDOW.kept)[:, None] + np.arange(both.shape[1])
        held = np.where((position >= 0) & (position < ends[:, None]), both, 0)
        size = rows.shape[1]
        answer = held[:, :size] + held[:, 1 : size + 1] + held[:, 2 : size + 2]
        return [answer.astype(np.float32), np.ascontiguousarray(both[:, -WINDOW.kept :]).view(np.uint8)]

    def stream(self, batch: int) -> Stream:
        numbers = Chunk("x", "float32", (None, None), 1)
        return Stream(self, self.timing, [numbers], [numbers], batch)


def whole(signal: Any) -> np.ndarray:
    return np.convolve(signal, np.ones(3, np.float32))[1:-1].astype(np.float32)


Ask = Callable[..., Coroutine[Any, Any, dict[str, np.ndarray]]]


def serve(model: Any, test: Callable[[Served, Ask], Coroutine[Any, Any, None]], **limits: Any) -> None:
    """Runs a test with a model that is served, for half a minute at most."""

    async def main() -> None:
        kind: Any = LiveServed if model.timing else Whole
        served: Served = kind("m", model, Options(**limits), Metrics())
        served.start()

        async def ask(
            outputs: Sequence[str] | None = None, gone: Any = None, parameters: Any = None, **arrays: Any
        ) -> Any:
            tensors = [
                {"name": name, "shape": a.shape, "datatype": {"f": "FP32", "u": "UINT8", "i": "INT64"}[a.dtype.kind]}
                | {"parameters": {"binary_data_size": a.nbytes}}
                for name, a in arrays.items()
            ]
            facts = {"inputs": tensors, "parameters": parameters or {}}
            head = json.dumps(facts | ({"outputs": [{"name": n} for n in outputs]} if outputs else {})).encode()
            body = head + b"".join(np.ascontiguousarray(a).tobytes() for a in arrays.values())
            request, given = decode(body, str(len(head)), served.inputs)
            return await served.infer(request, given, gone)

        try:
            await test(served, ask)
        finally:
            served.stop()

    asyncio.run(asyncio.wait_for(main(), 30))


def x_of(*rows: Any) -> np.ndarray:
    """Returns rows of one position."""
    return np.array(rows, np.float32).reshape(len(rows), 1, 2)


async def together(model: Any, served: Served, *asked: Coroutine[Any, Any, Any]) -> list[Any]:
    """Sends requests that come while a call runs, so that they are one batch."""
    model.go.clear()
    served.queue._took = 1.0  # a slow call runs in a thread, not in the event loop
    tasks = [asyncio.ensure_future(one) for one in asked]
    await asyncio.sleep(0.05)
    model.go.set()
    return await asyncio.gather(*tasks, return_exceptions=True)


def test_requests_of_one_shape_share_a_call() -> None:
    model = Plain()

    async def test(served: Served, ask: Ask) -> None:
        xs = [x_of([n, n]) if n % 2 else x_of([n, n], [n, -n]) for n in range(9)]
        answers = await together(model, served, *(ask(x=x) for x in xs))
        for x, answer in zip(xs, answers):
            np.testing.assert_array_equal(answer["y"], 2 * x)
            np.testing.assert_array_equal(answer["total"], x.sum(1))
        assert sum(model.batches) == sum(map(len, xs)) and len(model.batches) <= 2

    serve(model, test)


def test_rows_that_are_not_finite_touch_nobody_and_a_bad_one_fails_alone() -> None:
    model = Plain()

    async def test(served: Served, ask: Ask) -> None:
        xs = [x_of([np.nan, np.inf]), x_of([1e30, 1]), x_of([1, 2]), x_of([13, 1]), x_of([3, 4])]
        *fine, bad, last = await together(model, served, ask(x=x_of([0, 0])), *(ask(x=x) for x in xs))
        for x, answer in zip([x_of([0, 0]), *xs[:3], xs[4]], [*fine, last]):
            np.testing.assert_array_equal(answer["y"], 2 * x)
        assert isinstance(bad, Refused) and (bad.status, str(bad)) == (400, "model: 13 is not taken.")

    serve(model, test)


def test_a_model_whose_first_dimension_is_not_the_batch_runs_each_request_alone() -> None:
    model = Fixed()

    async def test(served: Served, ask: Ask) -> None:
        xs = [np.arange(n, dtype=np.float32) for n in (3, 3, 4)]
        for x, answer in zip(xs, await asyncio.gather(*(ask(x=x) for x in xs))):
            np.testing.assert_array_equal(answer["y"], x[::-1])
        assert model.shapes == [(3,), (3,), (4,)]
        assert served.facts["batched"] is False

    serve(model, test)


def test_signals_of_different_length_share_a_call() -> None:
    model = Ragged()

    async def test(served: Served, ask: Ask) -> None:
        random = np.random.default_rng(0)
        xs = [
            random.standard_normal((rows, n, 1)).astype(np.float32)
            for n, rows in [(9, 1), (7, 2), (8, 1), (5, 1), (9, 1)]
        ]
        alone = [Ragged()(x, np.full(len(x), x.shape[1])) for x in xs]
        answers = await together(model, served, *(ask(x=x) for x in xs))
        for want, answer in zip(alone, answers):
            np.testing.assert_array_equal(answer["y"], want)
        assert max(len(shape) and shape[0] for shape in model.shapes) > 2
        # A client's own lengths.
        answer = await ask(x=np.pad(xs[0], ((0, 0), (0, 3), (0, 0))), lengths=np.array([9]))
        np.testing.assert_array_equal(answer["y"][:, :5], alone[0])
        for wrong in (-1, 13):
            with pytest.raises(Refused, match=r"input 'lengths' must be from 0 to the 12 positions"):
                await ask(x=np.pad(xs[0], ((0, 0), (0, 3), (0, 0))), lengths=np.array([wrong]))

    serve(model, test)


def test_a_sequence_keeps_its_state_and_so_does_a_client() -> None:
    async def test(served: Served, ask: Ask) -> None:
        first = await ask(x=x_of([1, 2]), parameters={"sequence_id": 5, "sequence_start": True})
        other = await ask(x=x_of([10, 20]), parameters={"sequence_id": "b", "sequence_start": True})
        np.testing.assert_array_equal(first["total"], [[1, 2]])
        second = await ask(x=x_of([1, 2]), parameters={"sequence_id": 5})
        np.testing.assert_array_equal(second["total"], [[2, 4]])
        np.testing.assert_array_equal((await ask(x=x_of([1, 1]), total=other["total"]))["total"], [[11, 21]])
        assert served.streams() == 2
        last = await ask(x=x_of([1, 2]), parameters={"sequence_id": 5, "sequence_end": True})
        np.testing.assert_array_equal(last["total"], [[3, 6]])
        assert served.streams() == 1
        again = await ask(x=x_of([7, 7]), parameters={"sequence_id": "b", "sequence_start": True})
        np.testing.assert_array_equal(again["total"], [[7, 7]])

    serve(Plain(), test)


def status(error: Any) -> int:
    assert isinstance(error.value, Refused)
    return error.value.status


@pytest.mark.parametrize("kind", [Plain, Live])
def test_sequences_that_are_refused(kind: Any) -> None:
    model = kind()

    def piece(rows: int = 1) -> np.ndarray:
        return x_of(*[[1, 2]] * rows) if kind is Plain else np.ones((rows, 4), np.float32)

    async def test(served: Served, ask: Ask) -> None:
        with pytest.raises(Refused, match="sequence '5' is not known here; begin it with sequence_start") as error:
            await ask(x=piece(), parameters={"sequence_id": 5})
        assert status(error) == 409
        begin = {"sequence_id": 5, "sequence_start": True}
        await ask(x=piece(), parameters=begin)
        with pytest.raises(Refused, match="sequence '5' has 1 rows, but 2 came"):
            await ask(x=piece(2), parameters={"sequence_id": 5})
        one, two = await together(model, served, *(ask(x=piece(), parameters={"sequence_id": 5}) for _ in range(2)))
        assert isinstance(two, Refused) and two.status == 409 and "busy" in str(two) and "y" in one
        await ask(x=piece(), parameters={"sequence_id": 6, "sequence_start": True})
        with pytest.raises(Refused, match="m has 2 live signals, as many as may") as error:
            await ask(x=piece(), parameters={"sequence_id": 7, "sequence_start": True})
        assert status(error) == 503
        await ask(x=piece(), parameters={"sequence_id": 6, "sequence_end": True})
        await ask(x=piece(), parameters={"sequence_id": 7, "sequence_start": True})

    serve(model, test, max_streams=2)


def test_sequences_of_a_model_without_state() -> None:
    async def test(served: Served, ask: Ask) -> None:
        with pytest.raises(Refused, match="m keeps no state; leave sequence_id out"):
            await ask(x=np.ones(3, np.float32), parameters={"sequence_id": 1, "sequence_start": True})
        assert not served.sequences

    serve(Fixed(), test)


def test_sequences_that_get_nothing_are_ended() -> None:
    async def test(served: Served, ask: Ask) -> None:
        await ask(x=np.ones((1, 4), np.float32), parameters={"sequence_id": 1, "sequence_start": True})
        await asyncio.sleep(0.02)
        served.free_idle()
        assert served.streams() == 0

    serve(Live(), test, idle=0.01)


def pieces(signal: np.ndarray, sizes: Sequence[int]) -> Iterator[tuple[np.ndarray, bool]]:
    at = 0
    for size in sizes:
        yield signal[None, at : at + size], at == 0
        at += size
    yield signal[None, at:], at == 0


SIGNAL = np.random.default_rng(1).standard_normal(23).astype(np.float32)


def test_a_live_signal_as_a_whole() -> None:
    async def test(served: Served, ask: Ask) -> None:
        both = np.stack([SIGNAL, -SIGNAL])
        answer = await ask(x=both)
        np.testing.assert_array_equal(answer["y"], np.stack([whole(SIGNAL), whole(-SIGNAL)]))
        assert list(answer) == ["y"] and served.streams() == 0

    serve(Live(), test)


@pytest.mark.parametrize("sizes", [[1, 1, 1, 5, 0, 7], [23], [], [4, 4]])
@pytest.mark.parametrize("keeper", ["server", "client"])
def test_a_live_signal_in_pieces(sizes: list[int], keeper: str) -> None:
    async def test(served: Served, ask: Ask) -> None:
        got: list[np.ndarray] = []
        state = np.zeros((1, 0), np.uint8)
        *begin, rest = [piece for piece, _ in pieces(SIGNAL, sizes)]
        for number, piece in enumerate([*begin, rest]):
            end = number == len(begin)
            if keeper == "server":
                facts = {"sequence_id": "s", "sequence_start": number == 0, "sequence_end": end}
                got.append((await ask(x=piece, parameters=facts))["y"])
            else:
                answer = await ask(x=piece, state=state, parameters={"sequence_end": end})
                got.append(answer["y"])
                state = answer["state"]
        np.testing.assert_array_equal(np.concatenate(got, 1)[0], whole(SIGNAL))
        assert served.streams() == 0 and state.shape == (1, 0)

    serve(Live(), test)


def test_live_signals_of_many_callers_run_in_one_batch() -> None:
    model = Live()

    async def test(served: Served, ask: Ask) -> None:
        random = np.random.default_rng(2)
        signals = random.standard_normal((20, 60)).astype(np.float32)
        signals[3] = np.nan

        async def caller(n: int) -> np.ndarray:
            own, at = np.random.default_rng(n), 0
            got: list[np.ndarray] = []
            while at < 60:
                size = int(own.integers(0, 9))
                facts = {"sequence_id": n + 1, "sequence_start": at == 0 and not got, "sequence_end": at + size >= 60}
                got.append((await ask(x=signals[n : n + 1, at : at + size], parameters=facts))["y"])
                at += size
            return np.concatenate(got, 1)[0]

        for signal, answer in zip(signals, await asyncio.gather(*(caller(n) for n in range(20)))):
            np.testing.assert_array_equal(answer, whole(signal))
        assert max(model.batches) > 5 and served.streams() == 0

    serve(model, test)


@pytest.mark.parametrize("keeper", ["nobody", "server", "client"])
def test_a_long_signal_is_cut_and_lets_others_in_between(keeper: str) -> None:
    model = Live()

    async def test(served: Served, ask: Ask) -> None:
        signal = np.random.default_rng(3).standard_normal((2, 2 * 64 * 5 + 1)).astype(np.float32)
        facts = {"sequence_id": 1, "sequence_start": True} if keeper == "server" else {}
        facts["sequence_end"] = True
        long = ask(x=signal, parameters=facts, outputs=["y", "state"] if keeper == "client" else None)
        short = ask(x=np.ones((1, 3), np.float32))
        whole_answer, short_answer = await together(model, served, long, short)
        np.testing.assert_array_equal(whole_answer["y"], np.stack([whole(row) for row in signal]))
        np.testing.assert_array_equal(short_answer["y"], [[2, 3, 2]])
        assert len(model.batches) > 5 and served.streams() == 0

    serve(model, test)


def test_states_that_are_refused() -> None:
    async def test(served: Served, ask: Ask) -> None:
        state = (await ask(x=np.ones((1, 3), np.float32), outputs=["state"]))["state"]
        wrong = {
            "short": state[:, :5],
            "long": np.pad(state, ((0, 0), (0, 4))),
            "mark": np.concatenate([255 - state[:, :1], state[:, 1:]], 1),
            "ticks": np.concatenate([state[:, :4], np.full((1, 8), 255, np.uint8), state[:, 12:]], 1),
            "seen": np.concatenate([state[:, :12], np.full((1, 8), 255, np.uint8), state[:, 20:]], 1),
        }
        for name, value in wrong.items():
            with pytest.raises(Refused, match="the input state") as error:
                await ask(x=np.ones((1, 3), np.float32), state=value)
            assert status(error) == 400, name
        with pytest.raises(Refused, match="leave the input state out"):
            facts = {"sequence_id": 1, "sequence_start": True}
            await ask(x=np.ones((1, 3), np.float32), state=state, parameters=facts)
        assert served.streams() == 0
        answer = await ask(x=np.ones((1, 3), np.float32), state=state, parameters={"sequence_end": True})
        np.testing.assert_array_equal(answer["y"][0], whole(np.ones(6))[1:])

    serve(Live(), test)


def test_a_client_that_goes_while_its_piece_runs_loses_its_sequence() -> None:
    """Nobody has the answer, and the signal has gone on: the next piece is refused instead of answered wrongly."""
    model = Live()

    async def test(served: Served, ask: Ask) -> None:
        facts = {"sequence_id": 1, "sequence_start": True}
        await ask(x=np.ones((1, 4), np.float32), parameters=facts)
        model.go.clear()

        async def gone() -> None:
            await asyncio.sleep(0.02)

        # A slow call runs in a thread, not in the event loop.
        served.queue._took = 1.0
        with pytest.raises(Refused) as error:
            await ask(x=np.ones((1, 4), np.float32), parameters={"sequence_id": 1}, gone=gone)
        assert status(error) == 499
        model.go.set()
        with pytest.raises(Refused) as error:
            await ask(x=np.ones((1, 4), np.float32), parameters={"sequence_id": 1})
        assert status(error) == 409

    serve(model, test)


def test_more_rows_than_there_may_be() -> None:
    async def test(served: Served, ask: Ask) -> None:
        with pytest.raises(Refused, match="3 rows came, but 2 live signals are allowed; send fewer") as error:
            await ask(x=np.ones((3, 4), np.float32))
        assert status(error) == 400
        with pytest.raises(Refused, match="needs at least one row"):
            await ask(x=np.ones((0, 4), np.float32))

    serve(Live(), test, max_streams=2)


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"max_batch": 0}, "serve: max_batch must be above 0, but is 0."),
        ({"deadline": -1.0}, "serve: deadline must be above 0, but is -1.0."),
        ({"token": ""}, "serve: the token must be of visible ASCII characters, without spaces."),
        ({"token": "a b"}, "serve: the token must be of visible ASCII characters, without spaces."),
    ],
)
def test_limits_that_are_none(limits: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        Options(**limits)
    assert str(error.value) == message
    assert Options(tick=0).tick == 0


def test_what_is_missing() -> None:
    async def test(served: Served, ask: Ask) -> None:
        with pytest.raises(Refused, match="input 'x' is missing; the inputs are x, total"):
            await ask(total=np.ones((1, 2), np.float32))

    serve(Plain(), test)


def test_metadata() -> None:
    async def test(served: Served, ask: Ask) -> None:
        told = served.metadata()
        assert told["inputs"] == [
            {"name": "x", "datatype": "FP32", "shape": [-1, -1]},
            {"name": "state", "datatype": "UINT8", "shape": [-1, -1], "parameters": {"optional": True}},
        ]
        assert told["parameters"]["kind"] == "features"
        assert told["parameters"]["latency"] == 3 and told["parameters"]["live"] is True

    serve(Live(), test)
