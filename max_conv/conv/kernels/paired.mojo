"""Convolution of bfloat16 data with the processor's dot products of pairs (AVX512_BF16), summed in float32.

An instruction multiplies a pair of input channels with a pair of filter values for each of 16 filters: twice the work
of a float32 multiply-add. The filter is packed in pairs of channels, panel by panel, once per call.
"""

from std.math import ceildiv
from std.memory import bitcast
from std.sys import inlined_assembly
from std.sys.info import CompilationTarget, simd_width_of, size_of

from .geometry import Geometry
from .grid import Grid, Part, by_chunks
from .lanes import PACK, FilterSteps, Memory, Operands, Panels, Scratch, Write, load_strided, panels_at_a_time, put
from .tasks import spread, workers
from .turn import turned
from .window import Rows, Window

comptime WIDTH = simd_width_of[DType.float32]()
comptime VECTORS = 2
comptime PANEL = VECTORS * WIDTH
comptime ROWS = 14
comptime SHORT_ROWS = 4
comptime SUM_PAIRS = 64
"""Pairs in one running sum."""
comptime BLOCK_BYTES = 256 * 1024
"""Bytes of the rows of a block's window."""


def has_vectors() -> Bool:
    """Returns whether the code is compiled for a processor with vectors of 512 bits.

    Python checks whether this processor has the instruction itself, which is inline assembler; `amx.mojo` says why.
    """
    return CompilationTarget._has_feature["avx512f"]()


@always_inline
def dot[
    dtype: DType, //
](a: SIMD[dtype, 2 * WIDTH], b: SIMD[dtype, 2 * WIDTH], sum: SIMD[DType.float32, WIDTH]) -> SIMD[DType.float32, WIDTH]:
    comptime assert dtype == DType.bfloat16 and WIDTH == 16
    comptime type = SIMD[DType.float32, WIDTH]
    return inlined_assembly["vdpbf16ps $3, $2, $0", type, constraints="=v,0,v,v", has_side_effect=False](
        sum, bitcast[DType.int32, WIDTH](a), bitcast[DType.int32, WIDTH](b)
    )


def pack[
    dtype: DType, //
](g: Geometry, w: Memory[dtype], steps: FilterSteps, tap: Int, lanes: Int, target: Memory[dtype]):
    """Writes one tap of a panel, whose first filter `w` points at: (pair of channels, filter, channel of the pair)."""
    var channels = g.group_channels()
    for c in range(0, channels, 2):
        comptime for j in range(VECTORS):
            var from_ = w.unsafe_offset(tap * steps.tap + c * steps.channel + j * WIDTH * steps.filter)
            var even = load_strided[dtype, WIDTH](from_, steps.filter, lanes - j * WIDTH)
            var odd = SIMD[dtype, WIDTH](0)
            if c + 1 < channels:
                odd = load_strided[dtype, WIDTH](from_.unsafe_offset(steps.channel), steps.filter, lanes - j * WIDTH)
            target.unsafe_offset(c * PANEL + j * 2 * WIDTH).unsafe_store(even.interleave(odd))


@always_inline
def tile[
    dtype: DType, //, write: Write[dtype], rows: Int
](g: Geometry, x: Rows[dtype], w: Memory[dtype], o: Operands[dtype], part: Part):
    """Computes the first `rows` positions of a part, or all if there are fewer, by its first panel of filters."""
    comptime acc = DType.float32
    var filter = part.column(g)
    var lanes = part.lanes()
    var pairs = ceildiv(g.group_channels(), 2)
    var total = Array[SIMD[acc, WIDTH], rows * VECTORS](fill=SIMD[acc, WIDTH](0))
    comptime for j in range(VECTORS):
        var b = o.bias_at[acc, WIDTH](filter + j * WIDTH, lanes - j * WIDTH)
        comptime for i in range(rows):
            total[i * VECTORS + j] = b
    for k in range(g.first_tap(part.first, rows), g.end_tap(part.first)):
        var xk = x.data.unsafe_offset(k * x.tap_step)
        var wk = w.unsafe_offset(k * pairs * 2 * PANEL)
        for pair in range(0, pairs, SUM_PAIRS):
            var sum = Array[SIMD[acc, WIDTH], rows * VECTORS](fill=SIMD[acc, WIDTH](0))
            for p in range(pair, min(pair + SUM_PAIRS, pairs)):
                var b = Array[SIMD[dtype, 2 * WIDTH], VECTORS](fill=SIMD[dtype, 2 * WIDTH](0))
                comptime for j in range(VECTORS):
                    b[j] = wk.unsafe_offset((p * VECTORS + j) * 2 * WIDTH).unsafe_load[width=2 * WIDTH]()
                comptime for i in range(rows):
                    var two = xk.unsafe_offset(i * x.output_step + 2 * p).unsafe_bitcast[Int32]().unsafe_load()
                    var a = bitcast[dtype, 2 * WIDTH](SIMD[DType.int32, WIDTH](two))
                    comptime for j in range(VECTORS):
                        sum[i * VECTORS + j] = dot(a, b[j], sum[i * VECTORS + j])
            comptime for i in range(rows * VECTORS):
                total[i] += sum[i]
    comptime for i in range(rows):
        if i < part.count:
            comptime for j in range(VECTORS):
                var value = total[i * VECTORS + j]
                put[write, True](part.n, part.first + i, filter + j * WIDTH, value, lanes - j * WIDTH)


@always_inline
def column[
    dtype: DType, //, write: Write[dtype]
](g: Geometry, x: Rows[dtype], w: Memory[dtype], o: Operands[dtype], part: Part):
    """Computes a part's first panel of filters."""
    var done = 0
    while done < part.count:
        var left = part.after(done)
        if left.count > 2 * SHORT_ROWS:
            tile[write, ROWS](g, x.skip(done), w, o, left)
            done += ROWS
        else:
            tile[write, SHORT_ROWS](g, x.skip(done), w, o, left)
            done += SHORT_ROWS


def block[
    dtype: DType, //, write: Write[dtype], nlc: Bool
](g: Geometry, o: Operands[dtype], part: Part, filter: Panels[dtype]):
    """Computes a part."""
    var channels = g.group_channels()
    # A pair must not reach into the next row, and a tile must not reach beyond the last row.
    var row_size = ceildiv(channels, 2) * 2
    var window = Window.span(g, part.first, part.count + ROWS)
    var in_place = nlc and channels % 2 == 0 and window.inside(g)
    var scratch = Scratch[dtype](0 if in_place else window.rows * row_size)
    var x = o.x.unsafe_offset(part.n * g.length * g.channels + part.group * channels * (1 if nlc else g.length))
    var data = scratch.data()
    var step = row_size
    if in_place:
        data = x.unsafe_offset(window.first * g.channels)
        step = g.channels
    else:
        comptime if nlc:
            window.fill(g, x, channels, data, row_size)
        else:
            window.turn(g, x, channels, data, row_size)
    var rows = Rows[dtype](data, g.stride * step, g.dilation * step)
    for f in range(part.filter, part.end_filter, PANEL):
        var left = part.by(f, part.end_filter - f)
        var w = filter.at(f)
        comptime if nlc:
            column[write](g, rows, w, o, left)
        else:
            var room = Scratch[dtype]((part.count + 2 * WIDTH) * PANEL)

            @__parameter
            @always_inline
            def compute[keep: Write[dtype]]():
                column[keep](g, rows, w, o, left)

            var lanes = min(left.lanes(), PANEL)
            turned[write, PANEL, compute](room.data(), part.n, part.first, part.count, left.column(g), lanes)
            _ = w
            _ = left
            _ = room^
    _ = rows
    _ = scratch^


def conv1d_paired[
    dtype: DType, //, write: Write[dtype], nlc: Bool, packed: Bool = False
](g: Geometry, steps: FilterSteps, o: Operands[dtype]):
    """Computes a convolution of NLC or NCL data with a filter of any layout, or one that is `packed`."""
    comptime assert PANEL == PACK
    var channels = g.group_channels()
    var tap_rows = ceildiv(channels, 2) * 2
    var panel_rows = g.kernel * tap_rows
    var panels = ceildiv(g.group_filters(), PANEL)
    var threads = workers(g.batch * g.out_length * g.filters * g.kernel * channels)
    var panel_bytes = panel_rows * PANEL * size_of[Scalar[dtype]]()
    var chunk = panels if packed else panels_at_a_time(panels, panel_bytes, threads)
    var tiles = ceildiv(g.out_length, ROWS)
    var size = min(8, BLOCK_BYTES // (2 * channels * g.stride * ROWS))
    size = max(1, min(size, g.batch * tiles // (4 * threads)))
    var blocks = ceildiv(tiles, size)
    var splits = min(chunk, ceildiv(4 * threads, g.batch * blocks))
    var split = ceildiv(chunk, splits)
    splits = ceildiv(chunk, split)
    var groups = g.groups if packed else 1
    var filters = g.group_filters() if packed else chunk * PANEL
    var grid = Grid(g.batch, groups, blocks, splits, ROWS, g.out_length, split * PANEL, filters)

    comptime if packed:

        def in_place(i: Int) {imm}:
            var part = grid.part(i)
            block[write, nlc](g, o, part, Panels[dtype].packed(g, part.group, o.w, panel_rows))

        spread(in_place, grid.tasks(), threads)
    else:
        var room = Scratch[dtype](chunk * panel_rows * PANEL)

        def prepare(group: Int, filter: Int, tap: Int, target: Memory[dtype]) {imm}:
            var w = o.w.unsafe_offset((group * g.group_filters() + filter) * steps.filter)
            pack(g, w, steps, tap, g.group_filters() - filter, target.unsafe_offset(tap * tap_rows * PANEL))

        def work(part: Part, filter: Panels[dtype]) {imm}:
            block[write, nlc](g, o, part, filter)

        by_chunks(g, grid, chunk, Panels[dtype](room.data(), PANEL, panel_rows), prepare, g.kernel, work, threads)
        _ = room^
