"""Convolution of NLC data with an SCF filter: vector lanes run over output channels.

A tile of positions by two vectors of output channels stays in registers while taps and channels are summed. A step
reads the filter's vectors straight from SCF and broadcasts one input value a row.
"""

from std.math import ceildiv
from std.sys.info import simd_width_of, size_of

from .geometry import Geometry
from .lanes import BLOCK, PACK, Memory, Operands, Panels, Scratch, Write, accumulator, load, put
from .tasks import spread, workers
from .window import Rows, Window

comptime VECTORS = 2
comptime SHORT_ROWS = 4
"""Positions in the tile that ends a block: a tile of 14 would waste most of its rows on short signals."""
comptime SLAB = 2048
"""Rows of a filter's panel (a tap and a channel each) that are summed for all tiles of a block before the next ones: a
quarter of the second cache."""
comptime WINDOW_BYTES = 512 * 1024
comptime TASK = 1 << 20
"""Multiplications in a task: about 10 microseconds, above which finer cuts pay for themselves."""


def tile_rows[acc: DType]() -> Int:
    """Positions in a register tile: 28 of 32 AVX-512 or NEON registers hold sums, 12 of 16 in AVX2."""
    return 6 if simd_width_of[acc]() * size_of[Scalar[acc]]() == 32 else 14


@fieldwise_init
struct Panel[acc: DType](ImplicitlyCopyable, TrivialRegisterPassable):
    """Some taps of up to `VECTORS` vectors of filters, side by side, and the sums over the taps before them."""

    var data: Memory[Self.acc]
    var row_size: Int
    var first_tap: Int
    var end_tap: Int
    var sums: Memory[Self.acc]
    """Of each position of the block, where the taps do not all fit into one slab."""


@always_inline
def accumulate[
    acc: DType, width: Int, size: Int, //, rows: Int, vectors: Int, partial: Bool
](
    mut sum: Array[SIMD[acc, width], size],
    x: Memory[acc],
    tap_step: Int,
    output_step: Int,
    w: Memory[acc],
    tap_size: Int,
    row_size: Int,
    taps: Int,
    channels: Int,
    rest: Int,
):
    """Adds the products of some taps and channels to the sums of a tile. `rest` lanes of the last vector are there."""
    for k in range(taps):
        var xk = x.unsafe_offset(k * tap_step)
        var wk = w.unsafe_offset(k * tap_size)
        for c in range(channels):
            var b = Array[SIMD[acc, width], vectors](fill=SIMD[acc, width](0))
            comptime for j in range(vectors):
                b[j] = load[acc, width, partial and j == vectors - 1](wk.unsafe_offset(c * row_size + j * width), rest)
            comptime for i in range(rows):
                var a = SIMD[acc, width](xk[unsafe_offset=i * output_step + c])
                comptime for j in range(vectors):
                    sum[i * vectors + j] = a.fma(b[j], sum[i * vectors + j])


@always_inline
def tile[
    dtype: DType, acc: DType, //, write: Write[dtype], short: Bool, rows: Int, vectors: Int, partial: Bool, packed: Bool
](
    g: Geometry,
    x: Rows[acc],
    w: Panel[acc],
    o: Operands[dtype],
    n: Int,
    first: Int,
    valid: Int,
    filter: Int,
    lanes: Int,
    sums: Memory[acc],
):
    """Computes `valid` of `rows` positions from `first` on, by `lanes` of `vectors * width` filters from `filter` on.

    With `short` a running sum is not cut into blocks, so that it needs no second set of registers.
    """
    comptime width = simd_width_of[acc]()
    comptime last = vectors - 1
    var rest = lanes - last * width
    var total = Array[SIMD[acc, width], rows * vectors](fill=SIMD[acc, width](0))
    if short or w.first_tap == 0:
        comptime for j in range(vectors):
            var b = o.bias_at[acc, width](filter + j * width, lanes - j * width)
            comptime for i in range(rows):
                total[i * vectors + j] = b
    else:
        comptime for i in range(rows * vectors):
            total[i] = sums.unsafe_offset(i * width).unsafe_load[width=width]()

    var channels = g.group_channels()
    var tap_step = x.tap_step
    var first_tap = max(g.first_tap(first, rows), w.first_tap)
    var end_tap = min(g.end_tap(first), w.end_tap)
    var xt = x.data.unsafe_offset(first_tap * tap_step)
    var wt = w.data.unsafe_offset((first_tap - w.first_tap) * channels * w.row_size)
    var taps = max(0, end_tap - first_tap)
    if tap_step == channels:  # taps and channels are one long row
        channels *= taps
        taps = min(taps, 1)
    comptime if short:
        var tap_size = channels * w.row_size
        accumulate[rows, vectors, partial and not packed](
            total, xt, tap_step, x.output_step, wt, tap_size, w.row_size, taps, channels, rest
        )
    else:
        var channel_block = min(channels, BLOCK)
        var tap_block = BLOCK // max(1, channel_block)
        for tap in range(0, taps, tap_block):
            for channel in range(0, channels, channel_block):
                var sum = Array[SIMD[acc, width], rows * vectors](fill=SIMD[acc, width](0))
                accumulate[rows, vectors, partial and not packed](
                    sum,
                    xt.unsafe_offset(tap * tap_step + channel),
                    tap_step,
                    x.output_step,
                    wt.unsafe_offset((tap * channels + channel) * w.row_size),
                    channels * w.row_size,
                    w.row_size,
                    min(tap_block, taps - tap),
                    min(channel_block, channels - channel),
                    rest,
                )
                comptime for i in range(rows * vectors):
                    total[i] += sum[i]

    if not short and w.end_tap < g.kernel:
        comptime for i in range(rows * vectors):
            sums.unsafe_offset(i * width).unsafe_store(total[i])
        return
    comptime for i in range(rows):
        if i < valid:
            comptime for j in range(vectors):
                comptime if partial and j == last:
                    put[write, True](n, first + i, filter + j * width, total[i * vectors + j], rest)
                else:
                    write[width](n, first + i, filter + j * width, total[i * vectors + j].cast[dtype]())


@always_inline
def column[
    dtype: DType, acc: DType, //, write: Write[dtype], short: Bool, vectors: Int, partial: Bool, packed: Bool
](
    g: Geometry,
    x: Rows[acc],
    w: Panel[acc],
    o: Operands[dtype],
    n: Int,
    first: Int,
    count: Int,
    filter: Int,
    lanes: Int,
):
    """Computes `count` positions from `first` on, by `lanes` filters from `filter` on."""
    comptime rows = tile_rows[acc]()
    comptime width = simd_width_of[acc]()
    var done = 0
    while done < count:
        var left = count - done
        var sums = w.sums.unsafe_offset(done * vectors * width)
        if left > 2 * SHORT_ROWS:
            tile[write, short, rows, vectors, partial, packed](
                g, x.skip(done), w, o, n, first + done, min(left, rows), filter, lanes, sums
            )
            done += rows
        else:
            tile[write, short, SHORT_ROWS, vectors, partial, packed](
                g, x.skip(done), w, o, n, first + done, min(left, SHORT_ROWS), filter, lanes, sums
            )
            done += SHORT_ROWS


@always_inline
def pack[
    dtype: DType, acc: DType, //
](w: Memory[dtype], row_size: Int, rows: Int, lanes: Int, target: Memory[acc]):
    """Copies `rows` rows of `lanes` filters side by side, with zeros behind the last filter."""
    comptime width = simd_width_of[acc]()
    for r in range(rows):
        comptime for j in range(VECTORS):
            var from_ = w.unsafe_offset(r * row_size + j * width)
            var value = SIMD[acc, width](0)
            if lanes >= (j + 1) * width:
                value = load[acc, width, False](from_, width)
            elif lanes > j * width:
                value = load[acc, width, True](from_, lanes - j * width)
            target.unsafe_offset((r * VECTORS + j) * width).unsafe_store(value)


def block[
    dtype: DType, //, write: Write[dtype], short: Bool, whole: Bool, packed: Bool
](
    g: Geometry,
    o: Operands[dtype],
    n: Int,
    group: Int,
    first: Int,
    count: Int,
    first_filter: Int,
    end_filter: Int,
):
    """Computes `count` positions from `first` on, of one group's filters `first_filter .. end_filter - 1`."""
    comptime acc = accumulator[dtype]
    comptime width = simd_width_of[acc]()
    comptime panel = VECTORS * width
    comptime rows = tile_rows[acc]()
    var channels = g.group_channels()
    # Tiles may run past `count`: the rows that they read must exist all the same.
    var window = Window.of(g, first, count + rows)
    var x = o.x.unsafe_offset(n * g.length * g.channels + group * channels)
    var scratch = Scratch[acc](0)
    var data = Rows[acc].of(window, g, x, channels, scratch)
    var taps = g.kernel if short else min(g.kernel, max(1, SLAB // channels))
    var in_slabs = taps < g.kernel or dtype != acc
    var copy_size = 0 if packed or not in_slabs else taps * channels * panel
    var room = Scratch[acc](copy_size + (count + rows) * panel if in_slabs else 0)
    var copy = room.data()
    var sums = copy.unsafe_offset(copy_size)
    var f = first_filter
    while f < end_filter:
        var filter = group * g.group_filters() + f
        var lanes = end_filter - f
        for tap in range(0, g.kernel, taps):
            var end = min(tap + taps, g.kernel)
            var w = Panel[acc](copy, panel, tap, end, sums)
            comptime if packed:
                comptime assert dtype == acc
                var panels = Panels[acc].packed(g, group, o.w.unsafe_bitcast[Scalar[acc]](), g.kernel * channels)
                w.data = panels.at(f).unsafe_offset(tap * channels * PACK)
                w.row_size = PACK
            else:
                var in_place = o.w.unsafe_offset(tap * channels * g.filters + filter)
                if in_slabs:
                    pack(in_place, g.filters, (end - tap) * channels, lanes, copy)
                else:
                    w.data = in_place.unsafe_bitcast[Scalar[acc]]()
                    w.row_size = g.filters
            if whole or lanes >= panel:
                column[write, short, VECTORS, False, packed](g, data, w, o, n, first, count, filter, lanes)
            else:
                comptime if not whole:
                    column[write, short, 1, True, packed](g, data, w, o, n, first, count, filter, min(lanes, width))
        f += panel if whole or lanes >= panel else width
    _ = scratch^
    _ = room^


def conv1d_dense[
    dtype: DType, //, write: Write[dtype], short: Bool, whole: Bool = False, packed: Bool = False
](g: Geometry, o: Operands[dtype]):
    """Computes a convolution of NLC data with an SCF filter, or a `packed` one; with `short`, in one running sum.

    `whole` says that the filters of a group are a multiple of 32, and leaves the tiles for others uncompiled.
    """
    comptime acc = accumulator[dtype]
    comptime rows = tile_rows[acc]()
    comptime panel = VECTORS * simd_width_of[acc]()
    var work = g.batch * g.out_length * g.filters * g.kernel * g.group_channels()
    var threads = workers(work)
    var target = max(threads, min(16 * threads, work // TASK))
    var tiles = ceildiv(g.out_length, rows)
    var panels = ceildiv(g.group_filters(), panel)
    # A block reads its filters from cache once for each of its tiles, so blocks are long, and work is cut along the
    # filters where blocks alone are too few to go round evenly.
    var tile_bytes = g.group_channels() * g.stride * rows * size_of[Scalar[acc]]()
    var longest = min(16 if g.kernel * g.group_channels() > SLAB else 8, WINDOW_BYTES // tile_bytes)
    var block_tiles = min(longest, g.batch * g.groups * tiles * panels // target)
    var blocks = ceildiv(tiles, max(1, block_tiles))
    var splits = min(panels, ceildiv(target, g.batch * g.groups * blocks))
    var split = ceildiv(panels, splits) * panel
    splits = ceildiv(g.group_filters(), split)
    var tasks = g.batch * g.groups * blocks * splits

    def task(i: Int) {imm}:
        var part = i % splits
        var index = i // splits % blocks
        var group = i // (splits * blocks) % g.groups
        var n = i // (splits * blocks * g.groups)
        var first = index * tiles // blocks * rows
        var end = min((index + 1) * tiles // blocks * rows, g.out_length)
        var end_filter = min((part + 1) * split, g.group_filters())
        block[write, short, whole, packed](g, o, n, group, first, end - first, part * split, end_filter)

    spread(task, tasks, threads)
