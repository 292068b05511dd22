"""Silero's voice activity detection in one operation.

Its layers are so small that on a live chunk MAX takes longer to pass from one operation to the next than they take to
compute. Here a few chunks go through all layers together, in memory that stays in the cache, and the LSTM follows.

Filters stand in panels, (panels, taps * channels, 32). A panel of the spectrum holds the cosines of 16 frequencies and
then their sines, so that magnitudes are made of sums that are still in registers.
"""

from std.math import ceildiv, sqrt
from std.sys.info import simd_width_of

from .dense import VECTORS, accumulate, tile_rows
from .lanes import PACK, Memory, Scratch, load, spread, store, workers
from .lstm import GATES, Lstm, lstm_cpu, sigmoid

comptime F32 = DType.float32
comptime WIDTH = simd_width_of[F32]()
comptime PANEL_VECTORS = PACK // WIDTH
comptime ROWS = tile_rows[F32]() * VECTORS // PANEL_VECTORS
"""Rows of a register tile, and chunks that go through the layers together."""
comptime FEW_ROWS = 4

comptime MAGNITUDE = 0
"""What the first layer gives: of its sums in pairs. The last layer is linear, the projection to the LSTM's gates."""
comptime RELU = 1
comptime LINEAR = 2


@fieldwise_init
struct Layer(ImplicitlyCopyable, TrivialRegisterPassable):
    """A convolution of short frames, which sees `pad` zeros before and behind each."""

    var w: Memory[F32]
    var bias: Memory[F32]
    var taps: Int
    var stride: Int
    var pad: Int
    var filters: Int


@fieldwise_init
struct Frames(ImplicitlyCopyable, TrivialRegisterPassable):
    """Data of some chunks, (chunks, pad + positions + pad, channels), zeros in the padding."""

    var data: Memory[F32]
    var positions: Int
    var pad: Int
    var channels: Int

    @always_inline
    def step(self) -> Int:
        """From a chunk to the next."""
        return (self.positions + 2 * self.pad) * self.channels

    @always_inline
    def at(self, chunk: Int, position: Int) -> Memory[F32]:
        return self.data.unsafe_offset(chunk * self.step() + (self.pad + position) * self.channels)


@fieldwise_init
struct Network(Copyable):
    """The input and the weights of a call."""

    var chunks: Memory[F32]  # (batch, steps, hop)
    var context: Memory[F32]  # (batch, before): the samples before the first chunk
    var steps: Int
    var hop: Int
    var before: Int
    var reflected: Int
    var layers: List[Layer]

    def add(mut self, taps: Int, stride: Int, pad: Int, filters: Int, w: Memory[F32]) -> Memory[F32]:
        """Adds a layer whose panels and bias stand at `w`; returns where they end."""
        var channels = self.layers[len(self.layers) - 1].filters if self.layers else 1
        var panels = ceildiv(filters, PACK if self.layers else PACK // 2)
        var bias = w.unsafe_offset(panels * taps * channels * PACK)
        self.layers.append(Layer(w, bias, taps, stride, pad, filters))
        return bias.unsafe_offset(panels * PACK)

    def multiplications(self) -> Int:
        """Those of a chunk, roughly: every layer's filters once a position."""
        var count = 0
        var positions = self.before + self.hop + self.reflected
        var channels = 1
        for layer in self.layers:
            positions = (positions + 2 * layer.pad - layer.taps) // layer.stride + 1
            count += positions * layer.taps * channels * layer.filters
            channels = layer.filters
        return count

    def sound(self, n: Int, to: Memory[F32]):
        """Copies chunk `n` behind the samples before it, and mirrors its end."""
        var chunk = self.chunks.unsafe_offset(n * self.hop)
        var before = chunk.unsafe_offset(-self.before)
        if n % self.steps == 0:
            before = self.context.unsafe_offset(n // self.steps * self.before)
        var end = self.before + self.hop
        for i in range(self.before):
            to[unsafe_offset=i] = before[unsafe_offset=i]
        for i in range(self.hop):
            to[unsafe_offset=self.before + i] = chunk[unsafe_offset=i]
        for i in range(self.reflected):
            to[unsafe_offset=end + i] = to[unsafe_offset=end - 2 - i]


@fieldwise_init
struct Product(ImplicitlyCopyable, TrivialRegisterPassable):
    """Rows of values, to be multiplied with panels of which `terms` rows are used."""

    var x: Memory[F32]
    var x_step: Int
    var rows: Int
    var w: Memory[F32]
    var terms: Int
    var panel_size: Int
    var bias: Memory[F32]
    var y: Memory[F32]
    var y_step: Int
    var columns: Int


@always_inline
def rectified(x: SIMD[F32, WIDTH]) -> SIMD[F32, WIDTH]:
    """Returns what is positive, zeros elsewhere; a NaN stays one."""
    return x.lt(0).select(SIMD[F32, WIDTH](0), x)


@always_inline
def tile[rows: Int, kind: Int](p: Product, row: Int, panel: Int):
    """Multiplies `rows` rows from `row` on with a panel."""
    comptime half = PANEL_VECTORS // 2
    var sum = Array[SIMD[F32, WIDTH], rows * PANEL_VECTORS](fill=SIMD[F32, WIDTH](0))
    comptime if kind != MAGNITUDE:
        comptime for j in range(PANEL_VECTORS):
            var bias = p.bias.unsafe_offset(panel * PACK + j * WIDTH).unsafe_load[width=WIDTH]()
            comptime for i in range(rows):
                sum[i * PANEL_VECTORS + j] = bias
    var x = p.x.unsafe_offset(row * p.x_step)
    var w = p.w.unsafe_offset(panel * p.panel_size)
    accumulate[rows, PANEL_VECTORS, False](sum, x, 0, p.x_step, w, 0, PACK, 1, p.terms, WIDTH)
    comptime for i in range(rows):
        comptime if kind == MAGNITUDE:
            var first = panel * half * WIDTH
            comptime for j in range(half):
                var real = sum[i * PANEL_VECTORS + j]
                var imaginary = sum[i * PANEL_VECTORS + half + j]
                var value = sqrt(real.fma(real, imaginary * imaginary))
                var to = p.y.unsafe_offset((row + i) * p.y_step + first + j * WIDTH)
                store[F32, WIDTH, True](to, value, p.columns - first - j * WIDTH)
        else:
            comptime for j in range(PANEL_VECTORS):
                var value = sum[i * PANEL_VECTORS + j]
                comptime if kind == RELU:
                    value = rectified(value)
                p.y.unsafe_offset((row + i) * p.y_step + panel * PACK + j * WIDTH).unsafe_store(value)


def multiply[kind: Int](p: Product):
    """Multiplies all rows with all panels."""
    for panel in range(ceildiv(p.columns, PACK // 2 if kind == MAGNITUDE else PACK)):
        var row = 0
        while row + ROWS <= p.rows:
            tile[ROWS, kind](p, row, panel)
            row += ROWS
        while row + FEW_ROWS <= p.rows:
            tile[FEW_ROWS, kind](p, row, panel)
            row += FEW_ROWS
        while row < p.rows:
            tile[1, kind](p, row, panel)
            row += 1


def convolve[kind: Int](layer: Layer, x: Frames, y: Frames, chunks: Int):
    """Computes a layer of some chunks."""
    var all_terms = layer.taps * x.channels
    var p = Product(
        x.data, layer.stride * x.channels, y.positions, layer.w, all_terms, all_terms * PACK, layer.bias, y.data,
        y.channels, y.channels,
    )
    if chunks < y.positions:
        for n in range(chunks):
            p.x = x.at(n, -layer.pad)
            p.y = y.at(n, 0)
            multiply[kind](p)
        return
    # One position of all chunks at a time, without its taps in the padding.
    p.x_step = x.step()
    p.y_step = y.step()
    p.rows = chunks
    for position in range(y.positions):
        var start = position * layer.stride - layer.pad
        var first_tap = max(0, -start)
        var taps = min(layer.taps, x.positions - start) - first_tap
        p.x = x.at(0, start + first_tap)
        p.w = layer.w.unsafe_offset(first_tap * x.channels * PACK)
        p.terms = taps * x.channels
        p.y = y.at(0, position)
        multiply[kind](p)


def features(net: Network, first: Int, end: Int, gates: Memory[F32]):
    """Takes the chunks from `first` to `end` through all layers; `gates` is (chunks, 4 * units)."""
    var frames: List[Frames] = [Frames(gates, net.before + net.hop + net.reflected, 0, 1)]
    var most = min(ROWS, end - first)
    var size = 0
    var last = len(net.layers) - 1
    for i in range(last + 1):
        var layer = net.layers[i]
        frames[i].pad = layer.pad
        size += most * frames[i].step()
        var positions = (frames[i].positions + 2 * layer.pad - layer.taps) // layer.stride + 1
        frames.append(Frames(gates, positions, 0, layer.filters))
    var scratch = Scratch[F32](size)
    var next = scratch.data()
    for i in range(size):
        next[unsafe_offset=i] = 0
    for i in range(last + 1):
        frames[i].data = next
        next = next.unsafe_offset(most * frames[i].step())

    for chunk in range(first, end, ROWS):
        var chunks = min(ROWS, end - chunk)
        for n in range(chunks):
            net.sound(chunk + n, frames[0].at(n, 0))
        frames[last + 1].data = gates.unsafe_offset(chunk * frames[last + 1].step())
        convolve[MAGNITUDE](net.layers[0], frames[0], frames[1], chunks)
        for i in range(1, last):
            convolve[RELU](net.layers[i], frames[i], frames[i + 1], chunks)
        convolve[LINEAR](net.layers[last], frames[last], frames[last + 1], chunks)
    _ = scratch^


def silero_vad(net: Network, var s: Lstm[F32], head: Memory[F32], probability: Memory[F32], context: Memory[F32]):
    """Computes a call. `s` lacks what is made here: the place of its input and its output."""
    var chunks = s.batch * s.steps
    var room = Scratch[F32](chunks * (GATES + 1) * s.units)
    s.x = room.data()
    s.output = s.x.unsafe_offset(chunks * GATES * s.units)
    var threads = workers(chunks * net.multiplications())
    var share = max(ceildiv(chunks, threads), 1)
    if share > ROWS:  # each task makes room of its own: few tasks, and enough to go round evenly
        share = ceildiv(ceildiv(chunks, ROWS), 4 * threads) * ROWS

    def some(i: Int) {imm}:
        features(net, i * share, min((i + 1) * share, chunks), s.x)

    spread(some, ceildiv(chunks, share), threads)
    lstm_cpu(s)
    for i in range(chunks):
        var sum = SIMD[F32, WIDTH](0)
        for unit in range(0, s.units, WIDTH):
            var hidden = load[F32, WIDTH, True](s.output.unsafe_offset(i * s.units + unit), s.units - unit)
            sum = rectified(hidden).fma(load[F32, WIDTH, True](head.unsafe_offset(unit), s.units - unit), sum)
        probability[unsafe_offset=i] = sigmoid(sum.reduce_add() + head[unsafe_offset=s.units])
    for n in range(s.batch):
        var end = net.chunks.unsafe_offset((n + 1) * s.steps * net.hop - net.before)
        for i in range(net.before):
            context[unsafe_offset=n * net.before + i] = end[unsafe_offset=i]
    _ = room^
