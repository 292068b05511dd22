"""The signals of a live graph: the positions of every value, and the rows that a layer reads in each call."""

from collections.abc import Sequence
from dataclasses import replace
from math import gcd, prod
from typing import Any

import numpy as np
from max.dtype import DType
from max.graph import BufferValue, DeviceRef, Dim, Graph, StaticDim, TensorType, TensorValue, ops

from ..conv.geometry import Geometry, TransposedGeometry
from ..conv.graph import custom_op
from ..conv.lines import Line, Window, chained
from ..conv.whole import cut_frames
from .positions import where
from .traced import TracedSignals, raw

ALIGNMENT = 64
"""Bytes: the rows of each window begin on a cache line of the state."""


class Longer(Exception):
    """The tick has to be a multiple of `tick`: a stride or a frame does not divide its positions."""

    def __init__(self, tick: int) -> None:
        self.tick = tick


class LiveSignals(TracedSignals):
    """The signals of a graph that gets them in ticks.

    If values of different delay meet, the earlier values are delayed, in place.

    Attributes:
        windows: The windows so far.
        state_size: Bytes of the state of one signal, for these windows.
    """

    live = True

    def __init__(
        self, graph: Graph, tick: int, ticks: Dim, counts: tuple[TensorValue, TensorValue], state: BufferValue
    ) -> None:
        """Begins to look at a graph.

        Args:
            graph: The graph, which has only its inputs so far.
            tick: Input positions of a tick.
            ticks: The size that counts the ticks of a call.
            counts: For each signal, how many ticks came before, and its length.
            state: The state of every signal.
        """
        self.windows: list[Window] = []
        self.state_size = 0
        self._tick, self._ticks, self._counts, self._state = tick, ticks, counts, state
        super().__init__(graph, str(ticks))

    def begin(self, inputs: Sequence[TensorValue]) -> None:
        """Records the lines of the network's inputs."""
        self._lines = {raw(value): Line(self._tick) for value in inputs}
        self._skip()

    def size(self, line: Line) -> Dim:
        """Returns how many positions a call brings."""
        return self._ticks if line.per_tick == 1 else self._ticks * line.per_tick

    def _read_by(
        self, x: TensorValue, line: Line, geometry: Geometry | TransposedGeometry, layout: str, outputs: Dim
    ) -> tuple[TensorValue, Geometry | TransposedGeometry, Dim]:
        """Returns a window of `x`, the geometry of a layer that computes the same from it, and its output's length."""
        if isinstance(geometry, Geometry):
            if geometry.padding_mode == "circular":
                raise ValueError(
                    'streaming: padding_mode="circular" puts the end of a signal before its begin; use another mode.'
                )
            self._divide(line, geometry.stride)
        if isinstance(outputs, StaticDim):
            raise ValueError("streaming: output_size fixes the length of a signal; use output_padding.")
        self._after = after = line.through(geometry)
        size = self.size(after)
        if isinstance(geometry, Geometry) and geometry.is_pointwise:
            return x, geometry, size
        window = Window.of(line, geometry)
        assert window.emitted is not None, "a layer's window has its geometry"
        return self._read(window, x, layout), window.emitted, size

    def layer_output(self, y: TensorValue) -> None:
        """Records the output of the layer that called `layer_input` last."""
        if self._after is not None:
            self._take(y, self._after)

    def as_long_as(self, y: TensorValue, x: TensorValue) -> TensorValue:
        """Returns the first positions of `y`, as many as `x` has."""
        line = replace(self.line(y), steps=self.line(x).steps)
        return self._take(ops.rebind(y, y.shape), line)

    def inside(self, x: TensorValue) -> TensorValue:
        """Returns a value with zeros outside the positions of its signals."""
        line = self.line(x)
        return x if line.delay == 0 else self._take(self._read(Window(line, 0, 0), x, "NLC"), line)

    def neighbours(self, x: TensorValue, before: int, after: int) -> list[TensorValue]:
        """Returns each position's neighbours, from `before` positions before to `after` after it; zeros outside."""
        line = self.line(x)
        later = replace(line, delay=line.delay + after)
        rows = [after - shift for shift in range(-before, after + 1)]
        return [self._take(self._read(Window(line, count, count), x, "NLC"), later) for count in rows]

    def in_frames(self, x: TensorValue, size: int, frames: TensorValue) -> TensorValue:
        """Returns a value in frames of `size` positions, (N, T, size, C), for `frames`, (N, T, ...)."""
        own, theirs = self.line(x), self.line(frames)
        delay = max(theirs.delay, -(-own.delay // size))
        if own.delay < delay * size:
            x = self._read(Window.delay(own, delay * size - own.delay), x, "NLC")
        framed = ops.reshape(x, [x.shape[0], self.size(theirs), size, x.shape[2]])
        return self._take(framed, replace(theirs, delay=delay, first=max(own.first, theirs.first)))

    def overlapping(self, x: TensorValue, window: int, hop: int) -> TensorValue:
        """Returns the frames of (N, L), `window` positions every `hop`, (N, T, window)."""
        line = self.line(x)
        self._divide(line, hop)
        geometry = Geometry.of(window, hop)
        after = line.through(geometry)
        rows = self._read(Window.of(line, geometry), ops.unsqueeze(x, 2), "NLC")
        return self._take(cut_frames(ops.squeeze(rows, 2), self.size(after), window, hop), after)

    def whole_frames(self, x: TensorValue, size: int) -> TensorValue:
        """Returns (N, L) in frames of `size` positions, (N, T, size); zeros fill up the last frame."""
        line = self.line(x)
        self._divide(line, size)
        assert line.delay == 0, "frames begin with the signal"
        own = self._read(Window(line, 0, 0), ops.unsqueeze(x, 2), "NLC")
        later = Line(line.per_tick // size, 0, chained(line.steps, (1, size - 1, size)), line.first)
        return self._take(ops.reshape(own, [x.shape[0], self.size(later), size]), later)

    def from_frames(self, x: TensorValue) -> TensorValue:
        """Returns the positions of all frames (N, T, size, C) as one sequence, (N, T * size, C)."""
        line, size = self.line(x), int(x.shape[2])
        flat = Line(line.per_tick * size, line.delay * size, chained(line.steps, (size, 0, 1)), line.first)
        return self._take(ops.reshape(x, [x.shape[0], self.size(flat), x.shape[3]]), flat)

    def recall(self, x: TensorValue, size: int) -> tuple[TensorValue, Any]:
        """Returns a value of the call before, (N, size) in the dtype of `x`, zeros at first; and what `keep` needs."""
        self._look()
        place = self.state_size
        nothing = ops.broadcast_to(ops.constant(0, x.dtype, device=x.device), [x.shape[0], 1, size])
        # The value after t ticks is position t - 1, so there is no value before the first tick.
        value = ops.reshape(self._read(Window(Line(1), 1, 1), nothing, "NLC", Dim(1)), [x.shape[0], size])
        self._skip()
        return value, place

    def keep(self, value: TensorValue, place: Any) -> None:
        """Keeps a value, (N, size), for the next call."""
        self._look()
        size, self.state_size = self.state_size, place
        self._read(Window(Line(1), 0, 1), ops.unsqueeze(value, 1), "NLC", Dim(1))
        self.state_size = size
        self._skip()

    def _divide(self, line: Line, by: int) -> None:
        """Makes the tick longer unless a number divides the positions of a tick."""
        if line.per_tick % by:
            raise Longer(self._tick * by // gcd(line.per_tick, by))

    def _read(self, window: Window, x: TensorValue, layout: str, size: Dim | None = None) -> TensorValue:
        """Emits a window of `x`, (N, L, C) or (N, C, L), whose rows in the state come next."""
        if len(x.shape) != 3:
            raise ValueError("streaming: a layer's input must have a batch axis.")
        length, channels = (1, 2) if layout == "NLC" else (2, 1)
        row = int(x.shape[channels]) * x.dtype.size_in_bytes
        numbers = window.numbers(self.state_size)
        plan = ops.constant(np.array(numbers, np.int64), DType.int64, device=DeviceRef.CPU())
        self.windows.append(window)
        self.state_size += -(-window.kept * row // ALIGNMENT) * ALIGNMENT
        shape = list(x.shape)
        shape[length] = Dim(window.size(self._ticks)) if size is None else size
        return emit_window(x, self._state, *self._counts, plan, shape, layout)

    def _late(self, operation: Any, value: TensorValue, line: Line, positions: int) -> Any:
        """Inserts, before an operation, a value that is delayed by some positions."""
        last = self._operations()[-1]
        (axis,) = where(value, self.size(line))
        shape = list(value.shape)
        if axis not in (1, len(shape) - 1):
            raise ValueError("streaming: a value with positions along a middle axis meets a later one; move the axis.")
        layout, other = ("NLC", shape[2:]) if axis == 1 else ("NCL", shape[1:-1])
        channels = prod(int(size) for size in other)
        flat: list[Any] = [shape[0], shape[axis], channels] if axis == 1 else [shape[0], channels, shape[axis]]
        late = ops.reshape(self._read(Window.delay(line, positions), ops.reshape(value, flat), layout), shape)
        for new in self._since(last):
            new.move_before(operation)
        return raw(late)


def emit_window(
    x: TensorValue,
    state: BufferValue,
    ticks: TensorValue,
    ends: TensorValue,
    plan: TensorValue,
    shape: Sequence[Any],
    layout: str,
) -> TensorValue:
    """Emits the operation that writes a window of this shape, and keeps the rows for later calls in the state.

    Args:
        x: The new rows, (N, L, C) or (N, C, L).
        state: (N, bytes) uint8, which is changed.
        ticks, ends: (N,) int64: how many ticks came before, and how long each signal is.
        plan: `Window.numbers`, int64, on the CPU.
    """
    result = TensorType(x.dtype, shape, x.device)
    return custom_op("max_conv.window", x.device, [state, x, ticks, ends, plan], [result], {"layout": layout})[0]
