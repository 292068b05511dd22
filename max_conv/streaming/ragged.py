"""Ragged graphs: whole networks on signals of different length, each computed as if it were alone."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from max.dtype import DType
from max.graph import Dim, TensorType, TensorValue

from ..conv.geometry import Geometry, TransposedGeometry
from ..conv.graph import PackedGraph
from ..conv.lines import WHOLE, Line, Window, chained
from ..conv.ragged import inside, laid_out, ragged_input
from ..conv.whole import Signals
from .positions import input_axis, where
from .traced import TracedSignals


class RaggedSignals(TracedSignals):
    """The signals of a graph in which each signal has a length.

    A value's line gives its signals' lengths; it has no ticks and no delay. `lengths` are the lengths of the network's input.
    """

    op = "ragged"

    def __init__(self, graph: PackedGraph, inputs: Sequence[TensorValue], axes: Sequence[int]) -> None:
        """Begins to look at a graph.

        Args:
            graph: The graph, which has only its inputs so far.
            inputs: The network's inputs, and the signals' lengths.
            axes: The axis of the positions of each of the network's inputs.
        """
        *own, self._lengths = inputs
        self._sizes: dict[Line, Dim] = {}
        super().__init__(graph, str(own[0].shape[axes[0]]))
        for value, axis in zip(own, axes, strict=True):
            self._take(value, WHOLE, value.shape[axis])

    def size(self, line: Line) -> Dim:
        """Returns how many positions a value has room for."""
        return self._sizes[line]

    def _read_by(
        self, x: TensorValue, line: Line, geometry: Geometry | TransposedGeometry, layout: str, outputs: Dim
    ) -> tuple[TensorValue, Geometry | TransposedGeometry, Dim]:
        """Returns the input that a layer reads instead of `x`, its geometry for that input, and its output's length."""
        self._after, self._outputs = line.through(geometry), outputs
        if isinstance(geometry, Geometry) and geometry.is_pointwise:
            return x, geometry, outputs
        return *ragged_input(x, self._lengths, geometry, layout, line), outputs

    def layer_output(self, y: TensorValue) -> None:
        """Records the output of the layer that called `layer_input` last."""
        if self._after is not None:
            self._take(y, self._after, self._outputs)

    def as_long_as(self, y: TensorValue, x: TensorValue) -> TensorValue:
        """Returns the first positions of `y`, as many as `x` has."""
        self.line(y)
        line = self.line(x)
        return self._take(y[:, : x.shape[1]], line)

    def neighbours(self, x: TensorValue, before: int, after: int) -> list[TensorValue]:
        """Returns each position's neighbours, from `before` positions before to `after` after it; zeros outside."""
        line = self.line(x)
        size = self.size(line)
        shifts = range(-before, after + 1)
        return [self._take(laid_out(x, self._lengths, Window(line, -n, 0), size, "NLC"), line) for n in shifts]

    def in_frames(self, x: TensorValue, size: int, frames: TensorValue) -> TensorValue:
        """Returns a value in frames of `size` positions, (N, T, size, C), for `frames`, (N, T, ...)."""
        self.line(x)
        line = self.line(frames)
        return self._take(Signals.in_frames(self, x, size, frames), line)

    def overlapping(self, x: TensorValue, window: int, hop: int) -> TensorValue:
        """Returns the frames of (N, L), `window` positions every `hop`, (N, T, window)."""
        line = self.line(x).through(Geometry.of(window, hop))
        frames = Signals.overlapping(self, x, window, hop)
        return self._take(frames, line, frames.shape[1])

    def whole_frames(self, x: TensorValue, size: int) -> TensorValue:
        """Returns (N, L) in frames of `size` positions, (N, T, size); zeros fill up the last frame."""
        line = self.line(x)
        framed = Signals.whole_frames(self, inside(x, self._lengths, 1, line), size)
        return self._take(framed, replace(line, steps=chained(line.steps, (1, size - 1, size))), framed.shape[1])

    def from_frames(self, x: TensorValue) -> TensorValue:
        """Returns the positions of all frames (N, T, size, C) as one sequence, (N, T * size, C)."""
        line = self.line(x)
        flat = Signals.from_frames(self, x)
        return self._take(flat, replace(line, steps=chained(line.steps, (int(x.shape[2]), 0, 1))), flat.shape[1])

    def own(self, value: TensorValue) -> TensorValue:
        """Returns a value with zeros after each signal's own positions."""
        line = self.line(value)
        (axis,) = where(value, self.size(line))
        return self._take(inside(value, self._lengths, axis, line), line)

    def _take(self, value: TensorValue, line: Line, size: Dim | None = None) -> TensorValue:
        if size is not None:
            self._sizes.setdefault(line, size)
        return super()._take(value, line)


class RaggedGraph(PackedGraph):
    """A graph whose last input, `lengths`, (batch,) int64, is the number of positions of each signal.

    Zeros follow a signal's own outputs. Made by `build(..., ragged=True)`.
    """

    signals: RaggedSignals

    def __init__(self, name: str, *, input_types: Sequence[TensorType], **kwargs: Any) -> None:
        given = list(input_types)
        first = given[0]
        lengths = TensorType(DType.int64, [first.shape[0]], first.device)
        axes = [input_axis("ragged", number, type_) for number, type_ in enumerate(given)]
        super().__init__(name, input_types=[*given, lengths], **kwargs)
        self._arguments = self.inputs
        with self:
            values = [value.tensor for value in self._arguments]
            self.signals = RaggedSignals(self, values, axes)
        # The network's code sees these as the graph's inputs.
        self.__dict__["inputs"] = tuple(values[:-1])

    def output(self, *values: Any) -> None:
        """Finishes the graph."""
        outputs = [self.signals.own(value) for value in values]
        self.__dict__["inputs"] = self._arguments
        self.input_names = (*self.input_names, "lengths") if self.input_names else ()
        super().output(*outputs)
