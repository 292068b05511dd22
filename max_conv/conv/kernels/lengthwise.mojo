"""Convolution with vector lanes along the length: NCL data, and layers with few output channels.

A block of positions is first copied channel by channel into lines: one line for each residue of the stride.
Neighbouring values of a line belong to neighbouring outputs, so every tap reads whole vectors, with any stride. The
filter is read one value at a time through strides, so every filter layout is native here.
"""

from std.math import ceildiv
from std.sys.info import simd_width_of, size_of

from .geometry import Geometry
from .grid import Grid, Part
from .lanes import SUM_TERMS, FilterSteps, Memory, Operands, Scratch, Write, accumulator, put
from .tasks import spread, workers

comptime WIDE_VECTORS = 6
"""Vectors of positions in a tile of one filter."""
comptime TILE_VECTORS = 3
"""Vectors of positions in a tile of several filters."""
comptime LONG_TILES = 40
comptime SHORT_TILES = 4
"""Wide tiles in a block if there is one channel; then the same for many channels, whose lines share a cache."""
comptime TASK = 1 << 20
"""Multiplications in a task that computes several groups."""
comptime WINDOW_BYTES = 256 * 1024


def tile_filters[acc: DType]() -> Int:
    """Returns the filters of a register tile: 24 of 32 registers hold sums, 12 of 16 in AVX2."""
    return 4 if simd_width_of[acc]() * size_of[Scalar[acc]]() == 32 else 8


@fieldwise_init
struct Lines(ImplicitlyCopyable, TrivialRegisterPassable):
    """How the rows of a block are laid out for each channel: `count` lines of `length` values.

    Entry i of line q is the input at `first + i * stride + shift(q)`. Lines are residues of the stride, or taps
    (`by_tap`) if that needs less memory.
    """

    var first: Int
    var count: Int
    var length: Int
    var by_tap: Bool

    @staticmethod
    def of(g: Geometry, first_output: Int, positions: Int) -> Self:
        var reach = (g.kernel - 1) * g.dilation
        var length = positions + reach // g.stride
        var by_tap = g.stride * length > g.kernel * positions
        return Self(
            first_output * g.stride - g.pad_left,
            g.kernel if by_tap else g.stride,
            positions if by_tap else length,
            by_tap,
        )

    @always_inline
    def shift(self, g: Geometry, line: Int) -> Int:
        return line * g.dilation if self.by_tap else line

    @always_inline
    def tap(self, g: Geometry, k: Int) -> Int:
        """Returns where tap k of the block's first output is stored."""
        if self.by_tap:
            return k * self.length
        var reach = k * g.dilation
        return reach % g.stride * self.length + reach // g.stride

    def fill[dtype: DType, acc: DType, //, nlc: Bool](self, g: Geometry, x: Memory[dtype], target: Memory[acc]):
        """Writes every line of every channel of one group, whose data starts at `x`."""
        comptime width = simd_width_of[acc]()
        var channels = g.group_channels()
        var channel_size = self.count * self.length
        for line in range(self.count):
            var start = self.first + self.shift(g, line)
            var to = target.unsafe_offset(line * self.length)
            comptime if nlc:
                for i in range(self.length):
                    var source = g.source(start + i * g.stride)
                    for c in range(channels):
                        to[unsafe_offset=c * channel_size + i] = (
                            x[unsafe_offset=source * g.channels + c].cast[acc]() if source >= 0 else 0
                        )
            else:
                var inner = min(self.length, max(0, ceildiv(-start, g.stride)))
                var outer = max(inner, min(self.length, (g.length - 1 - start) // g.stride + 1))
                for c in range(channels):
                    var row = x.unsafe_offset(c * g.length)
                    var out = to.unsafe_offset(c * channel_size)
                    for i in range(inner):
                        var source = g.source(start + i * g.stride)
                        out[unsafe_offset=i] = row[unsafe_offset=source].cast[acc]() if source >= 0 else 0
                    var i = inner
                    if g.stride == 1:
                        while i + width <= outer:
                            out.unsafe_offset(i).unsafe_store(
                                row.unsafe_offset(start + i).unsafe_load[width=width]().cast[acc]()
                            )
                            i += width
                    while i < outer:
                        out[unsafe_offset=i] = row[unsafe_offset=start + i * g.stride].cast[acc]()
                        i += 1
                    for j in range(outer, self.length):
                        var source = g.source(start + j * g.stride)
                        out[unsafe_offset=j] = row[unsafe_offset=source].cast[acc]() if source >= 0 else 0


@fieldwise_init
struct Laid[acc: DType](ImplicitlyCopyable, TrivialRegisterPassable):
    """A group's lines: `channel_size` values for each channel, where tap k starts at `taps[k]`."""

    var data: Memory[Self.acc]
    var channel_size: Int
    var taps: Pointer[Int, MutUntrackedOrigin]
    """If the filter has one tap: where each channel starts."""


@always_inline
def tile[
    dtype: DType, acc: DType, //, write: Write[dtype], filters: Int, vectors: Int, nlc: Bool
](g: Geometry, x: Laid[acc], steps: FilterSteps, o: Operands[dtype], part: Part, skip: Int):
    """Computes the first `vectors` vectors of a part's positions, or fewer at its end, by `filters` filters.

    The first `skip` filters are not stored.
    """
    comptime width = simd_width_of[acc]()
    var filter = part.column(g)
    var total = Array[SIMD[acc, width], filters * vectors](fill=SIMD[acc, width](0))
    if o.has_bias:
        comptime for i in range(filters):
            var b = SIMD[acc, width](o.bias[unsafe_offset=filter + i].cast[acc]())
            comptime for j in range(vectors):
                total[i * vectors + j] = b

    var channels = g.group_channels()
    # Whole blocks of terms are skipped, so that an output has the same bits next to an edge as elsewhere.
    var tap_block = min(g.kernel, SUM_TERMS)
    var first_tap = g.first_tap(part.first, vectors * width) // tap_block * tap_block
    var end_tap = g.end_tap(part.first)
    var tap_step = steps.tap
    if g.kernel == 1:  # the inner loop is over channels: there are more channels than taps
        first_tap, end_tap, tap_step, channels = 0, channels, steps.channel, 1
        tap_block = min(end_tap, SUM_TERMS)
    var channel_block = SUM_TERMS // tap_block
    for channel in range(0, channels, channel_block):
        for tap in range(first_tap, end_tap, tap_block):
            var sum = Array[SIMD[acc, width], filters * vectors](fill=SIMD[acc, width](0))
            for c in range(channel, min(channel + channel_block, channels)):
                var xc = x.data.unsafe_offset(c * x.channel_size)
                var wc = o.w.unsafe_offset(filter * steps.filter + c * steps.channel)
                for k in range(tap, min(tap + tap_block, end_tap)):
                    var xk = xc.unsafe_offset(x.taps[unsafe_offset=k])
                    var wk = wc.unsafe_offset(k * tap_step)
                    var a = Array[SIMD[acc, width], vectors](fill=SIMD[acc, width](0))
                    comptime for j in range(vectors):
                        a[j] = xk.unsafe_offset(j * width).unsafe_load[width=width]()
                    comptime for i in range(filters):
                        var b = SIMD[acc, width](wk[unsafe_offset=i * steps.filter].cast[acc]())
                        comptime for j in range(vectors):
                            sum[i * vectors + j] = a[j].fma(b, sum[i * vectors + j])
            comptime for i in range(filters * vectors):
                total[i] += sum[i]

    comptime for i in range(filters):
        if i >= skip:
            comptime for j in range(vectors):
                var value = total[i * vectors + j]
                var first = part.first + j * width
                comptime if nlc:
                    for lane in range(min(width, part.count - j * width)):
                        write[1](part.n, first + lane, filter + i, value[lane].cast[dtype]())
                else:
                    put[write, False](part.n, first, filter + i, value, part.count - j * width)


@always_inline
def band[
    dtype: DType, acc: DType, //, write: Write[dtype], filters: Int, vectors: Int, nlc: Bool
](g: Geometry, x: Laid[acc], steps: FilterSteps, o: Operands[dtype], part: Part, skip: Int = 0):
    """Computes a part's first `filters` filters; the first `skip` of them are not stored."""
    comptime width = simd_width_of[acc]()
    var done = 0
    while done < part.count:
        var left = part.after(done)
        var xt = Laid(x.data.unsafe_offset(done), x.channel_size, x.taps)
        if left.count > max(1, vectors // 2) * width:
            tile[write, filters, vectors, nlc](g, xt, steps, o, left, skip)
            done += vectors * width
            continue
        comptime if vectors // 2 > 1:
            comptime half = vectors // 2
            if left.count > width:
                tile[write, filters, half, nlc](g, xt, steps, o, left, skip)
                done += half * width
                continue
        tile[write, filters, 1, nlc](g, xt, steps, o, left, skip)
        done += width


@always_inline
def bands[
    dtype: DType, acc: DType, //, write: Write[dtype], nlc: Bool, fills_panels: Bool
](g: Geometry, x: Laid[acc], steps: FilterSteps, o: Operands[dtype], part: Part):
    """Computes a part from its group's lines."""
    comptime filters = tile_filters[acc]()
    var left = part
    while left.lanes() > 0:
        if fills_panels or left.lanes() >= filters:
            band[write, filters, TILE_VECTORS, nlc](g, x, steps, o, left)
            left.filter += filters
            continue
        comptime if not fills_panels:
            if left.lanes() > 2 and g.group_filters() >= filters:
                # This tile also computes filters before the rest, again. It costs as much as three separate filters.
                var skip = filters - left.lanes()
                left.filter -= skip
                band[write, filters, TILE_VECTORS, nlc](g, x, steps, o, left, skip)
                return
            band[write, 1, WIDE_VECTORS, nlc](g, x, steps, o, left)
            left.filter += 1


def block[
    dtype: DType, //, write: Write[dtype], nlc: Bool, fills_panels: Bool
](g: Geometry, steps: FilterSteps, o: Operands[dtype], part: Part, end_group: Int):
    """Computes a part, and the same part of the groups after it, up to `end_group`."""
    comptime acc = accumulator[dtype]
    var channels = g.group_channels()
    var lines = Lines.of(g, part.first, part.count)
    var channel_size = lines.count * lines.length
    # Tiles may run past the part: results from there are never stored, but the memory that is read must exist.
    var scratch = Scratch[acc](channels * channel_size + WIDE_VECTORS * simd_width_of[acc]())
    var table = List[Int](capacity=g.kernel)
    if g.kernel == 1:
        for c in range(channels):
            table.append(c * channel_size)
    else:
        for k in range(g.kernel):
            table.append(lines.tap(g, k))
    var taps = table.unsafe_ptr().unsafe_origin_cast[MutUntrackedOrigin]()
    var x = Laid[acc](scratch.data(), channel_size, taps)
    var left = part
    while left.group < end_group:
        var offset = part.n * g.length * g.channels + left.group * channels * (1 if nlc else g.length)
        lines.fill[nlc](g, o.x.unsafe_offset(offset), x.data)
        bands[write, nlc, fills_panels](g, x, steps, o, left)
        left.group += 1
    _ = scratch^
    _ = table^


def conv1d_lengthwise[
    dtype: DType, //, write: Write[dtype], nlc: Bool, fills_panels: Bool = False
](g: Geometry, steps: FilterSteps, o: Operands[dtype]):
    """Computes a convolution of NLC or NCL data with a filter of any layout.

    `fills_panels` says that the filters of a group are a multiple of 32, and leaves the tiles of one filter uncompiled.
    """
    comptime acc = accumulator[dtype]
    comptime lanes = WIDE_VECTORS * simd_width_of[acc]()
    var threads = workers(g.batch * g.out_length * g.filters * g.kernel * g.group_channels())
    var room = WINDOW_BYTES // (g.group_channels() * g.stride * size_of[Scalar[acc]]())
    var columns = max(1, min(LONG_TILES if g.group_channels() == 1 else SHORT_TILES, room // lanes))
    columns = max(1, min(columns, g.batch * g.groups * ceildiv(g.out_length, lanes) // (4 * threads)))
    var positions = columns * lanes
    var blocks = ceildiv(g.out_length, positions)
    positions = ceildiv(ceildiv(g.out_length, blocks), lanes) * lanes
    var splits = 1
    if g.batch * g.groups * blocks < 2 * threads:
        splits = min(g.group_filters(), ceildiv(2 * threads, g.batch * g.groups * blocks))
    var tile = tile_filters[acc]()
    var split = ceildiv(ceildiv(g.group_filters(), splits), tile) * tile
    splits = ceildiv(g.group_filters(), split)
    # Small groups share a task, and the memory that it allocates.
    var group_work = positions * g.kernel * g.group_channels() * g.group_filters()
    var bundle = min(TASK // group_work, g.batch * blocks * g.groups // (8 * threads))
    var bundles = g.groups if splits > 1 else ceildiv(g.groups, max(1, bundle))
    blocks = ceildiv(g.out_length, positions)
    var grid = Grid(g.batch, bundles, blocks, splits, positions, g.out_length, split, g.group_filters())

    def task(i: Int) {imm}:
        var part = grid.part(i)
        var end_group = (part.group + 1) * g.groups // bundles
        part.group = part.group * g.groups // bundles
        block[write, nlc, fills_panels](g, steps, o, part, end_group)

    spread(task, grid.tasks(), threads)
