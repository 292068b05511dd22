"""Rows of signals that begin and end at different positions: live signals, which come chunk by chunk; ragged batches.

A layer of a live signal reads a window: rows of the chunks before, which the state holds, and the rows of this chunk.
Position 0 is a signal's first row. Rows before it, and rows from the signal's length on, are the layer's padding. So
the values that the state and the chunk hold there are never read.
"""

from std.math import ceildiv
from std.memory import unsafe_memcpy
from std.sys.info import size_of

from max.gpu import global_idx
from max.gpu.host import DeviceContext
from max.gpu.host.info import is_cpu

from .checks import check_room
from .geometry import source
from .lanes import Memory
from .tasks import phases, workers

comptime MOST_STEPS = 8
"""The most steps in the formula of a length; also in `max_conv/conv/lines.py`."""
comptime ENDLESS = 1 << 40
"""The length of a signal whose end is not known; also `ENDLESS` in `max_conv/conv/lines.py`."""
comptime BLOCK_BYTES = 64 * 1024
"""Bytes that a task copies."""
comptime THREADS = 256
comptime PER_BYTE = 4
"""How many multiplications take as long as copying one byte."""


struct Plan(ImplicitlyCopyable, TrivialRegisterPassable):
    """The numbers that `WindowPlan.numbers` in `max_conv/conv/lines.py` writes, in this order."""

    var offset: Int
    """Bytes before this window's rows in a row of the state."""
    var kept: Int
    """Rows that the state holds."""
    var rows: Int
    """Rows of a window before the first row of the chunk."""
    var per_tick: Int
    """Positions that a tick brings."""
    var delay: Int
    """How many positions the chunk is late."""
    var mode: Int
    """The padding mode."""
    var left: Int
    var right: Int
    var reach: Int
    """The reach of the layer's filter; 0 if there is no layer."""
    var steps: Int
    var lengths: SIMD[DType.int64, 4 * MOST_STEPS]
    """Each step of the length's formula: factor, summand and divisor. These are values, not a pointer, for GPUs."""

    @always_inline
    def __init__(out self, memory: Memory[DType.int64]):
        self.offset = Int(memory[unsafe_offset=0])
        self.kept = Int(memory[unsafe_offset=1])
        self.rows = Int(memory[unsafe_offset=2])
        self.per_tick = Int(memory[unsafe_offset=3])
        self.delay = Int(memory[unsafe_offset=4])
        self.mode = Int(memory[unsafe_offset=5])
        self.left = Int(memory[unsafe_offset=6])
        self.right = Int(memory[unsafe_offset=7])
        self.reach = Int(memory[unsafe_offset=8])
        self.steps = min(Int(memory[unsafe_offset=9]), MOST_STEPS)
        self.lengths = SIMD[DType.int64, 4 * MOST_STEPS](0)
        for i in range(3 * self.steps):
            self.lengths[i] = memory[unsafe_offset=10 + i]

    @always_inline
    def length(self, end: Int) -> Int:
        """Returns how many positions a signal has here if it has `end` positions in the network's input."""
        var length = end
        for i in range(self.steps):
            length = (length * Int(self.lengths[3 * i]) + Int(self.lengths[3 * i + 1])) // Int(self.lengths[3 * i + 2])
        return length


@fieldwise_init
struct Line[dtype: DType](ImplicitlyCopyable, TrivialRegisterPassable):
    """A run of rows of one signal: all channels of NLC data, or one channel of NCL data."""

    var chunk: Memory[Self.dtype]
    var size: Int
    """Rows of the chunk."""
    var state: Memory[Self.dtype]
    var kept: Int
    var row: Int
    """Values of a row."""

    @always_inline
    def copy(self, first: Int, count: Int, target: Memory[Self.dtype]):
        """Copies `count` rows from `first` on. Row 0 is the chunk's first; rows that are not there are zeros."""
        var at = first
        var to = target
        var end = first + count
        var held = min(end, 0) - max(at, -self.kept)
        if at < -self.kept:
            to = zero(to, (min(end, -self.kept) - at) * self.row)
            at = min(end, -self.kept)
        if held > 0:
            var from_ = self.state.unsafe_offset((self.kept + at) * self.row)
            unsafe_memcpy(dest=to, src=from_, count=held * self.row)
            to = to.unsafe_offset(held * self.row)
            at += held
        var there = min(end, self.size) - at
        if there > 0:
            unsafe_memcpy(dest=to, src=self.chunk.unsafe_offset(at * self.row), count=there * self.row)
            to = to.unsafe_offset(there * self.row)
            at += there
        _ = zero(to, (end - at) * self.row)

    def keep_value(self, i: Int):
        """Writes value i of the newest rows into the state, the oldest row first: a new place may hold an old row."""
        for r in range(self.kept):
            var at = r + self.size - self.kept
            var value = (
                self.chunk[unsafe_offset=at * self.row + i] if at
                >= 0 else self.state[unsafe_offset=(r + self.size) * self.row + i]
            )
            self.state[unsafe_offset=r * self.row + i] = value

    def keep(self):
        """Writes the newest rows into the state."""
        if self.size < self.kept:
            # The copy goes forward, because the target is before the source.
            var rest = (self.kept - self.size) * self.row
            var from_ = self.state.unsafe_offset(self.size * self.row)
            for i in range(rest):
                self.state[unsafe_offset=i] = from_[unsafe_offset=i]
            unsafe_memcpy(dest=self.state.unsafe_offset(rest), src=self.chunk, count=self.size * self.row)
        elif self.kept > 0:
            var from_ = self.chunk.unsafe_offset((self.size - self.kept) * self.row)
            unsafe_memcpy(dest=self.state, src=from_, count=self.kept * self.row)


@always_inline
def zero[dtype: DType, //](target: Memory[dtype], count: Int) -> Memory[dtype]:
    """Writes zeros, and returns the address after them."""
    for i in range(count):
        target[unsafe_offset=i] = 0
    return target.unsafe_offset(max(0, count))


@fieldwise_init
struct Signals[dtype: DType, nlc: Bool](ImplicitlyCopyable, TrivialRegisterPassable):
    """The rows of a batch."""

    var plan: Plan
    var x: Memory[Self.dtype]
    var state: Memory[DType.uint8]
    var state_size: Int
    """Bytes of a row of the state."""
    var ticks: Memory[DType.int64]
    var ends: Memory[DType.int64]
    var batch: Int
    var length: Int
    var channels: Int

    @always_inline
    def lines(self) -> Int:
        """Returns how many lines a signal has."""
        return 1 if Self.nlc else self.channels

    @always_inline
    def row(self) -> Int:
        """Returns how many values a line's row has."""
        return self.channels if Self.nlc else 1

    @always_inline
    def start(self, n: Int) -> Int:
        """Returns the position of the chunk's first row."""
        return Int(self.ticks[unsafe_offset=n]) * self.plan.per_tick - self.plan.delay

    @always_inline
    def line(self, n: Int, i: Int) -> Line[Self.dtype]:
        var row = self.row()
        var held = self.state.unsafe_offset(n * self.state_size + self.plan.offset).unsafe_bitcast[Scalar[Self.dtype]]()
        return Line[Self.dtype](
            self.x.unsafe_offset((n * self.lines() + i) * self.length * row),
            self.length,
            held.unsafe_offset(i * self.plan.kept * row),
            self.plan.kept,
            row,
        )

    def window(self, n: Int, i: Int, first: Int, count: Int, target: Memory[Self.dtype]):
        """Writes `count` rows of a line's window, from row `first` on."""
        var line = self.line(n, i)
        var length = self.plan.length(Int(self.ends[unsafe_offset=n]))
        var start = self.start(n)
        var position = start - self.plan.rows + first
        # Rows inside the signal are copied together, other rows one by one.
        var inner = min(max(0, -position), count)
        var outer = max(inner, min(count, length - position))
        line.copy(position + inner - start, outer - inner, target.unsafe_offset(inner * line.row))
        for r in range(count):
            if r >= inner and r < outer:
                continue
            var to = target.unsafe_offset(r * line.row)
            var from_ = source(self.plan.mode, length, position + r)
            if from_ >= 0:
                line.copy(from_ - start, 1, to)
            else:
                _ = zero(to, line.row)

    def lay_out(self, output: Memory[Self.dtype], rows: Int):
        """Writes the windows of all signals, `rows` rows each, and then the state."""
        comptime value = size_of[Scalar[Self.dtype]]()
        var row = self.row()
        var lines = self.batch * self.lines()
        var size = max(1, BLOCK_BYTES // (row * value))
        var blocks = ceildiv(rows, size)
        var threads = workers(PER_BYTE * lines * rows * row * value)

        def copy(i: Int) {imm}:
            var line = i // blocks
            var first = i % blocks * size
            var target = output.unsafe_offset((line * rows + first) * row)
            self.window(line // self.lines(), line % self.lines(), first, min(size, rows - first), target)

        def keep(i: Int) {imm}:
            self.line(i // self.lines(), i % self.lines()).keep()

        phases(copy, lines * blocks, keep, lines if self.plan.kept > 0 else 0, threads)

    @always_inline
    def value(self, line: Line[Self.dtype], n: Int, r: Int, i: Int) -> Scalar[Self.dtype]:
        """Returns one value of row r of a line's window."""
        var start = self.start(n)
        var length = self.plan.length(Int(self.ends[unsafe_offset=n]))
        var at = source(self.plan.mode, length, start - self.plan.rows + r) - start
        if at + start < 0 or at < -line.kept or at >= line.size:
            return 0
        if at < 0:
            return line.state[unsafe_offset=(line.kept + at) * line.row + i]
        return line.chunk[unsafe_offset=at * line.row + i]

    def check(self) raises:
        """Raises if a length does not fit, or if a layer cannot pad a signal: the same checks as for a whole signal."""
        for n in range(self.batch):
            var end = Int(self.ends[unsafe_offset=n])
            if end < 0 or (self.plan.per_tick == 0 and self.plan.length(end) > self.length):
                raise Error(
                    "conv1d: a signal of the batch cannot have ", end, " positions; pass its length in lengths."
                )
            if self.plan.reach > 0 and end < ENDLESS:
                check_room(self.plan.length(end), self.plan.left, self.plan.right, self.plan.reach, self.plan.mode)


def lay_out[
    dtype: DType, nlc: Bool, //, target: StaticString
](s: Signals[dtype, nlc], output: Memory[dtype], rows: Int, ctx: DeviceContext) raises:
    """Writes the windows of all signals, `rows` rows each, and then the state."""
    comptime if is_cpu[target]():
        s.check()
        s.lay_out(output, rows)
    else:
        var row = s.row()
        var lines = s.batch * s.lines()

        @__parameter
        @__copy_capture(row, lines)
        def copy(size: Int64):
            var index = Int(global_idx.x)
            if index < Int(size):
                var i = index % row
                var r = index // row % rows
                var line = index // (row * rows)
                var n = line // s.lines()
                output[unsafe_offset=index] = s.value(s.line(n, line % s.lines()), n, r, i)

        @__parameter
        @__copy_capture(row)
        def keep(size: Int64):
            var index = Int(global_idx.x)
            if index < Int(size):
                var line = index // row
                s.line(line // s.lines(), line % s.lines()).keep_value(index % row)

        var size = lines * rows * row
        if size > 0:
            ctx.enqueue_function[copy](Int64(size), grid_dim=ceildiv(size, THREADS), block_dim=THREADS)
        size = lines * row
        if size > 0 and s.plan.kept > 0:
            ctx.enqueue_function[keep](Int64(size), grid_dim=ceildiv(size, THREADS), block_dim=THREADS)
