"""Registers the operations that graphs call. Run-time sizes are checked here, before any memory is touched."""

import extensibility
from extensibility import InputTensor, OutputTensor, _FusedOutputTensor as FusedOutputTensor
from std.math import ceildiv
from std.utils.index import IndexList
from max.gpu.host import DeviceContext
from max.gpu.host.info import is_cpu

from .dense import conv1d_dense
from .depthwise import conv1d_depthwise
from .geometry import CIRCULAR, Geometry, REFLECT, REPLICATE
from .gpu import conv1d_gpu
from .lanes import PACK, FilterSteps, Operands
from .lengthwise import conv1d_lengthwise
from .points import Plan
from .winograd import conv1d_winograd, pays
from .paired import conv1d_paired, has_pairs
from .lstm import GATES, Lstm, lstm_cpu, lstm_gpu


def check(g: Geometry, pad_right: Int, filter_channels: Int) raises:
    """Raises where the run-time sizes do not make a convolution that this package computes."""
    if g.kernel < 1 or g.stride < 1 or g.dilation < 1 or g.filters < 1 or filter_channels < 1:
        raise Error("conv1d: kernel_size, stride, dilation and the filter's sizes must be at least 1.")
    if min(g.pad_left, pad_right) < 0:
        raise Error("conv1d: padding must not be negative.")
    if g.groups < 1 or g.groups * filter_channels != g.channels or g.filters % g.groups != 0:
        raise Error(
            "conv1d: x has ", g.channels, " channels, but the filter takes ", filter_channels, " for each of ",
            g.groups,
            " groups and gives ", g.filters, "; pass what the graph was built for.",
        )
    var reach = (g.kernel - 1) * g.dilation + 1
    var padded = g.length + g.pad_left + pad_right
    if padded < reach:
        raise Error(
            "conv1d: the filter reaches over ", reach, " positions, but the padded input has only ", padded,
            "; pad more or pass a longer input.",
        )
    if g.out_length != (padded - reach) // g.stride + 1:
        raise Error("conv1d: the output has ", g.out_length, " positions, not ", (padded - reach) // g.stride + 1, ".")
    # A reflection leaves out the edge itself, a circle does not, and an edge to repeat needs an input.
    var pad = max(g.pad_left, pad_right)
    var wide = (
        (g.mode == REFLECT and pad >= g.length)
        or (g.mode == CIRCULAR and pad > g.length)
        or (g.mode == REPLICATE and pad > 0 and g.length == 0)
    )
    if wide:
        raise Error(
            "conv1d: padding of ", pad, " with values of the input needs more than its ", g.length,
            " positions; pad less or pass a longer input.",
        )


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
        stride: Scalar[DType.int64],
        dilation: Scalar[DType.int64],
        pad_left: Scalar[DType.int64],
        pad_right: Scalar[DType.int64],
        mode: Scalar[DType.int64],
        groups: Scalar[DType.int64],
        kernel_size: Scalar[DType.int64],
        ctx: DeviceContext,
    ) raises:
        comptime dtype = output.dtype
        comptime nlc = layout == "NLC"
        comptime length = 1 if nlc else 2
        comptime channel = 3 - length
        comptime packed = filter_layout == "packed"
        comptime tap_axis = 0 if packed else filter_layout.find("S")
        comptime channel_axis = 1 if packed else filter_layout.find("C")
        comptime filter_axis = 2 if packed else filter_layout.find("F")
        var g = Geometry(
            batch=x.dim_size(0),
            length=x.dim_size(length),
            out_length=output.dim_size(length),
            channels=x.dim_size(channel),
            filters=output.dim_size(channel) if packed else w.dim_size(filter_axis),
            groups=Int(groups),
            kernel=Int(kernel_size) if packed else w.dim_size(tap_axis),
            stride=Int(stride),
            dilation=Int(dilation),
            pad_left=Int(pad_left),
            mode=Int(mode),
        )
        check(g, Int(pad_right), g.channels // max(1, g.groups) if packed else w.dim_size(channel_axis))
        comptime if packed:
            var rows = Plan(g).products() if kernel == "winograd" else g.kernel
            var row = g.group_channels()
            comptime if kernel == "paired":
                row = ceildiv(row, 2) * 2
            var wanted = [g.groups * ceildiv(g.group_filters(), PACK), rows, row * PACK]
            if w.dim_size(0) != wanted[0] or w.dim_size(1) != wanted[1] or w.dim_size(2) != wanted[2]:
                raise Error(
                    "conv1d: the packed filter must have shape (",
                    wanted[0],
                    ", ",
                    wanted[1],
                    ", ",
                    wanted[2],
                    ") for these sizes; pass what max_conv.compile packed.",
                )
        if g.batch == 0:
            return
        var o = Operands[dtype](
            x.unsafe_ptr().unsafe_origin_cast[MutUntrackedOrigin](),
            w.unsafe_ptr().unsafe_origin_cast[MutUntrackedOrigin](),
            bias.unsafe_ptr().unsafe_origin_cast[MutUntrackedOrigin](),
            bias.dim_size(0) > 0,
        )

        @__parameter
        @always_inline
        def write[width: Int](n: Int, position: Int, filter: Int, value: SIMD[dtype, width]):
            comptime if nlc:
                output._lambda_store[width=width, element_alignment=1](IndexList[3](n, position, filter), value)
            else:
                output._lambda_store[width=width, element_alignment=1](IndexList[3](n, filter, position), value)

        var inner = w.dim_size(2)
        var outer = w.dim_size(1) * inner
        var size = [outer, inner, 1]
        var steps = FilterSteps(size[tap_axis], size[channel_axis], size[filter_axis])
        if whole and g.group_filters() % PACK != 0:
            raise Error("conv1d: the graph was built for a multiple of 32 filters, not ", g.group_filters(), " a group.")
        comptime if packed:
            comptime assert is_cpu[target]()
            comptime if kernel == "winograd":
                conv1d_winograd[write, nlc, packed, whole](g, steps, o)
            elif kernel == "paired":
                comptime assert dtype == DType.bfloat16 and has_pairs()
                conv1d_paired[write, nlc, packed](g, steps, o)
            else:
                comptime assert nlc and (kernel == "dense" or kernel == "short")
                conv1d_dense[write, kernel == "short", whole, packed](g, o)
            return
        comptime if not is_cpu[target]():
            conv1d_gpu[write, nlc](g, steps, o, ctx)
            return
        comptime if kernel == "winograd":
            if least == 0 or pays(g, least):
                conv1d_winograd[write, nlc, False, whole](g, steps, o)
                return
        comptime if kernel == "paired" and dtype == DType.bfloat16 and has_pairs():
            conv1d_paired[write, nlc](g, steps, o)
            return
        comptime if kernel == "depthwise":
            comptime assert filter_layout == "SCF"
            if g.groups != g.channels or g.filters != g.channels:
                raise Error("conv1d: the depthwise kernel needs one channel in and one out a group.")
            if not nlc and g.stride != 1:
                raise Error("conv1d: the depthwise kernel takes NCL data with stride 1 only, not ", g.stride, ".")
            conv1d_depthwise[write, nlc](g, o)
        elif nlc and filter_layout == "SCF" and kernel != "lengthwise":
            conv1d_dense[write, kernel == "short", whole](g, o)
        else:
            comptime assert kernel != "dense" and kernel != "short"
            conv1d_lengthwise[write, nlc, whole](g, steps, o)


@extensibility.register("max_conv.lstm")
struct LongShortTermMemory:
    """The recurrent part of an LSTM over (N, T, 4H) gates that hold the input's share, of at least T rows each."""

    @staticmethod
    def execute[
        target: StaticString
    ](
        output: OutputTensor[rank=3, ...],
        last_hidden: OutputTensor[dtype=output.dtype, rank=2, ...],
        last_cell: OutputTensor[dtype=output.dtype, rank=2, ...],
        x: InputTensor[dtype=output.dtype, rank=3, ...],
        w: InputTensor[dtype=output.dtype, rank=2, ...],
        hidden: InputTensor[dtype=output.dtype, rank=2, ...],
        cell: InputTensor[dtype=output.dtype, rank=2, ...],
        ctx: DeviceContext,
    ) raises:
        comptime assert output.dtype == DType.float32 or output.dtype == DType.float64
        var batch = output.dim_size(0)
        var units = output.dim_size(2)
        if (
            x.dim_size(0) != batch
            or x.dim_size(1) < output.dim_size(1)
            or x.dim_size(2) != GATES * units
            or w.dim_size(0) != units
            or w.dim_size(1) != GATES * units
        ):
            raise Error("lstm: the gates and the weights do not fit an output of ", units, " units")
        if (
            hidden.dim_size(0) != batch
            or cell.dim_size(0) != batch
            or hidden.dim_size(1) != units
            or cell.dim_size(1) != units
        ):
            raise Error("lstm: hidden and cell must both have shape (", batch, ", ", units, ")")
        if batch == 0:
            return
        var s = Lstm[output.dtype](
            x.unsafe_ptr().unsafe_origin_cast[MutUntrackedOrigin](),
            w.unsafe_ptr().unsafe_origin_cast[MutUntrackedOrigin](),
            hidden.unsafe_ptr().unsafe_origin_cast[MutUntrackedOrigin](),
            cell.unsafe_ptr().unsafe_origin_cast[MutUntrackedOrigin](),
            output.unsafe_ptr().unsafe_origin_cast[MutUntrackedOrigin](),
            last_hidden.unsafe_ptr().unsafe_origin_cast[MutUntrackedOrigin](),
            last_cell.unsafe_ptr().unsafe_origin_cast[MutUntrackedOrigin](),
            batch=batch,
            steps=output.dim_size(1),
            rows=x.dim_size(1),
            units=units,
        )
        comptime if is_cpu[target]():
            lstm_cpu(s)
        else:
            lstm_gpu(s, ctx)
