"""`streaming`: builds a network's graph live, from the network's own code."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from max.dtype import DType
from max.graph import BufferType, Dim, TensorType, ops

from ..conv.graph import PackedGraph, argument_names, graph_class
from ..conv.max_nn import nn
from .describe import describe
from .live import LiveSignals, Longer
from .positions import input_axis, where
from .timing import Signal, Timing

LIVE_INPUTS = ("ticks", "ends", "state")
"""The inputs that a live graph has after the network's inputs."""


def streaming(
    network: Callable[..., Any] | nn.Module, *args: Any, rate: int | None = None, exact: bool = False, **kwargs: Any
) -> "StreamingGraph":
    """Builds a network as a live graph, which gets its signals chunk by chunk.

    Args:
        network: The function that builds the network: a `build` of the gallery, followed by its arguments; a function of graph
            values, followed by the types of its inputs; a layer or a `Module`, followed by its input types unless it has
            a method `input_types()`. The first axis of an input is the batch, and one other size, the number of positions,
            is symbolic.
        args, kwargs: The arguments of a `build`, or the input types.
        rate: Samples per second; by default the attribute `rate` of a config among the arguments.
        exact: As in `max_conv.conv1d`: then an answer in chunks has the bits of the exact answer to the whole signal.

    Returns:
        A graph for `max_conv.compile`. Its attribute `timing` has the latency and the memory of a signal. Its inputs are the
        network's inputs, `ticks`, `ends` and `state`; its outputs are the network's outputs and `state`. `Model.stream()`
        handles them.

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
                names = list(args[0]) if isinstance(args[0], dict) else argument_names(network, len(types))
                graph.input_names = (*names, *LIVE_INPUTS)
            else:
                graph = network(*args, **kwargs)
        except Longer as longer:
            tick = longer.tick
            continue
        finally:
            graph_class.reset(token)
        if not isinstance(graph, StreamingGraph):
            raise TypeError(f"streaming: the network must build a PackedGraph, but built a {type(graph).__name__}.")
        return graph


class StreamingGraph(PackedGraph):
    """A graph of signals that come in ticks. Made by `streaming`.

    Attributes:
        tick: Input positions of a tick.
        signals: The facts that are known about its signals.
        timing: When the network's outputs are available; known when the graph is finished.
    """

    tick: int
    _rate: int | None
    timing: Timing
    signals: LiveSignals

    @classmethod
    def _of(cls, tick: int, rate: int | None) -> "StreamingGraph":
        graph = object.__new__(cls)
        graph.tick, graph._rate = tick, rate
        return graph

    def __init__(
        self, name: str, forward: Any = None, input_types: Any = (), *args: Any, exact: bool = False, **kwargs: Any
    ) -> None:
        given = list(input_types)
        self._axes = tuple(input_axis("streaming", number, type_) for number, type_ in enumerate(given))
        symbols = {str(type_.shape[axis]) for type_, axis in zip(given, self._axes, strict=True)}
        if len(symbols) != 1:
            raise ValueError(
                f"streaming: all inputs must have equally many positions, but they are named {sorted(symbols)}."
            )
        ticks = symbols.pop() if self.tick == 1 else "ticks"
        own = [self._in_ticks(type_, axis, ticks) for type_, axis in zip(given, self._axes, strict=True)]
        batch, device = given[0].shape[0], given[0].device
        counts = TensorType(DType.int64, [batch], device)
        state = BufferType(DType.uint8, [batch, "state"], device)
        super().__init__(name, None, [*own, counts, counts, state.as_tensor()], exact=exact, **kwargs)
        with self:
            self._begin(given, Dim(ticks), state)
            if forward is not None:
                result = forward(*self.inputs, *args)
                self.output(*(result if isinstance(result, tuple | list) else (result,)))

    def _in_ticks(self, type_: TensorType, axis: int, ticks: str) -> TensorType:
        """Returns an input's type with the positions in ticks."""
        sizes: list[Any] = [ticks] if self.tick == 1 else [ticks, self.tick]
        return TensorType(type_.dtype, [*type_.shape[:axis], *sizes, *type_.shape[axis + 1 :]], type_.device)

    def _begin(self, given: Sequence[TensorType], ticks: Dim, state: BufferType) -> None:
        self._arguments = self.inputs
        *own, before, ends, held = (value.tensor for value in self._arguments)
        self._state = ops.buffer_create(state)
        ops.buffer_store(self._state, held)
        self.signals = LiveSignals(self, self.tick, ticks, (before, ends), self._state)
        if self.tick != 1:
            for i, (type_, axis) in enumerate(zip(given, self._axes, strict=True)):
                shape = [*type_.shape[:axis], ticks * self.tick, *type_.shape[axis + 1 :]]
                own[i] = ops.reshape(own[i], shape)
        self.signals.begin(own)
        # The network's code sees these as the graph's inputs.
        self.__dict__["inputs"] = tuple(own)

    def output(self, *values: Any) -> None:
        """Finishes the graph; its last output is the state."""
        lines = [self.signals.line(value) for value in values]
        signals = [Signal(where(v, self.signals.size(line))[0], line) for v, line in zip(values, lines, strict=True)]
        self._name(self.input_names, self.output_names or [f"output{i}" for i in range(len(values))])
        state = ops.buffer_load(self._state)
        self.__dict__["inputs"] = self._arguments
        super().output(*values, state)
        span, first = describe(self).span, max(line.first for line in lines)
        size = self.signals.state_size
        self.timing = Timing(self.tick, first, self._axes, tuple(signals), size, span.right, span.field, self._rate)

    def _name(self, inputs: Sequence[str], outputs: Sequence[str]) -> None:
        """Names the network's inputs and outputs, and the ones that are added."""
        inputs = inputs or [f"input{i}" for i in range(len(self._axes))]
        self.input_names, self.output_names = (*inputs, *LIVE_INPUTS), (*outputs, "state")


def _are_types(value: Any) -> bool:
    values = list(value.values()) if isinstance(value, dict) else value
    return isinstance(values, Sequence) and bool(values) and all(isinstance(type_, TensorType) for type_ in values)
