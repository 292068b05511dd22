"""Convolution of NLC data with an SCF filter: vector lanes run over output channels.

A tile of positions by two vectors of output channels stays in registers while taps and channels are summed. A step
reads the filter's vectors straight from SCF and broadcasts one input value per row.
"""

from std.math import ceildiv, gcd
from std.sys.info import simd_width_of, size_of

from .geometry import Geometry
from .grid import Grid, Part
from .lanes import SUM_TERMS, PACK, Memory, Operands, Panels, Scratch, Write, accumulator, load, put
from .sink import Outputs, Sink
from .tasks import spread, workers
from .window import Rows, Window

comptime VECTORS = 2
comptime SHORT_ROWS = 4
"""Positions in the tile that ends a block: a tile of 14 would waste most of its rows on short signals."""
comptime SLAB = 2048
"""Rows of a filter's panel (each is a tap and a channel) that are summed for all tiles of a block before the next rows:
a quarter of the second cache."""
comptime WINDOW_BYTES = 512 * 1024
comptime TASK = 1 << 20
"""Multiplications in a task, about 10 microseconds. Larger tasks are worth cutting into smaller ones."""


def tile_rows[acc: DType]() -> Int:
    """Returns the positions of a register tile: 28 of 32 AVX-512 or NEON registers hold sums, 12 of 16 in AVX2."""
    return 6 if simd_width_of[acc]() * size_of[Scalar[acc]]() == 32 else 14


@fieldwise_init
struct Panel[acc: DType](ImplicitlyCopyable, TrivialRegisterPassable):
    """Some taps of up to `VECTORS` vectors of filters, side by side, and the sums over the taps before them."""

    var data: Memory[Self.acc]
    var row_size: Int
    var first_tap: Int
    var end_tap: Int
    var sums: Memory[Self.acc]
    """The sums of each position of the block, used if the taps do not all fit into one slab."""

    @always_inline
    def after(self, sums: Int) -> Self:
        """Returns the same panel for positions after some sums."""
        return Self(self.data, self.row_size, self.first_tap, self.end_tap, self.sums.unsafe_offset(sums))


@fieldwise_init
struct Taps[acc: DType](ImplicitlyCopyable, TrivialRegisterPassable):
    """Filters side by side: a row for each channel of each tap."""

    var data: Memory[Self.acc]
    var tap_size: Int
    var row_size: Int


@always_inline
def accumulate[
    acc: DType, width: Int, size: Int, //, rows: Int, vectors: Int, partial: Bool
](mut sum: Array[SIMD[acc, width], size], x: Rows[acc], w: Taps[acc], taps: Int, channels: Int, rest: Int):
    """Adds the products of some taps and channels to the sums of a tile. The last vector has `rest` lanes."""
    for k in range(taps):
        var xk = x.data.unsafe_offset(k * x.tap_step)
        var wk = w.data.unsafe_offset(k * w.tap_size)
        for c in range(channels):
            var b = Array[SIMD[acc, width], vectors](fill=SIMD[acc, width](0))
            comptime for j in range(vectors):
                comptime cut = partial and j == vectors - 1
                b[j] = load[acc, width, cut](wk.unsafe_offset(c * w.row_size + j * width), rest)
            comptime for i in range(rows):
                var a = SIMD[acc, width](xk[unsafe_offset=i * x.output_step + c])
                comptime for j in range(vectors):
                    sum[i * vectors + j] = a.fma(b[j], sum[i * vectors + j])


@always_inline
def sum_of_taps[
    acc: DType, width: Int, size: Int, //, short: Bool, rows: Int, vectors: Int, partial: Bool
](mut total: Array[SIMD[acc, width], size], x: Rows[acc], w: Taps[acc], taps: Int, channels: Int, rest: Int):
    """Adds the products of some taps and channels to the totals of a tile.

    With `short`, the sum is not cut into blocks, so that it needs no second set of registers.
    """
    comptime if short:
        accumulate[rows, vectors, partial](total, x, w, taps, channels, rest)
    else:
        var channel_block = min(channels, SUM_TERMS)
        var tap_block = SUM_TERMS // max(1, channel_block)
        for tap in range(0, taps, tap_block):
            for channel in range(0, channels, channel_block):
                var sum = Array[SIMD[acc, width], size](fill=SIMD[acc, width](0))
                var from_ = Rows(x.data.unsafe_offset(tap * x.tap_step + channel), x.output_step, x.tap_step)
                var by = Taps(w.data.unsafe_offset(tap * w.tap_size + channel * w.row_size), w.tap_size, w.row_size)
                var some_taps = min(tap_block, taps - tap)
                var some_channels = min(channel_block, channels - channel)
                accumulate[rows, vectors, partial](sum, from_, by, some_taps, some_channels, rest)
                comptime for i in range(size):
                    total[i] += sum[i]


@always_inline
def tile[
    dtype: DType, acc: DType, //, write: Write[dtype], short: Bool, rows: Int, vectors: Int, partial: Bool, packed: Bool
](g: Geometry, x: Rows[acc], w: Panel[acc], o: Operands[dtype], part: Part):
    """Computes the first `rows` positions of a part, or all if there are fewer, by `vectors` vectors of filters."""
    comptime width = simd_width_of[acc]()
    comptime last = vectors - 1
    var filter = part.column(g)
    var rest = part.lanes() - last * width
    var total = Array[SIMD[acc, width], rows * vectors](fill=SIMD[acc, width](0))
    if short or w.first_tap == 0:
        comptime for j in range(vectors):
            var b = o.bias_at[acc, width](filter + j * width, part.lanes() - j * width)
            comptime for i in range(rows):
                total[i * vectors + j] = b
    else:
        comptime for i in range(rows * vectors):
            total[i] = w.sums.unsafe_offset(i * width).unsafe_load[width=width]()

    var channels = g.group_channels()
    # Whole blocks of terms are skipped, so that an output has the same bits next to an edge as elsewhere.
    var in_row = g.dilation == 1 and (g.groups == 1 or dtype != acc) and g.stride <= g.kernel
    comptime if short:
        in_row = x.tap_step == channels
    var unit = 1 if short else SUM_TERMS // (gcd(channels, SUM_TERMS) if in_row else min(channels, SUM_TERMS))
    var first_tap = w.first_tap + max(0, g.first_tap(part.first, rows) - w.first_tap) // unit * unit
    var end_tap = min(g.end_tap(part.first), w.end_tap)
    var taps = max(0, end_tap - first_tap)
    var from_ = Rows(x.data.unsafe_offset(first_tap * x.tap_step), x.output_step, x.tap_step)
    var wt = w.data.unsafe_offset((first_tap - w.first_tap) * channels * w.row_size)
    if in_row:  # taps and channels are one long row
        channels *= taps
        taps = min(taps, 1)
    var by = Taps(wt, channels * w.row_size, w.row_size)
    sum_of_taps[short, rows, vectors, partial and not packed](total, from_, by, taps, channels, rest)

    if not short and w.end_tap < g.kernel:
        comptime for i in range(rows * vectors):
            w.sums.unsafe_offset(i * width).unsafe_store(total[i])
        return
    comptime for i in range(rows):
        if i < part.count:
            comptime for j in range(vectors):
                comptime if partial and j == last:
                    put[write, True](part.n, part.first + i, filter + j * width, total[i * vectors + j], rest)
                else:
                    var value = total[i * vectors + j].cast[dtype]()
                    write[width](part.n, part.first + i, filter + j * width, value)


@always_inline
def column[
    dtype: DType, acc: DType, //, write: Write[dtype], short: Bool, vectors: Int, partial: Bool, packed: Bool
](g: Geometry, x: Rows[acc], w: Panel[acc], o: Operands[dtype], part: Part):
    """Computes a part of at most `vectors` vectors of filters."""
    comptime rows = tile_rows[acc]()
    comptime size = vectors * simd_width_of[acc]()
    var done = 0
    while done < part.count:
        var left = part.after(done)
        if left.count > 2 * SHORT_ROWS:
            tile[write, short, rows, vectors, partial, packed](g, x.skip(done), w.after(done * size), o, left)
            done += rows
        else:
            tile[write, short, SHORT_ROWS, vectors, partial, packed](g, x.skip(done), w.after(done * size), o, left)
            done += SHORT_ROWS


@always_inline
def pack[dtype: DType, acc: DType, //](w: Memory[dtype], row_size: Int, rows: Int, lanes: Int, target: Memory[acc]):
    """Copies `rows` rows of `lanes` filters side by side, with zeros after the last filter."""
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
    dtype: DType,
    //,
    write: Write[dtype],
    after: def(Part) capturing -> None,
    short: Bool,
    fills_panels: Bool,
    packed: Bool,
](g: Geometry, o: Operands[dtype], part: Part):
    """Computes a part. When some of its filters are done, calls `after` with the part by these filters."""
    comptime acc = accumulator[dtype]
    comptime width = simd_width_of[acc]()
    comptime panel = VECTORS * width
    comptime rows = tile_rows[acc]()
    var channels = g.group_channels()
    # Tiles may run past the part: the rows that they read must exist nevertheless.
    var window = Window.of(g, part.first, part.count + rows)
    var x = o.x.unsafe_offset(part.n * g.length * g.channels + part.group * channels)
    var scratch = Scratch[acc](0)
    var data = Rows[acc].of(window, g, x, channels, scratch)
    var taps = g.kernel if short else min(g.kernel, max(1, SLAB // channels))
    var in_slabs = taps < g.kernel or dtype != acc
    var copy_size = 0 if packed or not in_slabs else taps * channels * panel
    var room = Scratch[acc](copy_size + (part.count + rows) * panel if in_slabs else 0)
    var copy = room.data()
    var left = part
    while left.lanes() > 0:
        var fills = fills_panels or left.lanes() >= panel
        for tap in range(0, g.kernel, taps):
            var end = min(tap + taps, g.kernel)
            var w = Panel[acc](copy, panel, tap, end, copy.unsafe_offset(copy_size))
            comptime if packed:
                comptime assert dtype == acc
                var panels = Panels[acc].packed(g, part.group, o.w.unsafe_bitcast[Scalar[acc]](), g.kernel * channels)
                w.data = panels.at(left.filter).unsafe_offset(tap * channels * PACK)
                w.row_size = PACK
            else:
                var in_place = o.w.unsafe_offset(tap * channels * g.filters + left.column(g))
                if in_slabs:
                    pack(in_place, g.filters, (end - tap) * channels, left.lanes(), copy)
                else:
                    w.data = in_place.unsafe_bitcast[Scalar[acc]]()
                    w.row_size = g.filters
            if fills:
                column[write, short, VECTORS, False, packed](g, data, w, o, left)
            else:
                comptime if not fills_panels:
                    var vector = left.by(left.filter, min(left.lanes(), width))
                    column[write, short, 1, True, packed](g, data, w, o, vector)
        after(left.by(left.filter, min(left.lanes(), panel if fills else width)))
        left.filter += panel if fills else width
    _ = scratch^
    _ = room^


def stored_block[
    dtype: DType, //, fills_panels: Bool, packed: Bool
](g: Geometry, o: Operands[dtype], part: Part, sink: Sink[dtype]):
    """Computes a part and stores its outputs panel by panel."""
    comptime panel = VECTORS * simd_width_of[accumulator[dtype]]()
    var room = Scratch[dtype](part.count * panel)
    var rows = room.data()
    var column = part.column(g)

    @__parameter
    @always_inline
    def keep[width: Int](_n: Int, position: Int, filter: Int, value: SIMD[dtype, width]):
        var at = (position - part.first) * panel + (filter - column) % panel
        rows.unsafe_offset(at).unsafe_store(value)

    @__parameter
    @always_inline
    def store(done: Part):
        var at = Outputs(part.n, part.first, part.count, 0, g.out_length, done.column(g), done.lanes())
        sink.put(at, rows.unsafe_offset((done.column(g) - column) % panel), panel)

    block[keep, store, False, fills_panels, packed](g, o, part)
    _ = rows
    _ = column
    _ = room^


def conv1d_short[
    dtype: DType, //, write: Write[dtype], fills_panels: Bool = False, packed: Bool = False
](g: Geometry, o: Operands[dtype]):
    """Does what `conv1d_dense` does, in one running sum: for few taps and channels.

    Its tiles write outputs directly: storing them in rows first would take as long as the sums.
    """
    var (grid, threads) = cut[accumulator[dtype]](g)

    def task(i: Int) {imm}:
        @__parameter
        @always_inline
        def nothing(_done: Part):
            pass

        block[write, nothing, True, fills_panels, packed](g, o, grid.part(i))

    spread(task, grid.tasks(), threads)


@no_inline
def conv1d_dense[
    dtype: DType, //, fills_panels: Bool = False, packed: Bool = False
](g: Geometry, o: Operands[dtype], sink: Sink[dtype]):
    """Computes a convolution of NLC data with an SCF filter, or a `packed` one.

    `fills_panels` says that the filters of a group are a multiple of 32, and leaves the tiles for others uncompiled.
    """
    var (grid, threads) = cut[accumulator[dtype]](g)

    def task(i: Int) {imm}:
        stored_block[fills_panels, packed](g, o, grid.part(i), sink)

    spread(task, grid.tasks(), threads)


def cut[acc: DType](g: Geometry) -> Tuple[Grid, Int]:
    """Returns the tasks of a layer, and how many threads compute them."""
    comptime rows = tile_rows[acc]()
    comptime panel = VECTORS * simd_width_of[acc]()
    var work = g.batch * g.out_length * g.filters * g.kernel * g.group_channels()
    var threads = workers(work)
    var target = max(threads, min(16 * threads, work // TASK))
    var tiles = ceildiv(g.out_length, rows)
    var panels = ceildiv(g.group_filters(), panel)
    # A block reads its filters from the cache once for each of its tiles. So blocks are long, and work is also cut
    # along the filters if there are too few blocks to give each thread an equal share.
    var tile_bytes = g.group_channels() * g.stride * rows * size_of[Scalar[acc]]()
    var longest = min(16 if g.kernel * g.group_channels() > SLAB else 8, WINDOW_BYTES // tile_bytes)
    var block_tiles = min(longest, g.batch * g.groups * tiles * panels // target)
    var blocks = ceildiv(tiles, max(1, block_tiles))
    var splits = min(panels, ceildiv(target, g.batch * g.groups * blocks))
    var split = ceildiv(panels, splits) * panel
    splits = ceildiv(g.group_filters(), split)
    var grid = Grid(g.batch, g.groups, blocks, splits, rows, g.out_length, split, g.group_filters())

    return (grid, threads)
