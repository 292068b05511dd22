"""Winograd's polynomials: how taps form groups, and how taps and data are evaluated at points and sums interpolated.

Four outputs and up to three taps are polynomials; they are evaluated at the points 0, 1, -1, 1/2, -2 and infinity,
multiplied there, and the products, summed over channels and groups of taps, become outputs by one matrix. Groups of two
taps need five of the same points, groups of one tap four. So every kernel size is a sum of groups, every stride a sum
of groups of its phases, and a dilation only changes which outputs make a quad: outputs that are `spacing` apart.

    Lavin and Gray, Fast Algorithms for Convolutional Neural Networks, https://arxiv.org/abs/1509.09308
    Barabasz et al., Error Analysis and Improving the Accuracy of Winograd Convolution, https://arxiv.org/abs/1803.10986
"""

from std.math import ceildiv, gcd
from std.sys.info import simd_width_of

from .geometry import Geometry
from .lanes import Memory

comptime QUAD = 4
"""Outputs of one transform."""
comptime POINTS = 6
"""0, 1, -1, infinity, 1/2, -2: groups of one tap use the first four, of two taps five, of three taps six."""
comptime TAPS = 3


struct Plan(Movable):
    """How the taps of a layer form groups. Large groups come first, so that each point is used by the first groups."""

    var spacing: Int  # outputs between the outputs of a quad
    var step: Int  # taps between the taps of a group
    var first: List[Int]  # first tap of each group
    var sizes: List[Int]
    var counts: List[Int]  # groups that use each point
    var bases: List[Int]  # products before each point

    def __init__(out self, g: Geometry):
        var common = gcd(g.stride, g.dilation)
        self.spacing = g.dilation // common
        self.step = g.stride // common
        self.first = List[Int]()
        self.sizes = List[Int]()
        self.counts = List[Int](length=POINTS, fill=0)
        self.bases = List[Int](length=POINTS, fill=0)
        for size in range(TAPS, 0, -1):
            for phase in range(min(self.step, g.kernel)):
                var taps = ceildiv(g.kernel - phase, self.step)
                var threes = taps // TAPS
                if size == TAPS:
                    for i in range(threes):
                        self.first.append(phase + i * TAPS * self.step)
                        self.sizes.append(size)
                elif taps % TAPS == size:
                    self.first.append(phase + threes * TAPS * self.step)
                    self.sizes.append(size)
        for point in range(POINTS):
            for i in range(len(self.sizes)):
                if point < self.sizes[i] + TAPS:
                    self.counts[point] += 1
            if point > 0:
                self.bases[point] = self.bases[point - 1] + self.counts[point - 1]

    def products(self) -> Int:
        """Returns the multiplications per quad, channel and filter."""
        return self.bases[POINTS - 1] + self.counts[POINTS - 1]


@always_inline
def filter_points[
    acc: DType, width: Int, //, size: Int
](w: Array[SIMD[acc, width], size]) -> Array[SIMD[acc, width], POINTS]:
    """Evaluates a group of taps at the points, divided by the factors that the data's transform leaves out."""
    var u = Array[SIMD[acc, width], POINTS](fill=SIMD[acc, width](0))
    comptime if size == 1:
        u[0] = w[0]
        u[1] = w[0] * 0.5
        u[2] = u[1]
        u[3] = w[0]
    elif size == 2:
        u[0] = w[0] * 2
        u[1] = w[0] + w[1]
        u[2] = (w[1] - w[0]) / 3
        u[3] = w[1]
        u[4] = w[0] * (-8.0 / 3) - w[1] * (4.0 / 3)
    else:
        var even = w[0] + w[2]
        u[0] = w[0]
        u[1] = (even + w[1]) / 3
        u[2] = (w[1] - even) / 3
        u[3] = w[2]
        u[4] = w[0] * (-16.0 / 15) - w[1] * (8.0 / 15) - w[2] * (4.0 / 15)
        u[5] = w[0] * (1.0 / 15) - w[1] * (2.0 / 15) + w[2] * (4.0 / 15)
    return u^


@always_inline
def data_points[
    acc: DType, width: Int, //, size: Int
](d: Array[SIMD[acc, width], size + QUAD - 1]) -> Array[SIMD[acc, width], POINTS]:
    """Transforms the data that four outputs read through a group of taps."""
    var t = Array[SIMD[acc, width], POINTS](fill=SIMD[acc, width](0))
    var e0 = d[0] - d[2]
    var e1 = d[1] - d[3]
    comptime half = SIMD[acc, width](0.5)
    comptime three_halves = SIMD[acc, width](1.5)
    comptime if size == 1:
        t[0] = e0
        t[1] = d[1] + d[2]
        t[2] = d[2] - d[1]
        t[3] = -e1
    elif size == 2:
        var e2 = d[2] - d[4]
        t[0] = half.fma(e0, -e1)
        t[1] = half.fma(d[2] - d[1], d[3])
        t[2] = three_halves.fma(-d[2], half.fma(d[1], d[3]))
        t[3] = half.fma(e1, -e2)
        t[4] = -e1
    else:
        var e2 = d[2] - d[4]
        var e3 = d[3] - d[5]
        t[0] = three_halves.fma(-e1, e0 - e2)
        t[1] = three_halves.fma(d[2] + d[3], -(e1 + e2))
        t[2] = three_halves.fma(d[3] - d[2], e1 - e2)
        t[3] = three_halves.fma(-e2, e1 - e3)
        t[4] = SIMD[acc, width](-2).fma(e1, -e2)
        t[5] = half.fma(e1, -e2)
    return t^


@always_inline
def outputs[
    acc: DType, width: Int, //
](sums: Memory[acc], point_size: Int, bias: SIMD[acc, width]) -> Array[SIMD[acc, width], QUAD]:
    """Returns the four outputs of one quad from its sums at the points, which are `point_size` apart."""
    var m = Array[SIMD[acc, width], POINTS](fill=SIMD[acc, width](0))
    comptime for p in range(POINTS):
        m[p] = sums.unsafe_offset(p * point_size).unsafe_load[width=width]()
    var even = m[1] + m[2]
    var odd = m[1] - m[2]
    var y = Array[SIMD[acc, width], QUAD](fill=bias)
    y[0] += m[0] + even + (m[4] + m[5])
    y[1] += SIMD[acc, width](0.5).fma(m[4], SIMD[acc, width](-2).fma(m[5], odd))
    y[2] += SIMD[acc, width](0.25).fma(m[4], SIMD[acc, width](4).fma(m[5], even))
    y[3] += SIMD[acc, width](0.125).fma(m[4], SIMD[acc, width](-8).fma(m[5], odd + m[3]))
    return y^


@always_inline
def first_output(plan: Plan, quad: Int) -> Int:
    """Returns the first output of a quad. `spacing` quads together are a run of outputs without gaps."""
    return quad // plan.spacing * plan.spacing * QUAD + quad % plan.spacing
