"""A live model that is served: the signals of all callers run in one batch, and join and leave it at any time."""

import math
import struct
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..runtime.ports import live_array
from .metrics import Metrics
from .protocol import Bits, Refused, Request, Spec
from .queue import Job
from .served import Gone, Options, Served, Session, as_output, together

if TYPE_CHECKING:
    from ..runtime import Model

STATE = "state"
HEAD = struct.Struct("<4sQQ")
"""The begin of a state that is sent to a client: a mark, the ticks so far, the positions so far."""
MARK = b"mcs1"
MOST_TICKS = 64
"""Ticks of a call for one signal: a longer piece is cut."""
MOST = 1 << 48
"""Positions of a signal, at most, that a state may claim."""


@dataclass
class _Piece:
    """The slots of a job, and how the job uses them."""

    slots: list[int]
    begin: bool
    end: bool
    state: np.ndarray | None = None
    wants_state: bool = False


class LiveServed(Served):
    """A model of a live graph, `max_conv.streaming(...)`.

    A request that names no sequence and carries no state is a whole signal. With a sequence, the server keeps the signal. With
    `state`, an input and an output, the client keeps it: it omits the input for a new signal, or sends the last output.
    """

    live = True

    def __init__(self, name: str, model: "Model", options: Options, metrics: Metrics) -> None:
        super().__init__(name, model, options, metrics)
        timing = model.timing
        assert timing is not None, "the model is live"
        self._timing = timing
        chunks = [live_array(p, axis, timing.tick) for p, axis in zip(model.inputs, timing.axes, strict=False)]
        results = [live_array(p, signal.axis) for p, signal in zip(model.outputs, timing.outputs, strict=False)]
        self._chunks, self._results = chunks, results
        state = Spec("uint8", ("batch", "bytes"), False)

        def spec(chunk: Any, positions: str) -> Spec:
            own = {0: "batch", chunk.axis: positions}
            return Spec(chunk.dtype, tuple(own.get(i, size or 0) for i, size in enumerate(chunk.shape)))

        self.inputs = {chunk.name: spec(chunk, "positions") for chunk in chunks} | {STATE: state}
        self.outputs = {r.name: spec(r, f"positions_{i}") for i, r in enumerate(results)} | {STATE: state}
        self.facts = {
            "live": True,
            "tick": timing.tick,
            "latency": timing.latency,
            "rate": timing.rate or 0,
            "positions_per_second": float(timing.positions_per_second) if timing.rate else 0.0,
            "state_bytes": timing.state,
            **model.facts,
        }
        self._free: list[int] = []

    def start(self) -> None:
        # The system does not allocate memory that no signal has used yet.
        self._stream = self.model.stream(batch=self.options.max_streams)
        self._free = [*range(self.options.max_streams)][::-1]
        super().start()

    def streams(self) -> int:
        return self.options.max_streams - len(self._free)

    def open(self, rows: int) -> Session:
        return Session(rows, self._slots(rows))

    def close(self, session: Session) -> None:
        self._free += session.kept or []
        session.kept = None

    async def push(
        self, session: Session, arrays: dict[str, np.ndarray], end: bool, seconds: float, gone: Gone | None = None
    ) -> dict[str, np.ndarray]:
        if STATE in arrays:
            raise Refused("the server keeps the state of a sequence; leave the input state out.")
        session.busy = True
        jobs = self._jobs(arrays, _Piece(session.kept, not session.begun, end), keeps=True)
        try:
            answer = await self._answers(jobs, seconds, gone)
        except BaseException:
            # A running job is not cancelled: the signal is somewhere in this piece, and nobody has the answer.
            session.broken = jobs[0].runs
            raise
        finally:
            session.busy, session.used = False, time.monotonic()
        session.begun = True
        return answer

    async def _alone(
        self, request: Request, arrays: dict[str, np.ndarray], rows: int, seconds: float, gone: Gone | None
    ) -> dict[str, np.ndarray]:
        state = arrays.pop(STATE, None)
        kept = state is not None or request.wants(STATE)
        if state is not None and state.shape[1] == 0:
            state = None
        end = request.flag("sequence_end") if kept else True
        # The rows go into slots for this call alone.
        slots = self._slots(rows)
        try:
            piece = _Piece(slots, state is None, end, None if state is None else self._checked(state), kept)
            return await self._answers(self._jobs(arrays, piece), seconds, gone)
        finally:
            self._free += slots

    def _most_rows(self) -> int:
        return self.options.max_streams

    def _most_jobs(self) -> int:
        return max(self.options.max_streams, self.options.max_queue)

    def _pause(self) -> float:
        return self.options.tick

    def _slots(self, rows: int) -> list[int]:
        if rows < 1:
            raise Refused("a live signal needs at least one row.")
        if rows > self.options.max_streams:
            raise Refused(f"{rows} rows came, but {self.options.max_streams} live signals are allowed; send fewer.")
        if rows > len(self._free):
            raise self._full()
        return [self._free.pop() for _ in range(rows)]

    def _jobs(self, arrays: Mapping[str, np.ndarray], piece: _Piece, keeps: bool = False) -> list[Job]:
        """Splits a request into jobs that are short enough not to delay the signals of others."""
        values = [arrays[chunk.name] for chunk in self._chunks]
        size, rows = values[0].shape[self._chunks[0].axis], len(piece.slots)
        most = max(MOST_TICKS, self._timing.first) * self._timing.tick
        if size <= most:
            return [Job(values, STATE, rows, more=piece, keeps=keeps)]
        jobs = []
        for at in range(0, size, most):
            first, last = at == 0, at + most >= size
            parts = [
                value[(slice(None),) * chunk.axis + (slice(at, at + most),)]
                for value, chunk in zip(values, self._chunks, strict=True)
            ]
            own = _Piece(
                piece.slots,
                piece.begin and first,
                piece.end and last,
                piece.state if first else None,
                piece.wants_state and last,
            )
            jobs.append(Job(parts, STATE, rows, more=own, keeps=keeps))
        return jobs

    async def _answers(self, jobs: Sequence[Job], seconds: float, gone: Gone | None) -> dict[str, np.ndarray]:
        """Runs the jobs of one signal one after the other, and returns their answers as one answer."""
        if len(jobs) == 1:
            return await self.queue.answer(jobs[0], seconds, gone)
        end = time.monotonic() + seconds
        answers = [await self.queue.answer(job, max(0.0, end - time.monotonic()), gone) for job in jobs]
        whole = {r.name: np.concatenate([answer[r.name] for answer in answers], r.axis) for r in self._results}
        for result in self._results:  # which `concatenate` forgets
            if isinstance(answers[0][result.name], Bits):
                whole[result.name] = whole[result.name].view(Bits)
        return {**answers[-1], **whole}

    def _run(self, jobs: Sequence[Job]) -> Sequence[dict[str, np.ndarray]]:
        pieces: list[_Piece] = [job.more for job in jobs]
        for piece in pieces:
            if piece.state is not None:
                self._stream.put(piece.slots, self._unpacked(piece.state))
        axis = self._chunks[0].axis
        counts = [job.arrays[0].shape[axis] for job in jobs]
        chunks = [together(jobs, i, self.model.inputs[i]) for i in range(len(self._chunks))]

        def each(values: Sequence[Any]) -> list[Any]:
            return [value for value, piece in zip(values, pieces, strict=True) for _ in piece.slots]

        results = self._stream.push(
            *chunks,
            rows=[slot for piece in pieces for slot in piece.slots],
            reset=np.array(each([piece.begin for piece in pieces])),
            last=np.array(each([piece.end for piece in pieces])),
            lengths=np.array(each(counts)),
        )
        results = results if isinstance(results, tuple) else (results,)
        arrays = [as_output(p, result) for p, result in zip(self.model.outputs, results, strict=False)]
        answers, at = [], 0
        for piece in pieces:
            answers.append(self._answer(piece, arrays, at))
            at += len(piece.slots)
        return answers

    def _answer(self, piece: _Piece, arrays: Sequence[np.ndarray], at: int) -> dict[str, np.ndarray]:
        answer = {}
        for result, array, lengths in zip(self._results, arrays, self._stream.output_lengths, strict=True):
            # The rows of a job are at the same position of their signals.
            own = array[at : at + len(piece.slots)]
            answer[result.name] = own[(slice(None),) * result.axis + (slice(int(lengths[at])),)].copy()
        if piece.wants_state:
            empty = np.zeros((len(piece.slots), 0), np.uint8)
            answer[STATE] = empty if piece.end else self._packed(self._stream.take(piece.slots))
        return answer

    def _packed(self, state: Mapping[str, Any]) -> np.ndarray:
        """Returns the state of some rows, as `Stream.take` returned it, in bytes: (rows, bytes)."""
        rows = [
            HEAD.pack(MARK, int(ticks), int(seen)) + own.tobytes() + b"".join(array.tobytes() for array in held)
            for ticks, seen, own, held in zip(state["ticks"], state["seen"], state["state"], state["held"], strict=True)
        ]
        return np.frombuffer(b"".join(rows), np.uint8).reshape(len(rows), -1)

    def _checked(self, state: np.ndarray) -> np.ndarray:
        """Raises an error unless a state that a client sent belongs to a signal of this model."""
        places = {HEAD.unpack(row[: HEAD.size].tobytes()) if len(row) >= HEAD.size else None for row in state}
        place = places.pop()
        if places or place is None or place[0] != MARK:
            raise Refused("the input state is not one that this server returned, or its rows are of different signals.")
        _, ticks, seen = place
        waiting = seen - ticks * self._timing.tick
        need = HEAD.size + self._timing.state + waiting * sum(self._units())
        if not (0 <= ticks <= seen <= MOST and waiting >= 0 and need == state.shape[1]):
            raise Refused(f"the input state has {state.shape[1]} bytes, which do not fit a signal of {self.name}.")
        return state

    def _units(self) -> list[int]:
        """Returns the bytes of a position of each input."""
        return [math.prod(size or 1 for size in c.shape) * Spec(c.dtype, ()).numpy.itemsize for c in self._chunks]

    def _unpacked(self, state: np.ndarray) -> dict[str, Any]:
        """Returns the state from the bytes that `_packed` returned."""
        _, ticks, seen = HEAD.unpack(state[0, : HEAD.size].tobytes())
        waiting = seen - ticks * self._timing.tick
        own, rest = np.split(state[:, HEAD.size :], [self._timing.state], axis=1)
        held: list[list[np.ndarray]] = [[] for _ in state]
        for chunk, unit in zip(self._chunks, self._units(), strict=True):
            values, rest = np.split(rest, [waiting * unit], axis=1)
            shape = [waiting if i == chunk.axis else size or 1 for i, size in enumerate(chunk.shape)][1:]
            for row, value in zip(held, values, strict=True):
                row.append(value.copy().view(Spec(chunk.dtype, ()).numpy).reshape(shape))
        count = len(state)
        return {"state": own, "ticks": [ticks] * count, "seen": [seen] * count, "ended": [False] * count, "held": held}
