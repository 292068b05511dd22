"""Direct sums in Winograd's place, where a value is not finite or too large for its transforms.

A transform mixes six inputs into four outputs, so that a NaN or an infinity would reach outputs that do not see it,
and a value of 1e17 would change them by its rounding error. The transforms detect such values, because they have them
in registers anyway. Outputs that a block cannot compute at the points are summed here, tap by tap.
"""

from std.utils.numerics import isnan
from std.sys.info import simd_width_of

from .geometry import Geometry
from .grid import Part
from .lanes import SUM_TERMS, FilterSteps, Memory, load_strided
from .points import Plan, QUAD, first_output


@always_inline
def limit[acc: DType]() -> Scalar[acc]:
    """Returns a limit for squares: values whose squares are below it cannot overflow in the transforms.

    The limit of the values is 2^54 in float32 and 2^500 in float64: `LIMIT` in `max_conv/conv/packing.py`.
    """
    comptime if acc == DType.float64:
        return Scalar[acc](2.0) ** 1000
    else:
        return Scalar[acc](2.0) ** 108


@fieldwise_init
struct Source[dtype: DType](ImplicitlyCopyable, TrivialRegisterPassable):
    """The rows that a block reads: NLC data in place, NCL data in `rest`, whose first row is position `start`."""

    var x: Memory[Self.dtype]
    var rest: Memory[Self.dtype]
    """One row of zeros for NLC data, all rows for NCL data."""
    var start: Int

    @always_inline
    def row[nlc: Bool](self, g: Geometry, position: Int) -> Memory[Self.dtype]:
        """Returns the row at a position. Positions in the left padding are negative."""
        comptime if nlc:
            var source = g.source(position)
            return self.x.unsafe_offset(source * g.channels) if source >= 0 else self.rest
        else:
            return self.rest.unsafe_offset((position - self.start) * g.group_channels())


@always_inline
def calm_filter[acc: DType, //](plan: Plan, w: Memory[acc], channels: Int, filter_row: Int) -> Bool:
    """Returns whether a panel could be transformed. If it could not, one of its first products is NaN."""
    for part in range(len(plan.sizes)):
        if isnan(w[unsafe_offset=part * channels * filter_row]):
            return False
    return True


@always_inline
def restored[
    acc: DType, //
](g: Geometry, plan: Plan, w: Memory[acc], filter_row: Int, raw: Bool, part: Int, j: Int, c: Int) -> Scalar[acc]:
    """Returns tap j of a group of taps, for channel c and the packed filter that `w` points at: the inverse of
    `Packing.multiply` in `max_conv/conv/packing.py`. `raw` is true if `calm_filter` is false for the panel.
    """
    var parts = len(plan.sizes)
    var plane = g.group_channels() * filter_row
    var at = w.unsafe_offset(c * filter_row)
    if raw:
        return at[unsafe_offset=(plan.products() - g.kernel + plan.first[part] + j * plan.step) * plane]
    if j == 0:
        return at[unsafe_offset=part * plane] * Scalar[acc](0.5 if plan.sizes[part] == 2 else 1.0)
    if j == plan.sizes[part] - 1:
        return at[unsafe_offset=(3 * parts + part) * plane]
    return 1.5 * (at[unsafe_offset=(parts + part) * plane] + at[unsafe_offset=(2 * parts + part) * plane])


@no_inline
def restore_taps[
    acc: DType, //
](g: Geometry, plan: Plan, w: Memory[acc], filter_row: Int, panel: Int, target: Memory[acc]):
    """Writes the taps of a packed panel: (K, channels, panel)."""
    var channels = g.group_channels()
    var raw = not calm_filter(plan, w, channels, filter_row)
    for part in range(len(plan.sizes)):
        for j in range(plan.sizes[part]):
            var to = target.unsafe_offset((plan.first[part] + j * plan.step) * channels * panel)
            for c in range(channels):
                for f in range(panel):
                    to[unsafe_offset=c * panel + f] = restored(g, plan, w.unsafe_offset(f), filter_row, raw, part, j, c)


@no_inline
def gather_taps[
    dtype: DType, acc: DType, //, panel: Int
](g: Geometry, w: Memory[dtype], steps: FilterSteps, lanes: Int, target: Memory[acc]):
    """Writes the taps of a panel, whose first filter `w` points at: (K, channels, panel)."""
    var channels = g.group_channels()
    for tap in range(g.kernel):
        for c in range(channels):
            var values = load_strided[acc, panel](
                w.unsafe_offset(tap * steps.tap + c * steps.channel), steps.filter, lanes
            )
            target.unsafe_offset((tap * channels + c) * panel).unsafe_store(values)


@no_inline
def direct[
    dtype: DType, acc: DType, //, nlc: Bool, vectors: Int
](g: Geometry, plan: Plan, source: Source[dtype], part: Part, taps: Memory[acc], sums: Memory[acc], output_size: Int,):
    """Sums the products of a part's quads and some vectors of filters.

    The outputs of a quad are `output_size` apart.
    """
    comptime width = simd_width_of[acc]()
    comptime panel = vectors * width
    var channels = g.group_channels()
    for q in range(part.count):
        for k in range(QUAD):
            var position = (first_output(plan, part.first + q) + k * plan.spacing) * g.stride - g.pad_left
            var total = SIMD[acc, panel](0)
            for tap in range(g.kernel):
                var row = source.row[nlc](g, position + tap * g.dilation)
                var w = taps.unsafe_offset(tap * channels * panel)
                for channel in range(0, channels, SUM_TERMS):
                    var sum = SIMD[acc, panel](0)
                    for c in range(channel, min(channel + SUM_TERMS, channels)):
                        var value = SIMD[acc, panel](row[unsafe_offset=c].cast[acc]())
                        sum = value.fma(w.unsafe_offset(c * panel).unsafe_load[width=panel](), sum)
                    total += sum
            sums.unsafe_offset(k * output_size + q * panel).unsafe_store(total)
