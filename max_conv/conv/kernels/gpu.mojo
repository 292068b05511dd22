"""Convolution on a GPU: one thread for each output value, neighbouring threads on neighbouring values.

Correct for every case, and coalesced in the layers' own layouts: threads that differ in the last axis read neighbouring
filter values (NLC with SCF) or neighbouring input values (NCL) and share all else.
"""

from max.gpu import global_idx
from std.math import ceildiv

from max.gpu.host import DeviceContext

from .geometry import Geometry
from .lanes import BLOCK, FilterSteps, Operands, Write, accumulator
from .transposed import Transposed

comptime THREADS = 256


def conv1d_gpu[
    dtype: DType, //, write: Write[dtype], nlc: Bool
](g: Geometry, steps: FilterSteps, o: Operands[dtype], ctx: DeviceContext) raises:
    """Computes a convolution of NLC or NCL data with a filter of any layout."""
    comptime acc = accumulator[dtype]
    var size = g.batch * g.filters * g.out_length
    if size == 0:
        return

    @__parameter
    def kernel(size: Int64):
        var index = Int(global_idx.x)
        if index >= Int(size):
            return
        var filter: Int
        var position: Int
        comptime if nlc:
            filter = index % g.filters
            position = index // g.filters % g.out_length
        else:
            position = index % g.out_length
            filter = index // g.out_length % g.filters
        var n = index // (g.filters * g.out_length)

        var channels = g.group_channels()
        var first_channel = filter // g.group_filters() * channels
        var x = o.x.unsafe_offset(n * g.length * g.channels)
        var w = o.w.unsafe_offset(filter * steps.filter)
        var total = o.bias[unsafe_offset=filter].cast[acc]() if o.has_bias else Scalar[acc](0)
        var sum = Scalar[acc](0)
        var terms = 0
        for k in range(g.kernel):
            var row = g.source(position * g.stride - g.pad_left + k * g.dilation)
            if row < 0:
                continue
            for c in range(channels):
                var at: Int
                comptime if nlc:
                    at = row * g.channels + first_channel + c
                else:
                    at = (first_channel + c) * g.length + row
                var a = x[unsafe_offset=at].cast[acc]()
                sum = a.fma(w[unsafe_offset=k * steps.tap + c * steps.channel].cast[acc](), sum)
                terms += 1
                if terms == BLOCK:
                    total += sum
                    sum = 0
                    terms = 0
        write[1](n, position, filter, (total + sum).cast[dtype]())

    ctx.enqueue_function[kernel](Int64(size), grid_dim=ceildiv(size, THREADS), block_dim=THREADS)


def conv_transpose1d_gpu[
    dtype: DType, //, write: Write[dtype], nlc: Bool
](t: Transposed, steps: FilterSteps, group_step: Int, o: Operands[dtype], ctx: DeviceContext) raises:
    """Computes a transposed convolution of NLC or NCL data; the filter's groups stand `group_step` apart."""
    comptime acc = accumulator[dtype]
    var size = t.batch * t.filters * t.out_length
    if size == 0:
        return

    @__parameter
    def kernel(size: Int64, inverse: Int64):
        var index = Int(global_idx.x)
        if index >= Int(size):
            return
        var filter: Int
        var position: Int
        comptime if nlc:
            filter = index % t.filters
            position = index // t.filters % t.out_length
        else:
            position = index % t.out_length
            filter = index // t.out_length % t.filters
        var n = index // (t.filters * t.out_length)

        var channels = t.group_channels()
        var group = filter // t.group_filters()
        var x = o.x.unsafe_offset(n * t.length * t.channels)
        var w = o.w.unsafe_offset(group * group_step + filter % t.group_filters() * steps.filter)
        var total = o.bias[unsafe_offset=filter].cast[acc]() if o.has_bias else Scalar[acc](0)
        var sum = Scalar[acc](0)
        var terms = 0
        var phase = t.phase(position, Int(inverse))
        for k in range(phase if phase >= 0 else t.kernel, t.kernel, t.step()):
            var row = (position + t.pad_left - k * t.dilation) // t.stride
            if row < 0 or row >= t.length:
                continue
            for c in range(channels):
                var at: Int
                comptime if nlc:
                    at = row * t.channels + group * channels + c
                else:
                    at = (group * channels + c) * t.length + row
                var a = x[unsafe_offset=at].cast[acc]()
                sum = a.fma(w[unsafe_offset=k * steps.tap + c * steps.channel].cast[acc](), sum)
                terms += 1
                if terms == BLOCK:
                    total += sum
                    sum = 0
                    terms = 0
        write[1](n, position, filter, (total + sum).cast[dtype]())

    ctx.enqueue_function[kernel](Int64(size), Int64(t.inverse()), grid_dim=ceildiv(size, THREADS), block_dim=THREADS)
