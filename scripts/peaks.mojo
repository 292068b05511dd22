"""Prints what this machine reaches at most, as JSON: f32 multiply-adds on one thread and on all, and copies.

    peaks BYTES ...     for each number, the GB/s of all threads that copy half of so many bytes to the other half

A copied byte counts twice, as it is read and written. The best of many tries counts, since other load slows some tries.
"""

from std.sys import argv
from std.sys.info import simd_width_of
from std.time import perf_counter_ns

from max.algorithm import sync_parallelize
from max.runtime.asyncrt import parallelism_level

comptime WIDTH = simd_width_of[DType.float32]()
comptime VALUES = SIMD[DType.float32, WIDTH]
comptime Memory = Pointer[Float32, MutUntrackedOrigin]

comptime SUMS = 12
"""Sums side by side: two multiply-adds per cycle of four cycles each need 8, and AVX2 has 16 registers."""
comptime STEPS = 1 << 18
comptime NANOSECONDS = 200_000_000
"""Tries for each figure."""
comptime UNROLLED = 8
comptime ENOUGH = 1 << 24
"""Bytes that one try copies at least, so that waking the threads does not count."""


def multiply(to: Memory, factor: Float32):
    """Runs STEPS * SUMS multiply-adds of a vector. It stores their sum, or nothing would be computed."""
    var a = VALUES(factor)
    var sums = Array[VALUES, SUMS](fill=a)
    for _ in range(STEPS):
        comptime for i in range(SUMS):
            sums[i] = sums[i].fma(a, a)
    var total = VALUES(0)
    comptime for i in range(SUMS):
        total += sums[i]
    to.unsafe_store(total)


def multiply_adds(threads: Int, to: Memory, factor: Float32) -> Float64:
    """Returns GFLOP/s."""

    def work(i: Int) {imm}:
        multiply(to.unsafe_offset(i * WIDTH), factor)

    var best = 0.0
    var began = perf_counter_ns()
    while perf_counter_ns() - began < NANOSECONDS:
        var start = perf_counter_ns()
        sync_parallelize(work, threads)
        best = max(best, Float64(2 * threads * SUMS * STEPS * WIDTH) / Float64(perf_counter_ns() - start))
    return best


def copies(threads: Int, memory: Memory, bytes: Int) -> Float64:
    """Returns GB/s."""
    comptime step = UNROLLED * WIDTH
    var part = bytes // 8 // threads // step * step
    var times = max(1, ENOUGH // bytes)

    def work(i: Int) {imm}:
        var source = memory.unsafe_offset(2 * i * part)
        var target = source.unsafe_offset(part)
        for _ in range(times):
            for at in range(0, part, step):
                comptime for j in range(UNROLLED):
                    target.unsafe_store(at + j * WIDTH, source.unsafe_load[width=WIDTH](at + j * WIDTH))

    var best = 0.0
    var began = perf_counter_ns()
    while perf_counter_ns() - began < NANOSECONDS:
        var start = perf_counter_ns()
        sync_parallelize(work, threads)
        best = max(best, Float64(8 * part * threads * times) / Float64(perf_counter_ns() - start))
    return best


def main() raises:
    var threads = parallelism_level(None)
    var words = argv()
    var largest = threads * WIDTH * 4
    for i in range(1, len(words)):
        largest = max(largest, Int(words[i]))
    var room = List[Float32](length=largest // 4 + 1, fill=0.5)
    var memory = room.unsafe_ptr().unsafe_origin_cast[MutUntrackedOrigin]()
    # A factor that the compiler does not know: 0.5 keeps the sums near 1.
    var factor = Float32(0.5) if len(words) > 0 else Float32(0.25)
    var text = String('{"threads": ', threads, ', "fma_one": ', multiply_adds(1, memory, factor))
    text += String(', "fma_all": ', multiply_adds(threads, memory, factor), ', "copy": [')
    for i in range(1, len(words)):
        text += String(", " if i > 1 else "", copies(threads, memory, Int(words[i])))
    print(text + "]}")
    _ = room^
