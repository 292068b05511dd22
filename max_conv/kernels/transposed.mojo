"""Transposed convolution as a convolution: the outputs of each phase of the stride are filters of their own.

Output `m * stride + phase * dilation - pad_left` is the sum over taps `phase + j * step` of input rows `m - j * dilation /
common`: every phase reads the same rows, with the same dilation and stride 1. So the kernels compute `phases` times as many
filters of one convolution of `ceil(kernel / step)` taps, and what they write finds its way to its place in the output. Each
output is written once; nothing is filled with zeros, and nothing is added up in memory.
"""

from std.math import ceildiv, gcd
from std.utils.numerics import isfinite, isnan

from .careful import calm_filter, restored
from .dispatch import convolve
from .geometry import Geometry, ZEROS
from .lanes import BLOCK, PACK, FilterSteps, Memory, Operands, Panels, Scratch, Write, accumulator, put
from .points import Plan
from .tasks import spread, workers

comptime LANES = 16
"""The filters of a phase are filled up to a multiple of it, so that no vector holds two phases: the widest vector."""
comptime CHANNELS = 16
"""Channels of the filter that a task copies: a cache line of them."""


@fieldwise_init
struct Transposed(ImplicitlyCopyable, TrivialRegisterPassable):
    """The run-time description of one transposed convolution."""

    var batch: Int
    var length: Int
    var out_length: Int
    var channels: Int
    var filters: Int
    var groups: Int
    var kernel: Int
    var stride: Int
    var dilation: Int
    var pad_left: Int

    @always_inline
    def group_channels(self) -> Int:
        return self.channels // self.groups

    @always_inline
    def group_filters(self) -> Int:
        return self.filters // self.groups

    @always_inline
    def common(self) -> Int:
        return gcd(self.stride, self.dilation)

    @always_inline
    def step(self) -> Int:
        """Taps from one to the next of the same phase."""
        return self.stride // self.common()

    @always_inline
    def phases(self) -> Int:
        """Phases that have a tap."""
        return min(self.step(), self.kernel)

    @always_inline
    def taps(self) -> Int:
        """Taps of the phase that has the most."""
        return ceildiv(self.kernel, self.step())

    @always_inline
    def first(self) -> Int:
        """Returns the first m, of any phase, that an output belongs to."""
        return -(((self.phases() - 1) * self.dilation - self.pad_left) // self.stride)

    def convolution(self, lanes: Int) -> Geometry:
        """Returns the convolution of all phases, each with its filters filled up to a multiple of `lanes`."""
        var dilation = self.dilation // self.common()
        var count = (self.out_length - 1 + self.pad_left) // self.stride - self.first() + 1
        return Geometry(
            batch=self.batch,
            length=self.length,
            out_length=max(0, count),
            channels=self.channels,
            filters=self.groups * self.phases() * ceildiv(self.group_filters(), lanes) * lanes,
            groups=self.groups,
            kernel=self.taps(),
            stride=1,
            dilation=dilation,
            pad_left=(self.taps() - 1) * dilation - self.first(),
            mode=ZEROS,
        )

    def inverse(self) -> Int:
        """Returns what `dilation / common` has to be multiplied with to leave 1 when divided by `step`."""
        var (a, b) = (self.step(), self.dilation // self.common() % self.step())
        var (x, y) = (0, 1)
        while b != 0:
            var quotient = a // b
            a, b = b, a - quotient * b
            x, y = y, x - quotient * y
        return x % self.step()

    @always_inline
    def phase(self, output: Int, inverse: Int) -> Int:
        """Returns the phase of an output, or -1 where no tap reaches it."""
        var at = output + self.pad_left
        if at % self.common() != 0:
            return -1
        var phase = at // self.common() % self.step() * inverse % self.step()
        return phase if phase < self.phases() else -1

    def scf[
        dtype: DType, //, depthwise: Bool
    ](self, w: Memory[dtype], steps: FilterSteps, group_step: Int, lanes: Int, target: Memory[dtype]):
        """Writes the filter as SCF of the convolution. `Packing.phased` in `max_conv/packing.py` is its twin.

        Args:
            w: The filter.
            steps: How far apart its taps, channels and filters stand.
            group_step: How far apart groups stand.
            lanes: What the filters of a phase are filled up to a multiple of.
            target: (taps, channels of a group, filters of the convolution); "depthwise" has the phases outside the groups.
        """
        var g = self.convolution(lanes)
        var channels = self.group_channels()
        var filters = self.group_filters()
        var room = g.filters // (self.groups * self.phases())
        var blocks = ceildiv(channels, CHANNELS)

        def task(i: Int) {imm}:
            var group = i // blocks
            var first = i % blocks * CHANNELS
            for phase in range(self.phases()):
                var column = (group * self.phases() + phase) * room
                comptime if depthwise:
                    column = phase * self.groups + group
                for t in range(g.kernel):
                    var k = phase + (g.kernel - 1 - t) * self.step()
                    var from_ = w.unsafe_offset(group * group_step + k * steps.tap + first * steps.channel)
                    var to = target.unsafe_offset((t * channels + first) * g.filters + column)
                    for f in range(room):
                        var there = k < self.kernel and f < filters
                        for c in range(min(CHANNELS, channels - first)):
                            var value = Scalar[dtype](0)
                            if there:
                                value = from_[unsafe_offset=f * steps.filter + c * steps.channel]
                            to[unsafe_offset=c * g.filters + f] = value

        spread(task, self.groups * blocks, workers(g.filters * channels * g.kernel))

    def fill_unreached[dtype: DType, //, write: Write[dtype]](self, o: Operands[dtype]):
        """Writes the bias where no tap reaches: the stride exceeds the kernel, or shares a factor with the dilation."""
        if self.phases() == self.stride:
            return
        var inverse = self.inverse()

        def task(i: Int) {imm}:
            var n = i // self.out_length
            var position = i % self.out_length
            if self.phase(position, inverse) < 0:
                for f in range(self.filters):
                    write[1](n, position, f, o.bias[unsafe_offset=f] if o.has_bias else 0)

        spread(task, self.batch * self.out_length, workers(self.batch * self.out_length * self.filters))


@no_inline
def direct_sum[
    dtype: DType, //, kernel: StaticString, nlc: Bool, packed: Bool
](
    t: Transposed,
    g: Geometry,
    o: Operands[dtype],
    room: Int,
    n: Int,
    position: Int,
    column: Int,
    value: Scalar[dtype],
) -> Scalar[dtype]:
    """Returns an output of the convolution `g` of all phases from the input and the taps that are there.

    Args:
        t: The layer.
        g: The convolution.
        o: The convolution's operands.
        room: The filters of a phase and a group, filled up.
        n: The batch item.
        position: Its output.
        column: Its filter.
        value: What the kernel made of it, which is right where every row and every tap is there.
    """
    comptime acc = accumulator[dtype]
    var channels = g.group_channels()
    var group = column // (room * t.phases())
    var phase = column // room % t.phases()
    comptime if kernel == "depthwise":
        group = column % t.groups
        phase = column // t.groups
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
            if c % BLOCK == BLOCK - 1:
                total += sum
                sum = 0
        total += sum
        if isnan(total):  # it stays so; data without end that is NaN does not take without end
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
    else:
        return Panels[dtype].packed(g, group, w, g.kernel * channels).at(f)[unsafe_offset=(tap * channels + c) * PACK]


def conv_transpose1d[
    dtype: DType,
    //,
    write: Write[dtype],
    kernel: StaticString,
    least: Int,
    whole: Bool,
    full: Bool,
    nlc: Bool,
    filter_layout: StaticString,
](t: Transposed, steps: FilterSteps, group_step: Int, o: Operands[dtype]) raises:
    """Computes a transposed convolution of NLC or NCL data on the CPU.

    The filter is "packed" for the kernel, "phased" (what `Transposed.scf` makes), or as `steps` and `group_step` say.
    `full` says that the filters of a group are a multiple of `LANES`, `whole` that those of all phases are one of 32.
    """
    comptime packed = filter_layout == "packed"
    comptime depthwise = kernel == "depthwise"
    # These two read filters one by one.
    comptime lanes = 1 if depthwise or kernel == "lengthwise" else LANES
    var g = t.convolution(lanes)
    var filters = t.group_filters()
    var phases = t.phases()
    var room = g.filters // (t.groups * phases)
    var start = t.first() * t.stride - t.pad_left

    # Where `lanes` filters of the convolution go: outputs from the first one's place, filters, how many there are.
    var units = g.filters // lanes
    var table = List[Int](length=3 * units, fill=0)
    var places = table.unsafe_ptr().unsafe_origin_cast[MutUntrackedOrigin]()
    var bias = Scratch[dtype](g.filters if o.has_bias else 0)
    var biases = bias.data()
    for unit in range(units):
        var column = unit * lanes
        var group = column // (room * phases)
        var phase = column // room % phases
        comptime if depthwise:
            group = column % t.groups
            phase = column // t.groups
        var in_phase = column % room
        places[unsafe_offset=3 * unit] = start + phase * t.dilation
        places[unsafe_offset=3 * unit + 1] = group * filters + in_phase
        places[unsafe_offset=3 * unit + 2] = filters - in_phase
        if o.has_bias:
            for i in range(lanes):
                biases[unsafe_offset=column + i] = (
                    o.bias[unsafe_offset=group * filters + in_phase + i] if i < filters - in_phase else 0
                )

    comptime made = packed or filter_layout == "phased"
    var copy = Scratch[dtype](0 if made else g.kernel * t.group_channels() * g.filters)
    var filter = o.w if made else copy.data()
    comptime if not made:
        t.scf[depthwise](o.w, steps, group_step, lanes, filter)
    var phased = Operands[dtype](o.x, filter, biases, o.has_bias)

    # Outputs between these have all their rows; where a phase lacks a tap there are none.
    var first_inside = g.pad_left
    var end_inside = g.length - (g.kernel - 1) * g.dilation + g.pad_left if t.kernel % t.step() == 0 else 0

    @__parameter
    @no_inline
    def seen[width: Int](n: Int, position: Int, column: Int, values: SIMD[dtype, width]) -> SIMD[dtype, width]:
        """Returns outputs of which one is not finite, each from what it sees alone.

        The kernel has also multiplied rows beside the input, and zeros in place of the taps that a phase lacks.
        """
        var result = values
        for i in range(width):
            if not isfinite(values[i]):
                comptime if nlc:
                    result[i] = direct_sum[kernel, nlc, packed](t, g, phased, room, n, position, column + i, result[i])
                else:
                    result[i] = direct_sum[kernel, nlc, packed](t, g, phased, room, n, position + i, column, result[i])
        return result

    @__parameter
    @always_inline
    def scatter[width: Int](n: Int, output: Int, filter: Int, value: SIMD[dtype, width]):
        """Writes outputs that stand a stride apart, as far as they are there."""
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
        """The same for `lengthwise`, which has many places to call it from: inlined, a layer compiled in 3.3 s, not 2.1."""
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
        var unit = places.unsafe_offset(column // lanes * 3)
        var output = position * t.stride + unit[unsafe_offset=0]
        var filter = unit[unsafe_offset=1] + column % lanes
        comptime if nlc:
            if output >= 0 and output < t.out_length:
                comptime if full or depthwise:
                    write[width](n, output, filter, value)
                else:
                    put[write, True](n, output, filter, value, unit[unsafe_offset=2] - column % lanes)
        else:
            if column % lanes < unit[unsafe_offset=2]:
                comptime if kernel == "lengthwise":
                    scatter_called(n, output, filter, value)
                else:
                    scatter(n, output, filter, value)

    if g.out_length > 0:
        var scf = FilterSteps(t.group_channels() * g.filters, g.filters, 1)
        convolve[place, kernel, least, whole, nlc, packed, True](g, scf, phased)
    t.fill_unreached[write](o)
    _ = copy^
    _ = g
    _ = room
    _ = first_inside
    _ = end_inside
    _ = phased
    _ = places
    _ = table^
    _ = bias^
