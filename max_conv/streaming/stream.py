"""`Stream`: signals that are pushed through a compiled live graph, chunk by chunk."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from max.driver import CPU, Buffer
from max.dtype import DType

from ..conv.arrays import buffer_of
from ..conv.lines import ENDLESS
from .timing import Chunk, Signal, Timing


class _Row(NamedTuple):
    """One signal: its ticks so far, its positions so far, whether it has ended, and the rest that waits for a tick."""

    ticks: int
    seen: int
    ended: bool
    held: tuple[np.ndarray, ...]


class Stream:
    """Live signals, one for each row of a batch. Made by `Model.stream`; any number can share one model.

    Each row begins, ends and begins again at any time, and no row depends on another. One thread at a time uses a stream;
    other threads may use other streams. The new state is kept only after a call has succeeded, so a call that failed can be
    repeated.

    Attributes:
        timing: When the network's outputs are available.
        output_lengths: For each output, how many positions the last answer has in each row. Zeros follow them.

    Source: the idea of one state for all layers, https://github.com/kyutai-labs/moshi
    """

    def __init__(
        self,
        run: Callable[..., Sequence[Any]],
        timing: Timing,
        chunks: Sequence[Chunk],
        results: Sequence[Chunk],
        batch: int = 1,
    ) -> None:
        """Starts a batch of signals.

        Args:
            run: Runs the network: its arguments are the network's inputs in ticks, `ticks`, `ends` and `state`; it returns
                the network's outputs and the state.
            timing: When the network's outputs are available.
            chunks, results: The network's inputs and outputs.
            batch: The number of signals.
        """
        if isinstance(batch, bool) or not isinstance(batch, int) or batch < 1:
            raise ValueError(f"stream: batch must be a number of signals from 1 on, but is {batch!r}.")
        self.timing, self._run, self._chunks, self._results = timing, run, tuple(chunks), tuple(results)
        self._axes = [chunk.axis - 1 for chunk in chunks]  # of the positions in a row
        shapes = ([size or 0 for size in chunk.shape[1:]] for chunk in self._chunks)
        self._nothing = tuple(np.zeros(s, _bits(c)) for s, c in zip(shapes, self._chunks, strict=True))
        self._fresh = _Row(0, 0, False, self._nothing)
        self._rows = [self._fresh] * batch
        self._late = max(-(-signal.line.delay // signal.line.per_tick) for signal in timing.outputs)  # in ticks
        self._endless = np.full(batch, ENDLESS)
        self._state = np.zeros((batch, timing.state), np.uint8)
        self.output_lengths = [np.zeros(batch, np.int64) for _ in timing.outputs]

    @property
    def lengths(self) -> np.ndarray:
        """How many positions the last answer has in each row, for the first output."""
        return self.output_lengths[0]

    @property
    def batch(self) -> int:
        """The number of signals."""
        return len(self._rows)

    def push(
        self,
        *chunks: Any,
        reset: Any = None,
        last: Any = None,
        lengths: Any = None,
        rows: Sequence[int] | None = None,
    ) -> Any:
        """Adds the next positions of every signal, and returns the outputs that can be computed.

        Args:
            chunks: An array for each input of the network, (batch, positions, ...); any number of positions, also 0.
            reset: For each row, whether a new signal begins with this chunk.
            last: For each row, whether its signal ends with this chunk: then the rest of it is returned, too.
            lengths: For each row, how many positions of the chunk belong to it; None means all.
            rows: Which rows the chunks are for, each once; all other rows wait. All arguments and the answer then have these
                rows alone. None means all.

        Returns:
            An array for each output of the network, alone if there is one: the next positions, maybe 0. Where rows have
            different numbers of positions, `lengths` has the numbers.

        Raises:
            TypeError, ValueError: If a chunk has another dtype or shape, a row has ended, or a signal is too short for the
                network. Nothing has changed then.
        """
        which = range(self.batch) if rows is None else self._picked(rows)
        size = len(which)
        given, arrays = self._checked(chunks, size)
        counts = [given] * size if lengths is None else self._counts(lengths, given, size)
        begins, ends = self._mask("reset", reset, size), self._mask("last", last, size)
        old = [self._fresh if begin else self._rows[n] for n, begin in zip(which, begins, strict=True)]
        if not any(ends) and counts == [given] * size and self._is_steady(old, given):
            return self._advance_steadily(which, old, given, arrays)
        changed = {}
        for i, (n, row) in enumerate(zip(which, old, strict=True)):
            if row.ended and (counts[i] or ends[i]):
                raise ValueError(
                    f"stream: {'the signal' if self.batch == 1 else f'row {n}'} was flushed; call reset() first, or push "
                    "with reset=."
                )
            changed[n] = self._longer(row, i, counts[i], ends[i], arrays)
        return self._advance(changed)

    def flush(self) -> Any:
        """Ends every signal that has not ended, and returns the rest of its outputs."""
        if all(row.ended for row in self._rows):
            raise ValueError("stream: was flushed; call reset() first.")
        return self._advance({n: row._replace(ended=True) for n, row in enumerate(self._rows)})

    def reset(self, rows: Sequence[int] | None = None) -> None:
        """Lets new signals begin, in all rows or in some."""
        self._rows = [self._fresh if rows is None or n in rows else row for n, row in enumerate(self._rows)]

    def state(self) -> dict[str, Any]:
        """Returns the whole state of the signals, as NumPy arrays; `Model.stream(state=...)` goes on from there."""
        return self.take(range(self.batch))

    def take(self, rows: Sequence[int]) -> dict[str, Any]:
        """Returns the state of some rows, as copies: `state`, `ticks`, `seen`, `ended` and `held`."""
        picked = [self._rows[n] for n in rows]
        return {
            "state": self._state[list(rows)].copy(),
            "ticks": np.array([row.ticks for row in picked], np.int64),
            "seen": np.array([row.seen for row in picked], np.int64),
            "ended": np.array([row.ended for row in picked], bool),
            "held": [[array.copy() for array in row.held] for row in picked],
        }

    def put(self, rows: Sequence[int], state: Mapping[str, Any]) -> None:
        """Replaces some rows by a state that `take` or `state` returned.

        Raises:
            ValueError: If it is the state of another model, or of another number of rows.
        """
        held = np.array(state["state"], np.uint8)
        if held.shape != (len(rows), self.timing.state):
            raise ValueError(
                f"stream: the state has shape {held.shape}, but {len(rows)} rows of this model have "
                f"({len(rows)}, {self.timing.state})."
            )
        self._keep(rows, held)
        for i, n in enumerate(rows):
            waiting = tuple(np.array(array) for array in state["held"][i])
            row = _Row(int(state["ticks"][i]), int(state["seen"][i]), bool(state["ended"][i]), waiting)
            self._rows[n] = self._later(row, 0)

    def _picked(self, rows: Sequence[int]) -> list[int]:
        picked = [int(n) for n in rows]
        if not picked or len(set(picked)) < len(picked) or min(picked) < 0 or max(picked) >= self.batch:
            raise ValueError(f"stream: rows must be numbers from 0 to {self.batch - 1}, each once, but are {picked}.")
        return picked

    def _checked(self, chunks: Sequence[Any], size: int) -> tuple[int, list[np.ndarray]]:
        """Returns the number of positions, and the arrays for `size` rows; bfloat16 as bits."""
        if len(chunks) != len(self._chunks):
            names = ", ".join(chunk.name for chunk in self._chunks)
            raise TypeError(f"stream: takes {len(self._chunks)} inputs ({names}), but got {len(chunks)}.")
        arrays, positions = [], set()
        for value, chunk in zip(chunks, self._chunks, strict=True):
            array = value
            if type(value) is not np.ndarray or value.dtype != _bits(chunk) or chunk.dtype == "bfloat16":
                buffer = buffer_of(value, "stream: input", chunk.name)
                if (other := buffer.dtype.name) != chunk.dtype:
                    raise TypeError(
                        f"stream: input {chunk.name!r} must be {chunk.dtype}, but is {other}; cast it first."
                    )
                array = to_numpy(buffer)
            shape = array.shape
            if len(shape) != len(chunk.shape) or any(
                want not in (None, given) for want, given in zip(chunk.shape, shape, strict=True)
            ):
                want = ", ".join("any" if axis is None else str(axis) for axis in (size, *chunk.shape[1:]))
                raise ValueError(f"stream: input {chunk.name!r} must have shape ({want}), but has {shape}.")
            if shape[0] != size:
                what = "the stream was made for" if size == self.batch else "rows= names"
                raise ValueError(f"stream: input {chunk.name!r} has {shape[0]} rows, but {what} {size}.")
            positions.add(shape[chunk.axis])
            arrays.append(array)
        if len(positions) > 1:
            raise ValueError(f"stream: all inputs must have equally many positions, but have {sorted(positions)}.")
        return positions.pop(), arrays

    def _counts(self, lengths: Any, given: int, size: int) -> list[int]:
        counts = np.asarray(lengths)
        if counts.shape != (size,) or counts.dtype.kind not in "iu":
            raise ValueError(f"stream: lengths must be {size} integers, one for each row, but are {lengths!r}.")
        if counts.min() < 0 or counts.max() > given:
            raise ValueError(f"stream: lengths must be 0 to the chunk's {given} positions, but are {counts.tolist()}.")
        return counts.tolist()

    def _mask(self, name: str, mask: Any, size: int) -> list[bool]:
        if mask is None:
            return [False] * size
        values = np.broadcast_to(np.asarray(mask), (size,)) if np.ndim(mask) == 0 else np.asarray(mask)
        if values.shape != (size,) or values.dtype != bool:
            raise ValueError(f"stream: {name} must be {size} booleans, one for each row, but is {mask!r}.")
        return values.tolist()

    def _longer(self, row: _Row, n: int, count: int, end: bool, arrays: Sequence[np.ndarray]) -> _Row:
        """Returns a row with the first `count` positions of row n of the arrays."""
        held = row.held
        if count:
            held = tuple(
                np.concatenate([waiting, _cut(array[n], axis, 0, count)], axis)
                if waiting.shape[axis]
                else _cut(array[n], axis, 0, count)
                for waiting, array, axis in zip(held, arrays, self._axes, strict=True)
            )
        return _Row(row.ticks, row.seen + count, row.ended or end, held)

    def _ready(self, row: _Row) -> int:
        """Returns how many ticks of a row can be computed."""
        if not row.ended:
            ready = (row.seen - row.ticks * self.timing.tick) // self.timing.tick
            return ready if row.ticks or ready >= self.timing.first else 0
        if row.seen == 0:
            return 0
        all_in = -(-row.seen // self.timing.tick)
        return max(self.timing.ticks(row.seen), all_in) - row.ticks

    def _advance(self, changed: dict[int, _Row]) -> Any:
        """Computes the ticks that are ready in the changed rows, keeps these rows, and returns their answers."""
        groups: dict[int, list[int]] = {}
        for n, row in changed.items():
            if (ticks := self._ready(row)) > 0:
                groups.setdefault(ticks, []).append(n)
            else:
                changed[n] = self._later(row, 0)
        outputs = self.timing.outputs
        answers: list[list[np.ndarray]] = [[] for _ in outputs]
        order: list[int] = []
        states = []
        for ticks, members in groups.items():
            picked = [changed[n] for n in members]
            whole = self._are_all(members)
            *values, kept = self._compute(picked, ticks, self._state if whole else self._state[members])
            states.append((members, to_numpy(kept)))
            order += members
            for i, (signal, value) in enumerate(zip(outputs, values, strict=True)):
                answers[i] += self._valid(picked, ticks, signal, to_numpy(value))
            for n in members:
                changed[n] = self._later(changed[n], ticks)
        where = {n: i for i, n in enumerate(changed)}
        made = [self._together(i, [where[n] for n in order], answers[i], len(changed)) for i in range(len(outputs))]
        # Nothing fails from here on.
        for members, state in states:
            self._keep(members, state)
        for n, row in changed.items():
            self._rows[n] = row
        return made[0] if len(made) == 1 else tuple(made)

    def _keep(self, rows: Sequence[int], state: np.ndarray) -> None:
        """Keeps the new state of some rows."""
        if self._are_all(rows):
            self._state = state
            return
        if not self._state.flags.writeable:
            self._state = self._state.copy()
        self._state[list(rows)] = state

    def _are_all(self, rows: Sequence[int]) -> bool:
        return rows == range(self.batch) or list(rows) == list(range(self.batch))

    def _is_steady(self, rows: Sequence[_Row], given: int) -> bool:
        """Whether whole ticks came for signals without waiting positions, and all rows get equally many positions."""
        if given == 0 or given % self.timing.tick:
            return False
        ticks = [row.ticks for row in rows]
        least = min(ticks)
        return (
            (least >= self._late or least == max(ticks))
            and (least > 0 or given >= self.timing.first * self.timing.tick)
            and all(row.held is self._nothing and not row.ended for row in rows)
        )

    def _advance_steadily(
        self, which: Sequence[int], rows: Sequence[_Row], given: int, arrays: Sequence[np.ndarray]
    ) -> Any:
        """Does the same as `_advance` for the rows of a steady push, without copying the chunks."""
        ticks = given // self.timing.tick
        inputs = [self._in_ticks(array, i, ticks) for i, array in enumerate(arrays)]
        state = self._state if self._are_all(which) else self._state[list(which)]
        counts = np.array([row.ticks for row in rows], np.int64)
        *values, state = self._run(*inputs, counts, self._endless[: len(rows)], state)
        results = []
        for i, (signal, value) in enumerate(zip(self.timing.outputs, values, strict=True)):
            begin = max(0, signal.line.delay - rows[0].ticks * signal.line.per_tick)
            result = _cut(to_numpy(value), signal.axis, begin, None)
            results.append(to_buffer(np.ascontiguousarray(result), self._results[i].dtype))
            self.output_lengths[i] = np.full(len(rows), result.shape[signal.axis])
        self._keep(which, to_numpy(state))
        for n, row in zip(which, rows, strict=True):
            self._rows[n] = _Row(row.ticks + ticks, row.seen + given, False, self._nothing)
        return results[0] if len(results) == 1 else tuple(results)

    def _in_ticks(self, batch: np.ndarray, number: int, ticks: int) -> Any:
        """Returns positions of an input in the form that the model accepts."""
        axis = self._chunks[number].axis
        if self.timing.tick > 1:
            batch = batch.reshape(*batch.shape[:axis], ticks, self.timing.tick, *batch.shape[axis + 1 :])
        return to_buffer(batch, self._chunks[number].dtype)

    def _compute(self, rows: Sequence[_Row], ticks: int, state: np.ndarray) -> Sequence[Any]:
        """Runs some rows for some ticks. Ended rows are padded with zeros, which no output depends on."""
        size = ticks * self.timing.tick
        inputs = []
        for i, axis in enumerate(self._axes):
            first = rows[0].held[i]
            batch = np.zeros((len(rows), *first.shape[:axis], size, *first.shape[axis + 1 :]), first.dtype)
            for row, target in zip(rows, batch, strict=True):
                have = min(size, row.held[i].shape[axis])
                _cut(target, axis, 0, have)[...] = _cut(row.held[i], axis, 0, have)
            inputs.append(self._in_ticks(batch, i, ticks))
        counts = np.array([row.ticks for row in rows], np.int64)
        ends = np.array([row.seen if row.ended else ENDLESS for row in rows], np.int64)
        return self._run(*inputs, counts, ends, state)

    def _valid(self, rows: Sequence[_Row], ticks: int, signal: Signal, values: np.ndarray) -> list[np.ndarray]:
        """Returns, of an output of some ticks, each row's positions that are in its signal."""
        found = []
        for row, value in zip(rows, values, strict=True):
            first = row.ticks * signal.line.per_tick - signal.line.delay
            length = signal.line.length(row.seen if row.ended else ENDLESS)
            end = min(ticks * signal.line.per_tick, length - first)
            found.append(_cut(value, signal.axis - 1, max(0, -first), max(0, -first, end)))
        return found

    def _later(self, row: _Row, ticks: int) -> _Row:
        """Returns a row after some ticks."""
        size = ticks * self.timing.tick
        if not any(array.shape[axis] > size for array, axis in zip(row.held, self._axes, strict=True)):
            return row._replace(ticks=row.ticks + ticks, held=self._nothing)
        # A copy, so that the caller's chunk can be freed: the rest was a part of it.
        held = [_cut(array, axis, size, None).copy() for array, axis in zip(row.held, self._axes, strict=True)]
        return row._replace(ticks=row.ticks + ticks, held=tuple(held))

    def _together(self, number: int, order: Sequence[int], found: Sequence[np.ndarray], size: int) -> Any:
        """Returns the positions of an output of `size` rows in one array."""
        spec, axis = self._results[number], self.timing.outputs[number].axis
        counts = np.zeros(size, np.int64)
        for n, value in zip(order, found, strict=True):
            counts[n] = value.shape[axis - 1]
        self.output_lengths[number] = counts
        shape = [
            size if i == 0 else int(counts.max()) if i == axis else fixed or 0 for i, fixed in enumerate(spec.shape)
        ]
        result = np.zeros(shape, _bits(spec))
        for n, value in zip(order, found, strict=True):
            _cut(result[n], axis - 1, 0, int(counts[n]))[...] = value
        return to_buffer(result, spec.dtype)


@functools.cache
def _bits(chunk: Chunk) -> np.dtype:
    """Returns NumPy's dtype for the values; bfloat16, which NumPy lacks, is bits."""
    return np.dtype(np.uint16 if chunk.dtype == "bfloat16" else chunk.dtype)


def to_numpy(value: Any) -> np.ndarray:
    """Returns values, or the bits of bfloat16."""
    if not isinstance(value, Buffer):
        return np.asarray(value)
    value = value.to(CPU())
    return value.view(DType.uint16, value.shape).to_numpy() if value.dtype == DType.bfloat16 else value.to_numpy()


def to_buffer(values: np.ndarray, dtype: str) -> Any:
    """Returns values as MAX accepts them: bits as bfloat16."""
    return Buffer.from_numpy(values).view(DType.bfloat16, list(values.shape)) if dtype == "bfloat16" else values


def _cut(values: np.ndarray, axis: int, start: int, stop: int | None) -> np.ndarray:
    """Returns some positions, along an axis."""
    return values[(slice(None),) * axis + (slice(start, stop),)]
