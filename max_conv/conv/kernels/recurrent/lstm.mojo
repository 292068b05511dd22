"""A long short-term memory over a whole sequence in one operation, so that the state never leaves the cache.

The input's share of the gates is computed before, by one matrix product for the whole sequence. Each step then needs
one vector by matrix product with the (H, 4H) recurrent weights, and the gates themselves. The order of the gates is
input, forget, cell, output, as in PyTorch.

A step reads all weights. For long sequences they are copied into the order in which they are read, tile by tile of
units. If they exceed a core's cache (`NEAR_BYTES`), threads share the units of every step and wait for each other after
it.
"""

from std.math import ceildiv, exp, tanh
from std.sys.info import simd_width_of, size_of
from std.utils.numerics import isnan

from max.gpu import barrier, block_dim, block_idx, thread_idx
from max.gpu.host import DeviceContext

from ..lanes import SUM_TERMS, Memory, load, store
from ..tasks import rounds, spread, workers

comptime GATES = 4
comptime ITEMS = 4
"""Batch items that are computed together: a step's time is mostly the time to read the weights."""
comptime THREADS = 1024
comptime LONG_STEPS = 16
"""From so many steps on, it is faster to copy the weights into the order in which they are read."""
comptime NEAR_BYTES = 1 << 20
"""Bytes of weights that stay in a core's cache."""


def tile_vectors[dtype: DType]() -> Int:
    """Vectors of units in a tile of one batch item: 16 of 32 AVX-512 or NEON registers hold sums, 8 of 16 in AVX2."""
    return 2 if simd_width_of[dtype]() * size_of[Scalar[dtype]]() == 32 else 4


@fieldwise_init
struct Lstm[dtype: DType](ImplicitlyCopyable, TrivialRegisterPassable):
    """The memory that one call reads and writes, and its sizes."""

    var x: Memory[Self.dtype]  # (batch, rows, 4 * units): the input's share of the gates, bias included
    var w: Memory[Self.dtype]  # (units, 4 * units)
    var hidden: Memory[Self.dtype]  # (batch, units), as are cell and the last two
    var cell: Memory[Self.dtype]
    var output: Memory[Self.dtype]  # (batch, steps, units)
    var last_hidden: Memory[Self.dtype]
    var last_cell: Memory[Self.dtype]
    var batch: Int
    var steps: Int
    var rows: Int  # rows of x for each batch item, at least `steps`
    var units: Int

    @always_inline
    def gates(self, n: Int, t: Int) -> Memory[Self.dtype]:
        return self.x.unsafe_offset((n * self.rows + t) * GATES * self.units)

    @always_inline
    def outputs(self, n: Int, t: Int) -> Memory[Self.dtype]:
        return self.output.unsafe_offset((n * self.steps + t) * self.units)


# The standard library's exp and tanh clamp their argument, which turns a NaN into a number. So the NaN is put back.
@always_inline
def sigmoid[dtype: DType, width: SIMDLength, //](x: SIMD[dtype, width]) -> SIMD[dtype, width]:
    comptime assert dtype.is_floating_point()
    return isnan(x).select(x, 1 / (1 + exp(-x)))


@always_inline
def hyperbolic[dtype: DType, width: SIMDLength, //](x: SIMD[dtype, width]) -> SIMD[dtype, width]:
    comptime assert dtype.is_floating_point()
    return isnan(x).select(x, tanh(x))


@always_inline
def advance[
    dtype: DType, width: SIMDLength, //
](
    input: SIMD[dtype, width],
    forget: SIMD[dtype, width],
    candidate: SIMD[dtype, width],
    output: SIMD[dtype, width],
    mut cell: SIMD[dtype, width],
) -> SIMD[dtype, width]:
    """Updates the cell state by one step and returns the hidden state; the arguments are the gates' sums."""
    cell = sigmoid(forget) * cell + sigmoid(input) * hyperbolic(candidate)
    return sigmoid(output) * hyperbolic(cell)


@fieldwise_init
struct Tiles[dtype: DType](ImplicitlyCopyable, TrivialRegisterPassable):
    """The recurrent weights of a tile of units: `at(unit)` is where the weights of row 0 and the first gate are."""

    var data: Memory[Self.dtype]
    var step: Int  # from one unit to the next
    var row: Int
    var gate: Int

    @always_inline
    def at(self, unit: Int) -> Memory[Self.dtype]:
        return self.data.unsafe_offset(unit * self.step)


@always_inline
def tile[
    dtype: DType, //, items: Int, vectors: Int, partial: Bool
](s: Lstm[dtype], w: Tiles[dtype], n: Int, valid: Int, t: Int, unit: Int, states: Memory[dtype]):
    """Computes step `t` for `vectors` vectors of units from `unit` on, of `items` batch items from `n` on.

    `states` is (3, batch, units): the hidden state before an even step, before an odd one, and the cell state. Only the
    first `valid` items are stored. Items past the end of the batch are computed from the last item's state.
    """
    comptime width = simd_width_of[dtype]()
    var lanes = s.units - unit
    var size = s.batch * s.units
    var h = states.unsafe_offset(t % 2 * size)
    var wu = w.at(unit)
    var total = Array[SIMD[dtype, width], items * GATES * vectors](fill=SIMD[dtype, width](0))
    for first in range(0, s.units, SUM_TERMS):
        var sum = Array[SIMD[dtype, width], items * GATES * vectors](fill=SIMD[dtype, width](0))
        for k in range(first, min(first + SUM_TERMS, s.units)):
            var wk = wu.unsafe_offset(k * w.row)
            comptime for v in range(GATES * vectors):
                comptime gate = v // vectors
                comptime j = v % vectors
                var b = load[dtype, width, partial](wk.unsafe_offset(gate * w.gate + j * width), lanes)
                comptime for i in range(items):
                    comptime at = i * GATES * vectors + v
                    var before = h[unsafe_offset=min(n + i, s.batch - 1) * s.units + k]
                    sum[at] = SIMD[dtype, width](before).fma(b, sum[at])
        comptime for i in range(items * GATES * vectors):
            total[i] += sum[i]

    var next = states.unsafe_offset((t + 1) % 2 * size)
    var c = states.unsafe_offset(2 * size)
    comptime for i in range(items):
        if i < valid:
            var gates = s.gates(n + i, t).unsafe_offset(unit)
            comptime for j in range(vectors):
                var gate = Array[SIMD[dtype, width], GATES](fill=SIMD[dtype, width](0))
                comptime for q in range(GATES):
                    var input = load[dtype, width, partial](gates.unsafe_offset(q * s.units + j * width), lanes)
                    gate[q] = input + total[(i * GATES + q) * vectors + j]
                var at = (n + i) * s.units + unit + j * width
                var cell = load[dtype, width, partial](c.unsafe_offset(at), lanes)
                var hidden = advance(gate[0], gate[1], gate[2], gate[3], cell)
                store[dtype, width, partial](c.unsafe_offset(at), cell, lanes)
                store[dtype, width, partial](next.unsafe_offset(at), hidden, lanes)
                store[dtype, width, partial](s.outputs(n + i, t).unsafe_offset(unit + j * width), hidden, lanes)


@always_inline
def lanes_of[dtype: DType, items: Int]() -> Int:
    """Returns how many units a tile has."""
    return simd_width_of[dtype]() * (tile_vectors[dtype]() if items == 1 else 1)


struct Sequence[dtype: DType, items: Int](Movable):
    """A sequence that is being computed, `items` batch items at a time."""

    var s: Lstm[Self.dtype]
    var w: Tiles[Self.dtype]
    var states: Memory[Self.dtype]
    var scratch: List[Scalar[Self.dtype]]

    def __init__(out self, s: Lstm[Self.dtype], threads: Int):
        """Copies the state; for a long sequence, also copies the weights into the order in which they are read."""
        comptime lanes = lanes_of[Self.dtype, Self.items]()
        var size = s.batch * s.units
        var full = s.units // lanes if s.steps >= LONG_STEPS else 0
        self.s = s
        self.scratch = {unsafe_uninit_length = 3 * size + s.units * GATES * full * lanes}
        self.states = self.scratch.unsafe_ptr().unsafe_origin_cast[MutUntrackedOrigin]()
        for i in range(size):
            self.states[unsafe_offset=i] = s.hidden[unsafe_offset=i]
            self.states[unsafe_offset=2 * size + i] = s.cell[unsafe_offset=i]
        self.w = Tiles(s.w, 1, GATES * s.units, s.units)
        if full > 0:
            self.w = Tiles(self.states.unsafe_offset(3 * size), GATES * s.units, GATES * lanes, lanes)

            def lay(i: Int) {imm}:
                self.lay_out(i * lanes)

            spread(lay, full, threads)

    def lay_out(self, unit: Int):
        """Copies the weights of the tile of units from `unit` on, row by row, gate by gate."""
        comptime width = simd_width_of[Self.dtype]()
        var to = self.w.at(unit)
        for k in range(self.s.units):
            comptime for q in range(GATES):
                var source = self.s.w.unsafe_offset((k * GATES + q) * self.s.units + unit)
                comptime for j in range(0, lanes_of[Self.dtype, Self.items](), width):
                    to.unsafe_store(source.unsafe_offset(j).unsafe_load[width=width]())
                    to = to.unsafe_offset(width)

    def step(self, t: Int, first: Int, end: Int, begin: Int, stop: Int):
        """Computes step `t` for the units from `first` to `end`, of the batch items from `begin` to `stop`."""
        comptime width = simd_width_of[Self.dtype]()
        comptime full = lanes_of[Self.dtype, Self.items]()
        var plain = Tiles(self.s.w, 1, GATES * self.s.units, self.s.units)
        var unit = first
        while unit + full <= end:
            for n in range(begin, stop, Self.items):
                tile[Self.items, full // width, False](self.s, self.w, n, stop - n, t, unit, self.states)
            unit += full
        while unit < end:
            for n in range(begin, stop, Self.items):
                tile[Self.items, 1, True](self.s, plain, n, stop - n, t, unit, self.states)
            unit += width

    def advance(self, i: Int, first: Int, end: Int):
        """Computes the steps from `first` to `end` for the batch items of tile `i`."""
        for t in range(first, end):
            self.step(t, 0, self.s.units, i * Self.items, min((i + 1) * Self.items, self.s.batch))

    def finish(self):
        """Writes the state after the last step."""
        var size = self.s.batch * self.s.units
        var last = self.states.unsafe_offset(self.s.steps % 2 * size)
        for i in range(size):
            self.s.last_hidden[unsafe_offset=i] = last[unsafe_offset=i]
            self.s.last_cell[unsafe_offset=i] = self.states[unsafe_offset=2 * size + i]


def compute[dtype: DType, //, items: Int](s: Lstm[dtype], threads: Int):
    """Computes a sequence: threads share the batch items, or the units of every step."""
    comptime lanes = lanes_of[dtype, items]()
    var sequence = Sequence[dtype, items](s, threads)
    if threads > 1 and s.units * s.units * GATES * size_of[Scalar[dtype]]() > NEAR_BYTES:
        var share = ceildiv(s.units // lanes, threads) * lanes

        def some_units(t: Int, i: Int) {imm}:
            var end = s.units if i == threads - 1 else min((i + 1) * share, s.units)
            sequence.step(t, min(i * share, end), end, 0, s.batch)

        rounds(some_units, s.steps, threads, threads, threads)
    else:

        def some_items(i: Int) {imm}:
            sequence.advance(i, 0, s.steps)

        spread(some_items, ceildiv(s.batch, items), threads)
    sequence.finish()


def lstm_cpu[dtype: DType](s: Lstm[dtype]):
    """Computes a sequence on the CPU."""
    var threads = workers(s.batch * s.steps * GATES * s.units * s.units)
    if s.batch <= threads:
        compute[1](s, threads)
    else:
        compute[ITEMS](s, threads)


def lstm_gpu[dtype: DType](s: Lstm[dtype], ctx: DeviceContext) raises:
    """Computes a sequence on a GPU: one block per batch item, one thread per hidden unit, a barrier after each step."""

    @__parameter
    def kernel(steps: Int64):
        var n = Int(block_idx.x)
        var first = Int(thread_idx.x)
        var threads = Int(block_dim.x)
        var h = s.hidden.unsafe_offset(n * s.units)
        var last_hidden = s.last_hidden.unsafe_offset(n * s.units)
        var c = s.last_cell.unsafe_offset(n * s.units)
        for unit in range(first, s.units, threads):
            c[unsafe_offset=unit] = s.cell[unsafe_offset=n * s.units + unit]
            last_hidden[unsafe_offset=unit] = h[unsafe_offset=unit]
        for t in range(Int(steps)):
            var x = s.gates(n, t)
            var output = s.outputs(n, t)
            for unit in range(first, s.units, threads):
                var gate = SIMD[dtype, GATES](0)
                for block in range(0, s.units, SUM_TERMS):
                    var sum = SIMD[dtype, GATES](0)
                    for k in range(block, min(block + SUM_TERMS, s.units)):
                        var w = s.w.unsafe_offset(k * GATES * s.units + unit)
                        comptime for q in range(GATES):
                            sum[q] = h[unsafe_offset=k].fma(w[unsafe_offset=q * s.units], sum[q])
                    gate += sum
                comptime for q in range(GATES):
                    gate[q] += x[unsafe_offset=q * s.units + unit]
                var cell = c[unsafe_offset=unit]
                var hidden = advance(gate[0], gate[1], gate[2], gate[3], cell)
                c[unsafe_offset=unit] = cell
                output[unsafe_offset=unit] = hidden
                last_hidden[unsafe_offset=unit] = hidden
            # The next step reads the values that all threads have written in this step.
            barrier()
            h = output

    var threads = min(ceildiv(s.units, 32) * 32, THREADS)
    ctx.enqueue_function[kernel](Int64(s.steps), grid_dim=s.batch, block_dim=threads)
