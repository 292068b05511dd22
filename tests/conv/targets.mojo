"""Runs every CPU kernel against plain loops, on the processor that this was compiled for; prints wrong results."""

from std.math import ceildiv, cos, gcd, pi, sin, sqrt
from std.sys import exit, is_defined
from std.utils.numerics import inf, isnan, nan

from kernels.amx import conv1d_amx
from kernels.by_phase import conv_transpose1d, place_rows
from kernels.dense import conv1d_dense, conv1d_short
from kernels.depthwise import conv1d_depthwise
from kernels.geometry import CIRCULAR, Geometry, REFLECT, REPLICATE, ZEROS
from kernels.lanes import PACK, FilterSteps, Memory, Operands, accumulator
from kernels.lengthwise import conv1d_lengthwise
from kernels.paired import conv1d_paired, has_vectors
from kernels.sink import Bytes, Outputs, Sink, address, store_rows
from kernels.models.silero_vad import FREQUENCIES, Frames, Layer as FramesLayer, convolve, fold, spectrum
from kernels.transposed import Transposed
from kernels.winograd import conv1d_winograd

comptime WRONG = 0
comptime RIGHT = 1
comptime NONE = 2
"""The kernel does not accept the layer, the dtype or the processor: nothing was compared."""


def noise(mut state: UInt64) -> Float64:
    """Returns a number between -1 and 1."""
    state = state * 6364136223846793005 + 1442695040888963407
    return Float64(state >> 40) / Float64(1 << 23) - 1


def row_at(g: Geometry, position: Int) -> Int:
    """Returns the input row at a padded position, or -1 for zero, as `Geometry.source` does, written separately."""
    if position >= 0 and position < g.length:
        return position
    if g.mode == REFLECT:
        return -position if position < 0 else 2 * (g.length - 1) - position
    if g.mode == REPLICATE:
        return 0 if position < 0 else g.length - 1
    if g.mode == CIRCULAR:
        return (position + g.length) % g.length
    return -1


def factor(point: Int, size: Int, tap: Int) -> Float64:
    """Returns a tap's factor in the product at a point (0, 1, -1, infinity, 1/2, -2), for a group of `size` taps."""
    var at = [0.0, 1.0, -1.0, 0.0, 0.5, -2.0][point]
    var power = 1.0
    for _ in range(tap):
        power *= at
    if point == 0:
        return (2.0 if size == 2 else 1.0) if tap == 0 else 0.0
    if point == 3:
        return 1.0 if tap == size - 1 else 0.0
    if size == 1:
        return 0.5
    if size == 2:
        return power * [0.0, 1.0, -1.0 / 3, 0.0, -8.0 / 3][point]
    return power * [0.0, 1.0 / 3, -1.0 / 3, 0.0, -16.0 / 15, 1.0 / 15][point]


def packed[dtype: DType, //, points: Bool](g: Geometry, w: List[Scalar[dtype]]) -> List[Scalar[dtype]]:
    """Packs an SCF filter: (group and panel, tap or product, channel, filter), as `conv/packing.py` does."""
    var step = g.stride // gcd(g.stride, g.dilation)
    # Groups of three, two and one taps of a phase; a product for each point that they use, of all groups before the
    # next point.
    var first = List[Int]()
    var sizes = List[Int]()
    for size in [3, 2, 1]:
        for phase in range(min(step, g.kernel)):
            var k = phase
            while k < g.kernel:
                var left = ceildiv(g.kernel - k, step)
                if min(3, left) == size:
                    first.append(k)
                    sizes.append(size)
                k += 3 * step
    var rows = 0
    for size in sizes:
        rows += size + 3
    comptime if not points:
        rows = g.kernel
    var channels = g.group_channels()
    var panels = ceildiv(g.group_filters(), PACK)
    var to = List[Scalar[dtype]](length=g.groups * panels * rows * channels * PACK, fill=0)
    for f in range(g.filters):
        var in_group = f % g.group_filters()
        var panel = f // g.group_filters() * panels + in_group // PACK
        for c in range(channels):
            var at = (panel * rows * channels + c) * PACK + in_group % PACK
            comptime if not points:
                for k in range(g.kernel):
                    to[at + k * channels * PACK] = w[(k * channels + c) * g.filters + f]
            else:
                var row = 0
                for point in range(6):
                    for group in range(len(sizes)):
                        if point < sizes[group] + 3:
                            var value = 0.0
                            for j in range(sizes[group]):
                                var tap = w[((first[group] + j * step) * channels + c) * g.filters + f]
                                value += factor(point, sizes[group], j) * tap.cast[DType.float64]()
                            to[at + row * channels * PACK] = value.cast[dtype]()
                            row += 1
    return to^


def packed_pairs[dtype: DType, //](g: Geometry, w: List[Scalar[dtype]]) -> List[Scalar[dtype]]:
    """Packs an SCF filter for "amx": pairs of inputs, 32 filters next to each other."""
    var panels = ceildiv(g.group_filters(), PACK)
    var channels = g.group_channels()
    var each = channels if g.dilation == 1 else ceildiv(channels, 32) * 32
    var rows = ceildiv(g.kernel * each, 32) * 32
    var to = List[Scalar[dtype]](length=g.groups * panels * rows * PACK, fill=0)
    for f in range(g.filters):
        var in_group = f % g.group_filters()
        var panel = f // g.group_filters() * panels + in_group // PACK
        for k in range(g.kernel):
            for c in range(channels):
                var row = k * each + c
                var at = (panel * rows + row // 2 * 2) * PACK + in_group % PACK * 2 + row % 2
                to[at] = w[(k * channels + c) * g.filters + f]
    return to^


@fieldwise_init
struct Room[dtype: DType, nlc: Bool](ImplicitlyCopyable, TrivialRegisterPassable):
    """The memory of an output."""

    var data: Memory[Self.dtype]
    var length: Int
    var filters: Int

    def put[width: Int](self, n: Int, position: Int, filter: Int, value: SIMD[Self.dtype, width]):
        var at = (n * self.length + position) * self.filters + filter
        comptime if not Self.nlc:
            at = (n * self.filters + filter) * self.length + position
        self.data.unsafe_offset(at).unsafe_store(value)


def store[dtype: DType, nlc: Bool](to: Bytes, _p: Bytes, at: Outputs, values: Memory[dtype], row_size: Int):
    """Stores rows of values in a `Room`."""
    var room = to.unsafe_bitcast[Room[dtype, nlc]]()[]

    @__parameter
    @always_inline
    @__copy_capture(room)
    def write[width: Int](n: Int, position: Int, filter: Int, value: SIMD[dtype, width]):
        room.put(n, position, filter, value)

    store_rows[write, nlc](at, values, row_size)


def store_placed[
    dtype: DType, kernel: StaticString, nlc: Bool
](to: Bytes, places: Bytes, at: Outputs, values: Memory[dtype], row_size: Int):
    """Stores rows of a transposed layer's columns in a `Room`."""
    var room = to.unsafe_bitcast[Room[dtype, nlc]]()[]

    @__parameter
    @always_inline
    @__copy_capture(room)
    def write[width: Int](n: Int, position: Int, filter: Int, value: SIMD[dtype, width]):
        room.put(n, position, filter, value)

    place_rows[write, kernel, False, nlc, False](places, at, values, row_size)


def compare[dtype: DType, kernel: StaticString, nlc: Bool](g: Geometry, spike: Float64 = 0) raises -> Int:
    """Runs one kernel on one layer of noise and returns whether it is right.

    A `spike` is a value in one row. It must change the outputs that depend on the row, and no others.
    """
    var state = UInt64(5)
    var channels = g.group_channels()
    var x = List[Scalar[dtype]]()
    for _ in range(g.batch * g.length * g.channels):
        x.append(noise(state).cast[dtype]())
    if spike != 0:
        x[g.length // 2 * g.channels if nlc else g.length // 2] = spike.cast[dtype]()
    var w = List[Scalar[dtype]]()
    for _ in range(g.kernel * channels * g.filters):
        w.append(noise(state).cast[dtype]())
    var plain = w.copy()
    var bias = List[Scalar[dtype]]()
    for _ in range(g.filters):
        bias.append(noise(state).cast[dtype]())
    var y = List[Scalar[dtype]](length=g.batch * g.out_length * g.filters, fill=0)
    var o = Operands[dtype](
        x.unsafe_ptr().unsafe_origin_cast[MutUntrackedOrigin](),
        w.unsafe_ptr().unsafe_origin_cast[MutUntrackedOrigin](),
        bias.unsafe_ptr().unsafe_origin_cast[MutUntrackedOrigin](),
        True,
    )

    var room = Room[dtype, nlc](y.unsafe_ptr().unsafe_origin_cast[MutUntrackedOrigin](), g.out_length, g.filters)

    @__parameter
    @always_inline
    def write[width: Int](n: Int, position: Int, filter: Int, value: SIMD[dtype, width]):
        room.put(n, position, filter, value)

    var sink = Sink[dtype](store[dtype, nlc], address(room), address(room))
    var steps = FilterSteps(channels * g.filters, g.filters, 1)
    comptime if kernel == "dense" or kernel == "short":
        comptime assert nlc
        if kernel == "short" and g.kernel * channels > 128:
            return NONE
        comptime if kernel == "short":
            conv1d_short[write](g, o)
        else:
            conv1d_dense(g, o, sink)
    elif kernel == "depthwise":
        if g.groups != g.channels or g.filters != g.channels or (not nlc and g.stride != 1):
            return NONE
        comptime if nlc or dtype == accumulator[dtype]:
            conv1d_depthwise[write, nlc](g, o)
        else:
            return NONE
    elif kernel == "lengthwise":
        conv1d_lengthwise[write, nlc](g, steps, o)
    elif kernel == "winograd":
        conv1d_winograd[nlc](g, steps, o, sink)
    elif kernel == "packed dense" or kernel == "packed winograd":
        comptime if dtype != accumulator[dtype]:
            return NONE
        else:
            w = packed[kernel == "packed winograd"](g, w)
            o.w = w.unsafe_ptr().unsafe_origin_cast[MutUntrackedOrigin]()
            comptime if kernel == "packed dense":
                comptime assert nlc
                conv1d_dense[packed=True](g, o, sink)
            else:
                conv1d_winograd[nlc, packed=True](g, steps, o, sink)
    elif kernel == "amx":
        # With its plain loops, because this processor may not have the instructions.
        comptime if dtype == DType.bfloat16:
            w = packed_pairs(g, w)
            o.w = w.unsafe_ptr().unsafe_origin_cast[MutUntrackedOrigin]()
            conv1d_amx[nlc, plain=True](g, o, sink)
        else:
            return NONE
    else:
        comptime assert kernel == "paired", "there is no such kernel"
        # Processors without the instruction may have vectors of 512 bits, too.
        comptime if dtype == DType.bfloat16 and has_vectors() and is_defined["AVX512_BF16"]():
            conv1d_paired[write, nlc](g, steps, o)
        else:
            return NONE

    var worst = 0.0
    for n in range(g.batch):
        for l in range(g.out_length):
            for f in range(g.filters):
                var want = bias[f].cast[DType.float64]()
                for k in range(g.kernel):
                    var source = row_at(g, l * g.stride - g.pad_left + k * g.dilation)
                    if source < 0:
                        continue
                    for c in range(channels):
                        var channel = f // g.group_filters() * channels + c
                        var at = (n * g.channels + channel) * g.length + source
                        comptime if nlc:
                            at = (n * g.length + source) * g.channels + channel
                        var value = plain[(k * channels + c) * g.filters + f]
                        want += x[at].cast[DType.float64]() * value.cast[DType.float64]()
                var at = (n * g.filters + f) * g.out_length + l
                comptime if nlc:
                    at = (n * g.out_length + l) * g.filters + f
                var got = y[at].cast[DType.float64]()
                if abs(want) > 1e30 or isnan(want):  # it depends on the spike
                    if (isnan(want) and isnan(got)) or got == want or abs(got - want) <= 1e-5 * abs(spike):
                        continue
                var off = abs(got - want)
                if not (off <= worst) and not isnan(worst):  # NaN is kept
                    worst = off
    _ = room
    _ = x^
    _ = w^
    _ = bias^
    var limit = 1.5e-6 * sqrt(Float64(g.kernel * channels))
    comptime if dtype == DType.bfloat16:
        limit += 0.004 * Float64(g.kernel * channels + 1)
    if worst <= limit:
        return RIGHT
    print(kernel, nlc, "is off by", worst, "of", limit, "on", g.channels, g.filters, g.kernel, g.stride, "spike", spike)
    return WRONG


def layer(
    batch: Int,
    length: Int,
    channels: Int,
    filters: Int,
    groups: Int,
    kernel: Int,
    stride: Int,
    dilation: Int,
    pad: Int,
    mode: Int,
) -> Geometry:
    var outputs = (length + 2 * pad - dilation * (kernel - 1) - 1) // stride + 1
    return Geometry(batch, length, outputs, channels, filters, groups, kernel, stride, dilation, pad, mode)


def compare_transposed[dtype: DType, kernel: StaticString, nlc: Bool](t: Transposed) raises -> Int:
    """Runs one kernel on one transposed layer of noise, with an SFC filter, and returns whether it is right."""
    comptime if kernel == "depthwise":
        if t.groups != t.channels or t.filters != t.channels:
            return NONE
    var state = UInt64(7)
    var channels = t.group_channels()
    var filters = t.group_filters()
    var x = List[Scalar[dtype]]()
    for _ in range(t.batch * t.length * t.channels):
        x.append(noise(state).cast[dtype]())
    var w = List[Scalar[dtype]]()
    for _ in range(t.kernel * filters * t.channels):
        w.append(noise(state).cast[dtype]())
    var bias = List[Scalar[dtype]]()
    for _ in range(t.filters):
        bias.append(noise(state).cast[dtype]())
    var y = List[Scalar[dtype]](length=t.batch * t.out_length * t.filters, fill=0)
    var o = Operands[dtype](
        x.unsafe_ptr().unsafe_origin_cast[MutUntrackedOrigin](),
        w.unsafe_ptr().unsafe_origin_cast[MutUntrackedOrigin](),
        bias.unsafe_ptr().unsafe_origin_cast[MutUntrackedOrigin](),
        True,
    )

    var room = Room[dtype, nlc](y.unsafe_ptr().unsafe_origin_cast[MutUntrackedOrigin](), t.out_length, t.filters)

    @__parameter
    @always_inline
    def write[width: Int](n: Int, position: Int, filter: Int, value: SIMD[dtype, width]):
        room.put(n, position, filter, value)

    var steps = FilterSteps(filters * t.channels, 1, t.channels)
    var to = store_placed[dtype, kernel, nlc]
    conv_transpose1d[write, kernel, 0, False, False, nlc, "SFC"](t, steps, channels, o, to, address(room))
    var worst = 0.0
    for n in range(t.batch):
        for l in range(t.out_length):
            for f in range(t.filters):
                var want = bias[f].cast[DType.float64]()
                for k in range(t.kernel):
                    var at = l + t.pad_left - k * t.dilation
                    if at < 0 or at % t.stride != 0 or at // t.stride >= t.length:
                        continue
                    for c in range(channels):
                        var channel = f // filters * channels + c
                        var place = (n * t.channels + channel) * t.length + at // t.stride
                        comptime if nlc:
                            place = (n * t.length + at // t.stride) * t.channels + channel
                        var value = w[(k * filters + f % filters) * t.channels + channel]
                        want += x[place].cast[DType.float64]() * value.cast[DType.float64]()
                var place = (n * t.filters + f) * t.out_length + l
                comptime if nlc:
                    place = (n * t.out_length + l) * t.filters + f
                var off = abs(y[place].cast[DType.float64]() - want)
                if not (off <= worst) and not isnan(worst):  # NaN is kept
                    worst = off
    _ = room
    _ = x^
    _ = w^
    _ = bias^
    var terms = Float64(t.kernel * channels)
    var limit = 1.5e-6 * sqrt(terms) + (0.004 * (terms + 1) if dtype == DType.bfloat16 else 0.0)
    if worst <= limit:
        return RIGHT
    print(kernel, "transposed is off by", worst, "of", limit, "on", t.channels, t.filters, t.kernel, t.stride)
    return WRONG


def compare_frames[
    relu: Bool
](chunks: Int, positions: Int, channels: Int, taps: Int, stride: Int, filters: Int) -> Bool:
    """Runs a layer of Silero's network on frames of noise, and returns whether it is right."""
    var state = UInt64(11)
    var pad = taps // 2
    var dangling = Memory[DType.float32].unsafe_dangling()
    var layer = FramesLayer(dangling, dangling, taps, stride, pad, filters)
    var x = Frames(dangling, positions, pad, channels)
    var y = Frames(dangling, layer.positions(positions), 1, filters)
    var data = List[Float32](length=chunks * x.step(), fill=0)
    var out = List[Float32](length=chunks * y.step(), fill=0)
    var w = List[Float32]()
    for _ in range(filters * taps * channels):
        w.append(noise(state).cast[DType.float32]())
    var bias = List[Float32]()
    for _ in range(filters):
        bias.append(noise(state).cast[DType.float32]())
    x.data = data.unsafe_ptr().unsafe_origin_cast[MutUntrackedOrigin]()
    y.data = out.unsafe_ptr().unsafe_origin_cast[MutUntrackedOrigin]()
    layer.w = w.unsafe_ptr().unsafe_origin_cast[MutUntrackedOrigin]()
    layer.bias = bias.unsafe_ptr().unsafe_origin_cast[MutUntrackedOrigin]()
    for n in range(chunks):
        for i in range(positions * channels):
            x.at(n, 0)[unsafe_offset=i] = noise(state).cast[DType.float32]()
    convolve[relu](layer, x, y, chunks)

    var worst = 0.0
    for n in range(chunks):
        for p in range(-1, y.positions + 1):
            for f in range(filters):
                var want = 0.0
                if 0 <= p < y.positions:
                    want = bias[f].cast[DType.float64]()
                    for k in range(taps * channels):
                        var value = w[(f // PACK * taps * channels + k) * PACK + f % PACK].cast[DType.float64]()
                        want += x.at(n, p * stride - pad)[unsafe_offset=k].cast[DType.float64]() * value
                    comptime if relu:
                        want = max(want, 0.0)
                var off = abs(y.at(n, p)[unsafe_offset=f].cast[DType.float64]() - want)
                if not (off <= worst) and not isnan(worst):  # NaN is kept
                    worst = off
    _ = data^
    _ = out^
    _ = w^
    _ = bias^
    if worst <= 1.5e-6 * sqrt(Float64(taps * channels)):
        return True
    print("frames are off by", worst, "on", chunks, positions, channels, taps, stride, filters)
    return False


def compare_spectrum(chunks: Int, positions: Int, window: Int) -> Bool:
    """Computes magnitudes of noise, and returns whether they equal a discrete Fourier transform's magnitudes."""
    var state = UInt64(12)
    var half = window // 2
    var rows = chunks * positions
    var sound = List[Float32]()
    for _ in range(rows * window):
        sound.append(noise(state).cast[DType.float32]())
    var panels = ceildiv(half // 2 + 1, FREQUENCIES)
    var w = List[Float32](length=panels * (window + 2) * FREQUENCIES, fill=0)
    for k in range(half // 2 + 1):
        var to = k // FREQUENCIES * (window + 2) * FREQUENCIES + k % FREQUENCIES
        for n in range(half + 1):
            var angle = 2 * pi * Float64(n * k) / Float64(window)
            var shape = 0.5 - 0.4 * cos(2 * pi * Float64(n) / Float64(window))
            w[to + n * FREQUENCIES] = (shape * cos(angle)).cast[DType.float32]()
            if n < half:
                w[to + (half + 2 + n) * FREQUENCIES] = (shape * sin(angle)).cast[DType.float32]()
    var folded = List[Float32](length=rows * (window + 2), fill=0)
    var x = Frames(folded.unsafe_ptr().unsafe_origin_cast[MutUntrackedOrigin](), positions, 0, window + 2)
    for row in range(rows):
        var frame = sound.unsafe_ptr().unsafe_origin_cast[MutUntrackedOrigin]().unsafe_offset(row * window)
        fold(frame, window, x.at(0, row))
    var layer = FramesLayer(w.unsafe_ptr().unsafe_origin_cast[MutUntrackedOrigin](), x.data, window, 1, 0, half + 1)
    var y = Frames(x.data, positions, 1, half + 1)
    var out = List[Float32](length=chunks * y.step(), fill=0)
    y.data = out.unsafe_ptr().unsafe_origin_cast[MutUntrackedOrigin]()
    spectrum(layer, x, y, chunks)

    var worst = 0.0
    for n in range(chunks):
        for p in range(-1, positions + 1):
            for k in range(half + 1):
                var real = 0.0
                var imaginary = 0.0
                if 0 <= p < positions:
                    for i in range(window):
                        var angle = 2 * pi * Float64(i * k) / Float64(window)
                        var shape = 0.5 - 0.4 * cos(2 * pi * Float64(i) / Float64(window))
                        var value = shape * sound[(n * positions + p) * window + i].cast[DType.float64]()
                        real += value * cos(angle)
                        imaginary += value * sin(angle)
                var want = sqrt(real * real + imaginary * imaginary)
                var off = abs(y.at(n, p)[unsafe_offset=k].cast[DType.float64]() - want)
                if not (off <= worst) and not isnan(worst):  # NaN is kept
                    worst = off
    _ = sound^
    _ = w^
    _ = folded^
    _ = out^
    if worst <= 1.5e-6 * sqrt(Float64(window)):
        return True
    print("magnitudes are off by", worst, "on", chunks, positions, window)
    return False


comptime NLC = [
    "dense",
    "short",
    "depthwise",
    "lengthwise",
    "winograd",
    "packed dense",
    "packed winograd",
    "amx",
    "paired",
]
comptime NCL = ["depthwise", "lengthwise", "winograd", "packed winograd", "amx", "paired"]


def noted(mut counts: Dict[String, Int], kernel: String, kind: String, result: Int) raises -> Bool:
    """Counts a comparison by its result, and returns whether the result was not wrong."""
    if result != NONE:
        var name = String(kernel, " ", kind)
        counts[name] = counts.get(name, 0) + 1
    return result != WRONG


def main() raises:
    var right = True
    var counts = Dict[String, Int]()
    for g in [
        layer(1, 100, 33, 65, 1, 3, 1, 1, 1, ZEROS),
        layer(2, 61, 32, 48, 1, 11, 1, 5, 25, REFLECT),
        layer(1, 90, 17, 5, 1, 7, 2, 3, 9, REPLICATE),
        layer(1, 70, 24, 36, 2, 4, 3, 1, 2, CIRCULAR),
        layer(1, 300, 1, 40, 1, 10, 5, 1, 0, ZEROS),
        layer(1, 150, 37, 37, 37, 31, 1, 1, 15, ZEROS),
        layer(2, 40, 16, 16, 16, 3, 2, 2, 1, ZEROS),
        layer(1, 64, 300, 24, 1, 9, 1, 2, 8, ZEROS),
    ]:
        comptime for kernel in NLC:
            right = noted(counts, kernel, "NLC", compare[DType.float32, kernel, True](g)) and right
            right = noted(counts, kernel, "NLC", compare[DType.bfloat16, kernel, True](g)) and right
        comptime for kernel in NCL:
            right = noted(counts, kernel, "NCL", compare[DType.float32, kernel, False](g)) and right
            right = noted(counts, kernel, "NCL", compare[DType.bfloat16, kernel, False](g)) and right
        for spike in [inf[DType.float64](), -inf[DType.float64](), 1e38, nan[DType.float64]()]:
            comptime for kernel in ["winograd", "packed winograd"]:
                right = noted(counts, "spiked", "NLC", compare[DType.float32, kernel, True](g, spike)) and right
                right = noted(counts, "spiked", "NCL", compare[DType.float32, kernel, False](g, spike)) and right
    for t in [
        Transposed(1, 30, 61, 33, 65, 1, 4, 2, 1, 1),
        Transposed(2, 11, 50, 32, 48, 2, 11, 5, 1, 4),
        Transposed(1, 9, 60, 5, 3, 1, 3, 6, 4, 0),
        Transposed(1, 20, 41, 24, 24, 24, 3, 2, 3, 2),
    ]:
        comptime for kernel in ["dense", "depthwise", "lengthwise", "winograd"]:
            right = noted(counts, kernel, "transposed", compare_transposed[DType.float32, kernel, True](t)) and right
            right = noted(counts, kernel, "transposed", compare_transposed[DType.bfloat16, kernel, True](t)) and right
        comptime for kernel in ["lengthwise", "winograd"]:
            right = noted(counts, kernel, "transposed", compare_transposed[DType.float32, kernel, False](t)) and right
    for chunks in [1, 3, 14, 33]:
        right = compare_frames[True](chunks, 4, 37, 3, 1, 64) and right
        right = compare_frames[True](chunks, 4, 8, 3, 2, 32) and right
        right = compare_frames[False](chunks, 1, 40, 1, 1, 96) and right
        right = compare_spectrum(chunks, 3, 64) and right
        right = compare_spectrum(chunks, 4, 192) and right
        counts["frames"] = counts.get("frames", 0) + 5
    print("right" if right else "wrong")
    for entry in counts.items():
        print(entry.key, "=", entry.value)
    if not right:
        exit(1)
