"""Describes a graph: its layers, weights, receptive field, hop, latency and cost."""

import functools
import re
from dataclasses import dataclass
from fractions import Fraction
from math import prod
from typing import Any

from ..conv.graph import Emitted, PackedGraph
from .span import Span


@dataclass(frozen=True)
class LayerCost:
    """A layer of a graph.

    Attributes:
        name: The weight that is its filter.
        kind: "conv1d", "conv_transpose1d" or "lstm".
        sizes: Its channels, filters and geometry, in words.
        kernel: The kernel that computes it; "" for an LSTM.
        flops: Two for each multiplication with a weight, per input position of the graph.
        span: The inputs that its outputs depend on.
    """

    name: str
    kind: str
    sizes: str
    kernel: str
    flops: Fraction
    span: Span


@dataclass(frozen=True)
class Description:
    """A graph's layers in order, the number of its parameters, and the inputs that an output depends on.

    Attributes:
        layers: The convolutions and recurrent layers.
        parameters: How many numbers the graph's weights hold.
        span: The inputs that an output depends on through these layers; attention and norms over the length depend on more.
    """

    layers: tuple[LayerCost, ...]
    parameters: int
    span: Span

    @property
    def flops(self) -> Fraction:
        """FLOPs of all layers, per input position."""
        return sum((layer.flops for layer in self.layers), Fraction(0))

    def summary(self, rate: int | None = None) -> dict[str, Any]:
        """Returns the main facts about a network, in words.

        Args:
            rate: Input positions per second; if the network makes sound from fewer positions, samples per second.
        """
        span, step = self.span, self.span.step
        a_second = None if rate is None else rate * min(step, Fraction(1))

        def positions(count: Fraction | int | None) -> str:
            if count is None:
                return "without end"
            seconds = "" if a_second is None else f" ({float(count / a_second) * 1e3:.4g} ms)"
            return f"{float(count):.5g} input position{'' if count == 1 else 's'}{seconds}"

        # An output can be computed when the last input that it depends on has arrived, and all inputs before the next
        # output's.
        latency = None if span.right is None else span.right + max(step, Fraction(1))
        cost = {"FLOPs per input position": f"{float(self.flops):.4g}"}
        if a_second is not None:
            cost = {"FLOPs per second of signal": f"{float(self.flops * a_second):.4g}"}
        return {
            "layers": len(self.layers),
            "parameters": self.parameters,
            "receptive field": positions(span.field),
            "hop": positions(step) if step >= 1 else f"{float(1 / step):.5g} outputs per input position",
            "latency": positions(latency),
        } | cost


def describe(graph: PackedGraph, window: int = 1, hop: int = 1) -> Description:
    """Describes a finished graph from its operations.

    The effect of convolutions, LSTMs and attention on the length is known. Every other operation is assumed to leave
    positions where they are. A convolution whose length is known in the graph runs inside a frame.

    Args:
        graph: The finished graph.
        window, hop: For a graph that cuts its input into frames without a convolution: the positions in a frame, and
            from one frame to the next.

    >>> from max_conv.graphs import conv1d
    >>> import numpy as np
    >>> config = conv1d.Config(stride=2, dilation=3, padding=3)
    >>> told = describe(conv1d.build(config, {"weight": np.zeros((5, 16, 32), np.float32)}))
    >>> told.span.field, told.span.step, told.parameters, told.flops
    (13, Fraction(2, 1), 2560, Fraction(2560, 1))
    """
    ours = iter(graph.emitted)
    block = graph._mlir_op.regions[0].blocks[0]
    begin = Span(Fraction(hop), Fraction(window - 1))
    spans: dict[Any, Span] = {argument: begin for argument in block.arguments}
    layers = []
    answer = begin
    for operation in block.operations:
        symbol = str(operation.attributes["symbol"]) if operation.name == "mo.custom" else ""
        window = "max_conv.window" in symbol
        own = "max_conv." in symbol and not window
        # A layer's data is its first operand. Computed filters and biases are not counted: they have no positions.
        # The first operand of a live layer's window is the state.
        operands = [operation.operands[int(window)]] if own or window else operation.operands
        seen = [spans[value] for value in operands if value in spans]
        if not seen:
            continue
        span = functools.reduce(Span.beside, seen)
        if operation.name == "mo.output":
            answer = span
        elif own:
            for emitted in next(ours):
                layers.append(_cost(emitted, span))
                span = layers[-1].span
        elif operation.name == "rmo.matmul" and len(seen) == 2 and _over_positions(operation):
            span = Span(span.step, None, None)
        for result in operation.results[:1] if window else operation.results:
            spans[result] = span
    return Description(tuple(layers), _parameters(graph), answer)


def _over_positions(product: Any) -> bool:
    """Returns whether a product of two values is attention: a matrix of unknown size has the positions as an axis."""
    return any(not re.search(r"[\[ ]\d+, \d+\]", str(value.type)) for value in product.operands)


def _cost(emitted: Emitted, span: Span) -> LayerCost:
    # A weight that is made from others has their name, followed by its dtype.
    name, layer = re.sub(r"\.(float|bfloat)\d+$", "", emitted.name), emitted.layer
    if layer is None:
        flops = 2 * 4 * emitted.units**2 / span.step
        return LayerCost(name, "lstm", f"{emitted.units} units", "", flops, Span(span.step, None, span.right))
    geometry = layer.transposed or layer.geometry
    flops = Fraction(2 * geometry.kernel_size * layer.group_channels * layer.group_filters * layer.groups)
    if emitted.outputs is not None:
        after = span
        flops *= Fraction(emitted.outputs, 1 if layer.transposed is None else geometry.stride) / span.step
    else:
        after = span.through(layer)
        # A transposed convolution multiplies every input with every tap; a plain one uses every tap for every output.
        flops /= span.step if layer.transposed else after.step
    arrow = "⇒" if layer.transposed else "→"
    sizes = f"{layer.group_channels * layer.groups}{arrow}{layer.group_filters * layer.groups} k{geometry.kernel_size}"
    for letter, value in (("s", geometry.stride), ("d", geometry.dilation), ("g", layer.groups)):
        sizes += f" {letter}{value}" if value > 1 else ""
    kind = "conv_transpose1d" if layer.transposed else "conv1d"
    return LayerCost(name, kind, sizes, emitted.kernel, flops, after)


def _parameters(graph: PackedGraph) -> int:
    """Counts the numbers in the weights that are not made from others."""
    read = {name: entry.weight for name, entry in graph._weights.items()}
    sources = {source.name: source for entry in graph.derived.values() for source in entry.sources}
    weights = [weight for name, weight in (read | sources).items() if name not in graph.derived]
    return sum(prod(int(size) for size in weight.shape) for weight in weights)
