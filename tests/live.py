"""One layer live, in random chunks: its windows, and then the graph of its kind. For the property tests.

Two signals of different length share a batch. The second begins again on the way. What is no part of a signal is NaN: the
state before the first tick, and what follows a signal's own positions in a chunk.
"""

import functools
from typing import Any

import numpy as np
from max.driver import Buffer
from max.dtype import DType
from max.graph import BufferType, DeviceRef, Module, TensorType, ops

from max_conv import PackedGraph
from max_conv.conv.dispatch import Layer
from max_conv.conv.library import kernel_library
from max_conv.conv.lines import Line, Window
from max_conv.runtime.devices import session_of
from max_conv.streaming import Stream, Timing
from max_conv.streaming.live import emit_window
from max_conv.streaming.stream import Chunk
from max_conv.streaming.timing import Signal
from properties import SHARES, Execute, from_bits, operands_of, to_bits

HOST = DeviceRef.CPU()
LAYOUTS = ("NLC", "NCL")


@functools.cache
def windows() -> dict[tuple[DType, str], Any]:
    """Returns the functions that lay out windows, by dtype and layout, from one compile."""
    module, keys = Module(), [(dtype, layout) for dtype in SHARES for layout in LAYOUTS]
    for dtype, layout in keys:
        counts, plan = TensorType(DType.int64, ["n"], HOST), TensorType(DType.int64, ["plan"], HOST)
        state = BufferType(DType.uint8, ["n", "state"], HOST)
        data = TensorType(dtype, [axis.lower() for axis in layout], HOST)
        types = [data, counts, counts, state.as_tensor(), plan, TensorType(DType.int8, ["rows", 0], HOST)]
        with PackedGraph(f"window_{dtype.name}_{layout}", input_types=types, module=module) as graph:
            x, ticks, ends, held, numbers, rows = (value.tensor for value in graph.inputs)
            buffer = ops.buffer_create(state)
            ops.buffer_store(buffer, held)
            shape = [rows.shape[0] if axis == "L" else x.shape[i] for i, axis in enumerate(layout)]
            window = emit_window(x, buffer, ticks, ends, numbers, shape, layout)
            graph.output(window, ops.buffer_load(buffer))
    compiled = session_of().compile(module, custom_extensions=[kernel_library()])
    models = session_of().init_all(compiled).values()
    return {key: model._execute_device_tensors for key, model in zip(keys, models, strict=True)}


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
        read, state = windows()[dtype, layer.layout]([data, *rest, rows])
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
    at, found = [0] * len(signals), [[] for _ in signals]
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
    dtype, given = DType[layer.dtype], layer.transposed or layer.geometry
    filters = layer.groups * layer.group_filters
    for n, got in enumerate(live_answers(execute, layer, *operands, signals, random)):
        x = signals[n][None] if layer.layout == "NLC" else np.ascontiguousarray(signals[n].T[None])
        length = given.output_length(len(signals[n]))
        data = Buffer.from_numpy(x).view(dtype, list(x.shape))
        (y,) = execute(operands_of(data, *operands, layer.numbers, (1, length, filters)))
        want = y.view(DType.uint16 if dtype == DType.bfloat16 else dtype, y.shape).to_numpy()[0]
        want = want if layer.layout == "NLC" else want.T
        assert got.shape == want.shape, f"{name}, row {n}: {got.shape}, not {want.shape}"
        off = np.abs(from_bits(got, dtype) - from_bits(want, dtype)).max(initial=0)
        assert off <= error, f"{name}, row {n}: off by {off:.2g}, more than {error:.2g}"
