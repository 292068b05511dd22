"""Convolution of bfloat16 data with the processor's matrix tiles (AMX), summed in float32.

An instruction multiplies 16 positions by 32 inputs with 32 inputs by 16 filters, in 16 cycles: 16 times the work of
`paired`. Inputs are the channels of all taps. The filter is packed in pairs of inputs when the model is compiled.

The instructions are inline assembler. MAX finds the processor to compile for by its number, and a virtual machine may
show the number of a processor with fewer instructions. So Python looks for the instructions, and chooses this kernel.
"""

from std.ffi import external_call
from std.math import ceildiv
from std.memory import bitcast
from std.sys import inlined_assembly
from std.sys.info import size_of

from .geometry import Geometry
from .grid import Grid, Part
from .lanes import PACK, Memory, Operands, Panels, Scratch, load
from .sink import Outputs, Sink
from .tasks import spread, workers
from .window import Rows, Window

comptime ROWS = 16
"""Positions of a tile, and also filters of a tile."""
comptime DEPTH = 32
"""Inputs of a tile."""
comptime POSITIONS = 2 * ROWS
"""Positions that are computed together, by the 32 filters of a panel: four tiles of sums."""
comptime BLOCK_TILES = 16
"""The most positions of a block, divided by `POSITIONS`."""
comptime BLOCK_BYTES = 512 * 1024
"""Bytes of the rows of a block's window."""
comptime ALIASED = 2048
"""Rows that are a multiple of these bytes apart share a few lines of the first cache. They are copied farther apart."""
comptime SPEED = 8
"""So many times as fast as multiply-adds of float32: a second thread is woken only for so much more work."""
comptime PERMIT = 0x1023
"""ARCH_REQ_XCOMP_PERM of Linux: asks that the process may use tiles."""


@fieldwise_init
struct Inputs(ImplicitlyCopyable, TrivialRegisterPassable):
    """How the inputs of an output are summed: `depth` inputs of each of `taps` rows, in steps of `DEPTH`."""

    var taps: Int
    var depth: Int

    @staticmethod
    def of(g: Geometry) -> Self:
        """Returns one row for each tap. If such a row does not fill the steps: without a dilation all taps are one row,
        because they are neighbours in memory; with a dilation, channels are padded with zeros."""
        var channels = g.group_channels()
        if channels % DEPTH != 0 and g.dilation == 1:
            return Self(1, g.kernel * channels)
        return Self(g.kernel, ceildiv(channels, DEPTH) * DEPTH)

    @always_inline
    def steps(self) -> Int:
        """Returns the steps of a row. The last one may have fewer inputs."""
        return ceildiv(self.depth, DEPTH)

    @always_inline
    def rows(self) -> Int:
        """Returns the rows of a packed panel. A row has the values of 32 filters for one input."""
        return self.taps * self.steps() * DEPTH

    @always_inline
    def row(self, g: Geometry, tap: Int, channel: Int) -> Int:
        """Returns the row of a tap and a channel."""
        return tap * (self.depth if self.taps > 1 else g.group_channels()) + channel


# The instructions. Registers 0 to 3 hold sums, 4 and 5 positions, 6 and 7 filters.


@always_inline
def run[instruction: StaticString]():
    inlined_assembly[instruction, NoneType, constraints="~{memory}", has_side_effect=True]()


@always_inline
def move[instruction: StaticString](address: Int, step: Int):
    """Loads or stores a tile whose rows are `step` bytes apart."""
    inlined_assembly[instruction, NoneType, constraints="r,r,~{memory}", has_side_effect=True](address, step)


def permit() raises:
    """Asks the system that this process may use tiles, which costs less than a microsecond."""
    if external_call["syscall", Int](Int(158), PERMIT, Int(18)) != 0:
        raise Error("conv1d: the system does not let this process use the processor's tiles (AMX).")


def configure():
    """Makes all eight registers tiles of 16 rows of 64 bytes, on this thread."""
    var config = Array[UInt8, 64](fill=0)
    config[0] = 1
    comptime for i in range(8):
        config[16 + 2 * i] = 64
        config[48 + i] = ROWS
    var address = Pointer(to=config)
    inlined_assembly["ldtilecfg ($0)", NoneType, constraints="r,~{memory}", has_side_effect=True](address)
    _ = config


@always_inline
def release():
    """Frees the registers, so that the system need not save them when it switches threads."""
    run["tilerelease"]()


@fieldwise_init
struct Steps(ImplicitlyCopyable, TrivialRegisterPassable):
    """Where the operands of a tile are: the addresses of the first operands, and bytes from one to the next."""

    var x: Int
    var x_row: Int
    """Bytes between neighbouring positions."""
    var x_tap: Int
    var rest: Int
    """The address of the last step's inputs, 64 bytes for each position, if that step is not full."""
    var w: Int


@always_inline
def step[both_rows: Bool, both_columns: Bool](x: Int, x_row: Int, w: Int):
    """Adds the products of up to 32 inputs."""
    comptime row = 4 * PACK
    move["tileloadd ($0,$1,1), %tmm4"](x, x_row)
    move["tileloadd ($0,$1,1), %tmm6"](w, row)
    run["tdpbf16ps %tmm6, %tmm4, %tmm0"]()
    comptime if both_columns:
        move["tileloadd ($0,$1,1), %tmm7"](w + row // 2, row)
        run["tdpbf16ps %tmm7, %tmm4, %tmm1"]()
    comptime if both_rows:
        move["tileloadd ($0,$1,1), %tmm5"](x + ROWS * x_row, x_row)
        run["tdpbf16ps %tmm6, %tmm5, %tmm2"]()
        comptime if both_columns:
            run["tdpbf16ps %tmm7, %tmm5, %tmm3"]()


@always_inline
def multiply[both_rows: Bool, both_columns: Bool](inputs: Inputs, at: Steps, sums: Memory[DType.float32]):
    """Writes the sums of 16 or 32 positions by 16 or 32 filters, 32 values for each position."""
    comptime row = 4 * PACK
    run["tilezero %tmm0"]()
    run["tilezero %tmm1"]()
    run["tilezero %tmm2"]()
    run["tilezero %tmm3"]()
    var full = inputs.depth // DEPTH
    var w = at.w
    for tap in range(inputs.taps):
        var x = at.x + tap * at.x_tap
        for _ in range(full):
            step[both_rows, both_columns](x, at.x_row, w)
            x += 2 * DEPTH
            w += 2 * DEPTH * PACK
        if full < inputs.steps():
            step[both_rows, both_columns](at.rest, 2 * DEPTH, w)
    var to = Int(sums)
    move["tilestored %tmm0, ($0,$1,1)"](to, row)
    comptime if both_columns:
        move["tilestored %tmm1, ($0,$1,1)"](to + row // 2, row)
    comptime if both_rows:
        move["tilestored %tmm2, ($0,$1,1)"](to + ROWS * row, row)
        comptime if both_columns:
            move["tilestored %tmm3, ($0,$1,1)"](to + ROWS * row + row // 2, row)


def multiply_plain(inputs: Inputs, at: Steps, sums: Memory[DType.float32]):
    """Does the same as `multiply` in plain loops, so that the code around it is tested on every processor."""

    def value(address: Int) {imm} -> Float32:
        var memory = Memory[DType.bfloat16](unsafe_from_address=address)
        return memory[].cast[DType.float32]()

    for i in range(POSITIONS):
        for f in range(PACK):
            var sum = Float32(0)
            for tap in range(inputs.taps):
                for d in range(inputs.steps() * DEPTH):
                    var x = at.x + i * at.x_row + tap * at.x_tap + 2 * d
                    if d // DEPTH * DEPTH + DEPTH > inputs.depth:
                        x = at.rest + i * 2 * DEPTH + 2 * (d % DEPTH)
                    var row = tap * inputs.steps() * DEPTH + d
                    sum += value(x) * value(at.w + 2 * (row // 2 * 2 * PACK + 2 * f + row % 2))
            sums[unsafe_offset=i * PACK + f] = sum


@always_inline
def narrow[dtype: DType, plain: Bool](low: SIMD[DType.float32, 16], high: SIMD[DType.float32, 16]) -> SIMD[dtype, 32]:
    """Rounds two vectors to bfloat16."""
    comptime if plain:
        return low.cast[dtype]().join(high.cast[dtype]())
    else:
        comptime vector = SIMD[DType.int32, 16]
        comptime constraints = "=v,v,v"
        var bits = inlined_assembly[
            "vcvtne2ps2bf16 $1, $2, $0", vector, constraints=constraints, has_side_effect=False
        ](low, high)
        return bitcast[dtype, 32](bits)


@always_inline
def tile[
    dtype: DType, //, plain: Bool
](
    inputs: Inputs,
    at: Steps,
    o: Operands[dtype],
    part: Part,
    column: Int,
    sums: Memory[DType.float32],
    values: Memory[dtype],
):
    """Computes the first positions of a part, up to 32, by its first panel of filters, and keeps them in `values`."""
    comptime width = 16
    comptime acc = DType.float32
    var lanes = part.lanes()
    comptime if plain:
        multiply_plain(inputs, at, sums)
    else:
        if part.count > ROWS:
            if lanes > ROWS:
                multiply[True, True](inputs, at, sums)
            else:
                multiply[True, False](inputs, at, sums)
        else:
            multiply[False, True](inputs, at, sums)
    var low = o.bias_at[acc, width](column, lanes)
    var high = o.bias_at[acc, width](column + width, lanes - width)
    for i in range(min(part.count, POSITIONS)):
        var sum = sums.unsafe_offset(i * PACK)
        var first = sum.unsafe_load[width=width]() + low
        var second = sum.unsafe_offset(width).unsafe_load[width=width]() + high
        values.unsafe_offset(i * PACK).unsafe_store(narrow[dtype, plain](first, second))


@always_inline
def last_inputs[dtype: DType, //](rows: Rows[dtype], first: Int, rest: Int, count: Int, target: Memory[dtype]):
    """Copies the inputs that the last step of each position reads: `rest` inputs from `first` on, with zeros up to 32.

    The filter has zeros there, too. But the inputs there belong to another position, and zero times infinity is NaN.
    """
    var from_ = rows.data.unsafe_offset(first)
    for i in range(count):
        var values = load[dtype, DEPTH, True](from_.unsafe_offset(i * rows.output_step), rest)
        target.unsafe_offset(i * DEPTH).unsafe_store(values)


def block[dtype: DType, //, nlc: Bool, plain: Bool](g: Geometry, o: Operands[dtype], part: Part, sink: Sink[dtype]):
    """Computes a part."""
    comptime bytes = size_of[Scalar[dtype]]()
    var inputs = Inputs.of(g)
    var channels = g.group_channels()
    # Tiles may run past the part: the rows that they read must exist nevertheless.
    var count = ceildiv(part.count, ROWS) * ROWS
    var window = Window.span(g, part.first, count)
    var in_place = nlc and window.inside(g)
    var row_size = inputs.depth
    if channels % DEPTH == 0:
        in_place = in_place and g.stride * g.channels * bytes % ALIASED != 0
    elif g.dilation == 1:
        in_place = in_place and g.groups == 1
        row_size = channels
    else:
        in_place = False
    if row_size % DEPTH == 0 and g.stride * row_size * bytes % ALIASED == 0:
        row_size += DEPTH
    var scratch = Scratch[dtype](0 if in_place else window.rows * row_size)
    var x = o.x.unsafe_offset(part.n * g.length * g.channels + part.group * channels * (1 if nlc else g.length))
    var rows = Rows[dtype](scratch.data(), g.stride * row_size, g.dilation * row_size)
    if in_place:
        rows = Rows[dtype](x.unsafe_offset(window.first * g.channels), g.stride * g.channels, g.dilation * g.channels)
    else:
        comptime if nlc:
            window.fill(g, x, channels, rows.data, row_size)
        else:
            window.turn(g, x, channels, rows.data, row_size)
    var rest = inputs.depth % DEPTH
    var lasts = Scratch[dtype](count * DEPTH if rest > 0 else 0)
    if rest > 0:
        last_inputs(rows, inputs.depth - rest, rest, count, lasts.data())
    var panels = Panels[dtype].packed(g, part.group, o.w, inputs.rows())
    # Transposing the outputs reads whole squares of vectors.
    var room = Scratch[dtype]((count + PACK) * PACK)
    var values = room.data()
    var sums = Scratch[DType.float32](POSITIONS * PACK)
    comptime if not plain:
        configure()
    for filter in range(part.filter, part.end_filter, PACK):
        var by = part.by(filter, min(PACK, part.end_filter - filter))
        var column = by.column(g)
        for done in range(0, part.count, POSITIONS):
            var at = Steps(
                Int(rows.data.unsafe_offset(done * rows.output_step)),
                rows.output_step * bytes,
                rows.tap_step * bytes,
                Int(lasts.data().unsafe_offset(done * DEPTH)),
                Int(panels.at(filter)),
            )
            tile[plain](inputs, at, o, by.after(done), column, sums.data(), values.unsafe_offset(done * PACK))
        var at = Outputs(part.n, part.first, part.count, 0, g.out_length, column, by.lanes())
        sink.put(at, values, PACK)
    comptime if not plain:
        release()
    _ = scratch^
    _ = lasts^
    _ = room^
    _ = sums^


@no_inline
def conv1d_amx[
    dtype: DType, //, nlc: Bool, plain: Bool = False
](g: Geometry, o: Operands[dtype], sink: Sink[dtype]) raises:
    """Computes a convolution of NLC or NCL data with a filter that is packed in pairs of inputs.

    With `plain`, it does so without the instructions, slowly: for tests on other processors.
    """
    comptime assert dtype == DType.bfloat16
    comptime if not plain:
        permit()
    var threads = workers(g.batch * g.out_length * g.filters * g.kernel * g.group_channels() // SPEED)
    var tiles = ceildiv(g.out_length, POSITIONS)
    var panels = ceildiv(g.group_filters(), PACK)
    var size = min(BLOCK_TILES, BLOCK_BYTES // (2 * g.group_channels() * g.stride * POSITIONS))
    size = max(1, min(size, g.batch * g.groups * tiles // (4 * threads)))
    var blocks = ceildiv(tiles, size)
    var splits = min(panels, ceildiv(4 * threads, g.batch * g.groups * blocks)) if threads > 1 else 1
    var split = ceildiv(panels, splits) * PACK
    splits = ceildiv(g.group_filters(), split)
    var grid = Grid(g.batch, g.groups, blocks, splits, POSITIONS, g.out_length, split, g.group_filters())

    def task(i: Int) {imm}:
        block[nlc, plain](g, o, grid.part(i), sink)

    spread(task, grid.tasks(), threads)
