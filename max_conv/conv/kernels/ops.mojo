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

from .by_phase import conv_transpose1d
from .checks import check, check_depthwise, check_shape, check_transposed, packed_shape
from .dispatch import convolve
from .geometry import Geometry
from .gpu import conv1d_gpu, conv_transpose1d_gpu
from .lanes import Operands
from .signals import Plan, Signals, lay_out
from .tensors import DataAxes, FilterAxes, Numbers, memory
from .transposed import LANES, Transposed


@extensibility.register("max_conv.conv1d")
struct Conv1d:
    """A convolution of (N, L, C) or (N, C, L) data. `kernel` is chosen in Python, where sizes are known.

    What it gives way to for fewer than `least` outputs needs no second op in the graph. `whole` says that the filters
    of a group are a multiple of 32. A filter of layout "packed" is what `max_conv/packing.py` made of it for the
    kernel, and its kernel size is `kernel_size`, which is not read otherwise.
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
        def write[width: Int](n: Int, position: Int, filter: Int, value: SIMD[dtype, width]):
            output._lambda_store[width=width, element_alignment=1](data.index(n, position, filter), value)

        var steps = axes.steps(w.shape())
        comptime if is_cpu[target]():
            comptime if kernel == "depthwise":
                check_depthwise("conv1d", g.channels, g.filters, g.groups)
            convolve[write, kernel, least, whole, data.nlc, packed, filter_layout == "SCF"](g, steps, o)
        else:
            comptime assert not packed
            conv1d_gpu[write, data.nlc](g, steps, o, ctx)


@extensibility.register("max_conv.conv_transpose1d")
struct ConvTranspose1d:
    """A transposed convolution of (N, L, C) or (N, C, L) data.

    A filter of layout SFC or CFS holds all channels and the filters of one group, one of layout FSC all filters and the
    channels of one group. "packed" and "phased" are what `max_conv/packing.py` made of it: the kernel size is
    `kernel_size`, which is not read otherwise. `full` says that the filters of a group are a multiple of 16.
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
        var parts = max(1, numbers.groups)
        var group_channels = x.dim_size(data.channel) // parts if made else w.dim_size(axes.channel)
        var filters = output.dim_size(data.channel) if made else w.dim_size(axes.filter)
        comptime if not by_filter and not made:
            group_channels //= parts
            filters *= parts
        var t = Transposed(
            batch=x.dim_size(0),
            length=x.dim_size(data.length),
            out_length=output.dim_size(data.length),
            channels=x.dim_size(data.channel),
            filters=filters,
            groups=numbers.groups,
            kernel=numbers.kernel_size if made else w.dim_size(axes.tap),
            stride=numbers.stride,
            dilation=numbers.dilation,
            pad_left=numbers.pad_left,
        )
        check_transposed(t, numbers.pad_right, group_channels)
        comptime if filter_layout == "packed":
            check_shape("conv_transpose1d", w.shape(), packed_shape[kernel](t.convolution(LANES)))
        elif made:
            var shape = IndexList[3](t.taps(), t.group_channels(), t.convolution(1).filters)
            check_shape("conv_transpose1d", w.shape(), shape)
        if t.batch == 0:
            return
        var o = Operands[dtype](memory(x), memory(w), memory(bias), bias.dim_size(0) > 0)

        @__parameter
        @always_inline
        def write[width: Int](n: Int, position: Int, filter: Int, value: SIMD[dtype, width]):
            output._lambda_store[width=width, element_alignment=1](data.index(n, position, filter), value)

        var steps = axes.steps(w.shape())
        var group_step = t.group_filters() * steps.filter if by_filter else t.group_channels() * steps.channel
        comptime if is_cpu[target]():
            comptime if kernel == "depthwise":
                check_depthwise("conv_transpose1d", t.channels, t.filters, t.groups)
            conv_transpose1d[write, kernel, least, whole, full, data.nlc, filter_layout](t, steps, group_step, o)
        else:
            comptime assert not made
            conv_transpose1d_gpu[write, data.nlc](t, steps, group_step, o, ctx)


@extensibility.register("max_conv.window")
struct SignalWindow:
    """The rows that a layer reads of signals that come chunk by chunk; `state` then holds what later chunks need.

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
    """The rows that a layer reads of whole signals, of which each has a length of its own."""

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
