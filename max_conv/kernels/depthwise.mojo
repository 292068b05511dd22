"""Depthwise convolution of NLC data with an SCF filter: one channel in, one channel out, lanes run over channels.

There is no sum over channels, so a step loads one filter vector and multiplies it with one vector of each row.
"""

from std.math import ceildiv
from std.sys.info import simd_width_of

from .geometry import Geometry
from .lanes import BLOCK, Operands, Write, accumulator, load, put, spread, workers
from .window import Rows, Window

comptime ROWS = 8
comptime SHORT_ROWS = 2
comptime POSITIONS = 8 * ROWS
comptime CHANNEL_VECTORS = 8


@always_inline
def tile[
    dtype: DType, //, write: Write[dtype], rows: Int, partial: Bool
](g: Geometry, x: Rows[dtype], o: Operands[dtype], n: Int, first: Int, valid: Int, channel: Int, lanes: Int):
    """Computes `valid` of `rows` positions from `first` on, of one vector of channels."""
    comptime acc = accumulator[dtype]
    comptime width = simd_width_of[acc]()
    var total = Array[SIMD[acc, width], rows](fill=o.bias_at[acc, width](channel, lanes))
    var end_tap = g.end_tap(first)
    for tap in range(g.first_tap(first, rows), end_tap, BLOCK):
        var sum = Array[SIMD[acc, width], rows](fill=SIMD[acc, width](0))
        for k in range(tap, min(tap + BLOCK, end_tap)):
            var wk = load[acc, width, partial](o.w.unsafe_offset(k * g.filters + channel), lanes)
            var xk = x.data.unsafe_offset(k * x.tap_step)
            comptime for i in range(rows):
                sum[i] = load[acc, width, partial](xk.unsafe_offset(i * x.output_step), lanes).fma(wk, sum[i])
        comptime for i in range(rows):
            total[i] += sum[i]
    comptime for i in range(rows):
        if i < valid:
            comptime if partial:
                put[write, True](n, first + i, channel, total[i], lanes)
            else:
                write[width](n, first + i, channel, total[i].cast[dtype]())


@always_inline
def column[
    dtype: DType, //, write: Write[dtype], partial: Bool
](g: Geometry, x: Rows[dtype], o: Operands[dtype], n: Int, first: Int, count: Int, channel: Int, lanes: Int):
    """Computes `count` positions from `first` on, of one vector of channels."""
    var done = 0
    while done < count:
        var left = count - done
        if left > SHORT_ROWS:
            tile[write, ROWS, partial](g, x.skip(done), o, n, first + done, min(left, ROWS), channel, lanes)
            done += ROWS
        else:
            tile[write, SHORT_ROWS, partial](g, x.skip(done), o, n, first + done, left, channel, lanes)
            done += SHORT_ROWS


def block[
    dtype: DType, //, write: Write[dtype]
](g: Geometry, o: Operands[dtype], n: Int, first: Int, count: Int, channel: Int, channels: Int):
    """Computes `count` positions from `first` on, of `channels` channels from `channel` on."""
    comptime width = simd_width_of[accumulator[dtype]]()
    # Tiles may run past `count`: the rows that they read must exist all the same.
    var window = Window.of(g, first, count + ROWS)
    var x = o.x.unsafe_offset(n * g.length * g.channels + channel)
    var scratch = List[Scalar[dtype]]()
    var rows = Rows[dtype].of(window, g, x, channels, scratch)
    for c in range(channel, channel + channels, width):
        var lanes = channel + channels - c
        if lanes >= width:
            column[write, False](g, rows.skip(0, c - channel), o, n, first, count, c, width)
        else:
            column[write, True](g, rows.skip(0, c - channel), o, n, first, count, c, lanes)
    _ = scratch^


def conv1d_depthwise[dtype: DType, //, write: Write[dtype]](g: Geometry, o: Operands[dtype]):
    """Computes a depthwise convolution of NLC data with an SCF filter."""
    comptime channels = CHANNEL_VECTORS * simd_width_of[accumulator[dtype]]()
    var blocks = ceildiv(g.out_length, POSITIONS)
    var columns = ceildiv(g.channels, channels)
    var tasks = g.batch * blocks * columns
    var threads = workers(g.batch * g.out_length * g.channels * g.kernel)

    def task(i: Int) {imm}:
        var channel = i % columns * channels
        var first = i // columns % blocks * POSITIONS
        block[write](
            g,
            o,
            i // (columns * blocks),
            first,
            min(POSITIONS, g.out_length - first),
            channel,
            min(channels, g.channels - channel),
        )

    spread(task, tasks, threads)
