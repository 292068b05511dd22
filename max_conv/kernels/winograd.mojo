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
from .lanes import FilterSteps, Memory, Operands, Scratch, Write, accumulator
from .lanes import PACK, Panels, panels_at_a_time, put
from .points import Plan, POINTS, QUAD, first_output, outputs
from .tasks import phases, spread, workers
from .transforms import VECTORS, transform_block, transform_filter
from .turn import turn_out
from .window import Window

comptime SUM = 32
"""Terms in one running sum. Transforms cost accuracy, shorter sums win it back."""
comptime NEAR = PrefetchOptions().for_read().high_locality().to_data_cache()
comptime AHEAD = 24
"""Channels between the filter's values that are multiplied and those that are asked for: a filter that is far away came 15 to
25 % faster, others alike."""
comptime DATA_BYTES = 320 * 1024
"""Transformed data of one block."""
comptime MOST_BYTES = 720 * 1024
"""The same where the transformed filter exceeds `FAR_BYTES`, and the data is little."""
comptime FAR_BYTES = 4 * 1024 * 1024


@always_inline
def tile[
    acc: DType, //, rows: Int, vectors: Int
](
    data: Memory[acc],
    row_size: Int,
    plane: Int,
    filter: Memory[acc],
    filter_row: Int,
    channels: Int,
    groups: Int,
    sums: Memory[acc],
):
    """Sums the products of `rows` quads and some vectors of filters at one point, over channels and groups of taps."""
    comptime width = simd_width_of[acc]()
    var step = ceildiv(channels, ceildiv(channels, SUM))
    var first = True
    for group in range(groups):
        var x = data.unsafe_offset(group * plane)
        var w = filter.unsafe_offset(group * channels * filter_row)
        for channel in range(0, channels, step):
            var sum = Array[SIMD[acc, width], rows * vectors](fill=SIMD[acc, width](0))
            for c in range(channel, min(channel + step, channels)):
                var b = Array[SIMD[acc, width], vectors](fill=SIMD[acc, width](0))
                comptime for j in range(vectors):
                    prefetch[NEAR](w.unsafe_offset((c + AHEAD) * filter_row + j * width))
                    b[j] = w.unsafe_offset(c * filter_row + j * width).unsafe_load[width=width]()
                comptime for i in range(rows):
                    var a = SIMD[acc, width](x[unsafe_offset=i * row_size + c])
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
    """`count` quads of one group of a batch item, from `first` on, and where what is made of them stands."""

    var source: Source[Self.dtype]
    var calm: Bool
    """Whether the data could be transformed."""
    var n: Int
    var group: Int
    var first: Int
    var count: Int
    var data: Memory[Self.acc]
    var row_size: Int
    var plane: Int
    var sums: Memory[Self.acc]

    @always_inline
    def point_size(self, panel: Int) -> Int:
        """Returns how far apart the sums at two points stand."""
        return (self.count + tile_rows[Self.acc]()) * panel


def block[
    dtype: DType, acc: DType, //, write: Write[dtype], nlc: Bool, whole: Bool, packed: Bool
](
    g: Geometry,
    plan: Plan,
    steps: FilterSteps,
    n: Int,
    group: Int,
    first: Int,
    count: Int,
    first_filter: Int,
    end_filter: Int,
    filter: Panels[acc],
    o: Operands[dtype],
):
    """Computes quads `first .. first + count - 1` of one group's filters `first_filter .. end_filter - 1`."""
    comptime width = simd_width_of[acc]()
    comptime rows = tile_rows[acc]()
    var channels = g.group_channels()
    var row_size = ceildiv(channels, width) * width
    # Tiles may run past `count`: the rows that they read must exist all the same.
    var plane = (count + rows // 4) * row_size
    var products = plan.products()
    var scratch = Scratch[acc](products * plane + POINTS * (count + rows) * VECTORS * width)
    var data = scratch.data()
    var sums = data.unsafe_offset(products * plane)
    # Rows of padding are read from `rest`; NCL data is turned into it.
    var x = o.x.unsafe_offset(n * g.length * g.channels + group * channels * (1 if nlc else g.length))
    var span = Window.span(g, first_output(plan, first), count * QUAD)
    var rest = Scratch[dtype](channels if nlc else span.rows * channels)
    var copy = rest.data()
    comptime if nlc:
        for c in range(channels):
            copy[unsafe_offset=c] = 0
    else:
        span.turn(g, x, channels, copy, channels)
    var source = Source[dtype](x, copy, span.first)
    var calm = transform_block[nlc](g, plan, source, first, count, data, row_size, plane)
    var b = Block[dtype, acc](source, calm, n, group, first, count, data, row_size, plane, sums)

    var f = first_filter
    while f < end_filter:
        var lanes = end_filter - f
        if whole or lanes > width:
            panel[write, nlc, packed, VECTORS](g, plan, steps, b, filter, o, f, lanes)
            f += VECTORS * width
        else:
            comptime if not whole:
                panel[write, nlc, packed, 1](g, plan, steps, b, filter, o, f, lanes)
                f += width
    _ = scratch^
    _ = rest^


@always_inline
def panel[
    dtype: DType, acc: DType, //, write: Write[dtype], nlc: Bool, packed: Bool, vectors: Int
](
    g: Geometry,
    plan: Plan,
    steps: FilterSteps,
    b: Block[dtype, acc],
    filter: Panels[acc],
    o: Operands[dtype],
    in_group: Int,
    lanes: Int,
):
    """Computes a block's quads of `lanes` filters of a group from `in_group` on."""
    comptime size = vectors * simd_width_of[acc]()
    var f = b.group * g.group_filters() + in_group
    var at_points = products[nlc, packed, vectors](g, plan, steps, b, filter.at(in_group), filter.lanes, o, f, lanes)
    comptime if nlc:
        quads[write, vectors](g, plan, b, at_points, o, f, lanes)
    else:
        var start = first_output(plan, b.first)
        var end = min(g.out_length, start + b.count * QUAD)
        var turned = Scratch[dtype]((end - start + simd_width_of[dtype]()) * size + simd_width_of[dtype]())
        var rows_out = turned.data()

        @__parameter
        @always_inline
        def keep[lanes: Int](_n: Int, position: Int, filter: Int, value: SIMD[dtype, lanes]):
            rows_out.unsafe_offset((position - start) * size + filter - f).unsafe_store(value)

        quads[keep, vectors](g, plan, b, at_points, o, f, lanes)
        turn_out[write](rows_out, size, b.n, start, end - start, f, min(lanes, size))
        _ = turned^


@no_inline
def products[
    dtype: DType, acc: DType, //, nlc: Bool, packed: Bool, vectors: Int
](
    g: Geometry,
    plan: Plan,
    steps: FilterSteps,
    b: Block[dtype, acc],
    w: Memory[acc],
    filter_row: Int,
    o: Operands[dtype],
    f: Int,
    lanes: Int,
) -> Bool:
    """Writes the sums of a block's quads and some vectors of filters: at all points, or else of the outputs themselves.

    Not inlined, as `transform_block` is not: what calls it holds the operations behind the layer, and compiles slowly.
    """
    comptime size = vectors * simd_width_of[acc]()
    var channels = g.group_channels()
    var point_size = b.point_size(size)
    if b.calm and calm_filter(plan, w, channels, filter_row):
        multiply[vectors](plan, b.count, channels, b.data, b.row_size, b.plane, w, filter_row, b.sums, point_size)
        return True
    var room = Scratch[acc](g.kernel * channels * size)
    var taps = room.data()
    comptime if packed:
        restore_taps(g, plan, w, filter_row, size, taps)
    else:
        gather_taps[size](g, o.w.unsafe_offset(f * steps.filter), steps, lanes, taps)
    direct[nlc, vectors](g, plan, b.source, b.first, b.count, taps, b.sums, point_size)
    _ = room^
    return False


@no_inline
def multiply[
    acc: DType, //, vectors: Int
](
    plan: Plan,
    count: Int,
    channels: Int,
    data: Memory[acc],
    row_size: Int,
    plane: Int,
    filter: Memory[acc],
    filter_row: Int,
    sums: Memory[acc],
    point_size: Int,
):
    """Sums the products of `count` quads and some vectors of filters, at all points."""
    comptime panel = vectors * simd_width_of[acc]()
    comptime rows = tile_rows[acc]()
    # Point by point: its part of the filter is read from far away once, for all tiles.
    for p in range(POINTS):
        var w = filter.unsafe_offset(plan.bases[p] * channels * filter_row)
        var i = 0
        while i < count:
            var left = count - i
            var x = data.unsafe_offset(plan.bases[p] * plane + i * row_size)
            var to = sums.unsafe_offset(p * point_size + i * panel)
            if left > rows // 2 + rows // 4:
                tile[rows, vectors](x, row_size, plane, w, filter_row, channels, plan.counts[p], to)
                i += rows
            elif left > rows // 4:
                tile[rows // 2, vectors](x, row_size, plane, w, filter_row, channels, plan.counts[p], to)
                i += rows // 2
            else:
                tile[rows // 4, vectors](x, row_size, plane, w, filter_row, channels, plan.counts[p], to)
                i += rows // 4


@always_inline
def quads[
    dtype: DType, acc: DType, //, write: Write[dtype], vectors: Int
](g: Geometry, plan: Plan, b: Block[dtype, acc], at_points: Bool, o: Operands[dtype], f: Int, lanes: Int):
    """Writes a block's outputs of some vectors of filters, of which `lanes` are there."""
    comptime width = simd_width_of[acc]()
    comptime panel = vectors * width
    var point_size = b.point_size(panel)
    if not at_points:
        for i in range(b.count * QUAD):
            var position = first_output(plan, b.first + i // QUAD) + i % QUAD * plan.spacing
            if position < g.out_length:
                var sums = b.sums.unsafe_offset(i % QUAD * point_size + i // QUAD * panel)
                for c in range(min(lanes, panel)):
                    var bias = o.bias_at[acc, 1](f + c, 1)
                    write[1](b.n, position, f + c, (bias + sums[unsafe_offset=c]).cast[dtype]())
        return
    for q in range(b.count):
        var position = first_output(plan, b.first + q)
        var inside = position + (QUAD - 1) * plan.spacing < g.out_length and lanes >= panel
        for j in range(vectors):
            var filters = lanes - j * width
            var bias = o.bias_at[acc, width](f + j * width, filters)
            var y = outputs(b.sums.unsafe_offset(q * panel + j * width), point_size, bias)
            if inside:
                comptime for k in range(QUAD):
                    write[width](b.n, position + k * plan.spacing, f + j * width, y[k].cast[dtype]())
            else:
                for k in range(QUAD):
                    if position + k * plan.spacing < g.out_length:
                        put[write, True](b.n, position + k * plan.spacing, f + j * width, y[k], filters)


def pays(g: Geometry, least: Int) -> Bool:
    """Tells whether outputs are enough to make up for the transformed filter, and for quads that are cut off."""
    return g.batch * g.out_length >= least and g.out_length * gcd(g.stride, g.dilation) >= 4 * QUAD * g.dilation


def conv1d_winograd[
    dtype: DType, //, write: Write[dtype], nlc: Bool, packed: Bool = False, whole: Bool = False
](g: Geometry, steps: FilterSteps, o: Operands[dtype]):
    """Computes a convolution of NLC or NCL data with a filter of any layout, or one that is `packed`.

    `whole` says that the filters of a group are a multiple of 32, and leaves the tiles for others uncompiled.
    """
    comptime acc = accumulator[dtype]
    comptime width = simd_width_of[acc]()
    comptime rows = tile_rows[acc]()
    var plan = Plan(g)
    var products = plan.products()
    var channels = g.group_channels()
    var filters = g.group_filters()
    var threads = workers(g.batch * g.out_length * g.filters * g.kernel * channels)
    var total = ceildiv(g.out_length, plan.spacing * QUAD) * plan.spacing
    var quad_bytes = products * ceildiv(channels, width) * width * size_of[Scalar[acc]]()
    var size = min(DATA_BYTES // quad_bytes, g.batch * g.groups * total // (4 * threads))
    size = max(1, size // rows) * rows
    if packed and quad_bytes * filters > FAR_BYTES and total * quad_bytes <= 4 * DATA_BYTES:
        # The filter comes from far away once a block: few long blocks, cut along the filters, take it in turns.
        var parts = ceildiv(total * quad_bytes, MOST_BYTES)
        size = min(total, ceildiv(ceildiv(total, parts), rows) * rows)
    comptime if not nlc:
        # Blocks of NCL data are runs of outputs without gaps.
        size = max(1, size // plan.spacing) * plan.spacing
    var blocks = ceildiv(total, size)

    var filter_rows = products * channels

    def run(i: Int, group: Int, n: Int, first: Int, end: Int, panels: Panels[acc]) {imm}:
        """Computes block i of a batch item with a group's filters `first .. end - 1`."""
        block[write, nlc, whole, packed](g, plan, steps, n, group, i * size, min(size, total - i * size), first, end, panels, o)

    comptime if packed:
        comptime assert dtype == acc
        # Few long blocks are cut along the filters, though each part then transforms the data again.
        var splits = max(1, min(ceildiv(filters, PACK), ceildiv(4 * threads, g.batch * g.groups * blocks)))
        var split = ceildiv(ceildiv(filters, PACK), splits) * PACK

        def in_place(i: Int) {imm}:
            var first = i % splits * split
            var group = i // (splits * blocks) % g.groups
            var panels = Panels[acc].packed(g, group, o.w.unsafe_bitcast[Scalar[acc]](), filter_rows)
            run(i // splits % blocks, group, i // (splits * blocks * g.groups), first, min(first + split, filters), panels)

        spread(in_place, g.batch * g.groups * blocks * splits, threads)
    else:
        comptime panel = VECTORS * width
        var panel_size = filter_rows * panel
        var panels = ceildiv(filters, panel)
        var chunk = panels_at_a_time(panels, panel_size * size_of[Scalar[acc]](), threads)
        var room = Scratch[acc](chunk * panel_size)
        var transformed = Panels[acc](room.data(), panel, filter_rows)
        for group in range(g.groups):
            for first in range(0, panels, chunk):
                var end = min(first + chunk, panels)
                var parts = len(plan.sizes)

                def prepare(i: Int) {imm}:
                    var part = i % parts
                    var f = (first + i // parts) * panel
                    var lanes = filters - f
                    var w = o.w.unsafe_offset((group * filters + f) * steps.filter)
                    var to = transformed.at(i // parts * panel)
                    if plan.sizes[part] == 3:
                        transform_filter[3](g, plan, part, w, steps, lanes, to)
                    elif plan.sizes[part] == 2:
                        transform_filter[2](g, plan, part, w, steps, lanes, to)
                    else:
                        transform_filter[1](g, plan, part, w, steps, lanes, to)

                def work(i: Int) {imm}:
                    var from_first = Panels[acc](transformed.at(-first * panel), panel, filter_rows)
                    run(i % blocks, group, i // blocks, first * panel, min(end * panel, filters), from_first)

                phases(prepare, (end - first) * parts, work, g.batch * blocks, threads)
        _ = room^
