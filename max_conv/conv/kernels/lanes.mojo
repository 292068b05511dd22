"""Vectors of the accumulation type, read from and written to memory of the data's own type."""

from std.math import ceildiv, iota
from std.sys.info import simd_width_of, size_of
from std.sys.intrinsics import masked_load, masked_store

from .geometry import Geometry

comptime Memory[dtype: DType] = Pointer[Scalar[dtype], MutUntrackedOrigin]

comptime SUM_TERMS = 128
"""Terms in one running sum. With blocks the rounding error is near sqrt(terms); in one long sum it grows with terms."""

comptime PACK = 32
"""Filters side by side in a packed filter (`conv/packing.py`): two vectors of float32 in AVX-512."""

comptime FILTER_BYTES = 1536 * 1024
"""Transformed or packed filters that are held at a time, for each thread."""

comptime accumulator[dtype: DType] = DType.float64 if dtype == DType.float64 else DType.float32
"""Sixteen-bit types are summed in float32, the others in themselves."""


@always_inline
def load[dtype: DType, //, acc: DType, width: Int, partial: Bool](p: Memory[dtype], lanes: Int) -> SIMD[acc, width]:
    """Loads `width` values, or with `partial` the first `lanes` of them and zeros."""
    comptime if partial:
        var mask = iota[DType.int32, width]().lt(Int32(lanes))
        return masked_load[width](p, mask, SIMD[dtype, width](0)).cast[acc]()
    else:
        return p.unsafe_load[width=width]().cast[acc]()


@always_inline
def load_strided[dtype: DType, //, acc: DType, width: Int](p: Memory[dtype], step: Int, lanes: Int) -> SIMD[acc, width]:
    """Loads `lanes` values that are `step` apart, and zeros after them."""
    if step == 1:
        if lanes >= width:
            return load[acc, width, False](p, lanes)
        return load[acc, width, True](p, lanes)
    var values = SIMD[acc, width](0)
    for i in range(min(width, lanes)):
        values[i] = p[unsafe_offset=i * step].cast[acc]()
    return values


@always_inline
def store[
    dtype: DType, //, acc: DType, width: Int, partial: Bool
](p: Memory[dtype], value: SIMD[acc, width], lanes: Int):
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
    """Stores the first min(lanes, width) values; nothing if lanes <= 0."""
    if lanes >= width:
        write[width](n, position, filter, value.cast[dtype]())
        return
    # A loop, not a vector for each power of two: so the code fused into `write` is compiled once more, not five times.
    var rest = value
    for i in range(lanes):
        comptime if nlc:
            write[1](n, position, filter + i, rest[0].cast[dtype]())
        else:
            write[1](n, position + i, filter, rest[0].cast[dtype]())
        rest = rest.shift_left[1]()


struct Scratch[dtype: DType](Movable):
    """A task's memory, uninitialised. It starts at a cache line: vectors across two lines load half as fast."""

    comptime LINE = 64
    var values: List[Scalar[Self.dtype]]

    def __init__(out self, size: Int):
        self.values = List[Scalar[Self.dtype]](unsafe_uninit_length=size + Self.LINE // size_of[Scalar[Self.dtype]]())

    def data(mut self) -> Memory[Self.dtype]:
        """Returns where the memory starts. The caller keeps the scratch alive as long as the result is used."""
        var start = self.values.unsafe_ptr().unsafe_origin_cast[MutUntrackedOrigin]()
        return start.unsafe_offset(-Int(start) % Self.LINE // size_of[Scalar[Self.dtype]]())


@fieldwise_init
struct Operands[dtype: DType](ImplicitlyCopyable, TrivialRegisterPassable):
    """The tensors that every kernel reads. The bias is read only if `has_bias` is true."""

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
    """A filter's layout: how far apart its taps, channels and output channels are."""

    var tap: Int
    var channel: Int
    var filter: Int


@fieldwise_init
struct Panels[acc: DType](ImplicitlyCopyable, TrivialRegisterPassable):
    """A filter in panels: `rows` rows of `lanes` filters side by side, then the rows of the next filters."""

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
        """Returns where the first row of a filter and its neighbours is stored."""
        return self.data.unsafe_offset(filter // self.lanes * self.lanes * self.rows + filter % self.lanes)


def panels_at_a_time(panels: Int, bytes: Int, threads: Int) -> Int:
    """Returns how many panels of filters, of `bytes` each, are transformed or packed before they are used."""
    var most = max(1, threads * FILTER_BYTES // bytes)
    return ceildiv(panels, ceildiv(panels, most))
