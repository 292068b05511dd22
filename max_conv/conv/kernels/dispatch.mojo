"""Calls one CPU kernel. Python chooses the kernel, where sizes are known; only short inputs change the choice here."""

from .amx import conv1d_amx
from .dense import conv1d_dense, conv1d_short
from .depthwise import conv1d_depthwise
from .geometry import Geometry
from .lanes import PACK, FilterSteps, Operands, Write
from .lengthwise import conv1d_lengthwise
from .paired import conv1d_paired, has_vectors
from .sink import Sink
from .winograd import conv1d_winograd, pays


def convolve[
    dtype: DType,
    //,
    write: Write[dtype],
    kernel: StaticString,
    least: Int,
    fills_panels: Bool,
    nlc: Bool,
    packed: Bool,
    scf: Bool,
](g: Geometry, steps: FilterSteps, o: Operands[dtype], sink: Sink[dtype]) raises:
    """Computes a convolution of NLC or NCL data with a filter that is packed for the kernel, SCF, or of another layout.

    "dense" and "winograd" give outputs to `sink`, the other kernels to `write`. Both store the same values.
    "winograd" falls back to another kernel below `least` outputs if the filter is not packed. `fills_panels` says
    that the filters of a group are a multiple of 32.
    """
    if fills_panels and g.group_filters() % PACK != 0:
        raise Error("conv1d: the graph was built for a multiple of 32 filters, not ", g.group_filters(), " a group.")
    comptime if packed:
        comptime if kernel == "winograd":
            conv1d_winograd[nlc, packed, fills_panels](g, steps, o, sink)
        elif kernel == "amx":
            conv1d_amx[nlc](g, o, sink)
        elif kernel == "paired":
            comptime assert dtype == DType.bfloat16 and has_vectors()
            conv1d_paired[write, nlc, packed](g, steps, o)
        else:
            comptime assert nlc and (kernel == "dense" or kernel == "short")
            comptime if kernel == "short":
                conv1d_short[write, fills_panels, packed](g, o)
            else:
                conv1d_dense[fills_panels, packed](g, o, sink)
        return
    comptime if kernel == "winograd":
        if least == 0 or pays(g, least):
            conv1d_winograd[nlc, False, fills_panels](g, steps, o, sink)
            return
    comptime if kernel == "paired" and dtype == DType.bfloat16 and has_vectors():
        conv1d_paired[write, nlc](g, steps, o)
        return
    comptime if kernel == "depthwise":
        comptime assert scf
        if not nlc and g.stride != 1:
            raise Error("conv1d: the depthwise kernel takes NCL data with stride 1 only, not ", g.stride, ".")
        conv1d_depthwise[write, nlc](g, o)
    elif nlc and scf and kernel != "lengthwise":
        comptime if kernel == "short":
            conv1d_short[write, fills_panels](g, o)
        else:
            conv1d_dense[fills_panels](g, o, sink)
    else:
        comptime assert kernel != "dense" and kernel != "short"
        conv1d_lengthwise[write, nlc, fills_panels](g, steps, o)
