"""The arithmetic of live signals: the positions of a value after some ticks, and the rows that a layer keeps.

A network that runs live gets its input in ticks of equally many positions. After t ticks a value has its positions
`0 .. per_tick * t - delay - 1`: a layer that reads ahead is late. All numbers are integers that follow from the layers'
geometries; no graph is needed.
"""

from dataclasses import dataclass, replace
from typing import Any

from .geometry import PADDING_MODES, Geometry, TransposedGeometry

ENDLESS = 1 << 40
"""The length of a signal whose end is not known yet; also in `kernels/signals.mojo`."""

MOST_STEPS = 8
"""The most steps in the formula of a length; also in `kernels/signals.mojo`."""

Step = tuple[int, int, int]


@dataclass(frozen=True)
class Line:
    """When the positions of a value are available.

    Attributes:
        per_tick: Positions that a tick brings; 0 for signals that come at once.
        delay: How many positions it is late.
        steps: The functions that lead from the length of the network's input to this value's, one after the other:
            (factor, summand, divisor) means `(length * factor + summand) // divisor`.
        first: Ticks that the first call must bring, because a layer mirrors the begin of its input.
    """

    per_tick: int
    delay: int = 0
    steps: tuple[Step, ...] = ()
    first: int = 1

    def length(self, end: int) -> int:
        """Returns how many positions the value has for an input of `end` positions."""
        for factor, summand, divisor in self.steps:
            end = (end * factor + summand) // divisor
        return end

    def ticks(self, end: int) -> int:
        """Returns after how many ticks all positions are available.

        >>> Line(2, delay=3).ticks(10)
        7
        """
        return max(0, -(-(self.length(end) + self.delay) // self.per_tick))

    def through(self, geometry: Geometry | TransposedGeometry) -> "Line":
        """Returns the line of a layer's output.

        >>> Line(1).through(Geometry.of(3, padding=1)).delay
        1
        """
        g = geometry
        if isinstance(g, TransposedGeometry):
            step = (g.stride, g.reach + g.output_padding - g.left - g.right - g.stride, 1)
        else:
            step = (1, g.left + g.right - g.reach + g.stride, g.stride)
        steps = chained(self.steps, step)
        if not self.per_tick:
            return replace(self, steps=steps)
        if isinstance(g, TransposedGeometry):
            # Outputs that the end of the signal removes must not be returned before the end is known.
            hold = max(0, g.right - (g.reach - g.stride) - g.output_padding)
            return Line(self.per_tick * g.stride, self.delay * g.stride + g.left + hold, steps, self.first)
        delay = max(0, -(-(self.delay + g.reach - g.left) // g.stride) - 1)
        first = self.first
        if g.padding_mode == "reflect" and g.left:
            first = max(first, -(-(g.left + 1 + self.delay) // self.per_tick))
        return Line(self.per_tick // g.stride, delay, steps, first)


WHOLE = Line(0)
"""The line of signals that come at once: there are no ticks."""


def chained(steps: tuple[Step, ...], step: Step) -> tuple[Step, ...]:
    """Returns the functions and one more. The last two become one if that gives the same for every integer.

    >>> chained(((1, 1, 2),), (1, 3, 4)), chained(((2, 0, 1),), (1, 1, 1)), chained(((1, 0, 2),), (2, 0, 1))
    (((1, 7, 8),), ((2, 1, 1),), ((1, 0, 2), (2, 0, 1)))
    """
    factor, summand, divisor = step
    if step == (1, 0, 1):
        return steps
    if steps:
        *before, (f, s, d) = steps
        if d == 1:
            return (*before, (f * factor, s * factor + summand, divisor))
        if factor == 1:
            return (*before, (f, s + summand * d, d * divisor))
    return (*steps, step)


@dataclass(frozen=True)
class Window:
    """The rows that a layer reads in one call: rows of the calls before, and rows of this call.

    Attributes:
        line: The layer's input.
        rows: Rows before this call's first one; negative if the first ones are not read.
        kept: Rows that the state holds.
        emitted: The geometry of the layer that computes the same from the window.
        declared: The layer's own geometry; None if the operation is not a convolution.
    """

    line: Line
    rows: int
    kept: int
    emitted: Geometry | TransposedGeometry | None = None
    declared: Geometry | TransposedGeometry | None = None

    @classmethod
    def of(cls, line: Line, geometry: Geometry | TransposedGeometry) -> "Window":
        """Returns the window of a layer whose input has this line."""
        after = line.through(geometry)
        if isinstance(geometry, Geometry):
            rows = after.delay * geometry.stride + geometry.left - line.delay
            # A reflection at the end reads back, beyond the rows that the last outputs themselves read.
            back = max(0, 2 * geometry.right - geometry.reach + 1) if geometry.padding_mode == "reflect" else 0
            emitted = replace(geometry, left=0, right=0, padding_mode="zeros")
            return cls(line, rows, max(0, rows + back), emitted, geometry)
        g = geometry
        rows = (after.delay - g.left + g.reach - 1) // g.stride - line.delay
        left = g.left - after.delay + (line.delay + rows) * g.stride
        if left < 0:
            rows, left = rows + 1, left + g.stride
        right = (rows - 1) * g.stride + g.reach - left
        whole = replace(g, left=left, right=max(0, right), output_padding=max(0, -right))
        return cls(line, rows, max(0, rows), whole, geometry)

    @classmethod
    def delay(cls, line: Line, positions: int) -> "Window":
        """Returns the window that delays a value by some positions."""
        return cls(line, positions, positions)

    def size(self, ticks: Any) -> Any:
        """Returns how many rows the window has, for a number of ticks that may be symbolic."""
        chunk = ticks * self.line.per_tick
        if isinstance(self.declared, Geometry):
            # Rows at the end that no output of this call reads are left out.
            g, after = self.declared, self.line.through(self.declared)
            return ticks * (after.per_tick * g.stride) + (g.reach - g.stride)
        if self.declared is None:
            return chunk
        return chunk + self.rows if self.rows else chunk

    def numbers(self, offset: int) -> list[int]:
        """Returns the vector `plan` of the operation; `Plan` in `kernels/signals.mojo`.

        Args:
            offset: Bytes before the window's rows in a row of the state.
        """
        g = self.declared
        mode, sides = 0, (0, 0, 0)
        if isinstance(g, Geometry):
            mode, sides = PADDING_MODES.index(g.padding_mode), (g.left, g.right, g.reach)
        steps = [number for step in self.line.steps for number in step]
        line = self.line
        if len(line.steps) > MOST_STEPS:
            raise ValueError(
                f"streaming: the length changes up and down more than {MOST_STEPS} times; split the network."
            )
        return [offset, self.kept, self.rows, line.per_tick, line.delay, mode, *sides, len(line.steps), *steps]
