"""Registers the operations that graphs call. Run-time sizes are checked before any memory is touched."""

import extensibility
from extensibility import (
    InputTensor,
    OutputTensor,
    _MutableInputTensor as MutableInputTensor,
    _FusedOutputTensor as FusedOutputTensor,
)
from std.utils.index import IndexList
from max.gpu.host import DeviceContext
from max.gpu.host.info import is_cpu

from .by_phase import conv_transpose1d, place_rows
from .checks import check, check_depthwise, check_shape, check_transposed, made_shape, packed_shape
from .dispatch import convolve
from .geometry import Geometry
from .gpu.dispatch import conv1d_gpu, conv_transpose1d_gpu
from .lanes import Memory, Operands
from .signals import Plan, Signals, lay_out
from .sink import Bytes, Outputs, Sink, address, store_rows
from .tensors import DataAxes, FilterAxes, Numbers, memory
from .transposed import Transposed


@extensibility.register("max_conv.conv1d")
struct Conv1d:
    """A convolution of (N, L, C) or (N, C, L) data. `kernel` is chosen in Python, where sizes are known.

    For fewer than `least` outputs it may use another kernel, without a second operation in the graph. `whole` says that
    the filters of a group are a multiple of 32. A filter of layout "packed" is one that `max_conv/conv/packing.py`
    packed for the kernel. Its kernel size is `kernel_size`, which is not read for other layouts. A GPU's kernels store
    only whole vectors, each at a multiple of its width.
    """

    @staticmethod
    def execute[
        target: StaticString,
        kernel: StaticString,
        least: Int,
        whole: Bool,
        layout: StaticString,
        filter_layout: StaticString,
    ](
        output: FusedOutputTensor[rank=3, ...],
        x: InputTensor[dtype=output.dtype, rank=3, ...],
        w: InputTensor[dtype=output.dtype, rank=3, ...],
        bias: InputTensor[dtype=output.dtype, rank=1, ...],
        geometry: InputTensor[dtype=DType.int64, rank=1, ...],
        ctx: DeviceContext,
    ) raises:
        comptime dtype = output.dtype
        comptime data = DataAxes[layout]
        comptime axes = FilterAxes[filter_layout]
        comptime packed = axes.made
        var numbers = Numbers(memory(geometry))
        var g = Geometry(
            batch=x.dim_size(0),
            length=x.dim_size(data.length),
            out_length=output.dim_size(data.length),
            channels=x.dim_size(data.channel),
            filters=output.dim_size(data.channel) if packed else w.dim_size(axes.filter),
            groups=numbers.groups,
            kernel=numbers.kernel_size if packed else w.dim_size(axes.tap),
            stride=numbers.stride,
            dilation=numbers.dilation,
            pad_left=numbers.pad_left,
            mode=numbers.mode,
        )
        check(g, numbers.pad_right, g.channels // max(1, g.groups) if packed else w.dim_size(axes.channel))
        comptime if packed:
            check_shape("conv1d", w.shape(), packed_shape[kernel](g))
        if g.batch == 0:
            return
        var o = Operands[dtype](memory(x), memory(w), memory(bias), bias.dim_size(0) > 0)

        @__parameter
        @always_inline
        @__copy_capture(output)
        def write[width: Int](n: Int, position: Int, filter: Int, value: SIMD[dtype, width]):
            comptime alignment = 1 if is_cpu[target]() else width
            output._lambda_store[width=width, element_alignment=alignment](data.index(n, position, filter), value)

        var steps = axes.steps(w.shape())
        comptime if is_cpu[target]():

            def store(to: Bytes, _p: Bytes, at: Outputs, values: Memory[dtype], row_size: Int):
                var out = to.unsafe_bitcast[type_of(output)]()[]

                @__parameter
                @always_inline
                @__copy_capture(out)
                def write[width: Int](n: Int, position: Int, filter: Int, value: SIMD[dtype, width]):
                    out._lambda_store[width=width, element_alignment=1](data.index(n, position, filter), value)

                store_rows[write, data.nlc](at, values, row_size)

            comptime if kernel == "depthwise":
                check_depthwise("conv1d", g.channels, g.filters, g.groups)
            var to = output
            var sink = Sink[dtype](store, address(to), address(to))
            convolve[write, kernel, least, whole, data.nlc, packed, filter_layout == "SCF"](g, steps, o, sink)
            _ = to
        else:
            comptime assert not packed
            conv1d_gpu[write, kernel, data.nlc, whole](g, steps, o, ctx)


def transposed_of[
    layout: StaticString, filter_layout: StaticString
](numbers: Numbers, x: IndexList[3], w: IndexList[3], y: IndexList[3]) -> Tuple[Transposed, Int]:
    """Returns a transposed convolution of these shapes, and how many channels its filter has for each group."""
    comptime data = DataAxes[layout]
    comptime axes = FilterAxes[filter_layout]
    comptime made = axes.made
    var parts = max(1, numbers.groups)
    var group_channels = x[data.channel] // parts if made else w[axes.channel]
    var filters = y[data.channel] if made else w[axes.filter]
    comptime if filter_layout != "FSC" and not made:
        group_channels //= parts
        filters *= parts
    var t = Transposed(
        batch=x[0],
        length=x[data.length],
        out_length=y[data.length],
        channels=x[data.channel],
        filters=filters,
        groups=numbers.groups,
        kernel=numbers.kernel_size if made else w[axes.tap],
        stride=numbers.stride,
        dilation=numbers.dilation,
        pad_left=numbers.pad_left,
    )
    return (t, group_channels)


@extensibility.register("max_conv.conv_transpose1d")
struct ConvTranspose1d:
    """A transposed convolution of (N, L, C) or (N, C, L) data.

    A filter of layout SFC or CFS holds all channels and the filters of one group, one of layout FSC all filters and the
    channels of one group. "packed" and "phased" filters come from `max_conv/conv/packing.py`: their kernel size is
    `kernel_size`, which is not read for other layouts. `full` says that the filters of a group are a multiple of 16.
    """

    @staticmethod
    def execute[
        target: StaticString,
        kernel: StaticString,
        least: Int,
        whole: Bool,
        full: Bool,
        layout: StaticString,
        filter_layout: StaticString,
    ](
        output: FusedOutputTensor[rank=3, ...],
        x: InputTensor[dtype=output.dtype, rank=3, ...],
        w: InputTensor[dtype=output.dtype, rank=3, ...],
        bias: InputTensor[dtype=output.dtype, rank=1, ...],
        geometry: InputTensor[dtype=DType.int64, rank=1, ...],
        ctx: DeviceContext,
    ) raises:
        comptime dtype = output.dtype
        comptime data = DataAxes[layout]
        comptime axes = FilterAxes[filter_layout]
        comptime made = axes.made
        comptime by_filter = filter_layout == "FSC"
        var numbers = Numbers(memory(geometry))
        var (t, group_channels) = transposed_of[layout, filter_layout](numbers, x.shape(), w.shape(), output.shape())
        check_transposed(t, numbers.pad_right, group_channels)
        comptime if made:
            check_shape("conv_transpose1d", w.shape(), made_shape[kernel, filter_layout](t))
        if t.batch == 0:
            return
        var o = Operands[dtype](memory(x), memory(w), memory(bias), bias.dim_size(0) > 0)

        @__parameter
        @always_inline
        @__copy_capture(output)
        def write[width: Int](n: Int, position: Int, filter: Int, value: SIMD[dtype, width]):
            comptime alignment = 1 if is_cpu[target]() else width
            output._lambda_store[width=width, element_alignment=alignment](data.index(n, position, filter), value)

        var steps = axes.steps(w.shape())
        var group_step = t.group_filters() * steps.filter if by_filter else t.group_channels() * steps.channel
        comptime if is_cpu[target]():

            def store(to: Bytes, places: Bytes, at: Outputs, values: Memory[dtype], row_size: Int):
                var out = to.unsafe_bitcast[type_of(output)]()[]

                @__parameter
                @always_inline
                @__copy_capture(out)
                def write[width: Int](n: Int, position: Int, filter: Int, value: SIMD[dtype, width]):
                    out._lambda_store[width=width, element_alignment=1](data.index(n, position, filter), value)

                place_rows[write, kernel, full, data.nlc, filter_layout == "packed"](places, at, values, row_size)

            comptime if kernel == "depthwise":
                check_depthwise("conv_transpose1d", t.channels, t.filters, t.groups)
            var to = output
            conv_transpose1d[write, kernel, least, whole, full, data.nlc, filter_layout](
                t, steps, group_step, o, store, address(to)
            )
            _ = to
        else:
            comptime assert made == (kernel != "each")
            conv_transpose1d_gpu[write, kernel, data.nlc, whole](t, steps, group_step, o, ctx)


@extensibility.register("max_conv.window")
struct SignalWindow:
    """The rows that a layer reads of signals that come chunk by chunk; `state` then holds the rows for later chunks.

    `state` has a row of bytes for each signal, `ticks` says how much of a signal came before, `ends` how long it is.
    """

    @staticmethod
    def execute[
        target: StaticString, layout: StaticString
    ](
        output: OutputTensor[rank=3, ...],
        state: MutableInputTensor[dtype=DType.uint8, rank=2, ...],
        x: InputTensor[dtype=output.dtype, rank=3, ...],
        ticks: InputTensor[dtype=DType.int64, rank=1, ...],
        ends: InputTensor[dtype=DType.int64, rank=1, ...],
        plan: InputTensor[dtype=DType.int64, rank=1, ...],
        ctx: DeviceContext,
    ) raises:
        comptime data = DataAxes[layout]
        var batch = x.dim_size(0)
        if state.dim_size(0) != batch or ticks.dim_size(0) != batch or ends.dim_size(0) != batch:
            raise Error("stream: ticks, ends and state must have as many rows as the chunk, ", batch, ".")
        var signals = Signals[output.dtype, data.nlc](
            Plan(memory(plan)),
            memory(x),
            memory(state),
            state.dim_size(1),
            memory(ticks),
            memory(ends),
            batch,
            x.dim_size(data.length),
            x.dim_size(data.channel),
        )
        lay_out[target](signals, memory(output), output.dim_size(data.length), ctx)


@extensibility.register("max_conv.ragged_window")
struct RaggedWindow:
    """The rows that a layer reads of whole signals. Each signal has a separate length."""

    @staticmethod
    def execute[
        target: StaticString, layout: StaticString
    ](
        output: OutputTensor[rank=3, ...],
        x: InputTensor[dtype=output.dtype, rank=3, ...],
        lengths: InputTensor[dtype=DType.int64, rank=1, ...],
        plan: InputTensor[dtype=DType.int64, rank=1, ...],
        ctx: DeviceContext,
    ) raises:
        comptime data = DataAxes[layout]
        if lengths.dim_size(0) != x.dim_size(0):
            raise Error("conv1d: lengths must have a value for each of the ", x.dim_size(0), " signals.")
        var signals = Signals[output.dtype, data.nlc](
            Plan(memory(plan)),
            memory(x),
            memory(lengths).unsafe_bitcast[Scalar[DType.uint8]](),  # no state is kept
            0,
            memory(lengths),
            memory(lengths),
            x.dim_size(0),
            x.dim_size(data.length),
            x.dim_size(data.channel),
        )
        lay_out[target](signals, memory(output), output.dim_size(data.length), ctx)
