"""Transposed convolution as a convolution: each phase of the stride has separate filters.

Output `m * stride + phase * dilation - pad_left` is the sum over taps `phase + j * step` of input rows
`m - j * dilation / common`: every phase reads the same rows, with the same dilation and stride 1. So the kernels
compute `phases` times as many filters of one convolution of `ceil(kernel / step)` taps, and each result is then written
to its place in the output. Each output is written once; nothing is filled with zeros, and nothing is added up in
memory.
"""

from std.math import ceildiv, gcd

from .geometry import Geometry, ZEROS
from .lanes import FilterSteps, Memory, Operands, Write
from .tasks import spread, workers

comptime LANES = 16
"""Zero filters fill up each phase to a multiple of this, the widest vector, so that no vector holds two phases."""
comptime CHANNELS = 16
"""Channels of the filter that a task copies: one cache line."""


@fieldwise_init
struct Transposed(ImplicitlyCopyable, TrivialRegisterPassable):
    """The run-time description of one transposed convolution."""

    var batch: Int
    var length: Int
    var out_length: Int
    var channels: Int
    var filters: Int
    var groups: Int
    var kernel: Int
    var stride: Int
    var dilation: Int
    var pad_left: Int

    @always_inline
    def group_channels(self) -> Int:
        return self.channels // self.groups

    @always_inline
    def group_filters(self) -> Int:
        return self.filters // self.groups

    @always_inline
    def common(self) -> Int:
        return gcd(self.stride, self.dilation)

    @always_inline
    def step(self) -> Int:
        """Returns the distance from one tap to the next tap of the same phase."""
        return self.stride // self.common()

    @always_inline
    def phases(self) -> Int:
        """Returns how many phases have a tap."""
        return min(self.step(), self.kernel)

    @always_inline
    def taps(self) -> Int:
        """Returns how many taps the phase with the most taps has."""
        return ceildiv(self.kernel, self.step())

    @always_inline
    def first(self) -> Int:
        """Returns the first m, of any phase, that an output belongs to."""
        return -(((self.phases() - 1) * self.dilation - self.pad_left) // self.stride)

    def convolution(self, lanes: Int) -> Geometry:
        """Returns the convolution of all phases, each with its filters filled up to a multiple of `lanes`."""
        var dilation = self.dilation // self.common()
        var count = (self.out_length - 1 + self.pad_left) // self.stride - self.first() + 1
        return Geometry(
            batch=self.batch,
            length=self.length,
            out_length=max(0, count),
            channels=self.channels,
            filters=self.groups * self.phases() * ceildiv(self.group_filters(), lanes) * lanes,
            groups=self.groups,
            kernel=self.taps(),
            stride=1,
            dilation=dilation,
            pad_left=(self.taps() - 1) * dilation - self.first(),
            mode=ZEROS,
        )

    def inverse(self) -> Int:
        """Returns the inverse of `dilation / common` modulo `step`."""
        var (a, b) = (self.step(), self.dilation // self.common() % self.step())
        var (x, y) = (0, 1)
        while b != 0:
            var quotient = a // b
            a, b = b, a - quotient * b
            x, y = y, x - quotient * y
        return x % self.step()

    @always_inline
    def phase(self, output: Int, inverse: Int) -> Int:
        """Returns the phase of an output, or -1 where no tap reaches it."""
        var at = output + self.pad_left
        if at % self.common() != 0:
            return -1
        var phase = at // self.common() % self.step() * inverse % self.step()
        return phase if phase < self.phases() else -1

    def scf[
        dtype: DType, //, depthwise: Bool
    ](self, w: Memory[dtype], steps: FilterSteps, group_step: Int, lanes: Int, target: Memory[dtype]):
        """Writes the filter as SCF of the convolution. `Packing.phased` in `conv/packing.py` does the same.

        Args:
            w: The filter.
            steps: How far apart its taps, channels and filters are.
            group_step: How far apart groups are.
            lanes: Zero filters fill up each phase to a multiple of this.
            target: (taps, channels of a group, filters of the convolution), the filters in the order of `Columns`.
        """
        var g = self.convolution(lanes)
        var channels = self.group_channels()
        var filters = self.group_filters()
        var room = g.filters // (self.groups * self.phases())
        var blocks = ceildiv(channels, CHANNELS)

        def task(i: Int) {imm}:
            var group = i // blocks
            var first = i % blocks * CHANNELS
            for phase in range(self.phases()):
                var column = (group * self.phases() + phase) * room
                comptime if depthwise:
                    column = phase * self.groups + group
                for t in range(g.kernel):
                    var k = phase + (g.kernel - 1 - t) * self.step()
                    var from_ = w.unsafe_offset(group * group_step + k * steps.tap + first * steps.channel)
                    var to = target.unsafe_offset((t * channels + first) * g.filters + column)
                    for f in range(room):
                        var there = k < self.kernel and f < filters
                        for c in range(min(CHANNELS, channels - first)):
                            var value = Scalar[dtype](0)
                            if there:
                                value = from_[unsafe_offset=f * steps.filter + c * steps.channel]
                            to[unsafe_offset=c * g.filters + f] = value

        spread(task, self.groups * blocks, workers(g.filters * channels * g.kernel))

    def fill_unreached[dtype: DType, //, write: Write[dtype]](self, o: Operands[dtype]):
        """Writes the bias where no tap reaches: the stride exceeds the kernel or shares a factor with the dilation."""
        if self.phases() == self.stride:
            return
        var inverse = self.inverse()

        def task(i: Int) {imm}:
            var n = i // self.out_length
            var position = i % self.out_length
            if self.phase(position, inverse) < 0:
                for f in range(self.filters):
                    write[1](n, position, f, o.bias[unsafe_offset=f] if o.has_bias else 0)

        spread(task, self.batch * self.out_length, workers(self.batch * self.out_length * self.filters))


@fieldwise_init
struct Columns[depthwise: Bool](ImplicitlyCopyable, TrivialRegisterPassable):
    """Filters of the convolution of all phases: `room` for each phase of each group, the real filters first."""

    var t: Transposed
    var phases: Int
    var room: Int

    @always_inline
    def group(self, column: Int) -> Int:
        comptime if Self.depthwise:
            return column % self.t.groups
        else:
            return column // (self.room * self.phases)

    @always_inline
    def phase(self, column: Int) -> Int:
        comptime if Self.depthwise:
            return column // self.t.groups
        else:
            return column // self.room % self.phases
