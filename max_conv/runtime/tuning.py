"""Times every kernel that can compute a layer, on this machine, so that later graphs get the fastest."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from max.dtype import DType
from max.graph import DeviceRef, Graph, TensorType, TensorValue, Weight

from ..conv import tuned
from ..conv.arrays import as_buffer, as_float64
from ..conv.dispatch import CPU_KERNELS, Layer, able, choose, only
from ..conv.geometry import positive
from ..conv.graph import PackedGraph
from ..conv.ops import conv1d, conv_transpose1d
from . import kinds
from .devices import port_of, size_in
from .ports import size_of
from .session import Model, compile

ROUNDS, BURST = 5, 0.004
"""Each kernel runs in so many rounds, alternately with the others, for so many seconds per round; the least time counts."""
CLOSE = {"float32": 1e-4, "float64": 1e-12, "float16": 2e-3, "bfloat16": 2e-2}
"""How far a kernel's answer may be from the usual kernel's, as a part of the largest value."""


@dataclass(frozen=True)
class Timed:
    """A layer that was timed.

    Attributes:
        layer: Its name, sizes and dtype.
        batch, outputs: The batch size and the output length.
        usual: The kernel that the layer gets if it was not timed.
        times: Microseconds by kernel.
    """

    layer: str
    batch: int
    outputs: int
    usual: str
    times: Mapping[str, float]

    @property
    def fastest(self) -> str:
        """The kernel with the least time."""
        return min(self.times, key=self.times.__getitem__)


def tune(
    graph: Graph,
    lengths: Sequence[int | Mapping[str, int]],
    *,
    batch: int = 1,
    again: bool = True,
    step: Callable[[str], Any] = lambda text: None,
) -> list[Timed]:
    """Times every kernel that can compute each layer of a graph, and keeps the times in the user's cache.

    Graphs that are built from then on, on this machine, get the fastest kernel for each of these layers. A layer is known
    by its kernel size, stride, dilation, channels, groups, layout and dtype. Kernels that this machine has not compiled
    yet are compiled first, together, which takes a minute or two.

    Args:
        graph: A graph with layers whose weights `compile` will have, on the CPU. It does not run.
        lengths: Sizes of the inputs' symbolic dimensions: a number for all of them but the batch, or sizes by name.
        batch: The size of the first symbolic dimension of the first input, if there are others.
        again: Whether layers are timed again that were timed on this machine with as many outputs.
        step: Called with a description of each step.

    Returns:
        A row for each layer and number of outputs that was timed. A layer that only one kernel can compute has no row.

    Raises:
        TypeError, ValueError: One sentence: no lengths, a length that leaves a layer without outputs, a graph without layers.
    """
    work = _work(graph, lengths, batch)
    if not again:
        for key, (_, sizes) in list(work.items()):
            counts = tuned.counts(key)
            sizes -= {size for size in sizes if size[0] * size[1] in counts}
            if not sizes:
                del work[key]
    if not work:
        return []
    needed = {_kind(layer, kernel) for layer, _ in work.values() for kernel in able(layer)}
    step(f"compiling what is missing of {len(needed)} kinds of layers")
    kinds.ready(*needed)
    rows = []
    for number, (key, (layer, sizes)) in enumerate(work.items()):
        step(f"timing layer {number + 1} of {len(work)}: {key}")
        models = _models(layer, able(layer))
        for size in sorted(sizes):
            rows.append(Timed(key, *size, choose(layer, packed=True).kernel, _times(layer, models, *size)))
    table: dict[str, tuned.Times] = {}
    for row in rows:
        table.setdefault(row.layer, {})[str(row.batch * row.outputs)] = dict(row.times)
    tuned.keep(table)
    return rows


def _work(
    graph: Graph, lengths: Sequence[int | Mapping[str, int]], batch: int
) -> dict[str, tuple[Layer, set[tuple[int, int]]]]:
    """Returns the layers of a graph by their keys, each with the batch sizes and output lengths to time."""
    if isinstance(lengths, int | Mapping) or not lengths:
        raise ValueError(f"tune: takes a list of lengths, such as [16000], not {lengths!r}.")
    shapes = [port_of("", value.type).shape for value in graph.inputs]
    names = list(dict.fromkeys(size for shape in shapes for size in shape if isinstance(size, str)))
    work: dict[str, tuple[Layer, set[tuple[int, int]]]] = {}
    none = True
    for length in lengths:
        sizes = length if isinstance(length, Mapping) else _sizes(names, positive("length", length, "tune"), batch)
        for emitted in (entry for entries in getattr(graph, "emitted", []) for entry in entries):
            layer = emitted.layer
            if layer is None or emitted.kernel not in CPU_KERNELS:
                continue
            none = False
            if len(able(layer)) == 1:
                continue
            found = [size if isinstance(size, int) else size_of(size, sizes) for size in map(size_in, emitted.sizes)]
            known = [size for size in found if size is not None]
            if len(known) != 2:
                raise ValueError(f"tune: the sizes {dict(sizes)} do not give {emitted.name}'s output, {emitted.sizes}.")
            if min(known) < 1:
                raise ValueError(f"tune: {emitted.name} has no output at {dict(sizes)}; pass a larger length.")
            work.setdefault(layer.key, (layer, set()))[1].add((known[0], known[1]))
    if none:
        raise ValueError("tune: the graph has no layer of this package on the CPU.")
    return work


def _sizes(names: Sequence[str], length: int, batch: int) -> dict[str, int]:
    """Returns the size of each symbolic dimension: the first of several is the batch."""
    return {name: batch if number == 0 and len(names) > 1 else length for number, name in enumerate(names)}


def _graph(layer: Layer, kernel: str) -> PackedGraph:
    """Returns a graph of one layer, which a kernel computes."""
    host, dtype = DeviceRef.CPU(), DType[layer.dtype]
    given = layer.transposed or layer.geometry
    channels, filters = layer.groups * layer.group_channels, layer.groups * layer.group_filters
    operation: Callable[..., TensorValue] = partial(conv1d, padding_mode=layer.geometry.padding_mode)
    shape = [given.kernel_size, layer.group_channels, filters]
    if layer.transposed:
        operation = partial(conv_transpose1d, output_padding=layer.transposed.output_padding)
        shape = [given.kernel_size, layer.group_filters, channels]

    def network(x: TensorValue) -> TensorValue:
        return operation(
            x,
            Weight("filter", dtype, shape, host),
            stride=given.stride,
            padding=(given.left, given.right),
            dilation=given.dilation,
            groups=layer.groups,
            layout=layer.layout,
        )

    sizes: dict[str, int | str] = {"N": "batch", "L": "length", "C": channels}
    x = TensorType(dtype, [sizes[axis] for axis in layer.layout], host)
    with only(kernel):
        return PackedGraph("tune", network, input_types=[x])


def _kind(layer: Layer, kernel: str) -> kinds.Kind:
    alone = kinds.alone(_graph(layer, kernel))
    assert alone is not None, "the graph has one layer"
    return alone.kind


def _models(layer: Layer, kernels: Sequence[str]) -> dict[str, Model]:
    """Returns a model of the layer by each kernel, all with the same random filter."""
    graphs = {kernel: _graph(layer, kernel) for kernel in kernels}
    random = np.random.default_rng(0)
    weights = {
        source.name: as_buffer(random.standard_normal([int(size) for size in source.shape]), source.dtype)
        for graph in graphs.values()
        for source in _filters(graph)
    }
    return {kernel: compile(graph, weights=weights) for kernel, graph in graphs.items()}


def _filters(graph: PackedGraph) -> list[Weight]:
    made = [source for entry in graph.derived.values() for source in entry.sources]
    return made or [entry.weight for entry in graph._weights.values()]


def _times(layer: Layer, models: Mapping[str, Model], batch: int, outputs: int) -> dict[str, float]:
    """Returns the microseconds of each kernel, after its answer has been compared with the first one's."""
    sizes = {"N": batch, "L": _input_length(layer, outputs), "C": layer.groups * layer.group_channels}
    x = as_buffer(np.random.default_rng(1).standard_normal([sizes[axis] for axis in layer.layout]), DType[layer.dtype])
    want = None
    for kernel, model in models.items():
        got = as_float64(model(x))
        want = got if want is None else want
        if not np.abs(got - want).max() <= CLOSE[layer.dtype] * np.abs(want).max():
            raise RuntimeError(
                f"tune: the kernel {kernel} is wrong on this machine for {layer.key}, {sizes}; run `max-conv check` and report it."
            )
    least = dict.fromkeys(models, float("inf"))
    calls = {kernel: 1 for kernel in models}
    for _ in range(ROUNDS):
        for kernel, model in models.items():
            start = time.perf_counter()
            for _ in range(calls[kernel]):
                model(x)
            least[kernel] = min(least[kernel], (time.perf_counter() - start) / calls[kernel])
            calls[kernel] = max(1, int(BURST / least[kernel]))
    return {kernel: 1e6 * seconds for kernel, seconds in least.items()}


def _input_length(layer: Layer, outputs: int) -> int:
    """Returns the least input length with which a layer has so many outputs."""
    given = layer.transposed or layer.geometry
    length = 1
    if layer.transposed is None:
        length = max(1, (outputs - 1) * given.stride + layer.geometry.reach - given.left - given.right)
        if layer.geometry.padding_mode in ("reflect", "circular"):
            length = max(length, given.left + 1, given.right + 1)
    while given.output_length(length) < outputs:
        length += max(1, (outputs - given.output_length(length)) // given.stride)
    return length
