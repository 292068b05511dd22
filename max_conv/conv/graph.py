"""`PackedGraph`: a graph that knows its layers, and weights that are made from others when it is compiled."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from max.driver import Buffer
from max.graph import BufferValue, DeviceRef, Graph, KernelLibrary, TensorType, TensorValue, Weight, ops

from .dispatch import Form, Layer
from .library import kernel_library
from .max_nn import nn
from .whole import Signals


@dataclass(frozen=True)
class Derived:
    """A weight that `compile` makes from other weights, such as a packed filter. Derived sources come first."""

    weight: Weight
    sources: tuple[Weight, ...]
    make: Callable[..., Buffer]


@dataclass(frozen=True)
class Emitted:
    """A layer that a kernel of this package computes in a graph.

    Attributes:
        name: The weight that holds its filter; "computed" if the filter is not a weight.
        layer: The convolution; None for an LSTM.
        kernel: The convolution's kernel.
        outputs: The convolution's output length, if it is known.
        units: The LSTM's hidden units.
        form: The properties that are compiled into the operation of one convolution.
        sizes: The convolution's batch size and output length, as dimensions of the graph.
    """

    name: str
    layer: Layer | None = None
    kernel: str = ""
    outputs: int | None = None
    units: int = 0
    form: Form | None = None
    sizes: tuple[Any, ...] = ()


class _Kernels(KernelLibrary):
    """Does not verify this package's operations: MAX loads all its kernels for that, for about a second."""

    def verify_custom_op(self, custom_op: Any) -> None:
        if not str(custom_op.attributes["symbol"]).startswith('"max_conv.'):
            super().verify_custom_op(custom_op)


graph_class: ContextVar[Callable[[], "PackedGraph"] | None] = ContextVar("graph_class", default=None)
"""Where it is set, it makes the instance for every `PackedGraph(...)`: `streaming` lets a network's code build its graphs."""


class PackedGraph(Graph):
    """A graph whose layers use derived weights (packed, folded), which `max_conv.compile` makes once.

    A `Graph` in every other way. A plain MAX session can load one with the weights that `max_conv.registry` returns.

    Layers without a name get one, in the order in which they are first called: the weights of the first layer are
    `weight` and `bias`, of the second layer `layer2.weight` and `layer2.bias`, and so on.

    Args:
        exact: Whether all layers get direct kernels, as with `conv1d(..., exact=True)`.

    Attributes:
        input_names, output_names: The names of its inputs and outputs in a model, where its builder gave them.
        signals: The facts that are known about its signals.
        derived: The weights to make, by name.
        emitted: The layers of this package's operations, in order.
    """

    input_names: Sequence[str] = ()
    output_names: Sequence[str] = ()
    signals = Signals()
    exact: bool
    derived: dict[str, Derived]
    emitted: list[tuple[Emitted, ...]]

    def __new__(cls, *args: Any, **kwargs: Any) -> "PackedGraph":
        make = graph_class.get()
        return make() if make else super().__new__(cls)

    def __init__(self, *args: Any, exact: bool = False, **kwargs: Any) -> None:
        self.exact = exact
        self.derived = {}
        self.emitted = []
        self._unnamed: list[nn.Module] = []
        self._named: dict[str, tuple[Weight, Weight, nn.Module]] = {}
        super().__init__(*args, **{"kernel_library": _Kernels()} | kwargs)

    def named(self, weight: Weight, layer: nn.Module, unnamed: bool) -> Weight:
        """Returns the weight of a layer under the name that it has in this graph."""
        name = weight.name
        if unnamed:
            if not any(layer is other for other in self._unnamed):
                self._unnamed.append(layer)
            number = next(i for i, other in enumerate(self._unnamed, 1) if layer is other)
            name = weight.name if number == 1 else f"layer{number}.{weight.name}"
        known = self._named.get(name)
        if known is None or known[0] is not weight:
            same = weight if name == weight.name else Weight(name, weight.dtype, weight.shape, weight.device)
            known = self._named[name] = (weight, same, layer)
        return known[1]

    def loaded(self) -> dict[str, Any]:
        """Returns the values that the layers in this graph have loaded themselves, by the names that they have in it."""
        values = {}
        for name, (weight, _, layer) in self._named.items():
            if (value := layer._weight_values.get(weight.name)) is not None:
                values[name] = value
        return values

    def __enter__(self) -> "PackedGraph":
        super().__enter__()
        return self


def is_live() -> bool:
    """Returns whether the next graph will be a live one."""
    return graph_class.get() is not None


def packed_graph() -> PackedGraph | None:
    """Returns the current graph if it is a `PackedGraph`, otherwise None."""
    try:
        graph = Graph.current
    except LookupError:
        return None
    return graph if isinstance(graph, PackedGraph) else None


def record(*layers: Emitted) -> None:
    """Records in the current graph which layers its next operation computes."""
    if graph := packed_graph():
        graph.emitted.append(layers)


def weight_name(filter: TensorValue) -> str:
    """Returns a filter's name if it is a weight, otherwise "computed"."""
    return filter.name if isinstance(filter, Weight) else "computed"


def derived(weight: Weight, sources: tuple[Weight, ...], make: Callable[..., Buffer]) -> Weight | None:
    """Returns a weight that `compile` will make from others, or None outside a `PackedGraph`."""
    graph = packed_graph()
    if graph is None:
        return None
    # A graph accepts only one weight of each name.
    known = graph.derived.setdefault(weight.name, Derived(weight, sources, make))
    for ours, theirs in zip(sources, known.sources, strict=True):
        if ours is not theirs:
            raise another(ours)
    return known.weight


def another(weight: Weight) -> ValueError:
    """Returns the error for a weight whose name another weight of the graph has."""
    return ValueError(
        f"conv1d: the graph has another weight named {weight.name!r}; give each layer a different name with name=."
    )


def in_graph(value: TensorValue) -> TensorValue:
    """Returns a weight as a value of the current graph, and any other value as it is."""
    if isinstance(value, Weight) and value.shard_idx is None:
        # A weight remembers the first graph it was used in; asking the graph lets a layer be traced again.
        known = Graph.current._weights.get(value.name)
        if known is not None and known.weight is not value:
            raise another(value)
        return Graph.current.add_weight(value, force_initial_weight_on_host=not value._has_alias)
    return value


def custom_op(
    name: str,
    device: DeviceRef,
    operands: Sequence[TensorValue | BufferValue],
    results: Sequence[TensorType],
    parameters: Mapping[str, str | int | bool] | None = None,
) -> list[TensorValue]:
    """Emits one of this package's kernels into the current graph, and the kernel library if the graph lacks it.

    An operation with a buffer among its operands may write to it.
    """
    graph = Graph.current
    library = kernel_library()
    if library not in graph.kernel_libraries_paths:
        graph._import_kernels([library])
    in_place = any(isinstance(operand, BufferValue) for operand in operands)
    emit_op = ops.inplace_custom if in_place else ops.custom
    return [value.tensor for value in emit_op(name, device, operands, results, parameters)]


def argument_names(function: Callable[..., Any], count: int) -> list[str]:
    """Returns the names of a function's first arguments, or numbers if it has no such names."""
    parameters = list(inspect.signature(function).parameters.values())[:count]
    plain = [p.name for p in parameters if p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]
    return plain if len(plain) == count else [f"input{i}" for i in range(count)]
