"""Live graphs: a network's own code builds them, and every layer that it emits reads a window of its signal."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from math import gcd
from typing import Any

import numpy as np
from max import _core, nn
from max._mlir import ir
from max.dtype import DType
from max.graph import BufferType, DeviceRef, Dim, StaticDim, TensorType, TensorValue, ops

from ..conv.geometry import Geometry, TransposedGeometry
from ..conv.graph import PackedGraph, graph_class
from ..conv.ops import custom_op
from .describe import describe
from .lines import Line, Window
from .positions import check, where
from .timing import Signal, Timing

ALIGNMENT = 64
"""Bytes: the rows of each window begin on a cache line of the state."""
SIZES = ("rmo.shape_to_tensor",)
"""Operations that read only the shape of a value."""


class _Longer(Exception):
    """The tick has to be a multiple of `tick`, because a layer's stride does not divide what a tick brings."""

    def __init__(self, tick: int) -> None:
        self.tick = tick


def streaming(
    network: Callable[..., Any] | nn.Module, *args: Any, rate: int | None = None, exact: bool = False, **kwargs: Any
) -> "StreamingGraph":
    """Builds a network as a live graph, which takes its signals chunk by chunk.

    Args:
        network: What builds the network: a `build` of the gallery, followed by its arguments; a function of graph
            values, followed by the types of its inputs; a layer or a `Module`, followed by its input types unless it has
            a method `input_types()`. The first axis of an input is the batch, and one other size, the number of positions,
            is symbolic.
        args, kwargs: The arguments of a `build`, or the input types.
        rate: Samples per second; by default the attribute `rate` of a config among the arguments.
        exact: As in `max_conv.conv1d`: then an answer in chunks has the bits of the exact answer to the whole signal.

    Returns:
        A graph for `max_conv.compile`. Its attribute `timing` tells the latency and the memory of a signal. Its inputs are
        the network's, `ticks`, `ends` and `state`, its outputs the network's and `state`; `Model.stream()` handles them.

    Raises:
        ValueError: If the network cannot run live; the sentence names the operation or the layer.

    >>> from max.dtype import DType
    >>> from max_conv import Conv1D
    >>> streaming(Conv1D(3, 4, 8, DType.float32, padding=1)).timing.delay
    1
    """
    rate = rate or next((value.rate for value in args if isinstance(getattr(value, "rate", None), int)), None)
    module = isinstance(network, nn.Module)
    if module and not args:
        args = (network.input_types(),)  # type: ignore[union-attr]
    plain = bool(args) and _are_types(args[0])
    if not plain and exact:
        kwargs["exact"] = True
    tick = 1
    while True:
        token = graph_class.set(partial(StreamingGraph._of, tick, rate))
        try:
            if plain:
                name = getattr(network, "__name__", type(network).__name__)
                types = list(args[0].values()) if isinstance(args[0], dict) else list(args[0])
                graph = PackedGraph(name, network, input_types=types, exact=exact)
            else:
                graph = network(*args, **kwargs)
        except _Longer as longer:
            tick = longer.tick
            continue
        finally:
            graph_class.reset(token)
        if not isinstance(graph, StreamingGraph):
            raise TypeError(f"streaming: the network must build a PackedGraph, but built a {type(graph).__name__}.")
        return graph


class StreamingGraph(PackedGraph):
    """A graph of signals that come in ticks. Made by `streaming`.

    While a network is traced, every operation is looked at: its results have the positions of its operands. A layer
    reads a window: rows that the state holds from the calls before, and the new ones. Where values of different delay
    meet, the earlier ones are delayed, in place. What does not keep positions apart is refused.

    Attributes:
        timing: When the network has what; known when the graph is finished.
    """

    timing: Timing
    live = True

    @classmethod
    def _of(cls, tick: int, rate: int | None) -> "StreamingGraph":
        graph = object.__new__(cls)
        graph.tick, graph.rate = tick, rate
        return graph

    def __init__(
        self, name: str, forward: Any = None, input_types: Any = (), *args: Any, exact: bool = False, **kwargs: Any
    ) -> None:
        given = list(input_types)
        self._axes = tuple(_axis(number, type_) for number, type_ in enumerate(given))
        symbols = {str(type_.shape[axis]) for type_, axis in zip(given, self._axes, strict=True)}
        if len(symbols) != 1:
            raise ValueError(
                f"streaming: all inputs must have equally many positions, but they are named {sorted(symbols)}."
            )
        ticks = symbols.pop() if self.tick == 1 else "ticks"
        own = [self._in_ticks(type_, axis, ticks) for type_, axis in zip(given, self._axes, strict=True)]
        batch, device = given[0].shape[0], given[0].device
        counts = TensorType(DType.int64, [batch], device)
        state = TensorType(DType.uint8, [batch, "state"], device)
        self.ticks, self._state_size, self._lines = Dim(ticks), 0, {}
        super().__init__(name, None, [*own, counts, counts, state], exact=exact, **kwargs)
        with self:
            self._begin(given, state)
            if forward is not None:
                result = forward(*self.inputs, *args)
                self.output(*(result if isinstance(result, tuple | list) else (result,)))

    def _in_ticks(self, type_: TensorType, axis: int, ticks: str) -> TensorType:
        """Returns an input's type with the positions as ticks of `tick` positions."""
        sizes: list[Any] = [ticks] if self.tick == 1 else [ticks, self.tick]
        return TensorType(type_.dtype, [*type_.shape[:axis], *sizes, *type_.shape[axis + 1 :]], type_.device)

    def _begin(self, given: Sequence[TensorType], state: TensorType) -> None:
        self._arguments = self.inputs
        *own, self._ticks, self._ends, held = (value.tensor for value in self._arguments)
        if self.tick != 1:
            for i, (type_, axis) in enumerate(zip(given, self._axes, strict=True)):
                shape = [*type_.shape[:axis], self.ticks * self.tick, *type_.shape[axis + 1 :]]
                own[i] = ops.reshape(own[i], shape)
        self._state = ops.buffer_create(BufferType(state.dtype, state.shape, state.device))
        ops.buffer_store(self._state, held)
        self._lines = {_raw(value): Line(self.tick) for value in own}
        self._skip()
        # What the network's code sees as the graph's inputs.
        self.__dict__["inputs"] = tuple(own)

    def output(self, *values: Any) -> None:
        """Finishes the graph; its last output is the state."""
        self._look()
        signals = []
        for value in values:
            line = self._lines.get(_raw(value))
            if line is None:
                raise ValueError("streaming: an output has no positions; every output must be a signal.")
            (axis,) = where(value, self._size(line))
            signals.append(Signal(axis, line))
        state = ops.buffer_load(self._state)
        self.__dict__["inputs"] = self._arguments
        super().output(*values, state)
        span = describe(self).span
        first = max(signal.line.first for signal in signals)
        self.timing = Timing(
            self.tick, first, self._axes, tuple(signals), self._state_size, span.right, span.field, self.rate
        )

    def layer_input(
        self, x: TensorValue, geometry: Geometry | TransposedGeometry, layout: str, outputs: Dim
    ) -> tuple[TensorValue, Geometry | TransposedGeometry, Dim]:
        """Returns what a layer reads instead of `x`, its geometry then, and its output's length."""
        line = self._line(x)
        op = "conv_transpose1d" if isinstance(geometry, TransposedGeometry) else "conv1d"
        if isinstance(geometry, Geometry):
            if geometry.padding_mode == "circular":
                raise ValueError(
                    'streaming: padding_mode="circular" puts the end of a signal before its begin; use another mode.'
                )
            if line.per_tick % geometry.stride:
                raise _Longer(self.tick * geometry.stride // gcd(line.per_tick, geometry.stride))
        if isinstance(outputs, StaticDim):
            raise ValueError(f"streaming: the length of a {op} is fixed; leave out output_size.")
        self._after = line.through(geometry)
        size = self._size(self._after)
        if isinstance(geometry, Geometry) and geometry.reach == geometry.stride == 1 + geometry.left + geometry.right:
            return x, geometry, size  # it reads one position
        window = Window.of(line, geometry)
        assert window.emitted is not None, "a layer's window has its geometry"
        return self._read(window, x, layout), window.emitted, size

    def layer_output(self, y: TensorValue) -> None:
        """Takes the output of the layer whose input was the last."""
        self._lines[_raw(y)] = self._after
        self._skip()

    def same_positions(self, value: TensorValue, x: TensorValue) -> None:
        """Takes note that a value, which was emitted last, has the positions of `x`."""
        self._lines[_raw(value)] = self._lines[_raw(x)]
        self._skip()

    def same_length(self, value: TensorValue, y: TensorValue, x: TensorValue) -> None:
        """Takes note that a value, which was emitted last, has the positions of `y`, as many as `x` has."""
        self._look()
        self._lines[_raw(value)] = replace(self._lines[_raw(y)], steps=self._lines[_raw(x)].steps)

    def inside(self, x: TensorValue) -> TensorValue:
        """Returns an NLC value, with zeros for what is no position of its signals."""
        line = self._line(x)
        if line.delay == 0:
            return x
        value = self._read(Window(line, 0, 0), x, "NLC")
        self.same_positions(value, x)
        return value

    def recall(self, x: TensorValue, size: int) -> tuple[TensorValue, Any]:
        """Returns a value of the call before, (N, size) in the dtype of `x`, zeros at first, and what `keep` needs."""
        self._look()
        place = self._state_size
        none = ops.broadcast_to(ops.constant(0, x.dtype, device=x.device), [x.shape[0], 0, size])
        value = self._read(Window(Line(1), 1, 1), none, "NLC", size=Dim(1))
        value = ops.reshape(value, [x.shape[0], size])
        self._skip()
        return value, place

    def keep(self, value: TensorValue, place: Any) -> None:
        """Keeps a value, (N, size), for the next call."""
        self._look()
        size, self._state_size = self._state_size, place
        self._read(Window(Line(1), 0, 1), ops.unsqueeze(value, 1), "NLC", size=Dim(0))
        self._state_size = size
        self._skip()

    def _line(self, x: TensorValue) -> Line:
        self._look()
        line = self._lines.get(_raw(x))
        if line is None:
            raise ValueError("streaming: a layer's input has no positions; compute it outside the graph.")
        if len(x.shape) != 3:
            raise ValueError("streaming: a layer's input must have a batch axis.")
        return line

    def _size(self, line: Line) -> Dim:
        return self.ticks if line.per_tick == 1 else self.ticks * line.per_tick

    def _read(self, window: Window, x: TensorValue, layout: str, size: Dim | None = None) -> TensorValue:
        """Emits a window of `x`, (N, L, C) or (N, C, L), whose rows in the state come next."""
        length, channels = (1, 2) if layout == "NLC" else (2, 1)
        row = int(x.shape[channels]) * x.dtype.size_in_bytes
        plan = ops.constant(np.array(window.numbers(self._state_size), np.int64), DType.int64, device=DeviceRef.CPU())
        self._state_size += -(-window.kept * row // ALIGNMENT) * ALIGNMENT
        shape = list(x.shape)
        shape[length] = Dim(window.size(self.ticks)) if size is None else size
        (y,) = custom_op(
            "max_conv.window",
            x.device,
            [self._state, x, self._ticks, self._ends, plan],
            [TensorType(x.dtype, shape, x.device)],
            {"layout": layout},
        )
        return y

    def _look(self) -> None:
        """Gives lines to what has been emitted since the last look."""
        for operation in self._since(self._last):
            results = [_value(result) for result in operation.results]
            seen = [(i, value) for i, value in enumerate(operation.operands) if value in self._lines]
            if str(operation.name) in SIZES:
                continue
            if not seen:
                self._check_made(operation, results)
                continue
            lines = [self._lines[value] for _, value in seen]
            if len({line.per_tick for line in lines}) > 1:
                rates = sorted({line.per_tick for line in lines})
                raise ValueError(f"streaming: values of {rates} positions a tick meet; they cannot be joined.")
            operands = [(i, _value(value)) for i, value in seen]
            check(operation, operands, results, self._size(lines[0]))
            latest = max(lines, key=lambda line: line.delay)
            for (i, value), line in zip(operands, lines, strict=True):
                if line.delay < latest.delay:
                    operation.operands[i] = self._late(operation, value, line, latest.delay - line.delay)
            first = max(line.first for line in lines)
            for result in operation.results:
                self._lines[result] = replace(latest, first=first)
        self._skip()

    def _late(self, operation: Any, value: TensorValue, line: Line, positions: int) -> Any:
        """Emits, before an operation, a value that is some positions later."""
        last = self._operations()[-1]
        (axis,) = where(value, self._size(line))
        shape = list(value.shape)
        if axis not in (1, len(shape) - 1):
            raise ValueError("streaming: a value with positions along a middle axis meets a later one; move the axis.")
        layout, other = ("NLC", shape[2:]) if axis == 1 else ("NCL", shape[1:-1])
        channels = int(np.prod([int(size) for size in other], dtype=int))
        flat = [shape[0], shape[axis], channels] if layout == "NLC" else [shape[0], channels, shape[axis]]
        late = ops.reshape(self._read(Window.delay(line, positions), ops.reshape(value, flat), layout), shape)
        for new in self._since(last):
            new.move_before(operation)
        return _raw(late)

    def _check_made(self, operation: Any, results: Sequence[TensorValue]) -> None:
        """Raises ValueError if an operation makes positions of a value that has none."""
        for result in results:
            if any(str(self.ticks) in str(size) for size in result.shape):
                name = str(operation.name).split(".")[-1]
                raise ValueError(
                    f"streaming: {name} makes a value for every position of a signal from no signal; use "
                    "max_conv.conv.ones_like."
                )

    def _operations(self) -> list[Any]:
        return list(self._mlir_op.regions[0].blocks[0].operations)

    def _since(self, last: Any) -> list[Any]:
        """Returns the operations after one. Weights are put before all others, so a number would not do."""
        operations = self._operations()
        return operations[len(operations) - operations[::-1].index(last) :]

    def _skip(self) -> None:
        self._last = self._operations()[-1]


def _axis(number: int, type_: TensorType) -> int:
    """Returns the axis of an input's positions."""
    axes = [axis for axis, size in enumerate(type_.shape) if axis and not isinstance(size, StaticDim)]
    if len(axes) != 1:
        raise ValueError(
            f"streaming: input {number} must have a batch axis and one other axis of symbolic size, its positions, but "
            f"has shape ({', '.join(map(str, type_.shape))})."
        )
    return axes[0]


def _raw(value: TensorValue) -> Any:
    """Returns the MLIR value of a graph value."""
    return ir.Value._CAPICreate(value._mlir_value._CAPIPtr)  # type: ignore[attr-defined]


def _value(raw: Any) -> TensorValue:
    """Returns the graph value of an MLIR value."""
    return TensorValue.from_mlir(_core.Value._from_cmlir(raw))


def _are_types(value: Any) -> bool:
    values = list(value.values()) if isinstance(value, dict) else value
    return isinstance(values, Sequence) and bool(values) and all(isinstance(type_, TensorType) for type_ in values)
