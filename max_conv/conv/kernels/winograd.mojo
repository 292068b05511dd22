"""Winograd's convolution along the length: four outputs of three taps for six multiplications instead of twelve.

The filter is transformed panel by panel, once per call; the data block by block. At each point a tile of quads by two
vectors of filters is summed like a tile of `dense`. The polynomials are in `points.mojo`.
"""

from std.math import ceildiv, gcd
from std.sys.info import simd_width_of, size_of
from std.sys.intrinsics import PrefetchOptions, prefetch

from .careful import Source, calm_filter, direct, gather_taps, restore_taps
from .dense import tile_rows
from .geometry import Geometry
from .grid import Grid, Part, by_chunks
from .lanes import PACK, FilterSteps, Memory, Operands, Panels, Scratch, accumulator, panels_at_a_time
from .points import Plan, POINTS, QUAD, TAPS, first_output, outputs
from .sink import Outputs, Sink
from .tasks import spread, workers
from .transforms import VECTORS, Planes, transform_block, transform_filter
from .window import Window

comptime POINT_TERMS = 32
"""Terms in one running sum. Transforms lose accuracy; shorter sums make up for it."""
comptime TO_CACHE = PrefetchOptions().for_read().high_locality().to_data_cache()
comptime AHEAD = 24
"""Filter values are prefetched so many channels before they are multiplied. That made loading a filter that is not in
the cache 15 to 25 % faster; other filters load equally fast."""
comptime DATA_BYTES = 320 * 1024
"""Bytes of one block's transformed data."""
comptime MOST_BYTES = 720 * 1024
"""The same if the transformed filter exceeds `FAR_BYTES` and there is little data."""
comptime FAR_BYTES = 4 * 1024 * 1024
comptime QUADS = 8
"""Quads whose outputs are stored at a time: they stay in the first cache."""


@always_inline
def tile[
    acc: DType, //, rows: Int, vectors: Int
](data: Planes[acc], filter: Memory[acc], filter_row: Int, channels: Int, groups: Int, sums: Memory[acc]):
    """Sums the products of `rows` quads and some vectors of filters at one point, over channels and groups of taps."""
    comptime width = simd_width_of[acc]()
    var step = ceildiv(channels, ceildiv(channels, POINT_TERMS))
    var first = True
    for group in range(groups):
        var x = data.at(group, 0).data
        var w = filter.unsafe_offset(group * channels * filter_row)
        for channel in range(0, channels, step):
            var sum = Array[SIMD[acc, width], rows * vectors](fill=SIMD[acc, width](0))
            for c in range(channel, min(channel + step, channels)):
                var b = Array[SIMD[acc, width], vectors](fill=SIMD[acc, width](0))
                comptime for j in range(vectors):
                    prefetch[TO_CACHE](w.unsafe_offset((c + AHEAD) * filter_row + j * width))
                    b[j] = w.unsafe_offset(c * filter_row + j * width).unsafe_load[width=width]()
                comptime for i in range(rows):
                    var a = SIMD[acc, width](x[unsafe_offset=i * data.row_size + c])
                    comptime for j in range(vectors):
                        sum[i * vectors + j] = a.fma(b[j], sum[i * vectors + j])
            if first:
                comptime for i in range(rows * vectors):
                    sums.unsafe_offset(i * width).unsafe_store(sum[i])
                first = False
            else:
                comptime for i in range(rows * vectors):
                    var at = sums.unsafe_offset(i * width)
                    at.unsafe_store(at.unsafe_load[width=width]() + sum[i])
    if first:
        comptime for i in range(rows * vectors):
            sums.unsafe_offset(i * width).unsafe_store(SIMD[acc, width](0))


@fieldwise_init
struct Block[dtype: DType, acc: DType](ImplicitlyCopyable, TrivialRegisterPassable):
    """A part and its intermediate results. While a panel is computed, the part's filters begin at that panel."""

    var part: Part
    var source: Source[Self.dtype]
    var calm: Bool
    """Whether all data is finite and small enough for the transforms."""
    var planes: Planes[Self.acc]
    var sums: Memory[Self.acc]

    @always_inline
    def point_size(self, panel: Int) -> Int:
        """Returns how far apart the sums at two points are."""
        return (self.part.count + tile_rows[Self.acc]()) * panel


def block[
    dtype: DType, acc: DType, //, nlc: Bool, fills_panels: Bool, packed: Bool
](g: Geometry, plan: Plan, steps: FilterSteps, part: Part, filter: Panels[acc], o: Operands[dtype], sink: Sink[dtype]):
    """Computes a part, whose positions are quads."""
    comptime width = simd_width_of[acc]()
    comptime rows = tile_rows[acc]()
    var channels = g.group_channels()
    var row_size = ceildiv(channels, width) * width
    # Tiles may run past the last quad: the rows that they read must exist nevertheless.
    var plane = (part.count + rows // 4) * row_size
    var products = plan.products()
    var scratch = Scratch[acc](products * plane + POINTS * (part.count + rows) * VECTORS * width)
    var planes = Planes[acc](scratch.data(), row_size, plane)
    # Rows of padding are read from `rest`. NCL data is transposed into it.
    var x = o.x.unsafe_offset(part.n * g.length * g.channels + part.group * channels * (1 if nlc else g.length))
    var span = Window.span(g, first_output(plan, part.first), part.count * QUAD)
    var rest = Scratch[dtype](channels if nlc else span.rows * channels)
    var copy = rest.data()
    comptime if nlc:
        for c in range(channels):
            copy[unsafe_offset=c] = 0
    else:
        span.turn(g, x, channels, copy, channels)
    var source = Source[dtype](x, copy, span.first)
    var calm = transform_block[nlc](g, plan, source, part, planes)
    var b = Block[dtype, acc](part, source, calm, planes, planes.at(products, 0).data)

    while b.part.lanes() > 0:
        if fills_panels or b.part.lanes() > width:
            panel[nlc, packed, VECTORS](g, plan, steps, b, filter, o, sink)
            b.part.filter += VECTORS * width
        else:
            comptime if not fills_panels:
                panel[nlc, packed, 1](g, plan, steps, b, filter, o, sink)
                b.part.filter += width
    _ = scratch^
    _ = rest^


@always_inline
def panel[
    dtype: DType, acc: DType, //, nlc: Bool, packed: Bool, vectors: Int
](
    g: Geometry,
    plan: Plan,
    steps: FilterSteps,
    b: Block[dtype, acc],
    filter: Panels[acc],
    o: Operands[dtype],
    sink: Sink[dtype],
):
    """Computes a block's quads by its first filters."""
    comptime size = vectors * simd_width_of[acc]()
    comptime spare = simd_width_of[dtype]()
    var at_points = products[nlc, packed, vectors](g, plan, steps, b, filter, o)
    var at = Outputs(b.part.n, 0, 0, 0, g.out_length, b.part.column(g), min(b.part.lanes(), size))
    comptime if nlc:
        var room = Scratch[dtype](min(b.part.count, QUADS) * QUAD * size)
        at.spacing = plan.spacing if plan.spacing > 1 else 0
        for i in range(0, b.part.count, QUADS):
            var count = min(QUADS, b.part.count - i)
            quads[nlc, vectors](plan, b, i, count, at_points, o, at.filter, room.data())
            at.first = b.part.first + i if plan.spacing > 1 else (b.part.first + i) * QUAD
            at.count = count * QUAD
            sink.put(at, room.data(), size)
        _ = room^
    else:
        at.first = first_output(plan, b.part.first)
        at.count = min(g.out_length, at.first + b.part.count * QUAD) - at.first
        var room = Scratch[dtype]((b.part.count * QUAD + spare) * size + spare)
        quads[nlc, vectors](plan, b, 0, b.part.count, at_points, o, at.filter, room.data())
        sink.put(at, room.data(), size)
        _ = room^


@no_inline
def products[
    dtype: DType, acc: DType, //, nlc: Bool, packed: Bool, vectors: Int
](g: Geometry, plan: Plan, steps: FilterSteps, b: Block[dtype, acc], filter: Panels[acc], o: Operands[dtype]) -> Bool:
    """Writes the sums of a block's quads and some vectors of filters: at all points, or the outputs themselves.

    Returns whether the sums are at the points.
    """
    comptime size = vectors * simd_width_of[acc]()
    var channels = g.group_channels()
    var w = filter.at(b.part.filter)
    if b.calm and calm_filter(plan, w, channels, filter.lanes):
        multiply[vectors](plan, b, channels, w, filter.lanes)
        return True
    var room = Scratch[acc](g.kernel * channels * size)
    var taps = room.data()
    comptime if packed:
        restore_taps(g, plan, w, filter.lanes, size, taps)
    else:
        gather_taps[size](g, o.w.unsafe_offset(b.part.column(g) * steps.filter), steps, b.part.lanes(), taps)
    direct[nlc, vectors](g, plan, b.source, b.part, taps, b.sums, b.point_size(size))
    _ = room^
    return False


@no_inline
def multiply[
    dtype: DType, acc: DType, //, vectors: Int
](plan: Plan, b: Block[dtype, acc], channels: Int, filter: Memory[acc], filter_row: Int):
    """Sums the products of a block's quads and some vectors of filters, at all points."""
    comptime panel = vectors * simd_width_of[acc]()
    comptime rows = tile_rows[acc]()
    # The loop over points is outermost, so each point's part of the filter is read from memory once for all tiles.
    for p in range(POINTS):
        var w = filter.unsafe_offset(plan.bases[p] * channels * filter_row)
        var groups = plan.counts[p]
        var i = 0
        while i < b.part.count:
            var left = b.part.count - i
            var x = b.planes.at(plan.bases[p], i)
            var to = b.sums.unsafe_offset(p * b.point_size(panel) + i * panel)
            if left > rows // 2 + rows // 4:
                tile[rows, vectors](x, w, filter_row, channels, groups, to)
                i += rows
            elif left > rows // 4:
                tile[rows // 2, vectors](x, w, filter_row, channels, groups, to)
                i += rows // 2
            else:
                tile[rows // 4, vectors](x, w, filter_row, channels, groups, to)
                i += rows // 4


@always_inline
def quads[
    dtype: DType, acc: DType, //, nlc: Bool, vectors: Int
](
    plan: Plan,
    b: Block[dtype, acc],
    first: Int,
    count: Int,
    at_points: Bool,
    o: Operands[dtype],
    column: Int,
    rows: Memory[dtype],
):
    """Writes the outputs of `count` quads of a block, from its quad `first` on, by its first vectors of filters.

    The rows are in the order of the quads for NLC data, and of the positions for NCL data.
    """
    comptime width = simd_width_of[acc]()
    comptime panel = vectors * width
    var point_size = b.point_size(panel)
    var start = first_output(plan, b.part.first)
    for q in range(first, first + count):
        var row = (q - first) * QUAD if nlc else first_output(plan, b.part.first + q) - start
        var step = 1 if nlc else plan.spacing
        for j in range(vectors):
            var bias = o.bias_at[acc, width](column + j * width, b.part.lanes() - j * width)
            var sums = b.sums.unsafe_offset(q * panel + j * width)
            var y = Array[SIMD[acc, width], QUAD](fill=bias)
            if at_points:
                y = outputs(sums, point_size, bias)
            else:
                comptime for k in range(QUAD):
                    y[k] += sums.unsafe_offset(k * point_size).unsafe_load[width=width]()
            comptime for k in range(QUAD):
                rows.unsafe_offset((row + k * step) * panel + j * width).unsafe_store(y[k].cast[dtype]())


def pays(g: Geometry, least: Int) -> Bool:
    """Returns whether there are enough outputs to make up for transforming the filter and for incomplete quads."""
    return g.batch * g.out_length >= least and g.out_length * gcd(g.stride, g.dilation) >= 4 * QUAD * g.dilation


def quads_of_a_block[acc: DType, packed: Bool, nlc: Bool](g: Geometry, plan: Plan, total: Int, threads: Int) -> Int:
    """Returns how many of `total` quads are transformed and multiplied at a time."""
    comptime width = simd_width_of[acc]()
    comptime rows = tile_rows[acc]()
    var quad_bytes = plan.products() * ceildiv(g.group_channels(), width) * width * size_of[Scalar[acc]]()
    var size = min(DATA_BYTES // quad_bytes, g.batch * g.groups * total // (4 * threads))
    size = max(1, size // rows) * rows
    if packed and quad_bytes * g.group_filters() > FAR_BYTES and total * quad_bytes <= 4 * DATA_BYTES:
        # Each block reads the filter from memory. So there are few long blocks, and tasks are cut along the filters.
        var parts = ceildiv(total * quad_bytes, MOST_BYTES)
        size = min(total, ceildiv(ceildiv(total, parts), rows) * rows)
    comptime if not nlc:
        # A block of NCL data is a run of outputs without gaps.
        size = max(1, size // plan.spacing) * plan.spacing
    return size


@no_inline
def conv1d_winograd[
    dtype: DType, //, nlc: Bool, packed: Bool = False, fills_panels: Bool = False
](g: Geometry, steps: FilterSteps, o: Operands[dtype], sink: Sink[dtype]):
    """Computes a convolution of NLC or NCL data with a filter of any layout, or one that is `packed`.

    `fills_panels` says that the filters of a group are a multiple of 32, and leaves the tiles for others uncompiled.
    """
    comptime acc = accumulator[dtype]
    var plan = Plan(g)
    var filter_rows = plan.products() * g.group_channels()
    var filters = g.group_filters()
    var threads = workers(g.batch * g.out_length * g.filters * g.kernel * g.group_channels())
    var total = ceildiv(g.out_length, plan.spacing * QUAD) * plan.spacing
    var size = quads_of_a_block[acc, packed, nlc](g, plan, total, threads)
    var blocks = ceildiv(total, size)

    comptime if packed:
        comptime assert dtype == acc
        # If there are few blocks, they are cut along the filters, though each part then transforms the data again.
        var splits = max(1, min(ceildiv(filters, PACK), ceildiv(4 * threads, g.batch * g.groups * blocks)))
        var split = ceildiv(ceildiv(filters, PACK), splits) * PACK
        var grid = Grid(g.batch, g.groups, blocks, splits, size, total, split, filters)

        def in_place(i: Int) {imm}:
            var part = grid.part(i)
            var panels = Panels[acc].packed(g, part.group, o.w.unsafe_bitcast[Scalar[acc]](), filter_rows)
            block[nlc, fills_panels, packed](g, plan, steps, part, panels, o, sink)

        spread(in_place, grid.tasks(), threads)
    else:
        comptime panel = VECTORS * simd_width_of[acc]()
        var panel_size = filter_rows * panel
        var chunk = panels_at_a_time(ceildiv(filters, panel), panel_size * size_of[Scalar[acc]](), threads)
        var room = Scratch[acc](chunk * panel_size)
        var grid = Grid(g.batch, 1, blocks, 1, size, total, chunk * panel, chunk * panel)

        def prepare(group: Int, filter: Int, taps: Int, target: Memory[acc]) {imm}:
            var w = o.w.unsafe_offset((group * filters + filter) * steps.filter)
            comptime for count in range(1, TAPS + 1):
                if plan.sizes[taps] == count:
                    transform_filter[count](g, plan, taps, w, steps, filters - filter, target)

        def work(part: Part, panels: Panels[acc]) {imm}:
            block[nlc, fills_panels, packed](g, plan, steps, part, panels, o, sink)

        var held = Panels[acc](room.data(), panel, filter_rows)
        by_chunks(g, grid, chunk, held, prepare, len(plan.sizes), work, threads)
        _ = room^
