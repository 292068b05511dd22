"""A convolution of NLC data on Hopper's tensor cores: nothing is copied and nothing padded.

The copy engine (TMA) fetches rows of 128 bytes of channels, and for each tap a tile of filters. For each tap, a tile of
positions reads the rows that are `tap * dilation` further on. So rows are fetched once for as many taps as fit into
shared memory. Values outside of the data, of a group's channels or of the filters are fetched as zeros: this is the
padding. One warp group fetches; two multiply, each one half of the positions. float32 is multiplied as TF32. The filter
is FSC.
"""

from layout import Coord, Idx, Layout, LayoutTensor
from layout.tensor_core_async import TensorCoreAsync, tile_layout_k_major, warpgroup_fence
from layout.tma_async import SharedMemBarrier, TMATensorTile
from max.gpu import MAX_THREADS_PER_BLOCK_METADATA, barrier, block_idx, thread_idx
from max.gpu.host import DeviceBuffer, DeviceContext, FuncAttribute
from max.gpu.host.nvidia.tma import TensorMapSwizzle, create_tma_descriptor
from max.gpu.intrinsics import warpgroup_reg_alloc, warpgroup_reg_dealloc
from max.gpu.memory import external_memory, fence_mbarrier_init
from max.gpu.primitives.warp import shuffle_xor
from std.math import ceildiv
from std.memory import AddressSpace, stack_allocation
from std.sys.info import size_of
from std.utils.index import Index, IndexList
from std.utils.static_tuple import StaticTuple

from ..geometry import Geometry
from ..lanes import Memory
from .tiles import Put

comptime WARP_GROUP = 128
comptime CONSUMERS = 2
comptime LINE = 128
"""Bytes of channels of a step."""
comptime BOX = 64
"""Rows that are fetched by one instruction."""
comptime ROOM = 225 * 1024
"""Bytes of a multiprocessor's shared memory for the tiles that its blocks fetch ahead."""
comptime MOST_ROWS = 4
"""The most tiles of rows that are fetched ahead."""
comptime STAGES = 4
"""Tiles of filters that are fetched ahead."""
comptime SWIZZLE = TensorMapSwizzle.SWIZZLE_128B
comptime depth[dtype: DType] = LINE // size_of[Scalar[dtype]]()
comptime x_box[dtype: DType] = Coord(Idx[1], Idx[BOX], Idx[1], Idx[depth[dtype]])
comptime w_box[dtype: DType, filters: Int] = Coord(Idx[filters], Idx[1], Idx[depth[dtype]])
comptime XTiles[dtype: DType] = TMATensorTile[dtype, x_box[dtype], x_box[dtype]]
comptime WTiles[dtype: DType, filters: Int] = TMATensorTile[dtype, w_box[dtype, filters], w_box[dtype, filters]]


struct Turn(TrivialRegisterPassable):
    """A place in a ring of buffers, and the phase of its barrier that is waited for."""

    var at: Int
    var phase: UInt32

    @always_inline
    def __init__(out self, phase: UInt32):
        self.at = 0
        self.phase = phase

    @always_inline
    def next(mut self, count: Int):
        self.at += 1
        if self.at == count:
            self.at = 0
            self.phase ^= 1


@fieldwise_init
struct Fetch(ImplicitlyCopyable, TrivialRegisterPassable):
    """How data is fetched."""

    var taps: Int
    """Taps for which a tile of rows is fetched."""
    var boxes: Int
    """Boxes of `BOX` rows in a tile of rows."""
    var tiles: Int
    """Tiles of rows that are fetched ahead."""

    @staticmethod
    def of(g: Geometry, positions: Int, chunks: Int, room: Int) -> Self:
        """Returns the most taps whose rows fit into `room` bytes, twice if there are several tiles of rows."""
        for taps in range(g.kernel, 0, -1):
            var boxes = ceildiv(positions + (taps - 1) * g.dilation, BOX)
            var tiles = min(room // (boxes * BOX * LINE), MOST_ROWS)
            if tiles >= min(2, chunks * ceildiv(g.kernel, taps)):
                return Self(taps, boxes, tiles)
        return Self(1, ceildiv(positions, BOX), 2)

    @always_inline
    def bytes(self) -> Int:
        """Returns the bytes of a tile of rows."""
        return self.boxes * BOX * LINE


def hopper[
    dtype: DType, //, put: Put, positions: Int, filters: Int, blocks: Int, eights: Bool
](g: Geometry, x: Memory[dtype], w: Memory[dtype], ctx: DeviceContext) raises:
    """Computes a convolution of stride 1, padded with zeros, whose groups have a multiple of 16 bytes of channels.

    Parameters:
        dtype: The data's type: bfloat16, float16, or float32, which is rounded to TF32.
        put: Stores sums.
        positions: Positions of a tile, a multiple of 128.
        filters: Filters of a tile, a multiple of 8, 256 at most.
        blocks: Blocks of a multiprocessor.
        eights: Whether 8 divides the filters of a group.
    """
    comptime filter_bytes = filters * LINE
    if g.batch * g.out_length * g.filters == 0:
        return
    var channels = g.group_channels()
    var group_filters = g.group_filters()
    var columns = ceildiv(group_filters, filters)
    var tiles = ceildiv(g.out_length, positions)
    var chunks = ceildiv(channels, depth[dtype])
    var fetch = Fetch.of(g, positions, chunks, ROOM // blocks - STAGES * filter_bytes)
    var x_map = create_tma_descriptor[dtype, 4, SWIZZLE](
        DeviceBuffer(ctx, x, 1, owning=False),
        IndexList[4](g.batch, g.length, g.groups, channels),
        IndexList[4](g.length * g.channels, g.channels, channels, 1),
        IndexList[4](1, BOX, 1, depth[dtype]),
    )
    var w_map = create_tma_descriptor[dtype, 3, SWIZZLE](
        DeviceBuffer(ctx, w, 1, owning=False),
        IndexList[3](g.filters, g.kernel, channels),
        IndexList[3](g.kernel * channels, channels, 1),
        IndexList[3](filters, 1, depth[dtype]),
    )

    @__parameter
    @__copy_capture(group_filters, columns, tiles, chunks, fetch)
    @__llvm_arg_metadata(x_tiles, `nvvm.grid_constant`)
    @__llvm_arg_metadata(w_tiles, `nvvm.grid_constant`)
    @__llvm_metadata(MAX_THREADS_PER_BLOCK_METADATA=StaticTuple[Int32, 1](Int32((1 + CONSUMERS) * WARP_GROUP)))
    def task(x_tiles: XTiles[dtype], w_tiles: WTiles[dtype, filters]):
        comptime DEPTH = depth[dtype]
        comptime A = tile_layout_k_major[dtype, positions, DEPTH, SWIZZLE]()
        comptime B = tile_layout_k_major[dtype, filters, DEPTH, SWIZZLE]()
        comptime Box = tile_layout_k_major[dtype, BOX, DEPTH, SWIZZLE]()
        comptime parts = positions // 64 // CONSUMERS  # products of 64 positions that a warp group computes
        comptime size = 64 * filters // WARP_GROUP  # values of one such product in a thread
        comptime Tile[layout: Layout] = LayoutTensor[
            dtype, layout, MutUntrackedOrigin, address_space=AddressSpace.SHARED, alignment=128
        ]
        var w_room = external_memory[
            Scalar[dtype], address_space=AddressSpace.SHARED, alignment=1024
        ]().unsafe_origin_cast[MutUntrackedOrigin]()
        var x_room = w_room.unsafe_offset(STAGES * filters * DEPTH)
        var x_full = stack_allocation[MOST_ROWS, SharedMemBarrier, address_space=AddressSpace.SHARED, alignment=8]()
        var x_empty = stack_allocation[MOST_ROWS, SharedMemBarrier, address_space=AddressSpace.SHARED, alignment=8]()
        var w_full = stack_allocation[STAGES, SharedMemBarrier, address_space=AddressSpace.SHARED, alignment=8]()
        var w_empty = stack_allocation[STAGES, SharedMemBarrier, address_space=AddressSpace.SHARED, alignment=8]()
        # The grid uses one axis, because the other axes have 65,535 blocks at most.
        var tile = Int(block_idx.x) // (columns * g.groups)
        var column = Int(block_idx.x) % (columns * g.groups)
        var group = column // columns
        var filter = column % columns * filters
        var first = tile % tiles * positions
        var n = tile // tiles
        var who = Int(thread_idx.x) // WARP_GROUP
        var thread = Int(thread_idx.x) % WARP_GROUP
        var tile_rows = fetch.boxes * BOX

        if thread_idx.x == 0:
            comptime for i in range(MOST_ROWS):
                x_full[unsafe_offset=i].init()
                x_empty[unsafe_offset=i].init(Int32(CONSUMERS))
            comptime for i in range(STAGES):
                w_full[unsafe_offset=i].init()
                w_empty[unsafe_offset=i].init(Int32(CONSUMERS))
            fence_mbarrier_init()
        barrier()

        if who == 0:
            warpgroup_reg_dealloc[40]()
            if thread == 0:
                var rows = Turn(1)
                var taps = Turn(1)
                for chunk in range(chunks):
                    for start in range(0, g.kernel, fetch.taps):
                        x_empty[unsafe_offset=rows.at].wait(rows.phase)
                        x_full[unsafe_offset=rows.at].expect_bytes(Int32(fetch.bytes()))
                        for box in range(fetch.boxes):
                            x_tiles.async_copy_4d(
                                Tile[Box](x_room.unsafe_offset((rows.at * tile_rows + box * BOX) * DEPTH)),
                                x_full[unsafe_offset=rows.at],
                                (chunk * DEPTH, group, first - g.pad_left + start * g.dilation + box * BOX, n),
                            )
                        rows.next(fetch.tiles)
                        for tap in range(start, min(start + fetch.taps, g.kernel)):
                            w_empty[unsafe_offset=taps.at].wait(taps.phase)
                            w_full[unsafe_offset=taps.at].expect_bytes(Int32(filter_bytes))
                            w_tiles.async_copy_3d(
                                Tile[B](w_room.unsafe_offset(taps.at * filters * DEPTH)),
                                w_full[unsafe_offset=taps.at],
                                (chunk * DEPTH, tap, group * group_filters + filter),
                            )
                            taps.next(STAGES)
            return

        warpgroup_reg_alloc[232]()
        comptime product = TensorCoreAsync[
            DType.float32,
            dtype,
            dtype,
            Index(64, filters, 32 // size_of[Scalar[dtype]]()),
            a_swizzle=SWIZZLE,
            b_swizzle=SWIZZLE,
            transpose_b=True,
        ]()
        var sums = LayoutTensor[
            DType.float32, Layout.row_major(parts, size), MutUntrackedOrigin, address_space=AddressSpace.LOCAL
        ].stack_allocation()
        _ = sums.fill(0)
        var rows = Turn(0)
        var taps = Turn(0)
        var used_rows = -1  # rows that the previous product read, if it was the last one to read them
        var used_taps = -1
        for _ in range(chunks):
            for start in range(0, g.kernel, fetch.taps):
                x_full[unsafe_offset=rows.at].wait(rows.phase)
                var count = min(fetch.taps, g.kernel - start)
                for tap in range(count):
                    w_full[unsafe_offset=taps.at].wait(taps.phase)
                    warpgroup_fence(sums)
                    product.arrive()
                    product.wgmma[CONSUMERS](
                        Tile[A](x_room.unsafe_offset((rows.at * tile_rows + tap * g.dilation) * DEPTH)),
                        Tile[B](w_room.unsafe_offset(taps.at * filters * DEPTH)),
                        sums,
                        who - 1,
                    )
                    product.commit_group()
                    warpgroup_fence(sums)
                    product.wait_group[1]()
                    if thread == 0:
                        if used_taps >= 0:
                            _ = w_empty[unsafe_offset=used_taps].arrive()
                        if used_rows >= 0:
                            _ = x_empty[unsafe_offset=used_rows].arrive()
                    used_taps = taps.at
                    used_rows = rows.at if tap == count - 1 else -1
                    taps.next(STAGES)
                rows.next(fetch.tiles)
        product.wait_group()
        warpgroup_fence(sums)

        # A thread holds two neighbouring filters of every eight, for rows `down` and `down + 8`.
        var lane = thread % 4
        comptime for part in range(parts):
            var down = first + ((who - 1) * parts + part) * 64 + thread // 32 * 16 + thread % 32 // 4
            comptime for half in range(2):
                var position = down + half * 8

                @__parameter
                @always_inline
                def pair(block: Int) -> SIMD[DType.float32, 2]:
                    var at = part * size + block * 4 + half * 2
                    return SIMD[DType.float32, 2](sums.ptr[unsafe_offset=at], sums.ptr[unsafe_offset=at + 1])

                comptime if eights and size_of[Scalar[dtype]]() == 2 and filters >= 32:
                    # Four threads exchange their pairs of four blocks: then each of them has eight values of a block.
                    comptime for four in range(filters // 32):
                        var all = SIMD[DType.float32, 8](0)
                        comptime for turn in range(4):
                            # Thread `lane` sends the pair that thread `lane ^ turn` stores, and gets a pair from it.
                            var other = lane ^ turn
                            var sent = SIMD[DType.float32, 2](0)
                            comptime for block in range(4):
                                if other == block:
                                    sent = pair(four * 4 + block)
                            comptime if turn > 0:
                                sent[0] = shuffle_xor(sent[0], UInt32(turn))
                                sent[1] = shuffle_xor(sent[1], UInt32(turn))
                            comptime for block in range(4):
                                if other == block:
                                    all[2 * block] = sent[0]
                                    all[2 * block + 1] = sent[1]
                        var f = filter + four * 32 + lane * 8
                        if position < g.out_length and f < group_filters:
                            put[8](n, position, group * group_filters + f, all)
                else:
                    comptime for block in range(filters // 8):
                        var f = filter + block * 8 + lane * 2
                        var two = pair(block)
                        if position < g.out_length and f < group_filters:
                            comptime if eights:
                                put[2](n, position, group * group_filters + f, two)
                            else:
                                for i in range(min(2, group_filters - f)):
                                    put[1](n, position, group * group_filters + f + i, two[0])
                                    two = two.shift_left[1]()

    var bytes = STAGES * filter_bytes + fetch.tiles * fetch.bytes()
    ctx.enqueue_function[task](
        XTiles[dtype](x_map),
        WTiles[dtype, filters](w_map),
        grid_dim=columns * g.groups * tiles * g.batch,
        block_dim=(1 + CONSUMERS) * WARP_GROUP,
        shared_mem_bytes=bytes,
        func_attribute=FuncAttribute.MAX_DYNAMIC_SHARED_SIZE_BYTES(UInt32(bytes)),
    )
