"""Vectors of the accumulation type, read from and written to memory of the data's own type."""

from std.atomic import Atomic
from std.math import ceildiv, iota
from std.sys.info import simd_width_of, size_of
from std.sys.intrinsics import masked_load, masked_store

from max.algorithm import sync_parallelize
from max.runtime.asyncrt import parallelism_level

from .geometry import Geometry

comptime Memory[dtype: DType] = Pointer[Scalar[dtype], MutUntrackedOrigin]

comptime BLOCK = 128
"""Terms in one running sum. Sums of blocks keep the rounding error near sqrt(terms) instead of growing with terms."""

comptime PACK = 32
"""Filters side by side in a packed filter (`max_conv/packing.py`): two vectors of float32 in AVX-512."""

comptime FILTER_BYTES = 1536 * 1024
"""Transformed or packed filters that are held at a time, for each thread."""

comptime SMALL = 1 << 19
"""Multiplications below which waking a second thread costs more than it saves."""


comptime accumulator[dtype: DType] = DType.float64 if dtype == DType.float64 else DType.float32
"""Sixteen-bit types are summed in float32, the others in themselves."""


@always_inline
def load[dtype: DType, //, acc: DType, width: Int, partial: Bool](
    p: Memory[dtype], lanes: Int
) -> SIMD[acc, width]:
    """Loads `width` values, or with `partial` the first `lanes` of them and zeros."""
    comptime if partial:
        var mask = iota[DType.int32, width]().lt(Int32(lanes))
        return masked_load[width](p, mask, SIMD[dtype, width](0)).cast[acc]()
    else:
        return p.unsafe_load[width=width]().cast[acc]()


@always_inline
def gathered[
    dtype: DType, //, acc: DType, width: Int
](p: Memory[dtype], step: Int, lanes: Int) -> SIMD[acc, width]:
    """Loads `lanes` values that stand `step` apart, and zeros after them."""
    if step == 1:
        if lanes >= width:
            return load[acc, width, False](p, lanes)
        return load[acc, width, True](p, lanes)
    var values = SIMD[acc, width](0)
    for i in range(min(width, lanes)):
        values[i] = p[unsafe_offset=i * step].cast[acc]()
    return values


@always_inline
def store[dtype: DType, //, acc: DType, width: Int, partial: Bool](
    p: Memory[dtype], value: SIMD[acc, width], lanes: Int
):
    """Stores `width` values, or with `partial` the first `lanes` of them."""
    comptime if partial:
        masked_store(value.cast[dtype](), p, iota[DType.int32, width]().lt(Int32(lanes)))
    else:
        p.unsafe_store(value.cast[dtype]())


comptime Write[dtype: DType] = def[width: Int](
    n: Int, position: Int, filter: Int, value: SIMD[dtype, width]
) capturing -> None
"""Stores `width` output values, of neighbouring filters in NLC data and of neighbouring positions in NCL data.

The graph compiler puts the operations that follow the convolution in here, so outputs are written once.
"""


@always_inline
def put[
    dtype: DType, acc: DType, width: Int, //, write: Write[dtype], nlc: Bool
](n: Int, position: Int, filter: Int, value: SIMD[acc, width], lanes: Int):
    """Stores the first `lanes` values, of which there may be more than `width` and none."""
    if lanes >= width:
        write[width](n, position, filter, value.cast[dtype]())
        return
    # A loop, and not a vector for each power of two: what is fused into `write` is compiled once more, not five times.
    var rest = value
    for i in range(lanes):
        comptime if nlc:
            write[1](n, position, filter + i, rest[0].cast[dtype]())
        else:
            write[1](n, position + i, filter, rest[0].cast[dtype]())
        rest = rest.shift_left[1]()


struct Scratch[dtype: DType](Movable):
    """Memory of a task, uninitialised, at the start of a cache line: vectors across two lines load half as fast."""

    comptime LINE = 64
    var values: List[Scalar[Self.dtype]]

    def __init__(out self, size: Int):
        self.values = List[Scalar[Self.dtype]](unsafe_uninit_length=size + Self.LINE // size_of[Scalar[Self.dtype]]())

    def data(mut self) -> Memory[Self.dtype]:
        """Returns where it starts. The caller keeps the scratch alive as long as this is used."""
        var start = self.values.unsafe_ptr().unsafe_origin_cast[MutUntrackedOrigin]()
        return start.unsafe_offset(-Int(start) % Self.LINE // size_of[Scalar[Self.dtype]]())


@fieldwise_init
struct Operands[dtype: DType](ImplicitlyCopyable, TrivialRegisterPassable):
    """What every kernel reads. The bias is read only where `has_bias` says so."""

    var x: Memory[Self.dtype]
    var w: Memory[Self.dtype]
    var bias: Memory[Self.dtype]
    var has_bias: Bool

    @always_inline
    def bias_at[acc: DType, width: Int](self, filter: Int, lanes: Int) -> SIMD[acc, width]:
        """Returns the bias of `lanes` filters from `filter` on, or zeros."""
        if not self.has_bias or lanes <= 0:
            return 0
        var p = self.bias.unsafe_offset(filter)
        return load[acc, width, False](p, width) if lanes >= width else load[acc, width, True](p, lanes)


@fieldwise_init
struct FilterSteps(ImplicitlyCopyable, TrivialRegisterPassable):
    """How far apart a filter's taps, channels and output channels stand: its layout."""

    var tap: Int
    var channel: Int
    var filter: Int


@fieldwise_init
struct Panels[acc: DType](ImplicitlyCopyable, TrivialRegisterPassable):
    """A filter in panels: `rows` rows of `lanes` filters side by side, then those of the next filters."""

    var data: Memory[Self.acc]
    var lanes: Int
    var rows: Int

    @always_inline
    @staticmethod
    def packed(g: Geometry, group: Int, w: Memory[Self.acc], rows: Int) -> Self:
        """Returns one group of a packed filter."""
        var filters = ceildiv(g.group_filters(), PACK) * PACK
        return Self(w.unsafe_offset(group * filters * rows), PACK, rows)

    @always_inline
    def at(self, filter: Int) -> Memory[Self.acc]:
        """Returns where the first row of a filter and its neighbours stands."""
        return self.data.unsafe_offset(filter // self.lanes * self.lanes * self.rows + filter % self.lanes)


struct Queue(Movable):
    """Numbers of tasks, that threads take in turns and report when they have been done."""

    var count: Int
    var taken: Memory[DType.int64]
    var done: Memory[DType.int64]
    var counters: List[Int64]

    def __init__(out self, count: Int):
        self.count = count
        self.counters = List[Int64](length=1 + count, fill=0)
        self.taken = self.counters.unsafe_ptr().unsafe_origin_cast[MutUntrackedOrigin]()
        self.done = self.taken.unsafe_offset(1)

    def take(self) -> Int:
        """Returns the next number, from `count` on where there is none left."""
        return Int(Atomic.fetch_add(self.taken, 1))

    def finish(self, i: Int):
        _ = Atomic.fetch_add(self.done.unsafe_offset(i), 1)

    def finished(self, i: Int) -> Bool:
        return Atomic.load(self.done.unsafe_offset(i)) > 0


def spread[Task: def(Int) -> None, //](task: Task, tasks: Int, threads: Int):
    """Runs `task(0)` to `task(tasks - 1)`; a thread that is done takes the next one.

    `sync_parallelize` alone deals items out in advance, and a core that is interrupted keeps the others waiting: a
    timer of MAX wakes 5,000 times a second on one of them. Taking turns made whisper's stem 12 % faster.
    """
    if threads == 1 or tasks == 1:
        for i in range(tasks):
            task(i)
        return
    var counter = List[Int64](length=1, fill=0)
    var next = counter.unsafe_ptr().unsafe_origin_cast[MutUntrackedOrigin]()

    def work(_thread: Int) {imm}:
        while True:
            var i = Int(Atomic.fetch_add(next, 1))
            if i >= tasks:
                return
            task(i)

    sync_parallelize(work, min(threads, tasks))
    _ = counter^


def phases[
    First: def(Int) -> None, Second: def(Int) -> None, //
](first: First, first_tasks: Int, second: Second, second_tasks: Int, threads: Int):
    """Runs all tasks of `first`, then all of `second`, without sending the threads to sleep in between."""
    var counters = List[Int64](length=2, fill=0)
    var next = counters.unsafe_ptr().unsafe_origin_cast[MutUntrackedOrigin]()
    var done = next.unsafe_offset(1)

    def work(_thread: Int) {imm}:
        while True:
            var i = Int(Atomic.fetch_add(next, 1))
            if i < first_tasks:
                first(i)
                _ = Atomic.fetch_add(done, 1)
            elif i < first_tasks + second_tasks:
                # Every task that is waited for has been taken by a thread that runs.
                while Int(Atomic.fetch_add(done, 0)) < first_tasks:
                    pass
                second(i - first_tasks)
            else:
                return

    if threads == 1:
        work(0)
    else:
        sync_parallelize(work, threads)
    _ = counters^


def rounds[Task: def(Int, Int) -> None, //](task: Task, count: Int, tasks: Int, threads: Int):
    """Runs `task(r, i)` for all `tasks` of round 0, then for those of round 1, up to round `count - 1`.

    Threads spin in between: a round may be as short as a few microseconds.
    """
    var counters = List[Int64](length=2, fill=0)
    var next = counters.unsafe_ptr().unsafe_origin_cast[MutUntrackedOrigin]()
    var done = next.unsafe_offset(1)

    def work(_thread: Int) {imm}:
        while True:
            var i = Int(Atomic.fetch_add(next, 1))
            if i >= count * tasks:
                return
            # Every task that is waited for has been taken by a thread that runs.
            var before = i // tasks * tasks
            while Int(Atomic.load(done)) < before:
                pass
            task(i // tasks, i % tasks)
            _ = Atomic.fetch_add(done, 1)

    if threads == 1:
        work(0)
    else:
        sync_parallelize(work, threads)
    _ = counters^


def workers(work: Int) -> Int:
    """Returns how many threads `work` multiplications should be spread over."""
    return 1 if work < SMALL else parallelism_level(None)


def panels_at_a_time(panels: Int, bytes: Int, threads: Int) -> Int:
    """Returns how many panels of filters, of `bytes` each, are transformed or packed before they are used."""
    var most = max(1, threads * FILTER_BYTES // bytes)
    return ceildiv(panels, ceildiv(panels, most))
