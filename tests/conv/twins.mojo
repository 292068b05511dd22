"""Prints facts that both kernels and Python code contain, one line each, `name = numbers`, for tests/test_twins.py."""

from std.sys.info import simd_width_of
from std.utils.index import IndexList

from kernels.careful import limit
from kernels.checks import packed_shape
from kernels.geometry import Geometry, ZEROS
from kernels.lanes import PACK, FilterSteps
from kernels.points import POINTS, Plan, QUAD, TAPS, filter_points
from kernels.transposed import LANES, Transposed


def show(name: String, numbers: List[Int]):
    var line = String(name, " =")
    for number in numbers:
        line += String(" ", number)
    print(line)


def points[size: Int]():
    """Prints each tap's factor at each point, for a group of taps."""
    comptime width = simd_width_of[DType.float64]()
    for tap in range(size):
        var taps = Array[SIMD[DType.float64, width], size](fill=SIMD[DType.float64, width](0))
        taps[tap] = 1
        var values = filter_points[size](taps)
        var line = String("points ", size, " ", tap, " =")
        comptime for point in range(size + TAPS):
            line += String(" ", values[point][0])
        print(line)


def layer(filters: Int, kernel: Int, stride: Int, dilation: Int) -> Geometry:
    return Geometry(1, 1000, 1, 12, filters, 2, kernel, stride, dilation, 0, ZEROS)


def shape(name: String, sizes: IndexList[3]):
    show(name, [sizes[0], sizes[1], sizes[2]])


def plan(kernel: Int, stride: Int, dilation: Int):
    """Prints how the taps of a layer form groups, and the shapes of its packed filters."""
    var name = String(kernel, " ", stride, " ", dilation)
    var g = layer(66, kernel, stride, dilation)
    var plan = Plan(g)
    for group in range(len(plan.sizes)):
        var taps = List[Int]()
        for i in range(plan.sizes[group]):
            taps.append(plan.first[group] + i * plan.step)
        show(String("group ", name, " ", group), taps)
    show(String("plan ", name), [len(plan.sizes), plan.spacing, plan.products()])
    shape(String("shape winograd ", name), packed_shape["winograd"](g))
    shape(String("shape dense ", name), packed_shape["dense"](g))
    shape(String("shape paired ", name), packed_shape["paired"](g))
    shape(String("shape amx ", name), packed_shape["amx"](g))


def transposed[depthwise: Bool](kernel: Int, stride: Int, dilation: Int, groups: Int, lanes: Int):
    """Prints the convolution of all phases, and its filter, made from a filter with the values 1, 2, 3 ..."""
    var name = String(kernel, " ", stride, " ", dilation, " ", groups, " ", lanes)
    var channels = groups if depthwise else 3 * groups
    var filters = groups if depthwise else 5 * groups
    var t = Transposed(1, 10, 100, channels, filters, groups, kernel, stride, dilation, 0)
    var g = t.convolution(lanes)
    show(String("transposed ", name), [t.step(), t.phases(), t.taps(), g.dilation, g.filters])
    var size = kernel * t.group_filters() * channels
    var given = List[Float32]()
    for i in range(size):
        given.append(Float32(i + 1))
    var made = List[Float32](length=t.taps() * t.group_channels() * g.filters, fill=0)
    var w = given.unsafe_ptr().unsafe_origin_cast[MutUntrackedOrigin]()
    var target = made.unsafe_ptr().unsafe_origin_cast[MutUntrackedOrigin]()
    # An SFC filter: taps, filters of a group, channels of all groups.
    var steps = FilterSteps(t.group_filters() * channels, 1, channels)
    t.scf[depthwise](w, steps, t.group_channels(), lanes, target)
    var numbers = List[Int]()
    for value in made:
        numbers.append(Int(value))
    show(String("phased ", name), numbers)
    _ = given^


def main():
    show("panel", [PACK])
    show("lanes", [LANES])
    show("quad", [QUAD])
    show("points", [POINTS])
    print("limit float32 =", limit[DType.float32]().cast[DType.float64]())
    print("limit float64 =", limit[DType.float64]())
    points[1]()
    points[2]()
    points[3]()
    for kernel in range(1, 13):
        for stride in [1, 2, 3, 6]:
            for dilation in [1, 2, 4]:
                plan(kernel, stride, dilation)
    for kernel in [1, 3, 4, 7, 16]:
        for stride in [1, 2, 3, 8]:
            for dilation in [1, 2, 3]:
                transposed[False](kernel, stride, dilation, 2, LANES)
                transposed[False](kernel, stride, dilation, 2, 1)
                transposed[True](kernel, stride, dilation, 8, 1)
