"""Calls one GPU kernel. Python chooses it, where sizes are known: `max_conv/conv/accelerators.py`."""

from max.gpu.host import DeviceContext

from ..geometry import Geometry
from ..lanes import FilterSteps, Memory, Operands, Write
from ..transposed import Transposed
from .each import conv1d_each, conv_transpose1d_each
from .hopper import hopper
from .rows import fits, lines, rows
from .tiles import Put, tiles, values


def run[
    dtype: DType, //, put: Put, kernel: StaticString, nlc: Bool, whole: Bool
](g: Geometry, x: Memory[dtype], w: Memory[dtype], ctx: DeviceContext) raises:
    """Computes a convolution with a filter in the order that the kernel reads."""
    comptime width = 4 if whole else 1
    comptime if kernel == "tiles32":
        tiles[put, nlc, 256, 32, width](g, x, w, ctx)
    elif kernel == "tiles64":
        tiles[put, nlc, 256, 64, width](g, x, w, ctx)
    elif kernel == "tiles128":
        tiles[put, nlc, 128, 128, width](g, x, w, ctx)
    elif kernel == "hopper32":
        hopper[put, 128, 32, 3, whole](g, x, w, ctx)
    elif kernel == "hopper64":
        hopper[put, 128, 64, 3, whole](g, x, w, ctx)
    elif kernel == "hopper128":
        hopper[put, 256, 128, 1, whole](g, x, w, ctx)
    else:
        comptime assert kernel == "hopper192"
        hopper[put, 128, 192, 1, whole](g, x, w, ctx)


def conv1d_gpu[
    dtype: DType, //, write: Write[dtype], kernel: StaticString, nlc: Bool, whole: Bool
](g: Geometry, steps: FilterSteps, o: Operands[dtype], ctx: DeviceContext) raises:
    """Computes a convolution of NLC or NCL data.

    `whole` says that 8 divides the channels and the filters of a group. "each" reads any filter layout, "hopper…" reads
    FSC filters, all others SCF filters.
    """

    @__parameter
    @always_inline
    def put[width: Int](n: Int, position: Int, filter: Int, value: SIMD[DType.float32, width]):
        var sum = value
        if o.has_bias:
            sum += values[width](o.bias.unsafe_offset(filter))
        write[width](n, position, filter, sum.cast[dtype]())

    comptime if kernel == "each":
        conv1d_each[write, nlc](g, steps, o, ctx)
    elif kernel.startswith("hopper"):
        if g.length == 0:  # the copy engine refuses data without rows
            conv1d_each[write, nlc](g, steps, o, ctx)
        else:
            run[put, kernel, nlc, whole](g, o.x, o.w, ctx)
    elif kernel == "rows":
        comptime if nlc:
            rows[put, 4 if whole else 1](g, o.x, o.w, ctx)
        else:
            if fits(g):
                lines[put](g, o.x, o.w, ctx)
            else:
                conv1d_each[write, nlc](g, steps, o, ctx)
    else:
        run[put, kernel, nlc, whole](g, o.x, o.w, ctx)


def conv_transpose1d_gpu[
    dtype: DType, //, write: Write[dtype], kernel: StaticString, nlc: Bool, whole: Bool
](t: Transposed, steps: FilterSteps, group_step: Int, o: Operands[dtype], ctx: DeviceContext) raises:
    """Computes a transposed convolution of NLC or NCL data.

    "each" reads any filter. The other kernels compute the convolution of all phases, and each phase has all its taps.
    Their filter is the one that `Transposed.scf` makes, in the order that they read.
    """
    comptime if kernel == "each":
        conv_transpose1d_each[write, nlc](t, steps, group_step, o, ctx)
    else:
        if t.length == 0:  # no tap is read
            conv_transpose1d_each[write, nlc](t, steps, group_step, o, ctx)
            return
        var filters = t.group_filters()
        var start = t.first() * t.stride - t.pad_left

        @__parameter
        @always_inline
        @__copy_capture(filters, start)
        def place[width: Int](n: Int, position: Int, column: Int, value: SIMD[DType.float32, width]):
            """Stores sums of neighbouring filters of one phase."""
            var of_all = Int32(column) // Int32(filters)
            var group = of_all // Int32(t.stride)
            var phase = of_all - group * Int32(t.stride)
            var filter = column - Int(of_all - group) * filters
            var output = position * t.stride + start + Int(phase) * t.dilation
            if output >= 0 and output < t.out_length:
                var sum = value
                if o.has_bias:
                    sum += values[width](o.bias.unsafe_offset(filter))
                write[width](n, output, filter, sum.cast[dtype]())

        run[place, kernel, nlc, whole](t.convolution(1), o.x, o.w, ctx)
