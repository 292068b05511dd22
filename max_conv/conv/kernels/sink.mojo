"""Where `dense` and `winograd` put their outputs: in rows of values, which the graph's own code then stores.

Each layer's `write` has another type, because it contains the operations that MAX fuses with the layer. A kernel with
`write` as a parameter is compiled again for each layer of a graph. These two kernels are large. So they call a function
through a pointer, and are compiled once for all layers. This costs one more store and load per value, in the cache.
"""

from std.sys.info import simd_width_of

from .lanes import Memory, Write, accumulator
from .points import QUAD
from .turn import turn_out


comptime Bytes = Memory[DType.uint8]
"""The address of a value of any type."""


@fieldwise_init
struct Outputs(ImplicitlyCopyable, TrivialRegisterPassable):
    """Some positions of a batch item, by neighbouring filters.

    Row i holds position `first + i`; with a spacing, output `i % QUAD` of quad `first + i // QUAD`.
    """

    var n: Int
    var first: Int
    var count: Int
    var spacing: Int
    """The distance between the outputs of a quad, or 0."""
    var end: Int
    """The output has no positions from here on."""
    var filter: Int
    var lanes: Int


comptime Store[dtype: DType] = def(Bytes, Bytes, Outputs, Memory[dtype], Int) thin -> None
"""Stores rows of values, which are `row size` apart: `store(output, places, outputs, values, row size)`."""


@fieldwise_init
struct Sink[dtype: DType](ImplicitlyCopyable, TrivialRegisterPassable):
    """A function that stores outputs, and two of its arguments: the graph's tensor, and the places of columns.

    With NCL data, whole squares of vectors are read: so there must be memory after the last row and value.
    """

    var store: Store[Self.dtype]
    var output: Bytes
    var places: Bytes

    @always_inline
    def put(self, outputs: Outputs, values: Memory[Self.dtype], row_size: Int):
        """Stores rows of values."""
        self.store(self.output, self.places, outputs, values, row_size)


@always_inline
def address[T: AnyType, //](mut value: T) -> Bytes:
    """Returns the address of a value. The caller keeps the value there as long as the address is used."""
    return Pointer(to=value).unsafe_bitcast[Scalar[DType.uint8]]().unsafe_origin_cast[MutUntrackedOrigin]()


@always_inline
def store_rows[
    dtype: DType, //, write: Write[dtype], nlc: Bool, widest: Int = simd_width_of[dtype]()
](at: Outputs, values: Memory[dtype], row_size: Int):
    """Writes rows of values, in vectors of at most `widest`, as a `Store` does."""
    comptime if not nlc:
        turn_out[write](values, row_size, at.n, at.first, at.count, at.filter, at.lanes)
    else:
        # Runs of neighbouring positions: all rows, or one output of each quad between two multiples of `spacing`.
        var each = QUAD if at.spacing > 0 else 1
        var done = 0
        while done < at.count:
            var position = at.first
            var run = at.count
            if at.spacing > 0:
                var quad = at.first + done // QUAD
                var within = quad % at.spacing
                position = (quad - within) * QUAD + within
                run = min(at.spacing - within, (at.count - done) // QUAD)
            for k in range(each):
                var first = position + k * at.spacing
                var row = values.unsafe_offset((done + k) * row_size)
                run_of[write, widest](at, first, min(run, at.end - first), row, each * row_size)
            done += run * each


@always_inline
def run_of[
    dtype: DType, //, write: Write[dtype], widest: Int
](at: Outputs, first: Int, count: Int, row: Memory[dtype], row_size: Int):
    """Writes rows of neighbouring positions from `first` on."""
    comptime whole = min(widest, simd_width_of[dtype]())
    for i in range(count):
        var from_ = row.unsafe_offset(i * row_size)
        var j = 0
        # One vector of 16-bit values holds a whole panel, so half a vector may be left.
        comptime for width in range(whole, min(whole, simd_width_of[accumulator[dtype]]()) - 1, -(whole // 2)):
            while j + width <= at.lanes:
                write[width](at.n, first + i, at.filter + j, from_.unsafe_offset(j).unsafe_load[width=width]())
                j += width
        for f in range(j, at.lanes):
            write[1](at.n, first + i, at.filter + f, from_[unsafe_offset=f])
