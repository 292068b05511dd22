"""A model that is served: its inputs and outputs as clients see them, its queue, and the signals that go on."""

import re
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from ..runtime.ports import Port, size_of
from ..streaming.stream import to_buffer, to_numpy
from .metrics import Metrics
from .protocol import DATATYPES, Bits, Refused, Request, Spec
from .queue import Job, Queue

if TYPE_CHECKING:
    from ..runtime import Model

Gone = Callable[[], Awaitable[None]]
BATCH, LENGTHS = "batch", "lengths"


@dataclass(frozen=True)
class Options:
    """The limits of a server. Seconds, bytes and counts.

    Attributes:
        max_batch: Rows of a call.
        max_queue: Requests of a model that wait.
        deadline: Seconds until a request is answered; its parameter `timeout`, in microseconds, may shorten it.
        max_streams: Live signals and sequences of a model.
        idle: Seconds after which a live signal or sequence that receives nothing is ended.
        tick: Seconds between the begins of two calls of a live model, at least: a caller alone does not wait.
        max_body: Bytes of a request.
        max_memory: Bytes of all requests that are being read.
        body_timeout: Seconds in which a request's body must come.
        max_connections: Connections.
        token: The token that clients have to send, `Authorization: Bearer TOKEN`; None lets everybody in.

    Raises:
        ValueError: If a number is not above 0 (`tick` may be 0), or the token has other than visible ASCII characters.
    """

    max_batch: int = 32
    max_queue: int = 256
    deadline: float = 30.0
    max_streams: int = 1000
    idle: float = 60.0
    tick: float = 0.005
    max_body: int = 64 << 20
    max_memory: int = 512 << 20
    body_timeout: float = 20.0
    max_connections: int = 2000
    token: str | None = None

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if name != "token" and not (value > 0 or (name == "tick" and value == 0)):
                raise ValueError(f"serve: {name} must be above 0, but is {value}.")
        if self.token is not None and not re.fullmatch(r"[!-~]+", self.token):
            raise ValueError("serve: the token must be of visible ASCII characters, without spaces.")


@dataclass(eq=False)
class Session:
    """A signal that goes on from request to request.

    Attributes:
        rows: Its rows.
        kept: The state that the model keeps of it.
        used: When it was used last.
        busy: Whether a request of it is being answered.
        begun: Whether it has received any data.
        broken: Whether an answer is lost, so that it cannot go on.
    """

    rows: int
    kept: Any
    used: float = field(default_factory=time.monotonic)
    busy: bool = False
    begun: bool = False
    broken: bool = False


class Served:
    """A model under a name. `Whole` and `LiveServed` say how its jobs are made and run.

    Attributes:
        name: Its name for clients.
        model: The model.
        inputs, outputs: The inputs and outputs as clients see them.
        sequences: The signals that go on, by their id.
        facts: Other entries of its metadata.
        live: Whether it accepts signals in pieces of any length, and returns the rest when a signal ends.
    """

    live = False

    def __init__(self, name: str, model: "Model", options: Options, metrics: Metrics) -> None:
        self.name, self.model, self.options, self.metrics = name, model, options, metrics.of(name)
        self.inputs: dict[str, Spec] = {}
        self.outputs: dict[str, Spec] = {}
        self.sequences: dict[int | str, Session] = {}
        self.facts: dict[str, Any] = {}

    def start(self) -> None:
        """Begins to answer, in the event loop that runs."""
        self.queue = Queue(self._run, self._most_rows(), self._most_jobs(), self._pause(), self.metrics.seen)
        self.metrics.watch(lambda: self.queue.waiting, self.streams)

    def stop(self) -> None:
        """Frees everything."""
        self.queue.close()

    def streams(self) -> int:
        """Returns how many signals go on."""
        return len(self.sequences)

    def metadata(self) -> dict[str, Any]:
        """Returns the protocol's metadata of the model."""

        def listed(specs: Mapping[str, Spec]) -> list[dict[str, Any]]:
            return [
                {
                    "name": name,
                    "datatype": DATATYPES[spec.dtype],
                    "shape": [size if isinstance(size, int) else -1 for size in spec.shape],
                }
                | ({} if spec.needed else {"parameters": {"optional": True}})
                for name, spec in specs.items()
            ]

        return {
            "name": self.name,
            "versions": ["1"],
            "platform": "max_conv",
            "inputs": listed(self.inputs),
            "outputs": listed(self.outputs),
            "parameters": self.facts,
        }

    async def infer(
        self, request: Request, arrays: dict[str, np.ndarray], gone: Gone | None = None
    ) -> dict[str, np.ndarray]:
        """Answers a request: alone, or as a part of the sequence that it names."""
        asked = request.number("timeout") / 1e6
        seconds = min(asked or self.options.deadline, self.options.deadline)
        rows = self._rows(arrays)
        if not (key := request.sequence()):
            return await self._alone(request, arrays, rows, seconds, gone)
        session = self._sequence(key, request.flag("sequence_start"), rows)
        end = request.flag("sequence_end")
        try:
            answer = await self.push(session, arrays, end, seconds, gone)
        except BaseException:
            if session.broken or not session.begun:
                self._drop(key, session)
            raise
        if end:
            self._drop(key, session)
        return answer

    async def push(
        self, session: Session, arrays: dict[str, np.ndarray], end: bool, seconds: float, gone: Gone | None = None
    ) -> dict[str, np.ndarray]:
        """Answers the next piece of a signal that goes on. If it fails, nothing has changed, and it can be sent again."""
        raise NotImplementedError

    def open(self, rows: int) -> Session:
        """Begins a signal that goes on.

        Raises:
            Refused: 503 if there are too many.
        """
        raise NotImplementedError

    def close(self, session: Session) -> None:
        """Ends a signal that went on."""
        session.kept = None

    def free_idle(self) -> None:
        """Ends the sequences that have received nothing for too long."""
        old = time.monotonic() - self.options.idle
        for key, session in [*self.sequences.items()]:
            if session.used < old and not session.busy:
                self._drop(key, session)

    def _sequence(self, key: int | str, start: bool, rows: int) -> Session:
        session = self.sequences.get(key)
        if session and session.busy:
            raise Refused(f"sequence {str(key)[:40]!r} is busy with another request; wait for its answer.", 409)
        if start:
            if session:
                self._drop(key, session)
            session = self.sequences[key] = self.open(rows)
        elif session is None:
            raise Refused(f"sequence {str(key)[:40]!r} is not known here; begin it with sequence_start.", 409)
        elif session.rows != rows:
            raise Refused(f"sequence {str(key)[:40]!r} has {session.rows} rows, but {rows} came; send the same.")
        return session

    def _drop(self, key: int | str, session: Session) -> None:
        if self.sequences.get(key) is session:
            del self.sequences[key]
        self.close(session)

    def _rows(self, arrays: Mapping[str, np.ndarray]) -> int:
        for name, spec in self.inputs.items():
            if name not in arrays and spec.needed:
                raise Refused(f"input {name!r} is missing; the inputs are {', '.join(self.inputs)}.")
        if not arrays:
            raise Refused(f"the request has no inputs; they are {', '.join(self.inputs)}.")
        return len(next(iter(arrays.values())))

    def _full(self) -> Refused:
        return Refused(
            f"{self.name} has {self.options.max_streams} live signals, as many as may; try again later.", 503
        )

    async def _alone(
        self, request: Request, arrays: dict[str, np.ndarray], rows: int, seconds: float, gone: Gone | None
    ) -> dict[str, np.ndarray]:
        raise NotImplementedError

    def _run(self, jobs: Sequence[Job]) -> Sequence[Any]:
        raise NotImplementedError

    def _most_rows(self) -> int:
        return self.options.max_batch

    def _most_jobs(self) -> int:
        return self.options.max_queue

    def _pause(self) -> float:
        return 0.0


class Whole(Served):
    """A model that answers each request by itself.

    Requests share a call if the first dimension of all inputs and outputs is named "batch": rows of equal shape as they are,
    signals of different length if the model was built with `ragged=True`. An output with the name of an input is the
    model's state: a client sends it back with the next request, or names a sequence, and the server keeps the state.
    """

    def __init__(self, name: str, model: "Model", options: Options, metrics: Metrics) -> None:
        super().__init__(name, model, options, metrics)
        ports = (*model.inputs, *model.outputs)
        self._batched = all(port.shape and port.shape[0] == BATCH for port in ports)
        last = model.inputs[-1]
        self._ragged = self._batched and (last.name, last.dtype, last.shape) == (LENGTHS, "int64", (BATCH,))
        outputs = {port.name for port in model.outputs}
        self._state = {port.name: port for port in model.inputs if port.name in outputs}
        optional = {*self._state, *([LENGTHS] if self._ragged else [])}
        self.inputs = {port.name: Spec(port.dtype, port.shape, port.name not in optional) for port in model.inputs}
        self.outputs = {port.name: Spec(port.dtype, port.shape) for port in model.outputs}
        own = {"batched": self._batched, "ragged": self._ragged, "state": ", ".join(self._state)}
        self.facts = {**model.facts, **own}

    def open(self, rows: int) -> Session:
        if not self._state:
            raise Refused(f"{self.name} keeps no state; leave sequence_id out.")
        if len(self.sequences) >= self.options.max_streams:
            raise self._full()
        return Session(rows, {})

    async def push(
        self, session: Session, arrays: dict[str, np.ndarray], end: bool, seconds: float, gone: Gone | None = None
    ) -> dict[str, np.ndarray]:
        session.busy = True
        try:
            answer = await self.queue.answer(self._job({**session.kept, **arrays}), seconds, gone)
        finally:
            session.busy, session.used = False, time.monotonic()
        # Copies: an answer may be a part of a whole batch.
        session.kept, session.begun = {name: answer[name].copy() for name in self._state}, True
        return answer

    async def _alone(
        self, request: Request, arrays: dict[str, np.ndarray], rows: int, seconds: float, gone: Gone | None
    ) -> dict[str, np.ndarray]:
        return await self.queue.answer(self._job(arrays), seconds, gone)

    def _job(self, arrays: dict[str, np.ndarray]) -> Job:
        """Returns a request's job. If the request has no state, it is zeros; if it has no lengths, they are all positions."""
        rows = len(next(iter(arrays.values())))
        for name, port in self._state.items():
            if name not in arrays:
                shape = [size if isinstance(size, int) else 1 for size in port.shape[1:]]
                arrays[name] = np.zeros((rows, *shape), self.inputs[name].numpy)
        values = [arrays[port.name] for port in self.model.inputs if port.name in arrays]
        if not self._batched:
            return Job(values, object())
        if not self._ragged:
            return Job(values, tuple(value.shape[1:] for value in values), rows)
        own = values[: len(self.model.inputs) - 1]
        first = self.model.inputs[0]
        size = own[0].shape[next(i for i, size in enumerate(first.shape[1:], 1) if isinstance(size, str))]
        lengths = arrays.get(LENGTHS, np.full(rows, size, np.int64))
        if rows and not 0 <= lengths.min() <= lengths.max() <= size:
            raise Refused(
                f"input 'lengths' must be from 0 to the {size} positions that came, but is {lengths.tolist()}."
            )
        return Job([*own, lengths], BATCH, rows, size)

    def _run(self, jobs: Sequence[Job]) -> Sequence[dict[str, np.ndarray]]:
        results = self.model(*(together(jobs, i, port) for i, port in enumerate(self.model.inputs)))
        results = results if isinstance(results, tuple) else (results,)
        arrays = [as_output(port, result) for port, result in zip(self.model.outputs, results, strict=True)]
        answers, at = [], 0
        for job in jobs:
            own = arrays if len(jobs) == 1 else [self._own(job, i, array, at) for i, array in enumerate(arrays)]
            answers.append(dict(zip(self.outputs, own, strict=True)))
            at += job.rows
        return answers

    def _own(self, job: Job, number: int, array: np.ndarray, at: int) -> np.ndarray:
        """Returns a job's rows of an output, without the positions after the ends of the job's signals."""
        rows = array[at : at + job.rows]
        if not self._ragged:
            return rows
        # An output's lengths follow from the inputs' lengths, by the expressions in its shape.
        sizes = {
            size: have
            for port, value in zip(self.model.inputs, job.arrays, strict=True)
            for size, have in zip(port.shape, value.shape, strict=True)
            if isinstance(size, str)
        }
        shape = self.model.outputs[number].shape
        ends = [size_of(size, sizes) if isinstance(size, str) else size for size in shape]
        return rows[tuple(slice(end) for end in ends)].copy()


def together(jobs: Sequence[Job], number: int, port: Port) -> Any:
    """Returns an input of all jobs as the model accepts it: rows after rows, shorter rows padded with zeros."""
    parts = [job.arrays[number] for job in jobs]
    sizes = {part.shape[1:] for part in parts}
    if len(parts) == 1:
        whole = parts[0]
    elif len(sizes) == 1:
        whole = np.concatenate(parts)
    else:
        whole, at = np.zeros((sum(map(len, parts)), *map(max, *sizes)), parts[0].dtype), 0
        for part in parts:
            whole[(slice(at, at + len(part)), *map(slice, part.shape[1:]))] = part
            at += len(part)
    return to_buffer(np.ascontiguousarray(whole), port.dtype)


def as_output(port: Port, result: Any) -> np.ndarray:
    """Returns a model's output as a contiguous array; bfloat16 as bits."""
    values = np.ascontiguousarray(to_numpy(result))
    return values.view(Bits) if port.dtype == "bfloat16" else values
