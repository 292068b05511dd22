"""Convolution on a GPU: one thread for each output value, neighbouring threads on neighbouring values.

Correct for every case, and coalesced in the layers' own layouts: threads that differ in the last axis read neighbouring
filter values (NLC with SCF) or neighbouring input values (NCL), and share everything else.
"""

from max.gpu import global_idx
from std.math import ceildiv

from max.gpu.host import DeviceContext

from ..geometry import Geometry
from ..lanes import SUM_TERMS, FilterSteps, Memory, Operands, Write, accumulator
from ..transposed import Transposed

comptime THREADS = 256


@fieldwise_init
struct Sizes(ImplicitlyCopyable, TrivialRegisterPassable):
    """The sizes that convolution and transposed convolution need: of the data, and where a group's filter is."""

    var batch: Int
    var length: Int
    var out_length: Int
    var channels: Int
    var filters: Int
    var groups: Int
    var group_step: Int  # from one group's filter to the next


@fieldwise_init
struct Sum[dtype: DType](ImplicitlyCopyable, TrivialRegisterPassable):
    """The sum of many products, cut into running sums of `SUM_TERMS` terms."""

    comptime acc = accumulator[Self.dtype]
    var total: Scalar[Self.acc]
    var running: Scalar[Self.acc]
    var terms: Int

    @always_inline
    def add[
        nlc: Bool
    ](mut self, s: Sizes, x: Memory[Self.dtype], row: Int, w: Memory[Self.dtype], channel_step: Int, group: Int):
        """Adds the products of a row of a batch item's data, which starts at `x`, with a tap's channels at `w`."""
        var channels = s.channels // s.groups
        for c in range(channels):
            var at: Int
            comptime if nlc:
                at = row * s.channels + group * channels + c
            else:
                at = (group * channels + c) * s.length + row
            var a = x[unsafe_offset=at].cast[Self.acc]()
            self.running = a.fma(w[unsafe_offset=c * channel_step].cast[Self.acc](), self.running)
            self.terms += 1
            if self.terms == SUM_TERMS:
                self.total += self.running
                self.running = 0
                self.terms = 0

    @always_inline
    def skip(mut self, terms: Int):
        """Does the same with products that are zero: an output has the same bits next to an edge as elsewhere."""
        self.terms += terms
        if self.terms >= SUM_TERMS:
            self.total += self.running
            self.running = 0
            self.terms %= SUM_TERMS


@always_inline
def output[
    dtype: DType,
    //,
    write: Write[dtype],
    nlc: Bool,
    first_tap: def(Int) capturing -> Int,
    row: def(Int, Int) capturing -> Int,
](s: Sizes, taps: Int, tap_step: Int, steps: FilterSteps, o: Operands[dtype], index: Int):
    """Computes one output value.

    Its taps are `first_tap(position)` and every `tap_step`-th tap after it. `row(position, tap)` is the input row that
    a tap reads, or a negative number if there is none.
    """
    var filter: Int
    var position: Int
    comptime if nlc:
        filter = index % s.filters
        position = index // s.filters % s.out_length
    else:
        position = index % s.out_length
        filter = index // s.out_length % s.filters
    var n = index // (s.filters * s.out_length)
    var group_filters = s.filters // s.groups
    var group = filter // group_filters
    var x = o.x.unsafe_offset(n * s.length * s.channels)
    var w = o.w.unsafe_offset(group * s.group_step + filter % group_filters * steps.filter)
    var bias = o.bias[unsafe_offset=filter].cast[accumulator[dtype]]() if o.has_bias else Scalar[accumulator[dtype]](0)
    var sum = Sum[dtype](bias, 0, 0)
    for k in range(first_tap(position), taps, tap_step):
        var source = row(position, k)
        if source >= 0:
            sum.add[nlc](s, x, source, w.unsafe_offset(k * steps.tap), steps.channel, group)
        else:
            sum.skip(s.channels // s.groups)
    write[1](n, position, filter, (sum.total + sum.running).cast[dtype]())


def conv1d_each[
    dtype: DType, //, write: Write[dtype], nlc: Bool
](g: Geometry, steps: FilterSteps, o: Operands[dtype], ctx: DeviceContext) raises:
    """Computes a convolution of NLC or NCL data with a filter of any layout."""
    var size = g.batch * g.filters * g.out_length
    if size == 0:
        return
    var group_step = g.group_filters() * steps.filter
    var s = Sizes(g.batch, g.length, g.out_length, g.channels, g.filters, g.groups, group_step)

    @__parameter
    @__copy_capture(s)
    def kernel(size: Int64):
        @__parameter
        @always_inline
        def first_tap(_position: Int) -> Int:
            return 0

        @__parameter
        @always_inline
        def row(position: Int, k: Int) -> Int:
            return g.source(position * g.stride - g.pad_left + k * g.dilation)

        var index = Int(global_idx.x)
        if index < Int(size):
            output[write, nlc, first_tap, row](s, g.kernel, 1, steps, o, index)

    ctx.enqueue_function[kernel](Int64(size), grid_dim=ceildiv(size, THREADS), block_dim=THREADS)
    _ = s


def conv_transpose1d_each[
    dtype: DType, //, write: Write[dtype], nlc: Bool
](t: Transposed, steps: FilterSteps, group_step: Int, o: Operands[dtype], ctx: DeviceContext) raises:
    """Computes a transposed convolution of NLC or NCL data; the filter's groups are `group_step` apart."""
    var size = t.batch * t.filters * t.out_length
    if size == 0:
        return
    var s = Sizes(t.batch, t.length, t.out_length, t.channels, t.filters, t.groups, group_step)

    @__parameter
    @__copy_capture(s)
    def kernel(size: Int64, inverse: Int64):
        @__parameter
        @always_inline
        def first_tap(position: Int) -> Int:
            var phase = t.phase(position, Int(inverse))
            return phase if phase >= 0 else t.kernel

        @__parameter
        @always_inline
        def row(position: Int, k: Int) -> Int:
            var row = (position + t.pad_left - k * t.dilation) // t.stride
            return row if row < t.length else -1

        var index = Int(global_idx.x)
        if index < Int(size):
            output[write, nlc, first_tap, row](s, t.kernel, t.step(), steps, o, index)

    ctx.enqueue_function[kernel](Int64(size), Int64(t.inverse()), grid_dim=ceildiv(size, THREADS), block_dim=THREADS)
    _ = s
