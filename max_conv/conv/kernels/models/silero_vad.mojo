"""Silero's voice activity detection in one operation.

Its layers are so small that on a live chunk MAX takes longer to pass from one operation to the next than they take to
compute. Here a few chunks go through all layers together, in memory that stays in the cache, and the LSTM follows.

Filters are stored in panels, (panels, taps * channels, 32). For the spectrum's filters see `spectrum_tile`.
"""

from std.math import ceildiv, sqrt
from std.sys.info import simd_width_of

from ..dense import VECTORS, Taps, accumulate, tile_rows
from ..lanes import PACK, Memory, Scratch, load, store
from ..recurrent.lstm import GATES, Lstm, Sequence, lstm_cpu, sigmoid
from ..tasks import Queue, together, workers
from ..window import Rows

comptime F32 = DType.float32
comptime WIDTH = simd_width_of[F32]()
comptime PANEL_VECTORS = PACK // WIDTH
comptime ROWS = tile_rows[F32]() * VECTORS // PANEL_VECTORS
"""Rows of a register tile, and chunks that go through the layers together."""
comptime FEW_ROWS = 4
comptime FREQUENCIES = 16
"""Frequencies of a panel of the spectrum."""


@fieldwise_init
struct Layer(ImplicitlyCopyable, TrivialRegisterPassable):
    """A convolution of short frames, which sees `pad` zeros before and after each."""

    var w: Memory[F32]
    var bias: Memory[F32]
    var taps: Int
    var stride: Int
    var pad: Int
    var filters: Int

    @always_inline
    def positions(self, given: Int) -> Int:
        """Returns how many positions the output has for `given` input positions."""
        return (given + 2 * self.pad - self.taps) // self.stride + 1


@fieldwise_init
struct Frames(ImplicitlyCopyable, TrivialRegisterPassable):
    """Data of some chunks, (chunks, pad + positions + pad, channels), zeros in the padding."""

    var data: Memory[F32]
    var positions: Int
    var pad: Int
    var channels: Int

    @always_inline
    def step(self) -> Int:
        """Returns how many values lie between the starts of two neighbouring chunks."""
        return (self.positions + 2 * self.pad) * self.channels

    @always_inline
    def at(self, chunk: Int, position: Int) -> Memory[F32]:
        return self.data.unsafe_offset(chunk * self.step() + (self.pad + position) * self.channels)


@fieldwise_init
struct Network(Copyable):
    """The input and the weights of one call."""

    var chunks: Memory[F32]  # (batch, steps, hop)
    var state: Memory[F32]  # (batch, state_size): first the samples before the first chunk
    var state_size: Int
    var steps: Int
    var hop: Int
    var before: Int
    var reflected: Int
    var layers: List[Layer]  # the first is the spectrum

    def add(mut self, taps: Int, stride: Int, pad: Int, filters: Int, w: Memory[F32]) -> Memory[F32]:
        """Adds a layer whose panels and bias are stored at `w`; returns where they end."""
        var panel_size = (taps + 2) * FREQUENCIES
        var panels = ceildiv(taps // 4 + 1, FREQUENCIES)
        var filters_in_panels = 0
        if self.layers:
            panel_size = taps * self.layers[len(self.layers) - 1].filters * PACK
            panels = ceildiv(filters, PACK)
            filters_in_panels = panels * PACK
        var bias = w.unsafe_offset(panels * panel_size)
        self.layers.append(Layer(w, bias, taps, stride, pad, filters))
        return bias.unsafe_offset(filters_in_panels)

    def samples(self) -> Int:
        """Returns the samples of a chunk, with the samples before it and the mirrored ones after it."""
        return self.before + self.hop + self.reflected

    def multiplications(self) -> Int:
        """Returns roughly how many multiplications a chunk needs: every layer's filters once per position."""
        var count = 0
        var positions = self.samples()
        var channels = 1
        for layer in self.layers:
            positions = layer.positions(positions)
            count += positions * layer.taps * channels * layer.filters
            channels = layer.filters
        return count

    def write_sound(self, n: Int, to: Memory[F32]):
        """Copies the samples before chunk `n`, then the chunk, then its mirrored end."""
        var chunk = self.chunks.unsafe_offset(n * self.hop)
        var before = chunk.unsafe_offset(-self.before)
        if n % self.steps == 0:
            before = self.state.unsafe_offset(n // self.steps * self.state_size)
        var end = self.before + self.hop
        for i in range(self.before):
            to[unsafe_offset=i] = before[unsafe_offset=i]
        for i in range(self.hop):
            to[unsafe_offset=self.before + i] = chunk[unsafe_offset=i]
        for i in range(self.reflected):
            to[unsafe_offset=end + i] = to[unsafe_offset=end - 2 - i]


struct Workspace(Movable):
    """The memory that a thread needs to compute chunks: a chunk's sound, and the input of every layer."""

    var sound: Memory[F32]
    var frames: List[Frames]
    var scratch: Scratch[F32]

    def __init__(out self, net: Network, chunks: Int):
        self.frames = []
        var positions = net.samples()
        var channels = net.layers[0].taps + 2
        var size = positions
        for i in range(len(net.layers)):
            var layer = net.layers[i]
            if i == 0:  # its frames are folded: they are stored one after the other
                positions = layer.positions(positions)
            self.frames.append(Frames(net.chunks, positions, layer.pad, channels))
            size += chunks * self.frames[i].step()
            if i > 0:
                positions = layer.positions(positions)
            channels = layer.filters
        self.scratch = Scratch[F32](size)
        self.sound = self.scratch.data()
        for i in range(size):
            self.sound[unsafe_offset=i] = 0
        var next = self.sound.unsafe_offset(net.samples())
        for ref frames in self.frames:
            frames.data = next
            next = next.unsafe_offset(chunks * frames.step())


def fold(x: Memory[F32], window: Int, to: Memory[F32]):
    """Writes the values of a frame that the spectrum's cosines multiply, and then the values for its sines.

    The first are the sums, the second the differences of samples that mirror each other about the middle:
    `window / 2 + 2` and `window / 2` values, an even number of each.
    """
    var half = window // 2
    var differences = to.unsafe_offset(half + 2)
    to[unsafe_offset=0] = x[unsafe_offset=0]
    to[unsafe_offset=half] = x[unsafe_offset=half]
    to[unsafe_offset=half + 1] = 0
    differences[unsafe_offset=0] = 0
    for n in range(1, half, WIDTH):
        var a = x.unsafe_offset(n).unsafe_load[width=WIDTH]()
        var b = x.unsafe_offset(window - n - WIDTH + 1).unsafe_load[width=WIDTH]().reversed()
        store[F32, WIDTH, True](to.unsafe_offset(n), a + b, half - n)
        store[F32, WIDTH, True](differences.unsafe_offset(n), a - b, half - n)


@always_inline
def spectrum_tile[rows: Int](layer: Layer, x: Frames, y: Frames, row: Int, first: Int):
    """Computes, for some rows, the magnitudes of `WIDTH` frequencies from `first` on, and of their mirror frequencies.

    The waves of frequencies k and window / 2 - k differ in the sign of every second sample. So even and odd samples are
    summed separately: the two sums give both frequencies. A panel, (window + 2, 16), holds the cosines and then the
    sines of 16 frequencies up to window / 4, one row for each value of a folded frame.
    """
    var half = layer.taps // 2
    var sum = Array[SIMD[F32, WIDTH], 4 * rows](fill=SIMD[F32, WIDTH](0))
    var panel = first // FREQUENCIES
    var w = layer.w.unsafe_offset(panel * (layer.taps + 2) * FREQUENCIES + first % FREQUENCIES)
    var values = x.data.unsafe_offset(row * x.channels)
    comptime for part in range(2):
        for _ in range(half // 2 + 1 - part):
            comptime for odd in range(2):
                var b = w.unsafe_offset(odd * FREQUENCIES).unsafe_load[width=WIDTH]()
                comptime for i in range(rows):
                    comptime at = (part * 2 + odd) * rows + i
                    sum[at] = SIMD[F32, WIDTH](values[unsafe_offset=i * x.channels + odd]).fma(b, sum[at])
            w = w.unsafe_offset(2 * FREQUENCIES)
            values = values.unsafe_offset(2)
    comptime for i in range(rows):
        var to = y.at((row + i) // y.positions, (row + i) % y.positions)
        var real = sum[i] + sum[rows + i]
        var imaginary = sum[2 * rows + i] + sum[3 * rows + i]
        var magnitude = sqrt(real.fma(real, imaginary * imaginary))
        store[F32, WIDTH, True](to.unsafe_offset(first), magnitude, half // 2 + 1 - first)
        if first < half // 2:
            real = sum[i] - sum[rows + i]
            imaginary = sum[2 * rows + i] - sum[3 * rows + i]
            magnitude = sqrt(real.fma(real, imaginary * imaginary))
            to.unsafe_offset(half - first - WIDTH + 1).unsafe_store(magnitude.reversed())


def spectrum(layer: Layer, x: Frames, y: Frames, chunks: Int):
    """Computes the magnitudes of some chunks' folded frames."""
    var rows = chunks * y.positions
    for first in range(0, layer.taps // 4 + 1, WIDTH):
        var row = 0
        while row + FEW_ROWS <= rows:
            spectrum_tile[FEW_ROWS](layer, x, y, row, first)
            row += FEW_ROWS
        while row < rows:
            spectrum_tile[1](layer, x, y, row, first)
            row += 1


@fieldwise_init
struct Product(ImplicitlyCopyable, TrivialRegisterPassable):
    """Rows of values, and the panels to multiply them with. Only `terms` rows of each panel are used."""

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
    """Returns max(x, 0) for each value; a NaN stays NaN."""
    return x.lt(0).select(SIMD[F32, WIDTH](0), x)


@always_inline
def tile[rows: Int, relu: Bool](p: Product, row: Int, panel: Int):
    """Multiplies `rows` rows from `row` on with a panel."""
    var sum = Array[SIMD[F32, WIDTH], rows * PANEL_VECTORS](fill=SIMD[F32, WIDTH](0))
    comptime for j in range(PANEL_VECTORS):
        var bias = p.bias.unsafe_offset(panel * PACK + j * WIDTH).unsafe_load[width=WIDTH]()
        comptime for i in range(rows):
            sum[i * PANEL_VECTORS + j] = bias
    var x = p.x.unsafe_offset(row * p.x_step)
    var w = p.w.unsafe_offset(panel * p.panel_size)
    accumulate[rows, PANEL_VECTORS, False](sum, Rows(x, p.x_step, 0), Taps(w, 0, PACK), 1, p.terms, WIDTH)
    comptime for i in range(rows):
        comptime for j in range(PANEL_VECTORS):
            var value = sum[i * PANEL_VECTORS + j]
            comptime if relu:
                value = rectified(value)
            p.y.unsafe_offset((row + i) * p.y_step + panel * PACK + j * WIDTH).unsafe_store(value)


def multiply[relu: Bool](p: Product):
    """Multiplies all rows with all panels."""
    for panel in range(p.columns // PACK):
        var row = 0
        while row + ROWS <= p.rows:
            tile[ROWS, relu](p, row, panel)
            row += ROWS
        while row + FEW_ROWS <= p.rows:
            tile[FEW_ROWS, relu](p, row, panel)
            row += FEW_ROWS
        while row < p.rows:
            tile[1, relu](p, row, panel)
            row += 1


def convolve[relu: Bool](layer: Layer, x: Frames, y: Frames, chunks: Int):
    """Computes a layer for some chunks. The layer's filters fill their panels."""
    var all_terms = layer.taps * x.channels
    var p = Product(
        x.data,
        layer.stride * x.channels,
        y.positions,
        layer.w,
        all_terms,
        all_terms * PACK,
        layer.bias,
        y.data,
        y.channels,
        y.channels,
    )
    if chunks < y.positions:
        for n in range(chunks):
            p.x = x.at(n, -layer.pad)
            p.y = y.at(n, 0)
            multiply[relu](p)
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
        multiply[relu](p)


def features(net: Network, room: Workspace, first: Int, end: Int, gates: Memory[F32]):
    """Computes all layers for the chunks from `first` to `end`; `gates` is (chunks, 4 * units)."""
    ref frames = room.frames
    var window = net.layers[0].taps
    for n in range(end - first):
        net.write_sound(first + n, room.sound)
        for position in range(frames[0].positions):
            fold(room.sound.unsafe_offset(position * net.layers[0].stride), window, frames[0].at(n, position))
    spectrum(net.layers[0], frames[0], frames[1], end - first)
    var last = len(net.layers) - 1
    for i in range(1, last):
        convolve[True](net.layers[i], frames[i], frames[i + 1], end - first)
    var size = net.layers[last].filters
    var to = Frames(gates.unsafe_offset(first * size), 1, 0, size)
    convolve[False](net.layers[last], frames[last], to, end - first)


def speech(hidden: Memory[F32], head: Memory[F32], units: Int) -> Float32:
    """Returns the probability of speech in a chunk: the last layer computes it from the hidden state."""
    var sum = SIMD[F32, WIDTH](0)
    for unit in range(0, units, WIDTH):
        var value = rectified(load[F32, WIDTH, True](hidden.unsafe_offset(unit), units - unit))
        sum = value.fma(load[F32, WIDTH, True](head.unsafe_offset(unit), units - unit), sum)
    return sigmoid(sum.reduce_add() + head[unsafe_offset=units])


def silero_vad(net: Network, var s: Lstm[F32], head: Memory[F32], probability: Memory[F32], last_state: Memory[F32]):
    """Computes one call. The fields of `s` for input, output and state are filled in here."""
    var chunks = s.batch * s.steps
    var size = s.batch * s.units
    var room = Scratch[F32](chunks * (GATES + 1) * s.units + 4 * size)
    s.x = room.data()
    s.output = s.x.unsafe_offset(chunks * GATES * s.units)
    s.hidden = s.output.unsafe_offset(chunks * s.units)
    s.cell = s.hidden.unsafe_offset(size)
    s.last_hidden = s.cell.unsafe_offset(size)
    s.last_cell = s.last_hidden.unsafe_offset(size)
    for n in range(s.batch):
        var memory = net.state.unsafe_offset(n * net.state_size + net.before)
        for i in range(s.units):
            s.hidden[unsafe_offset=n * s.units + i] = memory[unsafe_offset=i]
            s.cell[unsafe_offset=n * s.units + i] = memory[unsafe_offset=s.units + i]

    var threads = workers(chunks * net.multiplications())
    var share = min(max(ceildiv(chunks, threads), 1), ROWS)
    var tasks = Queue(ceildiv(chunks, share))

    def take_through(room: Workspace, i: Int) {imm}:
        features(net, room, i * share, min((i + 1) * share, chunks), s.x)
        tasks.finish(i)

    def work(thread: Int) {imm}:
        var room = Workspace(net, share)
        if thread == 0 and s.batch == 1:
            # This thread runs the LSTM of a single signal. While it waits for a chunk, it computes chunks itself.
            var sequence = Sequence[F32, 1](s, 1)
            for i in range(tasks.count):
                while not tasks.finished(i):
                    var next = tasks.take()
                    if next < tasks.count:
                        take_through(room, next)
                sequence.advance(0, i * share, min((i + 1) * share, chunks))
            sequence.finish()
        while True:
            var next = tasks.take()
            if next >= tasks.count:
                break
            take_through(room, next)
        _ = room^

    together(work, threads)
    if s.batch > 1:
        lstm_cpu(s)
    for i in range(chunks):
        probability[unsafe_offset=i] = speech(s.output.unsafe_offset(i * s.units), head, s.units)
    for n in range(s.batch):
        var end = net.chunks.unsafe_offset((n + 1) * s.steps * net.hop - net.before)
        var to = last_state.unsafe_offset(n * net.state_size)
        for i in range(net.before):
            to[unsafe_offset=i] = end[unsafe_offset=i]
        for i in range(s.units):
            to[unsafe_offset=net.before + i] = s.last_hidden[unsafe_offset=n * s.units + i]
            to[unsafe_offset=net.before + s.units + i] = s.last_cell[unsafe_offset=n * s.units + i]
    _ = room^
    _ = tasks^
