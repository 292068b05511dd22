"""Depthwise convolution of NLC data with an SCF filter: one channel in, one channel out, lanes run over channels.

There is no sum over channels, so a step loads one filter vector and multiplies it with one vector of each row.
"""

from std.math import ceildiv
from std.sys.info import simd_width_of

from .geometry import Geometry
from .lanes import BLOCK, Operands, accumulator, load, spread, store, workers
from .window import Rows, Window

comptime ROWS = 8
comptime SHORT_ROWS = 2
comptime POSITIONS = 8 * ROWS
comptime CHANNEL_VECTORS = 8


@always_inline
def tile[
    dtype: DType, //, rows: Int, partial: Bool
](g: Geometry, x: Rows[dtype], o: Operands[dtype], first: Int, valid: Int, lanes: Int):
    """Computes `valid` of `rows` positions from `first` on, of one vector of channels."""
    comptime acc = accumulator[dtype]
    comptime width = simd_width_of[acc]()
    var total = Array[SIMD[acc, width], rows](fill=SIMD[acc, width](0))
    if o.has_bias:
        var b = load[acc, width, partial](o.bias, lanes)
        comptime for i in range(rows):
            total[i] = b
    var end_tap = g.end_tap(first)
    for tap in range(g.first_tap(first, rows), end_tap, BLOCK):
        var sum = Array[SIMD[acc, width], rows](fill=SIMD[acc, width](0))
        for k in range(tap, min(tap + BLOCK, end_tap)):
            var wk = load[acc, width, partial](o.w.unsafe_offset(k * g.filters), lanes)
            var xk = x.data.unsafe_offset(k * x.tap_step)
            comptime for i in range(rows):
                sum[i] = load[acc, width, partial](xk.unsafe_offset(i * x.output_step), lanes).fma(wk, sum[i])
        comptime for i in range(rows):
            total[i] += sum[i]
    comptime for i in range(rows):
        if i < valid:
            store[acc, width, partial](o.output.unsafe_offset(i * g.filters), total[i], lanes)


@always_inline
def column[
    dtype: DType, //, partial: Bool
](g: Geometry, x: Rows[dtype], o: Operands[dtype], first: Int, count: Int, lanes: Int):
    """Computes `count` positions from `first` on, of one vector of channels."""
    var done = 0
    while done < count:
        var left = count - done
        var to = o.at(0, 0, 0, done * g.filters)
        if left > SHORT_ROWS:
            tile[ROWS, partial](g, x.skip(done), to, first + done, min(left, ROWS), lanes)
            done += ROWS
        else:
            tile[SHORT_ROWS, partial](g, x.skip(done), to, first + done, left, lanes)
            done += SHORT_ROWS


def block[
    dtype: DType
](g: Geometry, o: Operands[dtype], n: Int, first: Int, count: Int, channel: Int, channels: Int):
    """Computes `count` positions from `first` on, of `channels` channels from `channel` on."""
    comptime width = simd_width_of[accumulator[dtype]]()
    # Tiles may run past `count`: the rows that they read must exist all the same.
    var window = Window.of(g, first, count + ROWS)
    var x = o.x.unsafe_offset(n * g.length * g.channels + channel)
    var scratch = List[Scalar[dtype]]()
    var rows = Rows[dtype].of(window, g, x, channels, scratch)
    var position = (n * g.out_length + first) * g.filters
    for c in range(channel, channel + channels, width):
        var to = o.at(0, c, 1, position + c)
        var lanes = channel + channels - c
        if lanes >= width:
            column[False](g, rows.skip(0, c - channel), to, first, count, width)
        else:
            column[True](g, rows.skip(0, c - channel), to, first, count, lanes)
    _ = scratch^


def conv1d_depthwise[dtype: DType](g: Geometry, o: Operands[dtype]):
    """Computes a depthwise convolution of NLC data with an SCF filter."""
    comptime channels = CHANNEL_VECTORS * simd_width_of[accumulator[dtype]]()
    var blocks = ceildiv(g.out_length, POSITIONS)
    var columns = ceildiv(g.channels, channels)
    var tasks = g.batch * blocks * columns
    var threads = workers(g.batch * g.out_length * g.channels * g.kernel)

    def task(i: Int) {imm}:
        var channel = i % columns * channels
        var first = i // columns % blocks * POSITIONS
        block(
            g,
            o,
            i // (columns * blocks),
            first,
            min(POSITIONS, g.out_length - first),
            channel,
            min(channels, g.channels - channel),
        )

    spread(task, tasks, threads)
