"""One layer live, in random chunks: its windows, and then the graph of its kind. For the property tests.

Two signals of different length share a batch. The second begins again on the way. What is no part of a signal is NaN: the
state before the first tick, and what follows a signal's own positions in a chunk.
"""

import functools
import itertools
from typing import Any

import numpy as np
from max.driver import Buffer
from max.dtype import DType
from max.graph import BufferType, DeviceRef, Module, TensorType, ops

from max_conv import PackedGraph
from max_conv.conv.dispatch import Layer
from max_conv.conv.graph import custom_op
from max_conv.conv.library import kernel_library
from max_conv.conv.lines import Line, Window
from max_conv.conv.ragged import ragged_window
from max_conv.runtime import compiled
from max_conv.runtime.compiler import compile_graphs
from max_conv.runtime.devices import session_of
from max_conv.streaming import Stream, Timing
from max_conv.streaming.live import emit_window
from max_conv.streaming.timing import Chunk, Signal
from properties import SHARES, Execute, from_bits, operands_of, to_bits

HOST = DeviceRef.CPU()
LAYOUTS = ("NLC", "NCL")


@functools.cache
def windows() -> dict[tuple[str, DType, str], Any]:
    """Returns the functions that lay out windows, live and ragged, by dtype and layout; from the cache, or one compile."""
    names = list(itertools.product(("live", "ragged"), SHARES, LAYOUTS))
    keys = [compiled.key_of(window_graph(*name)) for name in names]
    found = compiled.find(keys[0])
    if found is None:
        module = Module()
        for name in names:
            window_graph(*name, module)
        result = compile_graphs(module, [kernel_library()])
        compiled.keep(result, keys)
    else:
        result = found.compiled
    models = session_of().init_all(result).values()
    return {name: model._execute_device_tensors for name, model in zip(names, models, strict=True)}


def window_graph(kind: str, dtype: DType, layout: str, module: Module | None = None) -> PackedGraph:
    """Returns a graph of one window; the last input is empty, and has as many rows as the window."""
    counts, plan = TensorType(DType.int64, ["n"], HOST), TensorType(DType.int64, ["plan"], HOST)
    state = BufferType(DType.uint8, ["n", "state"], HOST)
    data = TensorType(dtype, [axis.lower() for axis in layout], HOST)
    before = [data, counts, counts, state.as_tensor()] if kind == "live" else [data, counts]
    types = [*before, plan, TensorType(DType.int8, ["rows", 0], HOST)]
    with PackedGraph(f"{kind}_{dtype.name}_{layout}", input_types=types, module=module) as graph:
        x, *others, numbers, rows = (value.tensor for value in graph.inputs)
        shape = [rows.shape[0] if axis == "L" else x.shape[i] for i, axis in enumerate(layout)]
        if kind == "live":
            ticks, ends, given = others
            buffer = ops.buffer_create(state)
            ops.buffer_store(buffer, given)
            graph.output(emit_window(x, buffer, ticks, ends, numbers, shape, layout), ops.buffer_load(buffer))
        else:
            result = TensorType(dtype, shape, HOST)
            operands = [x, others[0], numbers]
            graph.output(*custom_op("max_conv.ragged_window", HOST, operands, [result], {"layout": layout}))
    return graph


def live_answers(
    execute: Execute, layer: Layer, filter: Buffer, bias: Buffer, signals: list[np.ndarray], random: np.random.Generator
) -> list[np.ndarray]:
    """Runs a kind live on signals, (L, C) each, in bits; returns the outputs, (L_out, F) each, in bits."""
    dtype, given = DType[layer.dtype], layer.transposed or layer.geometry
    filters = layer.groups * layer.group_filters
    tick = int(random.integers(1, 4)) * (1 if layer.transposed else given.stride)
    window, after = Window.of(Line(tick), given), Line(tick).through(given)
    axis = layer.layout.index("L")
    row = signals[0].shape[1] * signals[0].itemsize
    timing = Timing(tick, after.first, (axis,), (Signal(axis, after),), window.kept * row, None, None)
    assert window.emitted is not None
    sizes = (layer.group_channels, layer.group_filters, layer.groups, layer.dtype)
    numbers = Layer.of(window.emitted, layer.layout, *sizes).numbers
    plan = np.array(window.numbers(0), np.int64)

    def run(x: Any, *counts: np.ndarray) -> list[Any]:
        shape = list(x.shape)
        ticks = shape[axis]
        if tick > 1:
            shape[axis : axis + 2] = [ticks * tick]
        data = x.view(dtype, shape) if isinstance(x, Buffer) else Buffer.from_numpy(x.reshape(shape))
        rest = [Buffer.from_numpy(np.ascontiguousarray(array)) for array in (*counts, plan)]
        rows = Buffer.from_numpy(np.empty((window.size(ticks), 0), np.int8))
        read, state = windows()["live", dtype, layer.layout]([data, *rest, rows])
        (y,) = execute(operands_of(read, filter, bias, numbers, (shape[0], ticks * after.per_tick, filters)))
        return [y, state]

    shapes = [
        [None if a in "NL" else size if a == "C" else 0 for a in layer.layout]
        for size in (row // signals[0].itemsize, filters)
    ]
    chunk, result = (Chunk("x", layer.dtype, tuple(shape), axis) for shape in shapes)
    stream = Stream(run, timing, [chunk], [result], batch=len(signals))
    stream._state[...] = 0xFF
    return pushed(stream, signals, layer.layout, dtype, random)


def pushed(
    stream: Stream, signals: list[np.ndarray], layout: str, dtype: DType, random: np.random.Generator
) -> list[np.ndarray]:
    """Pushes signals in random chunks; the last one begins again on the way."""
    nan = to_bits(np.array([np.nan]), dtype)
    at = [0] * len(signals)
    found: list[list[np.ndarray]] = [[] for _ in signals]
    restart = bool(random.integers(2))
    sizes = [1, 2, 5, 17, 64, 300]
    while any(n < len(signal) for n, signal in zip(at, signals, strict=True)):
        counts = [
            min(len(s) - n, int(random.choice(sizes))) * int(random.integers(2))
            for n, s in zip(at, signals, strict=True)
        ]
        chunk = np.full((len(signals), max(counts), signals[0].shape[1]), nan, signals[0].dtype)
        for n, (begin, count) in enumerate(zip(at, counts, strict=True)):
            chunk[n, :count] = signals[n][begin : begin + count]
        last = np.array([count > 0 and n + count == len(s) for n, count, s in zip(at, counts, signals, strict=True)])
        given = np.ascontiguousarray(chunk if layout == "NLC" else chunk.transpose(0, 2, 1))
        value = Buffer.from_numpy(given).view(dtype, list(given.shape)) if dtype == DType.bfloat16 else given
        got = stream.push(value, last=last, lengths=np.array(counts))
        bits = got.view(DType.uint16, got.shape).to_numpy() if dtype == DType.bfloat16 else got
        bits = bits if layout == "NLC" else bits.transpose(0, 2, 1)
        for n, count in enumerate(counts):
            at[n] += count
            found[n].append(bits[n, : stream.lengths[n]])
        if restart and at[-1] and not last[-1]:
            restart, at[-1], found[-1] = False, 0, []
            stream.reset([len(signals) - 1])
    return [np.concatenate(parts) for parts in found]


def alone(execute: Execute, layer: Layer, operands: tuple[Buffer, Buffer], signal: np.ndarray) -> np.ndarray:
    """Runs a kind on one whole signal, (L, C); returns the output, (L_out, F), in bits."""
    dtype, given = DType[layer.dtype], layer.transposed or layer.geometry
    shape = (1, given.output_length(len(signal)), layer.groups * layer.group_filters)
    return turned(
        execute(operands_of(held(signal[None], layer.layout, dtype), *operands, layer.numbers, shape))[0], layer
    )[0]


def held(values: np.ndarray, layout: str, dtype: DType) -> Buffer:
    """Returns (N, L, C) in bits as a buffer in a layout."""
    given = np.ascontiguousarray(values if layout == "NLC" else values.transpose(0, 2, 1))
    return Buffer.from_numpy(given).view(dtype, list(given.shape))


def turned(result: Buffer, layer: Layer) -> np.ndarray:
    """Returns an output as (N, L, F), in bits."""
    dtype = DType[layer.dtype]
    bits = result.view(DType.uint16 if dtype == DType.bfloat16 else dtype, result.shape).to_numpy()
    return bits if layer.layout == "NLC" else bits.transpose(0, 2, 1)


def check_live(
    name: str,
    execute: Execute,
    layer: Layer,
    operands: tuple[Buffer, Buffer],
    signals: list[np.ndarray],
    random: np.random.Generator,
    error: float,
) -> None:
    """Compares a layer live with itself on the whole signals: to the bit, or within `error` where quads shift."""
    dtype = DType[layer.dtype]
    for n, got in enumerate(live_answers(execute, layer, *operands, signals, random)):
        want = alone(execute, layer, operands, signals[n])
        assert got.shape == want.shape, f"{name}, row {n}: {got.shape}, not {want.shape}"
        off = np.abs(from_bits(got, dtype) - from_bits(want, dtype)).max(initial=0)
        assert off <= error, f"{name}, row {n}: off by {off:.2g}, more than {error:.2g}"


def check_ragged(
    name: str, execute: Execute, layer: Layer, operands: tuple[Buffer, Buffer], signals: list[np.ndarray]
) -> None:
    """Compares each signal of a ragged batch, with NaN after its end, with the signal alone: to the bit."""
    dtype, given = DType[layer.dtype], layer.transposed or layer.geometry
    window, more, emitted = ragged_window(given)
    longest = max(map(len, signals)) + 3
    x = np.full((len(signals), longest, signals[0].shape[1]), to_bits(np.array([np.nan]), dtype), signals[0].dtype)
    for row, signal in zip(x, signals, strict=True):
        row[: len(signal)] = signal
    lengths, plan = np.array([len(signal) for signal in signals]), np.array(window.numbers(0), np.int64)
    rows = np.empty((longest + more, 0), np.int8)
    (read,) = windows()["ragged", dtype, layer.layout](
        [held(x, layer.layout, dtype), *(Buffer.from_numpy(array) for array in (lengths, plan, rows))]
    )
    sizes = (layer.group_channels, layer.group_filters, layer.groups, layer.dtype)
    numbers = Layer.of(emitted, layer.layout, *sizes).numbers
    shape = (len(signals), given.output_length(longest), layer.groups * layer.group_filters)
    got = turned(execute(operands_of(read, *operands, numbers, shape))[0], layer)
    for n, signal in enumerate(signals):
        want = alone(execute, layer, operands, signal)
        same = got[n, : len(want)].tobytes() == np.ascontiguousarray(want).tobytes()
        assert same, f"{name}, signal {n} of {lengths.tolist()} positions is not the signal alone"
