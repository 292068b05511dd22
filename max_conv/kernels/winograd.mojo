"""Winograd's convolution along the length: four outputs of three taps for six multiplications instead of twelve.

The filter is transformed panel by panel, once a call; the data block by block. At each point a tile of quads by two
vectors of filters is summed like a tile of `dense`. The polynomials stand in `points.mojo`.
"""

from std.math import ceildiv, gcd
from std.sys.info import simd_width_of, size_of
from std.sys.intrinsics import PrefetchOptions, prefetch

from .dense import tile_rows
from .geometry import Geometry
from .lanes import FilterSteps, Memory, Operands, Scratch, Write, accumulator, gathered, load
from .lanes import PACK, Panels, panels_at_a_time, phases, put, spread, workers
from .points import Plan, POINTS, QUAD, TAPS, data_points, filter_points, first_output, outputs
from .turn import turn_out
from .window import Window

comptime VECTORS = 2
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
def transform_filter[
    dtype: DType, acc: DType, //, size: Int
](
    g: Geometry,
    plan: Plan,
    group: Int,
    w: Memory[dtype],
    steps: FilterSteps,
    lanes: Int,
    target: Memory[acc],
):
    """Writes one group of taps of one panel, whose first filter `w` points at, all channels, to each point's place."""
    comptime width = simd_width_of[acc]()
    comptime panel = VECTORS * width
    var channels = g.group_channels()
    var taps = w.unsafe_offset(plan.first[group] * steps.tap)
    var tap_step = plan.step * steps.tap
    var to = Array[Memory[acc], size + TAPS](fill=target)
    comptime for p in range(size + TAPS):
        to[p] = target.unsafe_offset((plan.bases[p] + group) * channels * panel)
    for c in range(channels):
        comptime for j in range(VECTORS):
            var values = Array[SIMD[acc, width], size](fill=SIMD[acc, width](0))
            comptime for k in range(size):
                values[k] = gathered[acc, width](
                    taps.unsafe_offset(c * steps.channel + k * tap_step + j * width * steps.filter),
                    steps.filter,
                    lanes - j * width,
                )
            var points = filter_points[size](values)
            comptime for p in range(size + TAPS):
                to[p].unsafe_offset(c * panel + j * width).unsafe_store(points[p])


@always_inline
def transform_data[
    dtype: DType, acc: DType, //, size: Int
](
    rows: Array[Memory[dtype], TAPS + QUAD - 1],
    channels: Int,
    target: Memory[acc],
    plane: Int,
    plan: Plan,
    group: Int,
):
    """Writes one quad's data of one group of taps to each point's plane."""
    comptime width = simd_width_of[acc]()
    var to = Array[Memory[acc], size + TAPS](fill=target)
    comptime for p in range(size + TAPS):
        to[p] = target.unsafe_offset((plan.bases[p] + group) * plane)
    var c = 0
    while c < channels:
        var d = Array[SIMD[acc, width], size + QUAD - 1](fill=SIMD[acc, width](0))
        if c + width <= channels:
            comptime for j in range(size + QUAD - 1):
                d[j] = load[acc, width, False](rows[j].unsafe_offset(c), width)
        else:
            comptime for j in range(size + QUAD - 1):
                d[j] = load[acc, width, True](rows[j].unsafe_offset(c), channels - c)
        var points = data_points[size](d)
        comptime for p in range(size + TAPS):
            to[p].unsafe_offset(c).unsafe_store(points[p])
        c += width


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


@no_inline
def transform_block[
    dtype: DType, acc: DType, //, nlc: Bool
](
    g: Geometry,
    plan: Plan,
    x: Memory[dtype],
    first: Int,
    count: Int,
    copy: Memory[dtype],
    start: Int,
    data: Memory[acc],
    row_size: Int,
    plane: Int,
):
    """Writes the data of quads `first .. first + count - 1` to each point's planes.

    Rows of padding are read from `copy`, and with NCL data all rows, the first of which is input row `start`.
    """
    var channels = g.group_channels()
    for i in range(count):
        var position = first_output(plan, first + i) * g.stride - g.pad_left
        for part in range(len(plan.sizes)):
            var row = Array[Memory[dtype], TAPS + QUAD - 1](fill=copy)
            for j in range(plan.sizes[part] + QUAD - 1):
                var at = position + plan.first[part] * g.dilation + j * plan.spacing * g.stride
                comptime if nlc:
                    var source = g.source(at)
                    if source >= 0:
                        row[j] = x.unsafe_offset(source * g.channels)
                else:
                    row[j] = copy.unsafe_offset((at - start) * channels)
            var to = data.unsafe_offset(i * row_size)
            if plan.sizes[part] == 3:
                transform_data[3](row, channels, to, plane, plan, part)
            elif plan.sizes[part] == 2:
                transform_data[2](row, channels, to, plane, plan, part)
            else:
                transform_data[1](row, channels, to, plane, plan, part)


def block[
    dtype: DType, acc: DType, //, write: Write[dtype], nlc: Bool, whole: Bool
](
    g: Geometry,
    plan: Plan,
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
    transform_block[nlc](g, plan, x, first, count, copy, span.first, data, row_size, plane)

    var f = first_filter
    while f < end_filter:
        var lanes = end_filter - f
        if whole or lanes > width:
            panel[write, nlc, VECTORS](g, plan, first, count, data, row_size, plane, filter, sums, o, n, group, f, lanes)
            f += VECTORS * width
        else:
            comptime if not whole:
                panel[write, nlc, 1](g, plan, first, count, data, row_size, plane, filter, sums, o, n, group, f, lanes)
                f += width
    _ = scratch^
    _ = rest^


@always_inline
def panel[
    dtype: DType, acc: DType, //, write: Write[dtype], nlc: Bool, vectors: Int
](
    g: Geometry,
    plan: Plan,
    first: Int,
    count: Int,
    data: Memory[acc],
    row_size: Int,
    plane: Int,
    filter: Panels[acc],
    sums: Memory[acc],
    o: Operands[dtype],
    n: Int,
    group: Int,
    in_group: Int,
    lanes: Int,
):
    """Computes quads `first .. first + count - 1` of `lanes` filters of a group from `in_group` on."""
    comptime size = vectors * simd_width_of[acc]()
    var f = group * g.group_filters() + in_group
    var w = filter.at(in_group)
    comptime if nlc:
        quads[write, vectors](g, plan, first, count, data, row_size, plane, w, filter.lanes, sums, o, n, f, lanes)
    else:
        var start = first_output(plan, first)
        var end = min(g.out_length, start + count * QUAD)
        var turned = Scratch[dtype]((end - start + simd_width_of[dtype]()) * size + simd_width_of[dtype]())
        var rows_out = turned.data()

        @__parameter
        @always_inline
        def keep[lanes: Int](_n: Int, position: Int, filter: Int, value: SIMD[dtype, lanes]):
            rows_out.unsafe_offset((position - start) * size + filter - f).unsafe_store(value)

        quads[keep, vectors](g, plan, first, count, data, row_size, plane, w, filter.lanes, sums, o, n, f, lanes)
        turn_out[write](rows_out, size, n, start, end - start, f, min(lanes, size))
        _ = turned^


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
    """Sums the products of `count` quads and some vectors of filters, at all points.

    Not inlined, as `transform_block` is not: what calls it holds the operations behind the layer, and compiles slowly.
    """
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
](
    g: Geometry,
    plan: Plan,
    first: Int,
    count: Int,
    data: Memory[acc],
    row_size: Int,
    plane: Int,
    filter: Memory[acc],
    filter_row: Int,
    sums: Memory[acc],
    o: Operands[dtype],
    n: Int,
    f: Int,
    lanes: Int,
):
    """Computes quads `first .. first + count - 1` of some vectors of filters, of which `lanes` are there."""
    comptime width = simd_width_of[acc]()
    comptime panel = vectors * width
    comptime rows = tile_rows[acc]()
    var channels = g.group_channels()
    var point_size = (count + rows) * panel
    multiply[vectors](plan, count, channels, data, row_size, plane, filter, filter_row, sums, point_size)
    for q in range(count):
        var position = first_output(plan, first + q)
        var inside = position + (QUAD - 1) * plan.spacing < g.out_length and lanes >= panel
        for j in range(vectors):
            var filters = lanes - j * width
            var bias = o.bias_at[acc, width](f + j * width, filters)
            var y = outputs(sums.unsafe_offset(q * panel + j * width), point_size, bias)
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
        block[write, nlc, whole](g, plan, n, group, i * size, min(size, total - i * size), first, end, panels, o)

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
