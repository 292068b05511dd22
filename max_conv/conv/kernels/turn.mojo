"""Transposes blocks of data between (C, L) and (L, C), a square of vectors at a time, in registers."""

from std.bit import log2_floor
from std.sys.info import simd_width_of

from .lanes import Memory, Write, put


@always_inline
def transpose[dtype: DType, width: Int, //](mut rows: Array[SIMD[dtype, width], width]):
    """Transposes a square. Interleaving row i with row i + width / 2 rotates the bits of (row, lane) by one place."""
    comptime for _ in range(log2_floor(width)):
        var turned = Array[SIMD[dtype, width], width](fill=SIMD[dtype, width](0))
        comptime for i in range(width // 2):
            var both = rows[i].interleave(rows[i + width // 2])
            turned[2 * i] = both.slice[width]()
            turned[2 * i + 1] = both.slice[width, offset=width]()
        rows = turned^


@always_inline
def turn_in[
    dtype: DType, //
](x: Memory[dtype], line: Int, count: Int, channels: Int, target: Memory[dtype], row_size: Int):
    """Copies `count` positions of `channels` channels, each `line` values long, into rows `row_size` apart."""
    comptime width = simd_width_of[dtype]()
    for c in range(0, channels, width):
        var lanes = channels - c
        for l in range(0, count, width):
            var square = Array[SIMD[dtype, width], width](fill=SIMD[dtype, width](0))
            var from_ = x.unsafe_offset(c * line + l)
            if lanes >= width and count - l >= width:
                comptime for i in range(width):
                    square[i] = from_.unsafe_offset(i * line).unsafe_load[width=width]()
                transpose(square)
                comptime for i in range(width):
                    target.unsafe_offset((l + i) * row_size + c).unsafe_store(square[i])
            else:
                for i in range(min(width, lanes)):
                    for j in range(min(width, count - l)):
                        target[unsafe_offset=(l + j) * row_size + c + i] = from_[unsafe_offset=i * line + j]


@always_inline
def turned[
    dtype: DType, //, write: Write[dtype], size: Int, compute: def[keep: Write[dtype]]() capturing -> None
](rows: Memory[dtype], n: Int, first: Int, count: Int, filter: Int, filters: Int):
    """Calls `compute`, which stores `count` positions of at most `size` filters in `rows`, NLC; writes them as NCL.

    `rows` must have `simd_width_of[dtype]()` more rows than there are positions.
    """

    @__parameter
    @always_inline
    def keep[width: Int](_n: Int, position: Int, column: Int, value: SIMD[dtype, width]):
        rows.unsafe_offset((position - first) * size + column - filter).unsafe_store(value)

    compute[keep]()
    turn_out[write](rows, size, n, first, count, filter, filters)


@always_inline
def turn_out[
    dtype: DType, //, write: Write[dtype]
](rows: Memory[dtype], row_size: Int, n: Int, first: Int, count: Int, filter: Int, filters: Int):
    """Writes `count` rows of `filters` values, which are `row_size` apart, as outputs from `first` on.

    Whole squares are read: there must be memory after the last row and value.
    """
    comptime width = simd_width_of[dtype]()
    for f in range(0, filters, width):
        for l in range(0, count, width):
            var square = Array[SIMD[dtype, width], width](fill=SIMD[dtype, width](0))
            comptime for i in range(width):
                square[i] = rows.unsafe_offset((l + i) * row_size + f).unsafe_load[width=width]()
            transpose(square)
            comptime if width > 16:
                # Not unrolled: 32 vectors of 32 values would be a thousand stores where outputs are a stride apart.
                for i in range(min(width, filters - f)):
                    put[write, False](n, first + l, filter + f + i, square[i], count - l)
            else:
                if filters - f >= width and count - l >= width:
                    comptime for i in range(width):
                        write[width](n, first + l, filter + f + i, square[i])
                else:
                    comptime for i in range(width):
                        if f + i < filters:
                            put[write, False](n, first + l, filter + f + i, square[i], count - l)
