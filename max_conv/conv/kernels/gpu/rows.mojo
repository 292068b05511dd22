"""A depthwise convolution on a GPU, bound by memory: each value is loaded once and each output is stored once.

NLC data: a thread computes a run of positions of a vector of channels, and the threads of a warp have neighbouring
channels. NCL data: a block computes a run of one channel, which it first copies into shared memory. The
filter is SCF.
"""

from max.gpu import barrier, block_idx, global_idx, thread_idx
from max.gpu.host import DeviceContext, FuncAttribute
from max.gpu.memory import external_memory
from std.math import ceildiv
from std.memory import AddressSpace
from std.utils.static_tuple import StaticTuple

from ..geometry import Geometry
from ..lanes import Memory
from .tiles import Put, values

comptime THREADS = 128
comptime RUN = 8
"""Positions of a thread."""
comptime ROOM = 96 * 1024
"""The most bytes of shared memory of a block, so that two blocks fit into a multiprocessor."""


def rows[
    dtype: DType, //, put: Put, width: Int
](g: Geometry, x: Memory[dtype], w: Memory[dtype], ctx: DeviceContext) raises:
    """Computes a depthwise convolution of NLC data. `width`, 4 or 1, divides the channels."""
    comptime Vector = SIMD[DType.float32, width]
    var vectors = g.channels // width
    var runs = ceildiv(g.out_length, RUN)
    var size = g.batch * runs * vectors
    if size == 0:
        return

    @__parameter
    @__copy_capture(vectors, runs)
    def task(size: Int64):
        var index = Int(global_idx.x)
        if index >= Int(size):
            return
        var run = index // vectors
        var c = (index - run * vectors) * width
        var n = run // runs
        var first = (run - n * runs) * RUN
        var sums = StaticTuple[Vector, RUN](fill=Vector(0))
        var start = first * g.stride - g.pad_left
        var line = x.unsafe_offset(n * g.length * g.channels + c)

        @__parameter
        @always_inline
        def add[inside: Bool]():
            """Adds all products; `inside` says that every row is in the data."""

            @__parameter
            @always_inline
            def at(position: Int) -> Vector:
                comptime if inside:
                    return values[width](line.unsafe_offset(position * g.channels))
                else:
                    var row = g.source(position)
                    return values[width](line.unsafe_offset(row * g.channels)) if row >= 0 else 0

            if g.stride == 1 and g.dilation == 1:
                # A window of rows is a ring of registers: each step loads one row and one tap.
                var window = StaticTuple[Vector, RUN]()
                comptime for t in range(RUN):
                    window[t] = at(start + t)
                for base in range(0, g.kernel, RUN):
                    comptime for j in range(RUN):
                        if base + j < g.kernel:
                            var tap = values[width](w.unsafe_offset((base + j) * g.channels + c))
                            comptime for t in range(RUN):
                                sums[t] = window[(j + t) % RUN].fma(tap, sums[t])
                            window[j] = at(start + base + j + RUN)
            else:
                for k in range(g.kernel):
                    var tap = values[width](w.unsafe_offset(k * g.channels + c))
                    comptime for t in range(RUN):
                        sums[t] = at(start + t * g.stride + k * g.dilation).fma(tap, sums[t])

        # The window is loaded for one more row than the taps reach.
        if start >= 0 and start + (RUN - 1) * g.stride + g.kernel * g.dilation < g.length:
            add[True]()
        else:
            add[False]()
        comptime for t in range(RUN):
            if first + t < g.out_length:
                put[width](n, first + t, c, sums[t])

    ctx.enqueue_function[task](Int64(size), grid_dim=ceildiv(size, THREADS), block_dim=THREADS)


def fits(g: Geometry) -> Bool:
    """Returns whether a layer fits into the shared memory of one block of `lines`."""
    return bytes(g) <= ROOM


def bytes(g: Geometry) -> Int:
    return 4 * ((THREADS * RUN - 1) * g.stride + (g.kernel - 1) * g.dilation + 1)


def lines[dtype: DType, //, put: Put](g: Geometry, x: Memory[dtype], w: Memory[dtype], ctx: DeviceContext) raises:
    """Computes a depthwise convolution of NCL data that `fits`."""
    if g.batch * g.out_length * g.channels == 0:
        return
    var blocks = ceildiv(g.out_length, THREADS * RUN)

    @__parameter
    @__copy_capture(blocks)
    def task(room: Int32):
        var held = external_memory[Float32, address_space=AddressSpace.SHARED, alignment=16]()
        var of_all = Int(block_idx.x) // blocks
        var first = Int(block_idx.x) % blocks * THREADS * RUN
        var n = of_all // g.channels
        var c = of_all % g.channels
        var line = x.unsafe_offset(of_all * g.length)
        var start = first * g.stride - g.pad_left
        for i in range(Int32(thread_idx.x), room, Int32(THREADS)):
            var row = g.source(start + Int(i))
            held[unsafe_offset=Int(i)] = line[unsafe_offset=row].cast[DType.float32]() if row >= 0 else 0
        barrier()
        var sums = StaticTuple[Float32, RUN](fill=0)
        var from_ = held.unsafe_offset(Int(Int32(thread_idx.x) * Int32(g.stride)))
        for k in range(g.kernel):
            var tap = w[unsafe_offset=k * g.channels + c].cast[DType.float32]()
            comptime for t in range(RUN):
                sums[t] = from_[unsafe_offset=t * THREADS * g.stride].fma(tap, sums[t])
            from_ = from_.unsafe_offset(g.dilation)
        comptime for t in range(RUN):
            var position = first + t * THREADS + Int(thread_idx.x)
            if position < g.out_length:
                put[1](n, position, c, sums[t])

    ctx.enqueue_function[task](
        Int32(bytes(g) // 4),
        grid_dim=blocks * g.channels * g.batch,
        block_dim=THREADS,
        shared_mem_bytes=bytes(g),
        func_attribute=FuncAttribute.MAX_DYNAMIC_SHARED_SIZE_BYTES(UInt32(ROOM)),
    )
