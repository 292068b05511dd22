"""Convolution of bfloat16 data with the processor's dot products of pairs (AVX512_BF16), summed in float32.

An instruction multiplies a pair of input channels with a pair of filter values for each of 16 filters: twice the work
of a float32 multiply-add. The filter is packed in pairs of channels, panel by panel, once a call.
"""

from std.math import ceildiv
from std.memory import bitcast
from std.sys import llvm_intrinsic
from std.sys.info import CompilationTarget, simd_width_of, size_of

from .geometry import Geometry
from .lanes import PACK, FilterSteps, Memory, Operands, Scratch, Write, gathered
from .lanes import panels_at_a_time, put
from .tasks import phases, spread, workers
from .turn import turn_out
from .window import Window

comptime WIDTH = simd_width_of[DType.float32]()
comptime VECTORS = 2
comptime PANEL = VECTORS * WIDTH
comptime ROWS = 14
comptime SHORT_ROWS = 4
comptime PAIRS = 64
"""Pairs in one running sum."""
comptime BLOCK_BYTES = 256 * 1024
"""Rows of a block's window."""


def has_pairs() -> Bool:
    """Tells whether the processor that is compiled for has the instruction."""
    return CompilationTarget._has_feature["avx512bf16"]()


@always_inline
def dot[
    dtype: DType, //
](
    a: SIMD[dtype, 2 * WIDTH], b: SIMD[dtype, 2 * WIDTH], sum: SIMD[DType.float32, WIDTH]
) -> SIMD[DType.float32, WIDTH]:
    comptime assert dtype == DType.bfloat16 and WIDTH == 16
    return llvm_intrinsic["llvm.x86.avx512bf16.dpbf16ps.512", SIMD[DType.float32, WIDTH]](sum, a, b)


def pack[
    dtype: DType, //
](g: Geometry, w: Memory[dtype], steps: FilterSteps, tap: Int, lanes: Int, target: Memory[dtype]):
    """Writes one tap of a panel, whose first filter `w` points at: (pair of channels, filter, channel of the pair)."""
    var channels = g.group_channels()
    for c in range(0, channels, 2):
        comptime for j in range(VECTORS):
            var from_ = w.unsafe_offset(tap * steps.tap + c * steps.channel + j * WIDTH * steps.filter)
            var even = gathered[dtype, WIDTH](from_, steps.filter, lanes - j * WIDTH)
            var odd = SIMD[dtype, WIDTH](0)
            if c + 1 < channels:
                odd = gathered[dtype, WIDTH](from_.unsafe_offset(steps.channel), steps.filter, lanes - j * WIDTH)
            target.unsafe_offset(c * PANEL + j * 2 * WIDTH).unsafe_store(even.interleave(odd))


@always_inline
def tile[
    dtype: DType, //, write: Write[dtype], rows: Int
](
    g: Geometry,
    x: Memory[dtype],
    output_step: Int,
    tap_step: Int,
    w: Memory[dtype],
    o: Operands[dtype],
    n: Int,
    first: Int,
    valid: Int,
    filter: Int,
    lanes: Int,
):
    """Computes `valid` of `rows` positions from `first` on, by `lanes` of a panel of filters from `filter` on."""
    comptime acc = DType.float32
    var pairs = ceildiv(g.group_channels(), 2)
    var total = Array[SIMD[acc, WIDTH], rows * VECTORS](fill=SIMD[acc, WIDTH](0))
    comptime for j in range(VECTORS):
        var b = o.bias_at[acc, WIDTH](filter + j * WIDTH, lanes - j * WIDTH)
        comptime for i in range(rows):
            total[i * VECTORS + j] = b
    for k in range(g.first_tap(first, rows), g.end_tap(first)):
        var xk = x.unsafe_offset(k * tap_step)
        var wk = w.unsafe_offset(k * pairs * 2 * PANEL)
        for pair in range(0, pairs, PAIRS):
            var sum = Array[SIMD[acc, WIDTH], rows * VECTORS](fill=SIMD[acc, WIDTH](0))
            for p in range(pair, min(pair + PAIRS, pairs)):
                var b = Array[SIMD[dtype, 2 * WIDTH], VECTORS](fill=SIMD[dtype, 2 * WIDTH](0))
                comptime for j in range(VECTORS):
                    b[j] = wk.unsafe_offset((p * VECTORS + j) * 2 * WIDTH).unsafe_load[width=2 * WIDTH]()
                comptime for i in range(rows):
                    var two = xk.unsafe_offset(i * output_step + 2 * p).unsafe_bitcast[Int32]().unsafe_load()
                    var a = bitcast[dtype, 2 * WIDTH](SIMD[DType.int32, WIDTH](two))
                    comptime for j in range(VECTORS):
                        sum[i * VECTORS + j] = dot(a, b[j], sum[i * VECTORS + j])
            comptime for i in range(rows * VECTORS):
                total[i] += sum[i]
    comptime for i in range(rows):
        if i < valid:
            comptime for j in range(VECTORS):
                put[write, True](n, first + i, filter + j * WIDTH, total[i * VECTORS + j], lanes - j * WIDTH)


@always_inline
def column[
    dtype: DType, //, write: Write[dtype]
](
    g: Geometry,
    x: Memory[dtype],
    output_step: Int,
    tap_step: Int,
    w: Memory[dtype],
    o: Operands[dtype],
    n: Int,
    first: Int,
    count: Int,
    filter: Int,
    lanes: Int,
):
    """Computes `count` positions from `first` on, by `lanes` of a panel of filters from `filter` on."""
    var done = 0
    while done < count:
        var left = count - done
        var xt = x.unsafe_offset(done * output_step)
        if left > 2 * SHORT_ROWS:
            tile[write, ROWS](g, xt, output_step, tap_step, w, o, n, first + done, left, filter, lanes)
            done += ROWS
        else:
            tile[write, SHORT_ROWS](g, xt, output_step, tap_step, w, o, n, first + done, left, filter, lanes)
            done += SHORT_ROWS


def block[
    dtype: DType, //, write: Write[dtype], nlc: Bool
](
    g: Geometry,
    o: Operands[dtype],
    n: Int,
    group: Int,
    first: Int,
    count: Int,
    panel: Int,
    end_panel: Int,
    filter: Memory[dtype],
    panel_size: Int,
):
    """Computes `count` positions from `first` on, of a group's panels `panel .. end_panel - 1`, packed in `filter`."""
    var channels = g.group_channels()
    # A pair must not reach into the next row, nor a tile beyond the last one.
    var row_size = ceildiv(channels, 2) * 2
    var window = Window.span(g, first, count + ROWS)
    var in_place = nlc and channels % 2 == 0 and window.inside(g)
    var scratch = Scratch[dtype](0 if in_place else window.rows * row_size)
    var x = o.x.unsafe_offset(n * g.length * g.channels + group * channels * (1 if nlc else g.length))
    var rows = scratch.data()
    var step = row_size
    if in_place:
        rows = x.unsafe_offset(window.first * g.channels)
        step = g.channels
    else:
        comptime if nlc:
            window.fill(g, x, channels, rows, row_size)
        else:
            window.turn(g, x, channels, rows, row_size)
    for at in range(panel, end_panel):
        var f = group * g.group_filters() + at * PANEL
        var lanes = g.group_filters() - at * PANEL
        var w = filter.unsafe_offset((at - panel) * panel_size)
        comptime if nlc:
            column[write](g, rows, g.stride * step, g.dilation * step, w, o, n, first, count, f, lanes)
        else:
            var turned = Scratch[dtype]((count + 2 * WIDTH) * PANEL)
            var rows_out = turned.data()

            @__parameter
            @always_inline
            def keep[size: Int](_n: Int, position: Int, to: Int, value: SIMD[dtype, size]):
                rows_out.unsafe_offset((position - first) * PANEL + to - f).unsafe_store(value)

            column[keep](g, rows, g.stride * step, g.dilation * step, w, o, n, first, count, f, lanes)
            turn_out[write](rows_out, PANEL, n, first, count, f, min(lanes, PANEL))
            _ = turned^
    _ = scratch^


def conv1d_paired[
    dtype: DType, //, write: Write[dtype], nlc: Bool, packed: Bool = False
](g: Geometry, steps: FilterSteps, o: Operands[dtype]):
    """Computes a convolution of NLC or NCL data with a filter of any layout, or one that is `packed`."""
    comptime assert PANEL == PACK
    var channels = g.group_channels()
    var tap_size = ceildiv(channels, 2) * 2 * PANEL
    var panel_size = g.kernel * tap_size
    var panels = ceildiv(g.group_filters(), PANEL)
    var threads = workers(g.batch * g.out_length * g.filters * g.kernel * channels)
    var chunk = panels if packed else panels_at_a_time(panels, panel_size * size_of[Scalar[dtype]](), threads)
    var tiles = ceildiv(g.out_length, ROWS)
    var size = min(8, BLOCK_BYTES // (2 * channels * g.stride * ROWS))
    size = max(1, min(size, g.batch * tiles // (4 * threads)))
    var blocks = ceildiv(tiles, size)
    var splits = min(chunk, ceildiv(4 * threads, g.batch * blocks))
    var split = ceildiv(chunk, splits)
    splits = ceildiv(chunk, split)

    def run(i: Int, group: Int, first: Int, end: Int, filter: Memory[dtype]) {imm}:
        """Computes a block with panels `first .. end - 1`, of which `filter` holds the first and those after it."""
        var part = i % splits * split
        var at = i // splits % blocks
        var start = at * tiles // blocks * ROWS
        var stop = min((at + 1) * tiles // blocks * ROWS, g.out_length)
        block[write, nlc](
            g,
            o,
            i // (splits * blocks),
            group,
            start,
            stop - start,
            first + part,
            min(first + part + split, end),
            filter.unsafe_offset(part * panel_size),
            panel_size,
        )

    var tasks = g.batch * blocks * splits
    comptime if packed:

        def in_place(i: Int) {imm}:
            var group = i // tasks
            run(i % tasks, group, 0, panels, o.w.unsafe_offset(group * panels * panel_size))

        spread(in_place, g.groups * tasks, threads)
    else:
        var filters = Scratch[dtype](chunk * panel_size)
        var filter = filters.data()
        for group in range(g.groups):
            for first in range(0, panels, chunk):
                var end = min(first + chunk, panels)

                def prepare(i: Int) {imm}:
                    var f = (first + i // g.kernel) * PANEL
                    var w = o.w.unsafe_offset((group * g.group_filters() + f) * steps.filter)
                    var to = filter.unsafe_offset(i // g.kernel * panel_size + i % g.kernel * tap_size)
                    pack(g, w, steps, i % g.kernel, g.group_filters() - f, to)

                def work(i: Int) {imm}:
                    run(i, group, first, end, filter)

                phases(prepare, (end - first) * g.kernel, work, tasks, threads)
        _ = filters^
