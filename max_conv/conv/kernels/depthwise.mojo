"""Depthwise convolution of NLC data with an SCF filter: one channel in, lanes run over channels. A transposed
convolution has several filters per channel: the first filters of all channels come first, then the second ones.

There is no sum over channels, so a step loads one filter vector and multiplies it with one vector of each row. A block
of rows is first copied vector by vector, so that the rows of a vector are neighbours. In place they can be 2 KiB apart,
and then they all share the same few lines of the cache.
"""

from std.math import ceildiv
from std.sys.info import simd_width_of

from .geometry import Geometry
from .grid import Grid, Part
from .lanes import SUM_TERMS, Memory, Operands, Scratch, Write, accumulator, load, put
from .tasks import spread, workers
from .turn import turned
from .window import Window

comptime ROWS = 16
comptime SHORT_ROWS = 4
comptime POSITIONS = 8 * ROWS
comptime CHANNEL_VECTORS = 8


@always_inline
def fill[
    dtype: DType, acc: DType, //
](window: Window, g: Geometry, x: Memory[dtype], channels: Int, target: Memory[acc]):
    """Copies `channels` channels of the window's rows, from data that starts at `x`: (vector, row, lane)."""
    comptime width = simd_width_of[acc]()
    for r in range(window.rows):
        var source = window.source(g, r)
        var row = x.unsafe_offset(source * g.channels)
        var to = target.unsafe_offset(r * width)
        for c in range(0, channels, width):
            var value = SIMD[acc, width](0)
            if source >= 0:
                if c + width <= channels:
                    value = load[acc, width, False](row.unsafe_offset(c), width)
                else:
                    value = load[acc, width, True](row.unsafe_offset(c), channels - c)
            to.unsafe_offset(c * window.rows).unsafe_store(value)


@always_inline
def tile[
    dtype: DType, acc: DType, //, write: Write[dtype], rows: Int, partial: Bool
](g: Geometry, x: Memory[acc], tap_step: Int, o: Operands[dtype], part: Part):
    """Computes the first `rows` positions of a part, or all if there are fewer, of one vector of filters."""
    comptime width = simd_width_of[acc]()
    var lanes = part.lanes()
    var total = Array[SIMD[acc, width], rows](fill=o.bias_at[acc, width](part.filter, lanes))
    var end_tap = g.end_tap(part.first)
    # Whole blocks of terms are skipped, so that an output has the same bits next to an edge as elsewhere.
    for tap in range(g.first_tap(part.first, rows) // SUM_TERMS * SUM_TERMS, end_tap, SUM_TERMS):
        var sum = Array[SIMD[acc, width], rows](fill=SIMD[acc, width](0))
        for k in range(tap, min(tap + SUM_TERMS, end_tap)):
            var wk = load[acc, width, partial](o.w.unsafe_offset(k * g.filters + part.filter), lanes)
            var xk = x.unsafe_offset(k * tap_step)
            comptime for i in range(rows):
                sum[i] = xk.unsafe_offset(i * width).unsafe_load[width=width]().fma(wk, sum[i])
        comptime for i in range(rows):
            total[i] += sum[i]
    comptime for i in range(rows):
        if i < part.count:
            comptime if partial:
                put[write, True](part.n, part.first + i, part.filter, total[i], lanes)
            else:
                write[width](part.n, part.first + i, part.filter, total[i].cast[dtype]())


@always_inline
def column[
    dtype: DType, acc: DType, //, write: Write[dtype], partial: Bool
](g: Geometry, x: Memory[acc], tap_step: Int, o: Operands[dtype], part: Part):
    """Computes a part of one vector of filters."""
    comptime width = simd_width_of[acc]()
    var done = 0
    while done < part.count:
        var xt = x.unsafe_offset(done * width)
        var left = part.after(done)
        if left.count > SHORT_ROWS:
            tile[write, ROWS, partial](g, xt, tap_step, o, left)
            done += ROWS
        else:
            tile[write, SHORT_ROWS, partial](g, xt, tap_step, o, left)
            done += SHORT_ROWS


def block[
    dtype: DType, //, write: Write[dtype], nlc: Bool
](g: Geometry, o: Operands[dtype], n: Int, first: Int, count: Int, channel: Int, channels: Int):
    """Computes `count` positions from `first` on, of `channels` channels from `channel` on."""
    comptime acc = accumulator[dtype]
    comptime width = simd_width_of[acc]()
    # Tiles may run past `count`: the rows that they read must exist nevertheless.
    var window = Window.neighbours(g, first, count + ROWS) if nlc else Window.span(g, first, count + ROWS)
    var scratch = Scratch[acc](window.rows * ceildiv(channels, width) * width)
    var rows = scratch.data()
    comptime if nlc:
        fill(window, g, o.x.unsafe_offset(n * g.length * g.channels + channel), channels, rows)
    var room = Scratch[dtype](0 if nlc else (count + 2 * ROWS) * width)
    var rows_out = room.data()
    var tap_step = window.tap_step(g) * width
    for c in range(0, channels, width):
        var x = rows.unsafe_offset(c * window.rows)
        var lanes = min(width, channels - c)
        comptime if not nlc:
            comptime assert dtype == acc
            var lines = o.x.unsafe_offset((n * g.channels + channel + c) * g.length)
            window.turn(g, lines, lanes, x.unsafe_bitcast[Scalar[dtype]](), width)
        for f in range(channel + c, g.filters, g.channels):
            var vector = Part(n, 0, first, count, f, f + lanes)
            comptime if nlc:
                if lanes == width:
                    column[write, False](g, x, tap_step, o, vector)
                else:
                    column[write, True](g, x, tap_step, o, vector)
            else:

                @__parameter
                @always_inline
                def compute[keep: Write[dtype]]():
                    column[keep, True](g, x, tap_step, o, vector)

                turned[write, width, compute](rows_out, n, first, count, f, lanes)
                _ = vector
        _ = x
    _ = tap_step
    _ = room^
    _ = scratch^


def conv1d_depthwise[dtype: DType, //, write: Write[dtype], nlc: Bool](g: Geometry, o: Operands[dtype]):
    """Computes a depthwise convolution with an SCF filter; NCL data with stride 1 only."""
    comptime channels = CHANNEL_VECTORS * simd_width_of[accumulator[dtype]]()
    var threads = workers(g.batch * g.out_length * g.filters * g.kernel)
    var columns = ceildiv(g.channels, channels)
    var most = ceildiv(g.out_length, ROWS)
    var blocks = max(ceildiv(g.out_length, POSITIONS), min(most, ceildiv(4 * threads, g.batch * columns)))
    var positions = ceildiv(ceildiv(g.out_length, blocks), ROWS) * ROWS
    blocks = ceildiv(g.out_length, positions)
    # The channels of all groups together are cut into tasks, as the filters of other layers are.
    var grid = Grid(g.batch, 1, blocks, columns, positions, g.out_length, channels, g.channels)

    def task(i: Int) {imm}:
        var part = grid.part(i)
        block[write, nlc](g, o, part.n, part.first, part.count, part.filter, part.lanes())

    spread(task, grid.tasks(), threads)
