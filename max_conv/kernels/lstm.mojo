"""A long short-term memory over a whole sequence in one operation, so that the state never leaves the cache.

The input's share of the gates comes ready-made, from one matrix product for the whole sequence. What is left of a step
is one vector by matrix product with the (H, 4H) recurrent weights and the gates themselves. Gates stand in the order
input, forget, cell, output, as in PyTorch.
"""

from std.math import ceildiv, exp, tanh
from std.sys.info import simd_width_of, size_of
from std.utils.numerics import isnan

from max.gpu import barrier, block_dim, block_idx, thread_idx
from max.gpu.host import DeviceContext

from .lanes import BLOCK, Memory, load, spread, store, workers

comptime GATES = 4
comptime ITEMS = 4
"""Batch items that go through the weights together: a step is bound by reading them."""
comptime THREADS = 1024


def tile_vectors[dtype: DType]() -> Int:
    """Vectors of units in a tile of one batch item: 16 of 32 AVX-512 or NEON registers hold sums, 8 of 16 in AVX2."""
    return 2 if simd_width_of[dtype]() * size_of[Scalar[dtype]]() == 32 else 4


@fieldwise_init
struct Lstm[dtype: DType](ImplicitlyCopyable, TrivialRegisterPassable):
    """What one call reads and writes."""

    var x: Memory[Self.dtype]  # (batch, rows, 4 * units): the input's share of the gates, bias included
    var w: Memory[Self.dtype]  # (units, 4 * units)
    var hidden: Memory[Self.dtype]  # (batch, units), as cell and the last two
    var cell: Memory[Self.dtype]
    var output: Memory[Self.dtype]  # (batch, steps, units)
    var last_hidden: Memory[Self.dtype]
    var last_cell: Memory[Self.dtype]
    var batch: Int
    var steps: Int
    var rows: Int  # of x for each batch item, at least `steps`
    var units: Int

    @always_inline
    def gates(self, n: Int, t: Int) -> Memory[Self.dtype]:
        return self.x.unsafe_offset((n * self.rows + t) * GATES * self.units)

    @always_inline
    def outputs(self, n: Int, t: Int) -> Memory[Self.dtype]:
        return self.output.unsafe_offset((n * self.steps + t) * self.units)


# The standard library's exp and tanh clamp their argument, which turns a NaN into a number: it is put back.
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
    """Takes the cell state through one step and returns the hidden state; the gates come as sums."""
    cell = sigmoid(forget) * cell + sigmoid(input) * hyperbolic(candidate)
    return sigmoid(output) * hyperbolic(cell)


@always_inline
def tile[
    dtype: DType, //, items: Int, vectors: Int, partial: Bool
](
    s: Lstm[dtype],
    n: Int,
    valid: Int,
    t: Int,
    unit: Int,
    h: Memory[dtype],
    next: Memory[dtype],
    c: Memory[dtype],
):
    """Takes `vectors` vectors of units from `unit` on through step `t`, of `valid` of `items` batch items from `n` on.

    `h`, `next` and `c` are (items, units): the hidden state before and after the step, and the cell state.
    """
    comptime width = simd_width_of[dtype]()
    var lanes = s.units - unit
    var total = Array[SIMD[dtype, width], items * GATES * vectors](fill=SIMD[dtype, width](0))
    for first in range(0, s.units, BLOCK):
        var sum = Array[SIMD[dtype, width], items * GATES * vectors](fill=SIMD[dtype, width](0))
        for k in range(first, min(first + BLOCK, s.units)):
            var wk = s.w.unsafe_offset(k * GATES * s.units + unit)
            comptime for v in range(GATES * vectors):
                comptime gate = v // vectors
                comptime j = v % vectors
                var b = load[dtype, width, partial](wk.unsafe_offset(gate * s.units + j * width), lanes)
                comptime for i in range(items):
                    comptime at = i * GATES * vectors + v
                    sum[at] = SIMD[dtype, width](h[unsafe_offset=i * s.units + k]).fma(b, sum[at])
        comptime for i in range(items * GATES * vectors):
            total[i] += sum[i]

    comptime for i in range(items):
        if i < valid:
            var gates = s.gates(n + i, t).unsafe_offset(unit)
            comptime for j in range(vectors):
                var gate = Array[SIMD[dtype, width], GATES](fill=SIMD[dtype, width](0))
                comptime for q in range(GATES):
                    var input = load[dtype, width, partial](gates.unsafe_offset(q * s.units + j * width), lanes)
                    gate[q] = input + total[(i * GATES + q) * vectors + j]
                var at = i * s.units + unit + j * width
                var cell = load[dtype, width, partial](c.unsafe_offset(at), lanes)
                var hidden = advance(gate[0], gate[1], gate[2], gate[3], cell)
                store[dtype, width, partial](c.unsafe_offset(at), cell, lanes)
                store[dtype, width, partial](next.unsafe_offset(at), hidden, lanes)
                store[dtype, width, partial](s.outputs(n + i, t).unsafe_offset(unit + j * width), hidden, lanes)


def run[dtype: DType, //, items: Int](s: Lstm[dtype], n: Int, valid: Int):
    """Takes `valid` of `items` batch items from `n` on through the whole sequence."""
    comptime width = simd_width_of[dtype]()
    comptime vectors = tile_vectors[dtype]() if items == 1 else 1
    var size = items * s.units
    # Items past `valid` are computed from zeros and never stored.
    var scratch = List[Scalar[dtype]](length=3 * size, fill=0)
    var state = scratch.unsafe_ptr().unsafe_origin_cast[MutUntrackedOrigin]()
    var c = state.unsafe_offset(2 * size)
    for i in range(valid * s.units):
        state[unsafe_offset=i] = s.hidden[unsafe_offset=n * s.units + i]
        c[unsafe_offset=i] = s.cell[unsafe_offset=n * s.units + i]

    var whole = s.units // (vectors * width) * (vectors * width)
    for t in range(s.steps):
        var h = state.unsafe_offset(t % 2 * size)
        var next = state.unsafe_offset((t + 1) % 2 * size)
        for unit in range(0, whole, vectors * width):
            tile[items, vectors, False](s, n, valid, t, unit, h, next, c)
        for unit in range(whole, s.units, width):
            tile[items, 1, True](s, n, valid, t, unit, h, next, c)

    var last = state.unsafe_offset(s.steps % 2 * size)
    for i in range(valid * s.units):
        s.last_hidden[unsafe_offset=n * s.units + i] = last[unsafe_offset=i]
        s.last_cell[unsafe_offset=n * s.units + i] = c[unsafe_offset=i]
    _ = scratch^


def lstm_cpu[dtype: DType](s: Lstm[dtype]):
    """Computes a sequence on the CPU, batch items side by side."""
    var threads = workers(s.batch * s.steps * GATES * s.units * s.units)
    var items = 1 if s.batch <= threads else ITEMS
    var tasks = ceildiv(s.batch, items)

    def task(i: Int) {imm}:
        var n = i * items
        if items == 1:
            run[1](s, n, 1)
        else:
            run[ITEMS](s, n, min(ITEMS, s.batch - n))

    spread(task, tasks, threads)


def lstm_gpu[dtype: DType](s: Lstm[dtype], ctx: DeviceContext) raises:
    """Computes a sequence on a GPU: one block a batch item, one thread a hidden unit, a barrier after each step."""

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
                for block in range(0, s.units, BLOCK):
                    var sum = SIMD[dtype, GATES](0)
                    for k in range(block, min(block + BLOCK, s.units)):
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
            # The next step reads what every thread of this one has written.
            barrier()
            h = output

    var threads = min(ceildiv(s.units, 32) * 32, THREADS)
    ctx.enqueue_function[kernel](Int64(s.steps), grid_dim=s.batch, block_dim=threads)
