"""Runs every CPU kernel against plain loops, on the processor that this was compiled for; prints what is wrong."""

from std.math import ceildiv, cos, pi, sin, sqrt
from std.sys import exit
from std.sys.info import simd_width_of

from kernels.dense import conv1d_dense
from kernels.depthwise import conv1d_depthwise
from kernels.geometry import CIRCULAR, Geometry, REFLECT, REPLICATE, ZEROS
from kernels.lanes import PACK, FilterSteps, Memory, Operands, accumulator
from kernels.lengthwise import conv1d_lengthwise
from kernels.paired import conv1d_paired, has_pairs
from kernels.points import Plan, TAPS, filter_points
from kernels.silero import FREQUENCIES, Frames, Layer as FramesLayer, convolve, fold, spectrum
from kernels.transposed import Transposed, conv_transpose1d
from kernels.winograd import conv1d_winograd

comptime KERNELS = 13


def noise(mut state: UInt64) -> Float64:
    """Returns a number between -1 and 1."""
    state = state * 6364136223846793005 + 1442695040888963407
    return Float64(state >> 40) / Float64(1 << 23) - 1


def packed[dtype: DType, //, points: Bool](g: Geometry, w: List[Scalar[dtype]]) -> List[Scalar[dtype]]:
    """Packs an SCF filter: (group and panel, tap or product, channel, filter), as `max_conv/packing.py` does."""
    comptime width = simd_width_of[dtype]()
    var plan = Plan(g)
    var rows = plan.products() if points else g.kernel
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
                for group in range(len(plan.sizes)):
                    comptime for size in range(1, TAPS + 1):
                        if plan.sizes[group] == size:
                            var taps = Array[SIMD[dtype, width], size](fill=0)
                            comptime for k in range(size):
                                taps[k] = w[((plan.first[group] + k * plan.step) * channels + c) * g.filters + f]
                            var values = filter_points[size](taps)
                            comptime for p in range(size + TAPS):
                                to[at + (plan.bases[p] + group) * channels * PACK] = values[p][0]
    return to^


def compare[dtype: DType, kernel: Int](g: Geometry) -> Bool:
    """Runs one kernel on one layer of noise and tells whether it is right. Even kernels take NLC data, odd ones NCL."""
    comptime nlc = kernel % 2 == 0
    var state = UInt64(kernel + 1)
    var channels = g.group_channels()
    var x = List[Scalar[dtype]]()
    for _ in range(g.batch * g.length * g.channels):
        x.append(noise(state).cast[dtype]())
    var w = List[Scalar[dtype]]()
    for _ in range(g.kernel * channels * g.filters):
        w.append(noise(state).cast[dtype]())
    var plain = w.copy()
    var bias = List[Scalar[dtype]]()
    for _ in range(g.filters):
        bias.append(noise(state).cast[dtype]())
    var y = List[Scalar[dtype]](length=g.batch * g.out_length * g.filters, fill=0)
    var out = y.unsafe_ptr().unsafe_origin_cast[MutUntrackedOrigin]()
    var o = Operands[dtype](
        x.unsafe_ptr().unsafe_origin_cast[MutUntrackedOrigin](),
        w.unsafe_ptr().unsafe_origin_cast[MutUntrackedOrigin](),
        bias.unsafe_ptr().unsafe_origin_cast[MutUntrackedOrigin](),
        True,
    )

    @__parameter
    @always_inline
    def write[width: Int](n: Int, position: Int, filter: Int, value: SIMD[dtype, width]):
        comptime if nlc:
            out.unsafe_offset((n * g.out_length + position) * g.filters + filter).unsafe_store(value)
        else:
            out.unsafe_offset((n * g.filters + filter) * g.out_length + position).unsafe_store(value)

    var steps = FilterSteps(channels * g.filters, g.filters, 1)
    comptime if kernel == 0:
        conv1d_dense[write, False](g, o)
    elif kernel == 2:
        if g.kernel * channels > 128:
            return True
        conv1d_dense[write, True](g, o)
    elif kernel == 4:
        if g.groups != g.channels or g.filters != g.channels:
            return True
        conv1d_depthwise[write, nlc](g, o)
    elif kernel == 6 or kernel == 1:
        conv1d_lengthwise[write, nlc](g, steps, o)
    elif kernel == 8 or kernel == 3:
        conv1d_winograd[write, nlc](g, steps, o)
    elif kernel == 10 or kernel == 12:
        comptime if dtype == accumulator[dtype]:
            w = packed[kernel == 12](g, w)
            o.w = w.unsafe_ptr().unsafe_origin_cast[MutUntrackedOrigin]()
            comptime if kernel == 10:
                conv1d_dense[write, False, packed=True](g, o)
            else:
                conv1d_winograd[write, nlc, packed=True](g, steps, o)
        else:
            return True
    elif kernel == 5 or kernel == 7:
        comptime if dtype == DType.bfloat16 and has_pairs():
            conv1d_paired[write, nlc](g, steps, o)
        else:
            return True
    else:
        return True

    var worst = 0.0
    for n in range(g.batch):
        for l in range(g.out_length):
            for f in range(g.filters):
                var want = bias[f].cast[DType.float64]()
                for k in range(g.kernel):
                    var source = g.source(l * g.stride - g.pad_left + k * g.dilation)
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
                var off = abs(y[at].cast[DType.float64]() - want)
                if not (off <= worst):  # NaN is kept
                    worst = off
    _ = out
    _ = x^
    _ = w^
    _ = bias^
    var limit = 1.5e-6 * sqrt(Float64(g.kernel * channels))
    comptime if dtype == DType.bfloat16:
        limit += 0.004 * Float64(g.kernel * channels + 1)
    if worst <= limit:
        return True
    print("kernel", kernel, "is off by", worst, "of", limit, "on", g.channels, g.filters, g.kernel, g.stride)
    return False


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


def compare_transposed[dtype: DType, kernel: StaticString, nlc: Bool](t: Transposed) raises -> Bool:
    """Runs one kernel on one transposed layer of noise, with an SFC filter, and tells whether it is right."""
    comptime if kernel == "depthwise":
        if t.groups != t.channels or t.filters != t.channels:
            return True
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
    var out = y.unsafe_ptr().unsafe_origin_cast[MutUntrackedOrigin]()
    var o = Operands[dtype](
        x.unsafe_ptr().unsafe_origin_cast[MutUntrackedOrigin](),
        w.unsafe_ptr().unsafe_origin_cast[MutUntrackedOrigin](),
        bias.unsafe_ptr().unsafe_origin_cast[MutUntrackedOrigin](),
        True,
    )

    @__parameter
    @always_inline
    def write[width: Int](n: Int, position: Int, filter: Int, value: SIMD[dtype, width]):
        comptime if nlc:
            out.unsafe_offset((n * t.out_length + position) * t.filters + filter).unsafe_store(value)
        else:
            out.unsafe_offset((n * t.filters + filter) * t.out_length + position).unsafe_store(value)

    var steps = FilterSteps(filters * t.channels, 1, t.channels)
    conv_transpose1d[write, kernel, 0, False, False, nlc, "SFC"](t, steps, channels, o)
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
                if not (off <= worst):  # NaN is kept
                    worst = off
    _ = out
    _ = x^
    _ = w^
    _ = bias^
    var terms = Float64(t.kernel * channels)
    var limit = 1.5e-6 * sqrt(terms) + (0.004 * (terms + 1) if dtype == DType.bfloat16 else 0.0)
    if worst <= limit:
        return True
    print(kernel, "transposed is off by", worst, "of", limit, "on", t.channels, t.filters, t.kernel, t.stride)
    return False


def compare_frames[relu: Bool](chunks: Int, positions: Int, channels: Int, taps: Int, stride: Int, filters: Int) -> Bool:
    """Runs a layer of Silero's network on frames of noise, and tells whether it is right."""
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
                if not (off <= worst):  # NaN is kept
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
    """Computes magnitudes of noise, and tells whether they are those of a discrete Fourier transform."""
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
                if not (off <= worst):  # NaN is kept
                    worst = off
    _ = sound^
    _ = w^
    _ = folded^
    _ = out^
    if worst <= 1.5e-6 * sqrt(Float64(window)):
        return True
    print("magnitudes are off by", worst, "on", chunks, positions, window)
    return False


def main() raises:
    var right = True
    var runs = 0
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
        comptime for kernel in range(KERNELS):
            right = compare[DType.float32, kernel](g) and right
            right = compare[DType.bfloat16, kernel](g) and right
            runs += 2
    for t in [
        Transposed(1, 30, 61, 33, 65, 1, 4, 2, 1, 1),
        Transposed(2, 11, 50, 32, 48, 2, 11, 5, 1, 4),
        Transposed(1, 9, 60, 5, 3, 1, 3, 6, 4, 0),
        Transposed(1, 20, 41, 24, 24, 24, 3, 2, 3, 2),
    ]:
        comptime for kernel in ["dense", "depthwise", "lengthwise", "winograd"]:
            right = compare_transposed[DType.float32, kernel, True](t) and right
            right = compare_transposed[DType.bfloat16, kernel, True](t) and right
            runs += 2
        comptime for kernel in ["lengthwise", "winograd"]:
            right = compare_transposed[DType.float32, kernel, False](t) and right
            runs += 1
    for chunks in [1, 3, 14, 33]:
        right = compare_frames[True](chunks, 4, 37, 3, 1, 64) and right
        right = compare_frames[True](chunks, 4, 8, 3, 2, 32) and right
        right = compare_frames[False](chunks, 1, 40, 1, 1, 96) and right
        right = compare_spectrum(chunks, 3, 64) and right
        right = compare_spectrum(chunks, 4, 192) and right
        runs += 5
    print("right" if right else "wrong", runs)
    if not right:
        exit(1)
