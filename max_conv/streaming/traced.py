"""The signals of a graph in which each operation is checked while a network's code makes it."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from max import _core
from max._mlir import ir
from max.graph import Dim, Graph, TensorValue, ops

from ..conv.geometry import Geometry, TransposedGeometry
from ..conv.lines import Line
from ..conv.whole import Signals
from .positions import check

SIZES = ("rmo.shape_to_tensor",)
"""Operations that read only the shape of a value."""


class TracedSignals(Signals):
    """Signals that know, for every value, its positions or that it has none.

    The results of an operation have the positions of its operands. Operations that do not keep positions apart are refused.
    """

    op = "streaming"
    """Error messages begin with it."""

    def __init__(self, graph: Graph, symbol: str) -> None:
        """Begins to look at a graph, which has only its inputs so far.

        Args:
            symbol: The name of the size that positions have in the graph.
        """
        self._graph, self._symbol = graph, symbol
        self._lines: dict[Any, Line] = {}
        self._apart: set[Any] = set()
        self._after: Line | None = None  # the line of the layer that is being made
        self._skip()

    def size(self, line: Line) -> Dim:
        """Returns how many positions a value has in the graph."""
        raise NotImplementedError

    def line(self, x: TensorValue) -> Line:
        """Returns when the positions of a value are available.

        Raises:
            ValueError: If it has no positions.
        """
        self._look()
        line = self._lines.get(raw(x))
        if line is None:
            raise ValueError(
                f"{self.op}: a value that must be a signal has no positions; compute it outside the graph."
            )
        return line

    def layer_input(
        self, x: TensorValue, geometry: Geometry | TransposedGeometry, layout: str, outputs: Dim
    ) -> tuple[TensorValue, Geometry | TransposedGeometry, Dim]:
        """Returns the input that a layer reads instead of `x`, its geometry for that input, and its output's length."""
        if self.is_apart(x):
            self._after = None
            return x, geometry, outputs
        return self._read_by(x, self.line(x), geometry, layout, outputs)

    def _read_by(
        self, x: TensorValue, line: Line, geometry: Geometry | TransposedGeometry, layout: str, outputs: Dim
    ) -> tuple[TensorValue, Geometry | TransposedGeometry, Dim]:
        """Does the same as `layer_input` for a value that has a line, and sets `_after`."""
        raise NotImplementedError

    def same_positions(self, value: TensorValue, x: TensorValue) -> TensorValue:
        """Returns a value that a custom operation has just made. Its positions are the positions of `x`."""
        return self._take(value, self._lines[raw(x)])

    def ones_like(self, x: TensorValue) -> TensorValue:
        """Returns a one for every position, (N, L, 1)."""
        line = self.line(x)
        ones = ops.broadcast_to(ops.constant(1, x.dtype, device=x.device), [x.shape[0], self.size(line), 1])
        return self._take(ones, line)

    def run_after(self, value: TensorValue, before: TensorValue) -> TensorValue:
        """Returns a value unchanged."""
        return value

    def each_frame(self, x: TensorValue) -> TensorValue:
        """Returns each frame of (N, T, ...) as a separate signal, (N * T, ...)."""
        self.line(x)
        frames = super().each_frame(x)
        self._apart.add(raw(frames))
        self._skip()
        return frames

    def of_frames(self, y: TensorValue, frames: TensorValue) -> TensorValue:
        """Returns the results of the frames, (N * T, ...), as (N, T, ...), for `frames`, (N, T, ...)."""
        line = self.line(frames)
        return self._take(super().of_frames(y, frames), line)

    def is_apart(self, x: TensorValue) -> bool:
        """Returns whether a value belongs to a frame, which is a separate whole signal."""
        self._look()
        return raw(x) in self._apart

    def _take(self, value: TensorValue, line: Line) -> TensorValue:
        """Records the line of a value that has just been made, and returns the value."""
        self._lines[raw(value)] = line
        self._skip()
        return value

    def _look(self) -> None:
        """Gives lines to the values that were made since the last look."""
        for operation in self._since(self._last):
            if str(operation.name) in SIZES:
                continue
            results = [as_value(result) for result in operation.results]
            seen = [(i, value) for i, value in enumerate(operation.operands) if value in self._lines]
            if any(value in self._apart for value in operation.operands):
                if seen:
                    raise ValueError(f"{self.op}: a frame's own values and a signal's meet; use signals().of_frames.")
                self._apart.update(operation.results)
                continue
            if not seen:
                self._check_made(operation, results)
                continue
            lines = [self._lines[value] for _, value in seen]
            if len({line.per_tick for line in lines}) > 1:
                rates = " and ".join(str(rate) for rate in sorted({line.per_tick for line in lines}))
                raise ValueError(f"{self.op}: values with {rates} positions a tick meet; they cannot be joined.")
            operands = [(i, as_value(value)) for i, value in seen]
            check(self.op, operation, operands, results, self.size(lines[0]))
            latest = max(lines, key=lambda line: line.delay)
            for (i, value), line in zip(operands, lines, strict=True):
                if line.delay < latest.delay:
                    operation.operands[i] = self._late(operation, value, line, latest.delay - line.delay)
            first = max(line.first for line in lines)
            for result in operation.results:
                self._lines[result] = replace(latest, first=first)
        self._skip()

    def _late(self, operation: Any, value: TensorValue, line: Line, positions: int) -> Any:
        """Inserts, before an operation, a value that is delayed by some positions."""
        raise NotImplementedError

    def _check_made(self, operation: Any, results: Sequence[TensorValue]) -> None:
        """Raises ValueError if an operation makes positions from values without positions."""
        if any(self._symbol in str(size) for result in results for size in result.shape):
            name = str(operation.name).split(".")[-1]
            raise ValueError(
                f"{self.op}: {name} makes a value for every position from what is no signal; use signals().ones_like."
            )

    def _operations(self) -> list[Any]:
        return list(self._graph._mlir_op.regions[0].blocks[0].operations)

    def _since(self, last: Any) -> list[Any]:
        """Returns the operations after one. New weights come before all others, so a count would be wrong."""
        operations = self._operations()
        return operations[len(operations) - operations[::-1].index(last) :]

    def _skip(self) -> None:
        self._last = self._operations()[-1]


def raw(value: TensorValue) -> Any:
    """Returns the MLIR value of a graph value."""
    return ir.Value._CAPICreate(value._mlir_value._CAPIPtr)  # type: ignore[attr-defined]


def as_value(raw: Any) -> TensorValue:
    """Returns the graph value of an MLIR value."""
    value: Any = _core.Value._from_cmlir(raw)
    return TensorValue.from_mlir(value)
