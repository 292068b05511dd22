"""A small copy of the input rows that one block of outputs reads, with the halo written out.

Only blocks that touch an edge, and data that has to be converted or transposed, are read through a window. Row r of
the window is the input row at `first + r` when the taps overlap (`dense`), and the row of tap r // count, output
r % count otherwise, so a large dilation or stride costs no memory.
"""

from std.sys.info import simd_width_of

from .geometry import Geometry
from .lanes import Memory, Scratch
from .turn import turn_in


@fieldwise_init
struct Window(ImplicitlyCopyable, TrivialRegisterPassable):
    """Which input rows a block of `count` outputs needs."""

    var first: Int  # padded position of the first row
    var count: Int
    var rows: Int
    var by_tap: Bool

    @always_inline
    @staticmethod
    def of(g: Geometry, first_output: Int, count: Int) -> Self:
        var span = (count - 1) * g.stride + (g.kernel - 1) * g.dilation + 1
        var by_tap = span > g.kernel * count
        return Self(
            first_output * g.stride - g.pad_left,
            count,
            g.kernel * count if by_tap else span,
            by_tap,
        )

    @staticmethod
    def neighbours(g: Geometry, first_output: Int, count: Int) -> Self:
        """Returns a window in which neighbouring outputs read neighbouring rows: tap by tap unless the stride is 1."""
        var window = Self.of(g, first_output, count)
        if g.stride > 1 and not window.by_tap:
            return Self(window.first, count, g.kernel * count, True)
        return window

    @staticmethod
    def span(g: Geometry, first_output: Int, count: Int) -> Self:
        """Returns all rows from the first to the last needed row, whether a tap reads them or not."""
        var rows = (count - 1) * g.stride + (g.kernel - 1) * g.dilation + 1
        return Self(first_output * g.stride - g.pad_left, count, rows, False)

    @always_inline
    def row_step(self, g: Geometry) -> Int:
        """Returns how many rows are between neighbouring outputs."""
        return 1 if self.by_tap else g.stride

    @always_inline
    def tap_step(self, g: Geometry) -> Int:
        """Returns how many rows are between neighbouring taps."""
        return self.count if self.by_tap else g.dilation

    @always_inline
    def source(self, g: Geometry, r: Int) -> Int:
        """Returns the input row that window row `r` copies, or -1 if that row is zero."""
        if self.by_tap:
            return g.source(self.first + (r % self.count) * g.stride + (r // self.count) * g.dilation)
        return g.source(self.first + r)

    @always_inline
    def inside(self, g: Geometry) -> Bool:
        """Returns whether every row is in the input, so that no window is needed."""
        return self.first >= 0 and self.first + (self.count - 1) * g.stride + (g.kernel - 1) * g.dilation < g.length

    def fill[
        dtype: DType, to: DType, //
    ](self, g: Geometry, x: Memory[dtype], channels: Int, target: Memory[to], row_size: Int):
        """Copies `channels` channels of every row, from NLC data that starts at `x`, with zeros up to `row_size`."""
        comptime width = simd_width_of[to]()
        var in_vectors = channels - channels % width
        for r in range(self.rows):
            var source = self.source(g, r)
            var row = target.unsafe_offset(r * row_size)
            if source < 0:
                for c in range(row_size):
                    row[unsafe_offset=c] = 0
                continue
            var data = x.unsafe_offset(source * g.channels)
            for c in range(0, in_vectors, width):
                row.unsafe_offset(c).unsafe_store(data.unsafe_offset(c).unsafe_load[width=width]().cast[to]())
            for c in range(in_vectors, row_size):
                row[unsafe_offset=c] = data[unsafe_offset=c].cast[to]() if c < channels else 0

    def turn[
        dtype: DType, //
    ](self, g: Geometry, x: Memory[dtype], channels: Int, target: Memory[dtype], row_size: Int):
        """Does the same for NCL data. The window must be a `span`."""
        var inner = min(self.rows, max(0, -self.first))
        var outer = max(inner, min(self.rows, g.length - self.first))
        var to = target.unsafe_offset(inner * row_size)
        turn_in(x.unsafe_offset(self.first + inner), g.length, outer - inner, channels, to, row_size)
        for r in range(self.rows):
            var row = target.unsafe_offset(r * row_size)
            for c in range(channels, row_size):
                row[unsafe_offset=c] = 0
            if r >= inner and r < outer:
                continue
            var source = self.source(g, r)
            for c in range(channels):
                row[unsafe_offset=c] = x[unsafe_offset=c * g.length + source] if source >= 0 else 0


@fieldwise_init
struct Rows[dtype: DType](ImplicitlyCopyable, TrivialRegisterPassable):
    """Input rows of one block, in the input itself or in a window."""

    var data: Memory[Self.dtype]
    var output_step: Int
    var tap_step: Int

    @always_inline
    @staticmethod
    def of[
        source: DType, //
    ](window: Window, g: Geometry, x: Memory[source], channels: Int, mut scratch: Scratch[Self.dtype],) -> Self:
        """Returns where `channels` channels of the window's rows are stored: in the NLC data that starts at `x`, if
        every row is in the input and has the right type; otherwise in `scratch`, to which they are copied.
        """
        comptime if source == Self.dtype:
            if window.inside(g):
                var data = x.unsafe_offset(window.first * g.channels).unsafe_bitcast[Scalar[Self.dtype]]()
                return Self(data, g.stride * g.channels, g.dilation * g.channels)
        scratch = Scratch[Self.dtype](window.rows * channels)
        var rows = scratch.data()
        window.fill(g, x, channels, rows, channels)
        return Self(rows, window.row_step(g) * channels, window.tap_step(g) * channels)

    @always_inline
    def skip(self, outputs: Int) -> Self:
        """Returns the rows from some outputs on."""
        return Self(self.data.unsafe_offset(outputs * self.output_step), self.output_step, self.tap_step)
