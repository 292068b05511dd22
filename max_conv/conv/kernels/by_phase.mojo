"""Transposed convolution on the CPU: a kernel computes the convolution of all phases; its results are put in place."""

from std.math import ceildiv
from std.utils.numerics import isfinite, isnan

from .amx import Inputs
from .careful import calm_filter, restored
from .dispatch import convolve
from .geometry import Geometry
from .lanes import PACK, SUM_TERMS, FilterSteps, Memory, Operands, Panels, Scratch, Write, accumulator, put
from .points import Plan
from .sink import Bytes, Outputs, Sink, Store, address, store_rows
from .transposed import LANES, Columns, Transposed


struct Places[dtype: DType, lanes: Int](Movable):
    """Where the columns of the convolution go, and their biases.

    The table has three numbers for each `lanes` columns: the place of the first output, the first filter, and how many
    filters there are from it on.
    """

    var table: List[Int]
    var bias: Scratch[Self.dtype]

    def __init__(out self, columns: Columns, count: Int, o: Operands[Self.dtype]):
        var t = columns.t
        var start = t.first() * t.stride - t.pad_left
        self.table = List[Int](capacity=3 * (count // Self.lanes))
        self.bias = Scratch[Self.dtype](count if o.has_bias else 0)
        var biases = self.bias.data()
        for column in range(0, count, Self.lanes):
            var in_phase = column % columns.room
            var filter = columns.group(column) * t.group_filters() + in_phase
            var filters = t.group_filters() - in_phase
            self.table.append(start + columns.phase(column) * t.dilation)
            self.table.append(filter)
            self.table.append(filters)
            if o.has_bias:
                for i in range(Self.lanes):
                    biases[unsafe_offset=column + i] = o.bias[unsafe_offset=filter + i] if i < filters else 0

    def rows(mut self) -> Pointer[Int, MutUntrackedOrigin]:
        """Returns the table. The caller keeps the places alive as long as the table is used."""
        return self.table.unsafe_ptr().unsafe_origin_cast[MutUntrackedOrigin]()


@no_inline
def direct_sum[
    dtype: DType, depthwise: Bool, //, kernel: StaticString, nlc: Bool, packed: Bool
](
    columns: Columns[depthwise],
    g: Geometry,
    o: Operands[dtype],
    n: Int,
    position: Int,
    column: Int,
    value: Scalar[dtype],
) -> Scalar[dtype]:
    """Returns an output of the convolution `g` of all phases, from existing input rows and existing taps only.

    Args:
        columns: The convolution's filters.
        g: The convolution.
        o: The convolution's operands.
        n: The batch item.
        position: Its output.
        column: Its filter.
        value: The output that the kernel computed. It is right if every row and every tap exists.
    """
    comptime acc = accumulator[dtype]
    var channels = g.group_channels()
    var t = columns.t
    var group = columns.group(column)
    var phase = columns.phase(column)
    var first = position - g.pad_left
    var last = first + (g.kernel - 1) * g.dilation
    # The first tap of the convolution is the last one of its phase.
    var lacks = phase + (g.kernel - 1) * t.step() >= t.kernel
    if first >= 0 and last < g.length and not lacks:
        return value
    var plan = Plan(g)
    var total = o.bias[unsafe_offset=column].cast[acc]() if o.has_bias else Scalar[acc](0)
    for tap in range(Int(lacks), g.kernel):
        var row = first + tap * g.dilation
        if row < 0 or row >= g.length:
            continue
        var sum = Scalar[acc](0)
        for c in range(channels):
            var channel = group * channels + c
            var at = (n * g.length + row) * g.channels + channel
            comptime if not nlc:
                at = (n * g.channels + channel) * g.length + row
            var w = filter_value[kernel, packed](g, plan, o.w, group, tap, c, column).cast[acc]()
            sum = o.x[unsafe_offset=at].cast[acc]().fma(w, sum)
            if c % SUM_TERMS == SUM_TERMS - 1:
                total += sum
                sum = 0
        total += sum
        if isnan(total):  # it stays NaN: stopping here saves time on long data that is all NaN
            break
    return total.cast[dtype]()


def filter_value[
    dtype: DType, //, kernel: StaticString, packed: Bool
](g: Geometry, plan: Plan, w: Memory[dtype], group: Int, tap: Int, c: Int, column: Int) -> Scalar[dtype]:
    """Returns one value of the filter of a convolution, SCF or packed for a kernel."""
    var channels = g.group_channels()
    comptime if not packed:
        return w[unsafe_offset=(tap * channels + c) * g.filters + column]
    var f = column - group * g.group_filters()
    comptime if kernel == "winograd":
        var panel = Panels[dtype].packed(g, group, w, plan.products() * channels).at(f)
        for part in range(len(plan.sizes)):
            for j in range(plan.sizes[part]):
                if plan.first[part] + j * plan.step == tap:
                    return restored(g, plan, panel, PACK, not calm_filter(plan, panel, channels, PACK), part, j, c)
        return 0
    elif kernel == "paired":
        var row = ceildiv(channels, 2) * 2
        var panel = Panels[dtype].packed(g, group, w, g.kernel * row).at(f // PACK * PACK)
        return panel[unsafe_offset=(tap * row + c // 2 * 2) * PACK + f % PACK * 2 + c % 2]
    elif kernel == "amx":
        var inputs = Inputs.of(g)
        var row = inputs.row(g, tap, c)
        var panel = Panels[dtype].packed(g, group, w, inputs.rows()).at(f // PACK * PACK)
        return panel[unsafe_offset=row // 2 * 2 * PACK + f % PACK * 2 + row % 2]
    else:
        return Panels[dtype].packed(g, group, w, g.kernel * channels).at(f)[unsafe_offset=(tap * channels + c) * PACK]


@fieldwise_init
struct Placed[dtype: DType, depthwise: Bool](ImplicitlyCopyable, TrivialRegisterPassable):
    """The convolution of all phases, and where its outputs go."""

    var t: Transposed
    var g: Geometry
    var columns: Columns[Self.depthwise]
    var o: Operands[Self.dtype]
    """Operands of the convolution `g`."""
    var rows: Pointer[Int, MutUntrackedOrigin]
    """The table of `Places`."""


@always_inline
def lanes_of[kernel: StaticString]() -> Int:
    """Returns the number to a multiple of which zero filters fill up a phase: two kernels read filters one by one."""
    return 1 if kernel == "depthwise" or kernel == "lengthwise" else LANES


@always_inline
def placing[
    dtype: DType,
    depthwise: Bool,
    //,
    write: Write[dtype],
    kernel: StaticString,
    fills_vectors: Bool,
    nlc: Bool,
    packed: Bool,
    body: def[place: Write[dtype]]() raises capturing -> None,
](t: Transposed, p: Placed[dtype, depthwise]) raises:
    """Runs `body`, and passes its outputs to `write` with their output positions.

    The closures read variables. As functions of a `Placed` they took up to 2.5 times as long.
    """
    comptime lanes = lanes_of[kernel]()
    var g = p.g
    var columns = p.columns
    var phased = p.o
    var rows = p.rows

    # Outputs between these two have all their rows. If a phase lacks a tap, there are no such outputs.
    var first_inside = g.pad_left
    var end_inside = g.length - (g.kernel - 1) * g.dilation + g.pad_left if t.kernel % t.step() == 0 else 0

    @__parameter
    @no_inline
    def seen[width: Int](n: Int, position: Int, column: Int, values: SIMD[dtype, width]) -> SIMD[dtype, width]:
        """Returns the outputs. Each output that is not finite is computed again from its own inputs alone.

        The kernel has also multiplied rows next to the input, and zeros in place of the taps that a phase lacks.
        """
        var result = values
        for i in range(width):
            if not isfinite(values[i]):
                comptime if nlc:
                    result[i] = direct_sum[kernel, nlc, packed](columns, g, phased, n, position, column + i, result[i])
                else:
                    result[i] = direct_sum[kernel, nlc, packed](columns, g, phased, n, position + i, column, result[i])
        return result

    @__parameter
    @always_inline
    def scatter[width: Int](n: Int, output: Int, filter: Int, value: SIMD[dtype, width]):
        """Writes outputs that are a stride apart, if they exist."""
        if output >= 0 and output + (width - 1) * t.stride < t.out_length:
            comptime for i in range(width):
                write[1](n, output + i * t.stride, filter, value[i])
        else:
            for i in range(width):
                if output + i * t.stride >= 0 and output + i * t.stride < t.out_length:
                    write[1](n, output + i * t.stride, filter, value[i])

    @__parameter
    @no_inline
    def scatter_called[width: Int](n: Int, output: Int, filter: Int, value: SIMD[dtype, width]):
        """The same for `lengthwise`, which calls it from many places: inlined, a layer compiled in 3.3 s, not 2.1."""
        scatter(n, output, filter, value)

    @__parameter
    @always_inline
    def place[width: Int](n: Int, position: Int, column: Int, made: SIMD[dtype, width]):
        """Writes outputs of neighbouring columns in NLC data, and of neighbouring positions in NCL data."""
        var value = made
        comptime span = 1 if nlc else width
        if position < first_inside or position + span > end_inside:
            if not isfinite(made).reduce_and():
                value = seen(n, position, column, made)
        var unit = rows.unsafe_offset(column // lanes * 3)
        var output = position * t.stride + unit[unsafe_offset=0]
        var filter = unit[unsafe_offset=1] + column % lanes
        comptime if nlc:
            if output >= 0 and output < t.out_length:
                comptime if fills_vectors or depthwise:
                    write[width](n, output, filter, value)
                else:
                    put[write, True](n, output, filter, value, unit[unsafe_offset=2] - column % lanes)
        else:
            if column % lanes < unit[unsafe_offset=2]:
                comptime if kernel == "lengthwise":
                    scatter_called(n, output, filter, value)
                else:
                    scatter(n, output, filter, value)

    body[place]()
    _ = g
    _ = columns
    _ = first_inside
    _ = end_inside
    _ = phased
    _ = rows


@always_inline
def place_rows[
    dtype: DType,
    //,
    write: Write[dtype],
    kernel: StaticString,
    fills_vectors: Bool,
    nlc: Bool,
    packed: Bool,
](places: Bytes, at: Outputs, values: Memory[dtype], row_size: Int):
    """Writes rows of columns, as the `Store` of a transposed convolution. `places` is the address of a `Placed`."""

    @__parameter
    @always_inline
    def rows[place: Write[dtype]]() raises:
        store_rows[place, nlc, LANES](at, values, row_size)

    try:
        var placed = places.unsafe_bitcast[Placed[dtype, kernel == "depthwise"]]()[]
        placing[write, kernel, fills_vectors, nlc, packed, rows](placed.t, placed)
    except:
        pass  # stores raise nothing


def conv_transpose1d[
    dtype: DType,
    //,
    write: Write[dtype],
    kernel: StaticString,
    least: Int,
    fills_panels: Bool,
    fills_vectors: Bool,
    nlc: Bool,
    filter_layout: StaticString,
](t: Transposed, steps: FilterSteps, group_step: Int, o: Operands[dtype], store: Store[dtype], output: Bytes,) raises:
    """Computes a transposed convolution of NLC or NCL data on the CPU.

    The filter is "packed" for the kernel, "phased" (what `Transposed.scf` makes), or as `steps` and `group_step` say.
    `fills_vectors` says that the filters of a group are a multiple of `LANES`, `fills_panels` that the filters of all
    phases are a multiple of 32. `store` stores rows of columns, with a `Placed` as its places.
    """
    comptime packed = filter_layout == "packed"
    comptime depthwise = kernel == "depthwise"
    comptime lanes = lanes_of[kernel]()
    var g = t.convolution(lanes)
    var phases = t.phases()
    var columns = Columns[depthwise](t, phases, g.filters // (t.groups * phases))
    var places = Places[dtype, lanes](columns, g.filters, o)
    comptime made = packed or filter_layout == "phased"
    var copy = Scratch[dtype](0 if made else g.kernel * t.group_channels() * g.filters)
    var filter = o.w if made else copy.data()
    comptime if not made:
        t.scf[depthwise](o.w, steps, group_step, lanes, filter)
    var phased = Operands[dtype](o.x, filter, places.bias.data(), o.has_bias)
    var placed = Placed[dtype, depthwise](t, g, columns, phased, places.rows())

    @__parameter
    @always_inline
    def compute[place: Write[dtype]]() raises:
        var scf = FilterSteps(t.group_channels() * g.filters, g.filters, 1)
        var sink = Sink[dtype](store, output, address(placed))
        convolve[place, kernel, least, fills_panels, nlc, packed, True](g, scf, phased, sink)

    if g.out_length > 0:
        placing[write, kernel, fills_vectors, nlc, packed, compute](t, placed)
    t.fill_unreached[write](o)
    _ = copy^
    _ = g
    _ = phased
    _ = placed
    _ = places^
