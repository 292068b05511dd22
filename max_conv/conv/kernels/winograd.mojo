"""Winograd's convolution along the length: four outputs of three taps for six multiplications instead of twelve.

The filter is transformed panel by panel, once a call; the data block by block. At each point a tile of quads by two
vectors of filters is summed like a tile of `dense`. The polynomials stand in `points.mojo`.
"""

from std.math import ceildiv, gcd
from std.sys.info import simd_width_of, size_of
from std.sys.intrinsics import PrefetchOptions, prefetch

from .careful import Source, calm_filter, direct, gather_taps, restore_taps
from .dense import tile_rows
from .geometry import Geometry
from .grid import Grid, Part, by_chunks
from .lanes import PACK, FilterSteps, Memory, Operands, Panels, Scratch, Write, accumulator, panels_at_a_time, put
from .points import Plan, POINTS, QUAD, TAPS, first_output, outputs
from .tasks import spread, workers
from .transforms import VECTORS, Planes, transform_block, transform_filter
from .turn import turned
from .window import Window

comptime POINT_TERMS = 32
"""Terms in one running sum. Transforms cost accuracy, shorter sums win it back."""
comptime TO_CACHE = PrefetchOptions().for_read().high_locality().to_data_cache()
comptime AHEAD = 24
"""Channels between the filter's values that are multiplied and those that are asked for: a filter that is far away came
15 to 25 % faster, others alike."""
comptime DATA_BYTES = 320 * 1024
"""Transformed data of one block."""
comptime MOST_BYTES = 720 * 1024
"""The same where the transformed filter exceeds `FAR_BYTES`, and the data is little."""
comptime FAR_BYTES = 4 * 1024 * 1024


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
    """A part, whose filters are those of one panel while that is computed, and where what is made of it stands."""

    var part: Part
    var source: Source[Self.dtype]
    var calm: Bool
    """Whether the data could be transformed."""
    var planes: Planes[Self.acc]
    var sums: Memory[Self.acc]

    @always_inline
    def point_size(self, panel: Int) -> Int:
        """Returns how far apart the sums at two points stand."""
        return (self.part.count + tile_rows[Self.acc]()) * panel


def block[
    dtype: DType, acc: DType, //, write: Write[dtype], nlc: Bool, fills_panels: Bool, packed: Bool
](g: Geometry, plan: Plan, steps: FilterSteps, part: Part, filter: Panels[acc], o: Operands[dtype]):
    """Computes a part, whose positions are quads."""
    comptime width = simd_width_of[acc]()
    comptime rows = tile_rows[acc]()
    var channels = g.group_channels()
    var row_size = ceildiv(channels, width) * width
    # Tiles may run past the quads: the rows that they read must exist all the same.
    var plane = (part.count + rows // 4) * row_size
    var products = plan.products()
    var scratch = Scratch[acc](products * plane + POINTS * (part.count + rows) * VECTORS * width)
    var planes = Planes[acc](scratch.data(), row_size, plane)
    # Rows of padding are read from `rest`; NCL data is turned into it.
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
            panel[write, nlc, packed, VECTORS](g, plan, steps, b, filter, o)
            b.part.filter += VECTORS * width
        else:
            comptime if not fills_panels:
                panel[write, nlc, packed, 1](g, plan, steps, b, filter, o)
                b.part.filter += width
    _ = scratch^
    _ = rest^


@always_inline
def panel[
    dtype: DType, acc: DType, //, write: Write[dtype], nlc: Bool, packed: Bool, vectors: Int
](g: Geometry, plan: Plan, steps: FilterSteps, b: Block[dtype, acc], filter: Panels[acc], o: Operands[dtype]):
    """Computes a block's quads of its first filters."""
    comptime size = vectors * simd_width_of[acc]()
    var at_points = products[nlc, packed, vectors](g, plan, steps, b, filter, o)
    comptime if nlc:
        quads[write, vectors](g, plan, b, at_points, o)
    else:
        var start = first_output(plan, b.part.first)
        var count = min(g.out_length, start + b.part.count * QUAD) - start
        var room = Scratch[dtype]((count + simd_width_of[dtype]()) * size + simd_width_of[dtype]())

        @__parameter
        @always_inline
        def compute[keep: Write[dtype]]():
            quads[keep, vectors](g, plan, b, at_points, o)

        turned[write, size, compute](room.data(), b.part.n, start, count, b.part.column(g), min(b.part.lanes(), size))
        _ = at_points
        _ = room^


@no_inline
def products[
    dtype: DType, acc: DType, //, nlc: Bool, packed: Bool, vectors: Int
](g: Geometry, plan: Plan, steps: FilterSteps, b: Block[dtype, acc], filter: Panels[acc], o: Operands[dtype]) -> Bool:
    """Writes the sums of a block's quads and some vectors of filters: at all points, or else of the outputs themselves.

    Not inlined, as `transform_block` is not: what calls it holds the operations behind the layer, and compiles slowly.
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
    # Point by point: its part of the filter is read from far away once, for all tiles.
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
    dtype: DType, acc: DType, //, write: Write[dtype], vectors: Int
](g: Geometry, plan: Plan, b: Block[dtype, acc], at_points: Bool, o: Operands[dtype]):
    """Writes a block's outputs of its first vectors of filters."""
    comptime width = simd_width_of[acc]()
    comptime panel = vectors * width
    var n = b.part.n
    var f = b.part.column(g)
    var lanes = b.part.lanes()
    var point_size = b.point_size(panel)
    if not at_points:
        for i in range(b.part.count * QUAD):
            var position = first_output(plan, b.part.first + i // QUAD) + i % QUAD * plan.spacing
            if position < g.out_length:
                var sums = b.sums.unsafe_offset(i % QUAD * point_size + i // QUAD * panel)
                for c in range(min(lanes, panel)):
                    var bias = o.bias_at[acc, 1](f + c, 1)
                    write[1](n, position, f + c, (bias + sums[unsafe_offset=c]).cast[dtype]())
        return
    for q in range(b.part.count):
        var position = first_output(plan, b.part.first + q)
        var inside = position + (QUAD - 1) * plan.spacing < g.out_length and lanes >= panel
        for j in range(vectors):
            var filters = lanes - j * width
            var bias = o.bias_at[acc, width](f + j * width, filters)
            var y = outputs(b.sums.unsafe_offset(q * panel + j * width), point_size, bias)
            if inside:
                comptime for k in range(QUAD):
                    write[width](n, position + k * plan.spacing, f + j * width, y[k].cast[dtype]())
            else:
                for k in range(QUAD):
                    if position + k * plan.spacing < g.out_length:
                        put[write, True](n, position + k * plan.spacing, f + j * width, y[k], filters)


def pays(g: Geometry, least: Int) -> Bool:
    """Tells whether outputs are enough to make up for the transformed filter, and for quads that are cut off."""
    return g.batch * g.out_length >= least and g.out_length * gcd(g.stride, g.dilation) >= 4 * QUAD * g.dilation


def quads_of_a_block[acc: DType, packed: Bool, nlc: Bool](g: Geometry, plan: Plan, total: Int, threads: Int) -> Int:
    """Returns how many of `total` quads are transformed and multiplied at a time."""
    comptime width = simd_width_of[acc]()
    comptime rows = tile_rows[acc]()
    var quad_bytes = plan.products() * ceildiv(g.group_channels(), width) * width * size_of[Scalar[acc]]()
    var size = min(DATA_BYTES // quad_bytes, g.batch * g.groups * total // (4 * threads))
    size = max(1, size // rows) * rows
    if packed and quad_bytes * g.group_filters() > FAR_BYTES and total * quad_bytes <= 4 * DATA_BYTES:
        # The filter comes from far away once a block: few long blocks, cut along the filters, read it alternately.
        var parts = ceildiv(total * quad_bytes, MOST_BYTES)
        size = min(total, ceildiv(ceildiv(total, parts), rows) * rows)
    comptime if not nlc:
        # Blocks of NCL data are runs of outputs without gaps.
        size = max(1, size // plan.spacing) * plan.spacing
    return size


def conv1d_winograd[
    dtype: DType, //, write: Write[dtype], nlc: Bool, packed: Bool = False, fills_panels: Bool = False
](g: Geometry, steps: FilterSteps, o: Operands[dtype]):
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
        # Few long blocks are cut along the filters, though each part then transforms the data again.
        var splits = max(1, min(ceildiv(filters, PACK), ceildiv(4 * threads, g.batch * g.groups * blocks)))
        var split = ceildiv(ceildiv(filters, PACK), splits) * PACK
        var grid = Grid(g.batch, g.groups, blocks, splits, size, total, split, filters)

        def in_place(i: Int) {imm}:
            var part = grid.part(i)
            var panels = Panels[acc].packed(g, part.group, o.w.unsafe_bitcast[Scalar[acc]](), filter_rows)
            block[write, nlc, fills_panels, packed](g, plan, steps, part, panels, o)

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
            block[write, nlc, fills_panels, packed](g, plan, steps, part, panels, o)

        var held = Panels[acc](room.data(), panel, filter_rows)
        by_chunks(g, grid, chunk, held, prepare, len(plan.sizes), work, threads)
        _ = room^
