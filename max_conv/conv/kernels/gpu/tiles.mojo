"""A convolution on a GPU by tiles in shared memory and plain multiply-adds: strict float32, any GPU.

It computes any stride, dilation, groups and padding, of NLC and of NCL data. A block computes a tile of positions by
filters, a thread 8 by 8 or 8 by 4 of them. The reduction runs over taps and channels as one axis, 16 terms at a time;
while these are multiplied, the next terms are loaded into registers. The filter is SCF.
"""

from max.gpu import MAX_THREADS_PER_BLOCK_METADATA, barrier, block_idx, thread_idx
from max.gpu.host import DeviceContext
from std.math import ceildiv
from std.memory import AddressSpace, stack_allocation
from std.sys.info import size_of
from std.utils.static_tuple import StaticTuple

from ..geometry import ZEROS, Geometry
from ..lanes import Memory

comptime Put = def[width: Int](n: Int, position: Int, filter: Int, value: SIMD[DType.float32, width]) capturing -> None
"""Stores sums of neighbouring filters in NLC data, and of one position in NCL data."""

comptime DEPTH = 16
"""Terms of the reduction that are in shared memory at a time, twice."""
comptime THREADS = 256
comptime BLOCKS = 2
"""Blocks of a multiprocessor: a thread has 128 registers."""
comptime RUN = 8
"""Positions of a thread, in NLC data, and filters, in NCL data."""
comptime VECTOR = 4
comptime Four = SIMD[DType.float32, VECTOR]
comptime Shared = Pointer[Float32, MutUntrackedOrigin, address_space=AddressSpace.SHARED]


@always_inline
def shared[size: Int]() -> Shared:
    return stack_allocation[size, DType.float32, address_space=AddressSpace.SHARED, alignment=16]().unsafe_origin_cast[
        MutUntrackedOrigin
    ]()


@always_inline
def values[dtype: DType, //, width: Int](p: Memory[dtype]) -> SIMD[DType.float32, width]:
    return p.unsafe_load[width=width, alignment=width * size_of[Scalar[dtype]]()]().cast[DType.float32]()


@fieldwise_init
struct Term(ImplicitlyCopyable, TrivialRegisterPassable):
    """A place on the axis of the reduction: a channel of a tap."""

    var left: Int32
    """Terms from this place to the end."""
    var channel: Int32
    var offset: Int32
    """The distance of the tap's row from the row that the first tap reads."""

    @always_inline
    def move(mut self, g: Geometry, channels: Int32, terms: Int32):
        """Moves forward by `terms` terms."""
        self.left -= terms
        self.channel += terms
        while self.channel >= channels:
            self.channel -= channels
            self.offset += Int32(g.dilation)


def tiles[
    dtype: DType, //, put: Put, nlc: Bool, positions: Int, filters: Int, width: Int
](g: Geometry, x: Memory[dtype], w: Memory[dtype], ctx: DeviceContext) raises:
    """Computes a convolution.

    Parameters:
        dtype: The data's type.
        put: Stores sums.
        nlc: Whether the data is NLC.
        positions: Positions of a tile.
        filters: Filters of a tile.
        width: 4 or 1. It divides the channels and the filters of a group.

    Args:
        g: The convolution.
        x: The data.
        w: The filter, SCF.
        ctx: The device.
    """
    # The axis along which data is stored is `fast`: there, a thread's values are in vectors.
    comptime fast = filters if nlc else positions
    comptime slow = positions if nlc else filters
    comptime across = fast * slow // THREADS // RUN  # values of a thread along the fast axis
    comptime fast_threads = fast // across
    comptime vectors = across // VECTOR
    comptime fast_step = fast // vectors  # a thread's vectors are not neighbours: no bank conflicts
    comptime slow_step = slow // (RUN // VECTOR)
    comptime pitch = positions + VECTOR * Int(nlc)  # of a term, so that fewer threads store into the same bank
    comptime x_width = width if nlc else 1
    comptime x_loads = DEPTH * positions // x_width // THREADS
    comptime w_vectors = DEPTH * filters // width
    comptime w_loads = ceildiv(w_vectors, THREADS)
    var group_channels = g.group_channels()
    var group_filters = g.group_filters()
    var columns = ceildiv(group_filters, filters)
    var along = ceildiv(g.out_length, positions)
    if g.batch * g.out_length * g.filters == 0:
        return

    @__parameter
    @__copy_capture(group_channels, group_filters, columns, along)
    @__llvm_metadata(MAX_THREADS_PER_BLOCK_METADATA=StaticTuple[Int32, 1](Int32(THREADS)))
    @__llvm_metadata(`nvvm.minctasm`=SIMDLength(BLOCKS))
    def task(steps: Int32):
        var x_room = shared[2 * DEPTH * pitch]()
        var w_room = shared[2 * DEPTH * filters]()
        var thread = Int32(thread_idx.x)
        var first = Int32(block_idx.x) % Int32(along) * Int32(positions)
        var group = Int32(block_idx.y) // Int32(columns)
        var filter = Int32(block_idx.y) % Int32(columns) * Int32(filters)
        var n = Int(block_idx.x) // along
        var channels = Int32(group_channels)
        var signal = x.unsafe_offset(n * g.length * g.channels)
        signal = signal.unsafe_offset(Int(group) * group_channels * (1 if nlc else g.length))
        var taps = w.unsafe_offset(Int(group) * group_filters)
        var x_next = StaticTuple[SIMD[DType.float32, x_width], x_loads]()
        var w_next = StaticTuple[SIMD[DType.float32, width], w_loads]()

        # Where a thread loads: neighbouring threads load neighbouring values in memory.
        comptime x_across = Int32(DEPTH // x_width if nlc else positions)
        comptime rows = Int32(THREADS) // x_across  # from load to load: positions of NLC data, terms of NCL data
        var lane = thread % x_across
        var row = thread // x_across
        var start = (first + (row if nlc else lane)) * Int32(g.stride) - Int32(g.pad_left)
        var x_term = Term(Int32(g.kernel) * channels, 0, 0)
        x_term.move(g, channels, lane * Int32(x_width) if nlc else row)
        var w_term = Int32(g.kernel) * channels - thread // Int32(filters // width)
        var f = thread % Int32(filters // width) * Int32(width)
        var w_at = taps.unsafe_offset(Int(thread // Int32(filters // width)) * g.filters + Int(filter + f))
        var has_filter = filter + f < Int32(group_filters)

        @__parameter
        @always_inline
        def source(position: Int32) -> Int32:
            if g.mode == ZEROS:
                return position if position >= 0 and position < Int32(g.length) else -1
            return Int32(g.source(Int(position)))

        @__parameter
        @always_inline
        def fetch():
            """Loads the terms of the next step, and moves forward by one step."""
            comptime if nlc:
                comptime for i in range(x_loads):
                    var from_ = source(start + Int32(i) * rows * Int32(g.stride) + x_term.offset)
                    var value = SIMD[DType.float32, x_width](0)
                    if x_term.left > 0 and from_ >= 0:
                        value = values[x_width](signal.unsafe_offset(Int(from_) * g.channels + Int(x_term.channel)))
                    x_next[i] = value
                x_term.move(g, channels, Int32(DEPTH))
            else:
                if x_term.channel + Int32(DEPTH) <= channels and x_term.left >= Int32(DEPTH):
                    # All terms are channels of one tap.
                    var from_ = source(start + x_term.offset)
                    var p = signal.unsafe_offset(Int(x_term.channel) * g.length + Int(from_))
                    comptime for i in range(x_loads):
                        x_next[i] = values[x_width](p) if from_ >= 0 else SIMD[DType.float32, x_width](0)
                        p = p.unsafe_offset(Int(rows) * g.length)
                    x_term.move(g, channels, Int32(DEPTH))
                else:
                    comptime for i in range(x_loads):
                        var from_ = source(start + x_term.offset)
                        var value = SIMD[DType.float32, x_width](0)
                        if x_term.left > 0 and from_ >= 0:
                            value = values[x_width](signal.unsafe_offset(Int(x_term.channel) * g.length + Int(from_)))
                        x_next[i] = value
                        x_term.move(g, channels, rows)
            comptime for i in range(w_loads):
                comptime down = i * THREADS // (filters // width)
                var value = SIMD[DType.float32, width](0)
                if has_filter and w_term > Int32(down):
                    value = values[width](w_at.unsafe_offset(down * g.filters))
                w_next[i] = value
            w_term -= Int32(DEPTH)
            w_at = w_at.unsafe_offset(DEPTH * g.filters)

        @__parameter
        @always_inline
        def keep(buffer: Int32):
            """Writes what was loaded into shared memory."""
            var x_to = x_room.unsafe_offset(Int(buffer) * DEPTH * pitch)
            comptime if nlc:
                x_to = x_to.unsafe_offset(Int(lane * Int32(x_width * pitch) + row))
            else:
                x_to = x_to.unsafe_offset(Int(row * Int32(pitch) + lane))
            comptime for i in range(x_loads):
                comptime if nlc:
                    comptime for j in range(x_width):
                        x_to[unsafe_offset=j * pitch + i * Int(rows)] = x_next[i][j]
                else:
                    x_to[unsafe_offset=i * Int(rows) * pitch] = x_next[i][0]
            comptime for i in range(w_loads):
                if w_vectors % THREADS == 0 or thread + Int32(i * THREADS) < Int32(w_vectors):
                    var at = Int(buffer) * DEPTH * filters + (Int(thread) + i * THREADS) * width
                    w_room.unsafe_offset(at).unsafe_store[alignment=4 * width](w_next[i])

        var sums = StaticTuple[Four, RUN * vectors](fill=Four(0))
        var right = thread % Int32(fast_threads) * Int32(VECTOR)
        var down = thread // Int32(fast_threads) * Int32(VECTOR)
        fetch()
        keep(0)
        barrier()
        for step in range(steps):
            var buffer = step % 2
            if step + 1 < steps:
                fetch()
            var xs = x_room.unsafe_offset(Int(buffer) * DEPTH * pitch)
            var ws = w_room.unsafe_offset(Int(buffer) * DEPTH * filters)
            var fasts = (ws if nlc else xs).unsafe_offset(Int(right))
            var slows = (xs if nlc else ws).unsafe_offset(Int(down))
            comptime for c in range(DEPTH):
                var b = StaticTuple[Four, vectors]()
                comptime for j in range(vectors):
                    var at = c * (filters if nlc else pitch) + j * fast_step
                    b[j] = fasts.unsafe_offset(at).unsafe_load[width=VECTOR, alignment=16]()
                comptime for i in range(RUN // VECTOR):
                    var at = c * (pitch if nlc else filters) + i * slow_step
                    var a = slows.unsafe_offset(at).unsafe_load[width=VECTOR, alignment=16]()
                    comptime for k in range(VECTOR):
                        comptime for j in range(vectors):
                            comptime sum = (i * VECTOR + k) * vectors + j
                            sums[sum] = Four(a[k]).fma(b[j], sums[sum])
            if step + 1 < steps:
                keep(1 - buffer)
                barrier()

        comptime for i in range(RUN):
            comptime for j in range(vectors):
                var s = Int(down) + i // VECTOR * slow_step + i % VECTOR
                var q = Int(right) + j * fast_step
                var sum = sums[i * vectors + j]
                var position = Int(first) + (s if nlc else q)
                var in_group = Int(filter) + (q if nlc else s)
                var to = Int(group) * group_filters + in_group
                comptime if nlc:
                    if position < g.out_length:
                        comptime if width == VECTOR:
                            if in_group < group_filters:
                                put[VECTOR](n, position, to, sum)
                        else:
                            for k in range(min(VECTOR, group_filters - in_group)):
                                put[1](n, position, to + k, sum[0])
                                sum = sum.shift_left[1]()
                else:
                    for k in range(min(VECTOR, g.out_length - position) if in_group < group_filters else 0):
                        put[1](n, position + k, to, sum[0])
                        sum = sum.shift_left[1]()

    var steps = ceildiv(g.kernel * group_channels, DEPTH)
    # Signals are on the first axis, because the second axis has 65,535 blocks at most.
    ctx.enqueue_function[task](Int32(steps), grid_dim=(along * g.batch, columns * g.groups), block_dim=THREADS)
