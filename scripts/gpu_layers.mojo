"""Checks and times the GPU's kernels on layers of real networks, without Python and without MAX's compiler.

    mojo build --target-accelerator sm_90a -I FOLDER scripts/gpu_layers.mojo -o gpu_layers

FOLDER has a link named `kernels` to `max_conv/conv/kernels`. The program has 2 MB. It runs on a machine without MAX. It
needs four of MAX's libraries (libKGENCompilerRTShared, libAsyncRTMojoBindings, libAsyncRTRuntimeGlobals,
libMSupportGlobals) on LD_LIBRARY_PATH, and NVIDIA's ptxas at MODULAR_NVPTX_COMPILER_PATH. `gpu_peers.py` times PyTorch
on the same layers.

Every layer's output is first filled with NaN. Up to a million outputs are compared with sums in float64 that the GPU
computes from the definition; the error is the norm of all differences, as a part of the norm of the sums.
"""

from kernels.geometry import REFLECT, ZEROS, Geometry
from kernels.gpu.hopper import hopper
from kernels.gpu.rows import lines, rows
from kernels.gpu.tiles import tiles, values
from kernels.lanes import Memory
from max.gpu import global_idx
from max.gpu.host import DeviceContext
from std.math import ceildiv, sqrt
from std.sys.info import size_of
from std.time import perf_counter_ns

comptime SAMPLES = 1 << 20
comptime F = DType.float32
comptime B = DType.bfloat16
comptime REPEATS = 20
comptime TRIES = 3


def fill[dtype: DType](p: Memory[dtype], size: Int, seed: UInt64, scale: Float32, ctx: DeviceContext) raises:
    """Fills memory with numbers between -scale and scale that differ from each other."""

    @__parameter
    def task(size: Int64):
        var i = Int(global_idx.x)
        if i < Int(size):
            var z = (UInt64(i) + seed) * 0x9E3779B97F4A7C15
            z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
            z = (z ^ (z >> 27)) * 0x94D049BB133111EB
            var unit = ((z >> 40).cast[DType.float32]() - 8388608.0) / 8388608.0
            p.unsafe_offset(i).unsafe_store((unit * scale).cast[dtype]())

    ctx.enqueue_function[task](Int64(size), grid_dim=ceildiv(size, 256), block_dim=256)


def layer[
    dtype: DType, kernel: StaticString, positions: Int, width: Int, blocks: Int, whole: Bool, nlc: Bool = True
](name: StaticString, g: Geometry, ctx: DeviceContext) raises:
    """Checks and times one layer by "tiles", "rows" or "hopper", in a tile of `positions` and `width` filters."""
    comptime fsc = kernel == "hopper"
    var size = g.batch * g.out_length * g.filters
    var count = g.batch * g.length * g.channels
    var inner = g.group_channels()
    var x_room = ctx.enqueue_create_buffer[dtype](count)
    var w_room = ctx.enqueue_create_buffer[dtype](g.kernel * inner * g.filters)
    var y_room = ctx.enqueue_create_buffer[dtype](size)
    var off_room = ctx.enqueue_create_buffer[DType.float64](SAMPLES)
    var sum_room = ctx.enqueue_create_buffer[DType.float64](SAMPLES)
    var x = x_room.unsafe_ptr().unsafe_origin_cast[MutUntrackedOrigin]()
    var w = w_room.unsafe_ptr().unsafe_origin_cast[MutUntrackedOrigin]()
    var y = y_room.unsafe_ptr().unsafe_origin_cast[MutUntrackedOrigin]()
    var off = off_room.unsafe_ptr().unsafe_origin_cast[MutUntrackedOrigin]()
    var sums = sum_room.unsafe_ptr().unsafe_origin_cast[MutUntrackedOrigin]()
    fill[dtype](x, count, 1, 1, ctx)
    fill[dtype](w, g.kernel * inner * g.filters, 1 << 40, 0.1, ctx)
    y_room.enqueue_fill(Scalar[dtype](0) / Scalar[dtype](0))

    @__parameter
    @always_inline
    @__copy_capture(y, g)
    def put[lanes: Int](n: Int, position: Int, filter: Int, value: SIMD[DType.float32, lanes]):
        comptime alignment = lanes * size_of[Scalar[dtype]]()
        var at = (n * g.out_length + position) * g.filters + filter
        comptime if not nlc:
            at = (n * g.filters + filter) * g.out_length + position
        y.unsafe_offset(at).unsafe_store[alignment=alignment](value.cast[dtype]())

    @__parameter
    def once() raises:
        comptime vector = 4 if whole else 1
        comptime if kernel == "hopper":
            hopper[put, positions, width, blocks, whole](g, x, w, ctx)
        elif kernel == "tiles":
            tiles[put, nlc, positions, width, vector](g, x, w, ctx)
        elif nlc:
            rows[put, vector](g, x, w, ctx)
        else:
            lines[put](g, x, w, ctx)

    @__parameter
    @__copy_capture(x, w, y, off, sums, g, inner)
    def compare(samples: Int64, step: Int64):
        var i = Int(global_idx.x)
        if i >= Int(samples):
            return
        var at = i * Int(step) + i % Int(step)
        var filter = at % g.filters
        var position = at // g.filters % g.out_length
        var n = at // g.filters // g.out_length
        comptime if not nlc:
            position = at % g.out_length
            filter = at // g.out_length % g.filters
            n = at // g.out_length // g.filters
        var sum = Float64(0)
        for k in range(g.kernel):
            var row = g.source(position * g.stride + k * g.dilation - g.pad_left)
            if row >= 0:
                for c in range(inner):
                    var channel = filter // g.group_filters() * inner + c
                    var from_ = (n * g.length + row) * g.channels + channel
                    comptime if not nlc:
                        from_ = (n * g.channels + channel) * g.length + row
                    var tap = (k * inner + c) * g.filters + filter
                    comptime if fsc:
                        tap = (filter * g.kernel + k) * inner + c
                    sum += x[unsafe_offset=from_].cast[DType.float64]() * w[unsafe_offset=tap].cast[DType.float64]()
        off.unsafe_offset(i).unsafe_store(y[unsafe_offset=at].cast[DType.float64]() - sum)
        sums.unsafe_offset(i).unsafe_store(sum)

    once()
    var samples = min(size, SAMPLES)
    ctx.enqueue_function[compare](
        Int64(samples), Int64(max(1, size // SAMPLES)), grid_dim=ceildiv(samples, 256), block_dim=256
    )
    ctx.synchronize()
    var error = Float64(0)
    var norm = Float64(0)
    with off_room.map_to_host() as offs, sum_room.map_to_host() as exact:
        for i in range(samples):
            error += offs[i] * offs[i]
            norm += exact[i] * exact[i]
    error = sqrt(error / norm)
    var limit = 4e-3 if dtype == B else 1e-3 if kernel == "hopper" else 3e-6
    var best = Float64(1e30)
    for _ in range(TRIES):
        var start = perf_counter_ns()
        for _ in range(REPEATS):
            once()
        ctx.synchronize()
        best = min(best, Float64(perf_counter_ns() - start) / 1e6 / REPEATS)
    var operations = 2.0 * Float64(size) * Float64(g.kernel * inner)
    var moved = Float64((count + size) * size_of[Scalar[dtype]]())
    print(
        name,
        "float32" if dtype == F else "bfloat16",
        "NLC" if nlc else "NCL",
        String(kernel, width),
        "right" if error < limit else "WRONG",
        Float32(error),
        "ms",
        Float32(best),
        "TFLOP/s",
        Float32(operations / best / 1e9),
        "TB/s",
        Float32(moved / best / 1e9),
        flush=True,
    )
    _ = x_room^  # or its memory would be freed before the kernel has run
    _ = w_room^
    _ = y_room^


def small(ctx: DeviceContext) raises:
    """Odd sizes around the tiles."""
    layer[F, "tiles", 128, 128, 2, False]("odd", Geometry(2, 301, 149, 13, 37, 1, 5, 2, 3, 4, ZEROS), ctx)
    layer[F, "tiles", 256, 32, 2, False]("reflect", Geometry(2, 301, 149, 13, 37, 1, 5, 2, 3, 4, REFLECT), ctx)
    layer[F, "tiles", 256, 64, 2, False, False]("odd", Geometry(2, 301, 149, 13, 37, 1, 5, 2, 3, 4, ZEROS), ctx)
    layer[B, "tiles", 256, 32, 2, True]("groups", Geometry(2, 257, 257, 64, 96, 4, 3, 1, 1, 1, ZEROS), ctx)
    layer[F, "rows", 0, 0, 0, True]("strided depthwise", Geometry(2, 301, 149, 64, 64, 64, 7, 2, 2, 4, ZEROS), ctx)
    layer[F, "rows", 0, 0, 0, False, False]("depthwise", Geometry(2, 3001, 3001, 61, 61, 61, 7, 1, 2, 6, ZEROS), ctx)
    layer[B, "hopper", 128, 192, 1, True]("dense", Geometry(2, 300, 300, 80, 200, 1, 3, 1, 1, 1, ZEROS), ctx)
    layer[B, "hopper", 256, 128, 1, False]("odd filters", Geometry(2, 300, 300, 80, 203, 1, 3, 1, 1, 1, ZEROS), ctx)
    layer[B, "hopper", 128, 64, 3, True]("groups", Geometry(2, 300, 300, 96, 64, 2, 7, 1, 3, 9, ZEROS), ctx)
    layer[B, "hopper", 128, 32, 3, True]("many taps", Geometry(2, 900, 901, 48, 48, 1, 128, 1, 1, 64, ZEROS), ctx)
    layer[B, "hopper", 256, 128, 1, True]("far taps", Geometry(2, 9000, 9512, 64, 128, 1, 2, 1, 512, 512, ZEROS), ctx)


def main() raises:
    with DeviceContext() as ctx:
        print(ctx.name())
        small(ctx)
        var whisper = Geometry(8, 3000, 3000, 384, 384, 1, 3, 1, 1, 1, ZEROS)
        var hifigan = Geometry(8, 20000, 20000, 128, 128, 1, 11, 1, 5, 25, ZEROS)
        var hifigan64 = Geometry(8, 40000, 40000, 64, 64, 1, 7, 1, 3, 9, ZEROS)
        var hifigan32 = Geometry(8, 80000, 80000, 32, 32, 1, 7, 1, 3, 9, ZEROS)
        var wide = Geometry(8, 8192, 8192, 1024, 1024, 1, 3, 1, 1, 1, ZEROS)
        var positional = Geometry(8, 1500, 1501, 768, 768, 16, 128, 1, 1, 64, ZEROS)
        var one_channel = Geometry(8, 160000, 31999, 1, 512, 1, 10, 5, 1, 0, ZEROS)
        var strided = Geometry(8, 6400, 3200, 512, 512, 1, 3, 2, 1, 1, ZEROS)
        var depthwise7 = Geometry(8, 20000, 20000, 512, 512, 512, 7, 1, 1, 3, ZEROS)
        var depthwise31 = Geometry(8, 20000, 20000, 512, 512, 512, 31, 1, 1, 15, ZEROS)
        layer[F, "tiles", 128, 128, 2, True]("Whisper conv1", whisper, ctx)
        layer[F, "tiles", 128, 128, 2, True]("HiFi-GAN 128", hifigan, ctx)
        layer[F, "tiles", 256, 64, 2, True]("HiFi-GAN 64", hifigan64, ctx)
        layer[F, "tiles", 256, 32, 2, True]("HiFi-GAN 32", hifigan32, ctx)
        layer[F, "tiles", 128, 128, 2, True]("1,024 channels", wide, ctx)
        layer[F, "tiles", 256, 64, 2, True]("wav2vec2 positional", positional, ctx)
        layer[F, "tiles", 128, 128, 2, False]("wav2vec2 conv0", one_channel, ctx)
        layer[F, "tiles", 128, 128, 2, True]("wav2vec2 conv1", strided, ctx)
        layer[F, "tiles", 256, 64, 2, True, False]("Whisper conv1", whisper, ctx)
        layer[F, "tiles", 256, 64, 2, True, False]("HiFi-GAN 128", hifigan, ctx)
        layer[F, "tiles", 256, 64, 2, True, False]("HiFi-GAN 64", hifigan64, ctx)
        layer[F, "rows", 0, 0, 0, True]("depthwise 7", depthwise7, ctx)
        layer[F, "rows", 0, 0, 0, True]("depthwise 31", depthwise31, ctx)
        layer[B, "rows", 0, 0, 0, True]("depthwise 7", depthwise7, ctx)
        layer[B, "rows", 0, 0, 0, True]("depthwise 31", depthwise31, ctx)
        layer[F, "rows", 0, 0, 0, True, False]("depthwise 7", depthwise7, ctx)
        layer[F, "rows", 0, 0, 0, True, False]("depthwise 31", depthwise31, ctx)
        layer[B, "hopper", 128, 192, 1, True]("Whisper conv1", whisper, ctx)
        layer[B, "hopper", 256, 128, 1, True]("HiFi-GAN 128", hifigan, ctx)
        layer[B, "hopper", 128, 64, 3, True]("HiFi-GAN 64", hifigan64, ctx)
        layer[B, "hopper", 128, 32, 3, True]("HiFi-GAN 32", hifigan32, ctx)
        layer[B, "hopper", 256, 128, 1, True]("1,024 channels", wide, ctx)
        layer[B, "hopper", 128, 64, 3, True]("wav2vec2 positional", positional, ctx)
