"""Winograd's transforms to the points: of filters that are not packed, and of data."""

from std.sys.info import simd_width_of
from std.utils.numerics import nan

from .careful import Source, limit
from .geometry import Geometry
from .grid import Part
from .lanes import FilterSteps, Memory, load_strided, load
from .points import Plan, QUAD, TAPS, data_points, filter_points, first_output

comptime VECTORS = 2
"""Vectors of filters in a panel."""


@fieldwise_init
struct Planes[acc: DType](ImplicitlyCopyable, TrivialRegisterPassable):
    """Data at the points: a plane for each product, in it a row of channels for each quad."""

    var data: Memory[Self.acc]
    var row_size: Int
    var plane: Int

    @always_inline
    def at(self, product: Int, quad: Int) -> Self:
        """Returns the planes from `product` on, without the quads before `quad`."""
        var data = self.data.unsafe_offset(product * self.plane + quad * self.row_size)
        return Self(data, self.row_size, self.plane)


@always_inline
def transform_filter[
    dtype: DType, acc: DType, //, size: Int
](g: Geometry, plan: Plan, group: Int, w: Memory[dtype], steps: FilterSteps, lanes: Int, target: Memory[acc],):
    """Transforms one group of taps of one panel, all channels, and writes it to each point's place.

    `w` points at the panel's first filter. If a value is not finite or too large for the transforms, the first product
    becomes NaN, for `calm_filter`.
    """
    comptime width = simd_width_of[acc]()
    comptime panel = VECTORS * width
    var channels = g.group_channels()
    var taps = w.unsafe_offset(plan.first[group] * steps.tap)
    var tap_step = plan.step * steps.tap
    var to = Array[Memory[acc], size + TAPS](fill=target)
    comptime for p in range(size + TAPS):
        to[p] = target.unsafe_offset((plan.bases[p] + group) * channels * panel)
    var squares = SIMD[acc, width](0)
    for c in range(channels):
        comptime for j in range(VECTORS):
            var values = Array[SIMD[acc, width], size](fill=SIMD[acc, width](0))
            comptime for k in range(size):
                values[k] = load_strided[acc, width](
                    taps.unsafe_offset(c * steps.channel + k * tap_step + j * width * steps.filter),
                    steps.filter,
                    lanes - j * width,
                )
                squares = values[k].fma(values[k], squares)
            var points = filter_points[size](values)
            comptime for p in range(size + TAPS):
                to[p].unsafe_offset(c * panel + j * width).unsafe_store(points[p])
    if not (squares.reduce_add() < limit[acc]()):
        to[0].unsafe_store(SIMD[acc, panel](nan[acc]()))


@always_inline
def transform_data[
    dtype: DType, acc: DType, //, size: Int
](
    rows: Array[Memory[dtype], TAPS + QUAD - 1],
    channels: Int,
    planes: Planes[acc],
    plan: Plan,
    group: Int,
    mut squares: SIMD[acc, simd_width_of[acc]()],
):
    """Writes one quad's data of one group of taps to each point's plane, and adds up the squares of the data."""
    comptime width = simd_width_of[acc]()
    var to = Array[Memory[acc], size + TAPS](fill=planes.data)
    comptime for p in range(size + TAPS):
        to[p] = planes.at(plan.bases[p] + group, 0).data
    var c = 0
    while c < channels:
        var d = Array[SIMD[acc, width], size + QUAD - 1](fill=SIMD[acc, width](0))
        if c + width <= channels:
            comptime for j in range(size + QUAD - 1):
                d[j] = load[acc, width, False](rows[j].unsafe_offset(c), width)
        else:
            comptime for j in range(size + QUAD - 1):
                d[j] = load[acc, width, True](rows[j].unsafe_offset(c), channels - c)
        var sum = d[0] * d[0]
        comptime for j in range(1, size + QUAD - 1):
            sum = d[j].fma(d[j], sum)
        squares += sum
        var points = data_points[size](d)
        comptime for p in range(size + TAPS):
            to[p].unsafe_offset(c).unsafe_store(points[p])
        c += width


@no_inline
def transform_block[
    dtype: DType, acc: DType, //, nlc: Bool
](g: Geometry, plan: Plan, source: Source[dtype], part: Part, planes: Planes[acc]) -> Bool:
    """Writes the transformed data of a part's quads; returns whether all of it is finite and small enough for that."""
    var channels = g.group_channels()
    var squares = SIMD[acc, simd_width_of[acc]()](0)
    for i in range(part.count):
        var position = first_output(plan, part.first + i) * g.stride - g.pad_left
        for taps in range(len(plan.sizes)):
            var row = Array[Memory[dtype], TAPS + QUAD - 1](fill=source.rest)
            for j in range(plan.sizes[taps] + QUAD - 1):
                var at = position + plan.first[taps] * g.dilation + j * plan.spacing * g.stride
                row[j] = source.row[nlc](g, at)
            comptime for size in range(1, TAPS + 1):
                if plan.sizes[taps] == size:
                    transform_data[size](row, channels, planes.at(0, i), plan, taps, squares)
    return squares.reduce_add() < limit[acc]()
