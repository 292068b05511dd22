"""Checks of sizes that are only known at run time."""

from std.math import ceildiv
from std.utils.index import IndexList

from .amx import Inputs
from .geometry import CIRCULAR, Geometry, REFLECT, REPLICATE
from .lanes import PACK
from .points import Plan
from .transposed import LANES, Transposed


def counted(positions: Int) -> String:
    return String(positions, " position" if positions == 1 else " positions")


def check(g: Geometry, pad_right: Int, filter_channels: Int) raises:
    """Raises unless the run-time sizes make a convolution that this package computes."""
    if g.kernel < 1 or g.stride < 1 or g.dilation < 1 or g.filters < 1 or filter_channels < 1:
        raise Error("conv1d: kernel_size, stride, dilation and the filter's sizes must be at least 1.")
    # A window may end with rows that no output reads. Then the padding on the right is negative.
    if g.pad_left < 0 or pad_right < -g.length:
        raise Error("conv1d: padding must not be negative.")
    if g.groups < 1 or g.groups * filter_channels != g.channels or g.filters % g.groups != 0:
        raise Error(
            "conv1d: x has ",
            g.channels,
            " channels, but the filter takes ",
            filter_channels,
            " for each of ",
            g.groups,
            " groups and gives ",
            g.filters,
            "; pass what the graph was built for.",
        )
    var reach = (g.kernel - 1) * g.dilation + 1
    check_room(g.length, g.pad_left, pad_right, reach, g.mode)
    var outputs = (g.length + g.pad_left + pad_right - reach) // g.stride + 1
    if g.out_length != outputs:
        raise Error("conv1d: the output has ", g.out_length, " positions, not ", outputs, ".")


def check_room(length: Int, left: Int, right: Int, reach: Int, mode: Int) raises:
    """Raises if an input is too short for its padding, or for a filter that reaches over `reach` positions."""
    if length + left + right < reach:
        raise Error(
            "conv1d: the filter reaches over ",
            counted(reach),
            ", but the padded input has only ",
            length + left + right,
            "; pad more or pass a longer input.",
        )
    # Reflection leaves out the edge itself, circular padding does not, and repeating the edge needs an input.
    var pad = max(left, right)
    var wide = (
        (mode == REFLECT and pad >= length)
        or (mode == CIRCULAR and pad > length)
        or (mode == REPLICATE and pad > 0 and length == 0)
    )
    if wide:
        raise Error(
            "conv1d: padding of ",
            pad,
            " with values of the input needs more than its ",
            counted(length),
            "; pad less or pass a longer input.",
        )


def check_transposed(t: Transposed, pad_right: Int, filter_channels: Int) raises:
    """Raises unless the run-time sizes make a transposed convolution."""
    if t.kernel < 1 or t.stride < 1 or t.dilation < 1 or t.filters < 1 or filter_channels < 1:
        raise Error("conv_transpose1d: kernel_size, stride, dilation and the filter's sizes must be at least 1.")
    if min(t.pad_left, pad_right) < 0:
        raise Error("conv_transpose1d: padding must not be negative.")
    if t.groups < 1 or t.groups * filter_channels != t.channels or t.filters % t.groups != 0:
        raise Error(
            "conv_transpose1d: x has ",
            t.channels,
            " channels, but the filter takes ",
            filter_channels,
            " for each of ",
            t.groups,
            " groups and gives ",
            t.filters,
            "; pass what the graph was built for.",
        )
    if t.length < 1:
        raise Error("conv_transpose1d: x must have at least 1 position, but has ", t.length, ".")
    var shortest = (t.length - 1) * t.stride + (t.kernel - 1) * t.dilation + 1 - t.pad_left - pad_right
    var longest = shortest + max(t.stride, t.dilation) - 1
    if t.out_length < max(1, shortest) or t.out_length > longest:
        raise Error(
            "conv_transpose1d: the output has ",
            t.out_length,
            " positions, not ",
            max(1, shortest),
            " to ",
            longest,
            "; pad less or pass a longer input.",
        )


def check_depthwise(op: StaticString, channels: Int, filters: Int, groups: Int) raises:
    """Raises unless the depthwise kernel can compute a layer."""
    if groups != channels or filters != channels:
        raise Error(op, ": the depthwise kernel needs one channel in and one out a group.")


def packed_shape[kernel: StaticString](g: Geometry) -> IndexList[3]:
    """Returns the shape of a filter that `max_conv/conv/packing.py` has packed for a kernel."""
    var rows = Plan(g).products() if kernel == "winograd" else g.kernel
    var row = g.group_channels()
    comptime if kernel == "paired":
        row = ceildiv(row, 2) * 2
    elif kernel == "amx":
        (rows, row) = (1, Inputs.of(g).rows())
    return IndexList[3](g.groups * ceildiv(g.group_filters(), PACK), rows, row * PACK)


def made_shape[kernel: StaticString, filter_layout: StaticString](t: Transposed) -> IndexList[3]:
    """Returns the same for a transposed convolution, "packed", "phased" or "phased FSC"."""
    comptime if filter_layout == "packed":
        return packed_shape[kernel](t.convolution(LANES))
    var filters = t.convolution(1).filters
    comptime if filter_layout == "phased FSC":
        return IndexList[3](filters, t.taps(), t.group_channels())
    else:
        return IndexList[3](t.taps(), t.group_channels(), filters)


def check_shape(op: StaticString, given: IndexList[3], wanted: IndexList[3]) raises:
    """Raises unless a packed filter has the wanted shape."""
    if given != wanted:
        raise Error(
            op, ": the packed filter must have shape ", wanted, " for these sizes; pass what max_conv.compile packed."
        )
