"""Depthwise convolution with an SCF filter: one channel in, lanes run over channels. A transposed convolution has
several filters per channel: the first filters of all channels come first, then the second ones.

There is no sum over channels, so the kernel waits for memory more than it computes. With few taps, a tile of rows runs
along the channels of NLC data in place: it reads and writes every row from front to back, as prefetchers expect. With
many taps, and NCL data, a block of rows is first copied vector by vector, so that the rows of a vector are neighbours:
in place they can be 2 KiB apart, and then they all share the same few lines of the cache.
"""

from std.math import ceildiv
from std.sys.info import simd_width_of, size_of

from .geometry import Geometry
from .grid import Grid, Part
from .lanes import SUM_TERMS, Memory, Operands, Scratch, Write, accumulator, load, put
from .tasks import spread, workers
from .turn import turned
from .window import Rows, Window

comptime ROWS = 8 if simd_width_of[DType.uint8]() == 32 else 16
"""Rows of a tile of neighbouring rows: AVX2 has 16 registers, AVX-512 and NEON have 32."""
comptime FEW_ROWS = 8
"""Rows of a tile that runs along the channels."""
comptime LAST_ROWS = 2
"""Rows of the last tile, if no more are left."""
comptime FEW_READ = 28
"""Rows that a tile of `FEW_ROWS` may read to run along the channels."""
comptime POSITIONS = 64
"""Positions of a task along the channels, at most; a task by vectors has twice as many."""
comptime CHANNEL_VECTORS = 8
"""Vectors of channels of a task, at most; along the channels as many as `TILE_BYTES` allow, if they are more."""
comptime TILE_BYTES = 32 * 1024
"""Of the rows that a tile reads along the channels: they stay in the first cache for the next tile."""


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
    dtype: DType, acc: DType, //, write: Write[dtype], rows: Int, packed: Bool, partial: Bool
](g: Geometry, x: Rows[acc], o: Operands[dtype], first_tap: Int, end_tap: Int, part: Part):
    """Computes the first `rows` positions of a part, or all if there are fewer, of one vector of filters.

    `packed` says that the rows of neighbouring positions are one vector long.
    """
    comptime width = simd_width_of[acc]()
    var step = width if packed else x.output_step
    var lanes = part.lanes()
    var total = Array[SIMD[acc, width], rows](fill=o.bias_at[acc, width](part.filter, lanes))
    for tap in range(first_tap, end_tap, SUM_TERMS):
        var sum = Array[SIMD[acc, width], rows](fill=SIMD[acc, width](0))
        for k in range(tap, min(tap + SUM_TERMS, end_tap)):
            var wk = load[acc, width, partial](o.w.unsafe_offset(k * g.filters + part.filter), lanes)
            var xk = x.data.unsafe_offset(k * x.tap_step)
            comptime for i in range(rows):
                var value = load[acc, width, partial and not packed](xk.unsafe_offset(i * step), lanes)
                sum[i] = value.fma(wk, sum[i])
        comptime for i in range(rows):
            total[i] += sum[i]
    comptime for i in range(rows):
        if i < part.count:
            comptime if partial:
                put[write, True](part.n, part.first + i, part.filter, total[i], lanes)
            else:
                write[width](part.n, part.first + i, part.filter, total[i].cast[dtype]())


@always_inline
def run[
    dtype: DType, acc: DType, //, write: Write[dtype], rows: Int, packed: Bool
](g: Geometry, x: Rows[acc], o: Operands[dtype], part: Part):
    """Computes the first `rows` positions of a part, or all if there are fewer, vector by vector.

    Without `packed` the part's filters are channels, and all filters of each channel are computed.
    """
    comptime width = simd_width_of[acc]()
    # Whole blocks of terms are skipped, so that an output has the same bits next to an edge as elsewhere.
    var first_tap = g.first_tap(part.first, rows) // SUM_TERMS * SUM_TERMS
    var end_tap = g.end_tap(part.first)
    for c in range(part.filter, part.end_filter, width):
        var data = Rows(x.data.unsafe_offset(c - part.filter), x.output_step, x.tap_step)
        var lanes = min(width, part.end_filter - c)
        for f in range(c, c + 1 if packed else g.filters, g.channels):
            if lanes == width:
                tile[write, rows, packed, False](g, data, o, first_tap, end_tap, part.by(f, width))
            else:
                tile[write, rows, packed, True](g, data, o, first_tap, end_tap, part.by(f, lanes))


@always_inline
def runs[
    dtype: DType, acc: DType, //, write: Write[dtype], rows: Int, packed: Bool
](g: Geometry, x: Rows[acc], o: Operands[dtype], part: Part):
    """Computes a part in tiles of `rows` positions."""
    var done = 0
    while done < part.count:
        var left = part.after(done)
        if left.count > LAST_ROWS:
            run[write, rows, packed](g, x.skip(done), o, left)
            done += rows
        else:
            run[write, LAST_ROWS, packed](g, x.skip(done), o, left)
            done += LAST_ROWS


def along_channels[dtype: DType, //, write: Write[dtype]](g: Geometry, o: Operands[dtype], part: Part):
    """Computes a part of NLC data, all channels of a tile before the next tile."""
    comptime acc = accumulator[dtype]
    # Tiles may run past the part: the rows that they read must exist nevertheless.
    var window = Window.of(g, part.first, ceildiv(part.count, FEW_ROWS) * FEW_ROWS)
    var x = o.x.unsafe_offset(part.n * g.length * g.channels + part.filter)
    var scratch = Scratch[acc](0)
    runs[write, FEW_ROWS, False](g, Rows[acc].of(window, g, x, part.lanes(), scratch), o, part)
    _ = scratch^


def by_vectors[dtype: DType, //, write: Write[dtype], nlc: Bool](g: Geometry, o: Operands[dtype], part: Part):
    """Computes a part vector by vector of its channels, whose rows are copied."""
    comptime acc = accumulator[dtype]
    comptime width = simd_width_of[acc]()
    var rows = ceildiv(part.count, ROWS) * ROWS
    var window = Window.neighbours(g, part.first, rows) if nlc else Window.span(g, part.first, rows)
    var scratch = Scratch[acc](window.rows * ceildiv(part.lanes(), width) * width)
    comptime if nlc:
        fill(window, g, o.x.unsafe_offset(part.n * g.length * g.channels + part.filter), part.lanes(), scratch.data())
    var room = Scratch[dtype](0 if nlc else (part.count + 2 * ROWS) * width)
    for c in range(0, part.lanes(), width):
        var channel = part.filter + c
        var lanes = min(width, part.lanes() - c)
        var x = scratch.data().unsafe_offset(c * window.rows)
        comptime if not nlc:
            comptime assert dtype == acc
            var lines = o.x.unsafe_offset((part.n * g.channels + channel) * g.length)
            window.turn(g, lines, lanes, x.unsafe_bitcast[Scalar[dtype]](), width)
        var data = Rows(x, width, window.tap_step(g) * width)
        for f in range(channel, g.filters, g.channels):
            var vector = part.by(f, lanes)
            comptime if nlc:
                runs[write, ROWS, True](g, data, o, vector)
            else:

                @__parameter
                @always_inline
                def compute[keep: Write[dtype]]():
                    runs[keep, ROWS, True](g, data, o, vector)

                turned[write, width, compute](room.data(), part.n, part.first, part.count, f, lanes)
                _ = vector
        _ = data
    _ = room^
    _ = scratch^


def conv1d_depthwise[dtype: DType, //, write: Write[dtype], nlc: Bool](g: Geometry, o: Operands[dtype]):
    """Computes a depthwise convolution with an SCF filter; NCL data with stride 1 only."""
    comptime acc = accumulator[dtype]
    comptime width = simd_width_of[acc]()
    var threads = workers(g.batch * g.out_length * g.filters * g.kernel)
    var read = Window.of(g, 0, FEW_ROWS).rows
    var few = nlc and read <= FEW_READ
    var vectors = ceildiv(g.channels, width)
    var bytes = width * size_of[Scalar[acc]]()
    var most = CHANNEL_VECTORS
    if few:
        most = max(most, TILE_BYTES // read // bytes)
    var columns = ceildiv(vectors, most)
    var positions = POSITIONS if few else 2 * POSITIONS
    var unit = FEW_ROWS if few else ROWS
    var blocks = ceildiv(4 * threads, g.batch * columns)
    blocks = max(ceildiv(g.out_length, positions), min(ceildiv(g.out_length, unit), blocks))
    # The channels of all groups together are cut into tasks, as the filters of other layers are.
    var split = ceildiv(vectors, columns) * width
    var grid = Grid(g.batch, 1, blocks, columns, unit, g.out_length, split, g.channels)

    def task(i: Int) {imm}:
        var part = grid.part(i)
        comptime if nlc:
            if few:
                along_channels[write](g, o, part)
                return
        by_vectors[write, nlc](g, o, part)

    spread(task, grid.tasks(), threads)
