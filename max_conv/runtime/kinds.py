"""Layers alone: one compiled graph serves all layers of a kind, with any sizes, geometry and weights.

In a kind's graph every size is symbolic, and filter, bias and geometry are inputs. So a layer needs no separate compile
once this machine has compiled its kind.
"""

import functools
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from max.driver import Buffer
from max.dtype import DType
from max.graph import DeviceRef, Graph, Module, TensorType
from max.mlir import StringAttr

from ..conv.dispatch import LEAST_OUTPUTS, Form, Layer
from ..conv.geometry import Geometry, TransposedGeometry
from ..conv.graph import PackedGraph
from ..conv.library import kernel_library
from ..conv.ops import emit
from . import compiled
from .compiler import compile_graphs
from .devices import session_of
from .notice import slow_compile

COMMON = """
conv1d dense NLC packed, conv1d short NLC packed, conv1d winograd NLC packed, conv1d winograd NCL packed
conv1d depthwise NLC SCF, conv1d depthwise NCL SCF, conv1d lengthwise NLC SCF, conv1d lengthwise NCL FCS
conv_transpose1d dense NLC packed, conv_transpose1d short NLC packed, conv_transpose1d winograd NLC packed
conv_transpose1d winograd NCL packed, conv_transpose1d depthwise NLC phased, conv_transpose1d lengthwise NLC phased
conv_transpose1d lengthwise NCL phased
"""
"""The kinds of float32 layers whose filters `compile` packs, in the layouts of MAX and of PyTorch."""
Execute = Callable[[Sequence[Buffer]], Any]
CONSTANTS = {"mo.constant", "mo.constant.external", "mo.chain.create"}
RESHAPE = "rmo.reshape"
TENSOR = "!mo.tensor<["
"""How the text of a tensor's type begins; its sizes follow."""


@dataclass(frozen=True)
class Kind:
    """The properties that are compiled into the graph of a layer alone.

    Attributes:
        form: The properties of the operation. `whole` and `full` are false, so that any number of filters is right.
        dtype: The dtype of the data, the filter and the bias.
    """

    form: Form
    dtype: DType

    @classmethod
    def of(cls, form: Form, dtype: DType) -> "Kind":
        """Returns the kind of an operation."""
        falls_back = form.kernel == "winograd" and form.filter_layout != "packed"
        least = form.least if falls_back else LEAST_OUTPUTS
        return cls(replace(form, whole=False, full=False, least=least), dtype)

    @property
    def name(self) -> str:
        """The graph's name: a word for each property."""
        form = self.form
        words = ["conv_transpose1d" if form.transposed else "conv1d", form.kernel, form.layout, form.filter_layout]
        return "_".join([*words, self.dtype.name, *["always"] * (form.least == 0)])

    def graph(self, module: Module | None = None) -> Graph:
        """Returns the graph. Its inputs: data, filter, bias (F,) or (0,), `Layer.numbers`, and (L_out, F, 0) int8.

        The last input is empty. Only its sizes count: they are the output's.
        """
        host = DeviceRef.CPU()
        form = self.form
        shapes = [["n", "l", "c"] if form.layout == "NLC" else ["n", "c", "l"], ["w0", "w1", "w2"], ["b"]]
        types = [TensorType(self.dtype, shape, host) for shape in shapes]
        types += [TensorType(DType.int64, [7], host), TensorType(DType.int8, ["outputs", "filters", 0], host)]
        with PackedGraph(self.name, input_types=types, module=module) as graph:
            x, filter, bias, geometry, out = (value.tensor for value in graph.inputs)
            sizes = {"N": x.shape[0], "L": out.shape[0], "C": out.shape[1]}
            graph.output(emit(x, filter, bias, geometry, [sizes[axis] for axis in form.layout], form))
        return graph


@dataclass(frozen=True)
class Alone:
    """How a kind's graph computes one layer.

    Attributes:
        kind: The kind.
        layer: The layer.
        operands: Data, filter and bias: the number of an input of the model, or the name of a weight, or None.
        batched: Whether data and output have a batch axis.
        filters: The output's channels, F.
        outputs: The output's length, or None if it depends on the input's.
    """

    kind: Kind
    layer: Layer
    operands: tuple[int | str | None, ...]
    batched: bool
    filters: int
    outputs: int | None

    def bind(self, execute: Execute, weights: Mapping[str, Buffer]) -> Callable[[list[Buffer]], Any]:
        """Returns a function of the model's inputs that calls the kind's graph."""
        none = Buffer.from_numpy(np.empty(0, np.uint8)).view(self.kind.dtype, [0])
        bound = [(n, weights[n] if isinstance(n, str) else none) for n in self.operands]
        numbers = Buffer.from_numpy(np.array(self.layer.numbers, np.int64))
        length = self.layer.layout.index("L")
        given = self.layer.transposed or self.layer.geometry

        @functools.lru_cache(64)
        def shape(inputs: int) -> Buffer:
            # If an input is too short, the kernel raises the error.
            outputs = max(0, given.output_length(inputs)) if self.outputs is None else self.outputs
            return Buffer.from_numpy(np.empty((outputs, self.filters, 0), np.int8))

        def run(inputs: list[Buffer]) -> Any:
            x, *others = [inputs[n] if isinstance(n, int) else value for n, value in bound]
            if self.batched:
                return execute([x, *others, numbers, shape(x.shape[length])])
            x = x.view(x.dtype, [1, *x.shape])
            return [y.view(y.dtype, y.shape[1:]) for y in execute([x, *others, numbers, shape(x.shape[length])])]

        return run


def alone(graph: Graph) -> Alone | None:
    """Returns how a kind's graph computes a graph that holds one convolution on the CPU and nothing else, or None."""
    if not isinstance(graph, PackedGraph) or len(graph.emitted) != 1 or len(graph.emitted[0]) != 1:
        return None
    (emitted,) = graph.emitted[0]
    if emitted.form is None or emitted.layer is None:
        return None
    operations = [
        operation
        for operation in graph._mlir_op.regions[0].blocks[0].operations
        if operation.operation.name not in CONSTANTS
    ]
    names = [operation.operation.name for operation in operations]
    if names not in (["mo.custom", "mo.output"], [RESHAPE, "mo.custom", RESHAPE, "mo.output"]):
        return None
    batched = len(operations) == 2
    custom = operations[0 if batched else 1]
    x, filter, bias, _ = custom.operands
    y = custom.result
    if not batched:
        before, after = operations[0], operations[2]
        if not (_adds_batch(before.operands[0], x) and _adds_batch(after.result, y)):
            return None
        x, y = before.operands[0], after.result
    sources = [_source(value) for value in (x, filter, bias)]
    if list(operations[-1].operands) != [y] or "" in sources or None in sources[:2]:
        return None
    layer = emitted.layer
    kind = Kind.of(emitted.form, DType[layer.dtype])
    return Alone(kind, layer, tuple(sources), batched, layer.groups * layer.group_filters, emitted.outputs)


def _adds_batch(without: Any, value: Any) -> bool:
    """Returns whether the type of `value` is the type of `without` with a batch of 1."""
    return str(value.type) == str(without.type).replace(TENSOR, TENSOR + "1, ")


def _source(operand: Any) -> int | str | None:
    """Returns where an operand comes from: the number of an input, the name of a weight, "" or None.

    None is an array without values: a layer without a bias passes one. "" is any other array in the graph.
    """
    if hasattr(operand, "arg_number"):
        return operand.arg_number
    if operand.owner.operation.name == "mo.constant.external":
        return StringAttr(operand.owner.attributes["name"]).value
    return None if str(operand.type).startswith("!mo.tensor<[0]") else ""


class Ready(NamedTuple):
    """A kind in this process: MAX's result, the kind's number in it, and the function that runs it."""

    compiled: Any
    number: int
    execute: Execute


def common() -> list[Kind]:
    """Returns the kinds of `COMMON`."""
    rows = [row.split() for row in COMMON.replace("\n", ",").split(",") if row.strip()]
    return [
        Kind.of(Form(kernel, layout, filter_layout, op == "conv_transpose1d"), DType.float32)
        for op, kernel, layout, filter_layout in rows
    ]


_lock = threading.Lock()
_ready: dict[str, Ready] = {}
"""The kinds of this process, by their keys in the cache."""


def ready(*kinds: Kind) -> list[Ready]:
    """Returns the compiled graph of each kind, from this process or from the cache; all others are compiled together."""
    with _lock:
        keys = [_key(kind) for kind in kinds]
        missing: dict[str, Kind] = {}
        for key, kind in zip(keys, kinds, strict=True):
            if key in _ready:
                continue
            if (found := compiled.find(key)) is None:
                missing[key] = kind
            else:
                _start(found.compiled, found.keys)
        if missing:
            module = Module()
            for kind in missing.values():
                kind.graph(module)
            with slow_compile(", ".join(kind.name for kind in missing.values())):
                result = compile_graphs(module, [kernel_library()])
            compiled.keep(result, list(missing))
            _start(result, list(missing))
        return [_ready[key] for key in keys]


def _start(result: Any, keys: Sequence[str]) -> None:
    for number, (key, execute) in enumerate(zip(keys, _executes(result), strict=True)):
        _ready.setdefault(key, Ready(result, number, execute))


@functools.cache
def _key(kind: Kind) -> str:
    return compiled.key_of(kind.graph())


def _executes(result: Any) -> list[Execute]:
    """Returns the functions that run graphs which were compiled together."""
    return [model._execute_device_tensors for model in session_of().init_all(result).values()]


def execute_of(result: Any, number: int) -> Execute:
    """Returns the function that runs a kind that `ready` returned, or that comes from a saved model."""
    for kind in list(_ready.values()):
        if kind.compiled is result and kind.number == number:
            return kind.execute
    return _executes(result)[number]


def to_json(alone: Alone) -> dict[str, Any]:
    """Returns the facts about a layer alone that a saved model holds."""
    return asdict(alone) | {"kind": asdict(alone.kind) | {"dtype": alone.kind.dtype.name}}


def from_json(told: Mapping[str, Any]) -> Alone:
    """Returns the layer from the facts that `to_json` returned."""
    kind = Kind(Form(**told["kind"]["form"]), DType[told["kind"]["dtype"]])
    given = dict(told["layer"])
    given["geometry"] = Geometry(**given["geometry"])
    given["transposed"] = given["transposed"] and TransposedGeometry(**given["transposed"])
    return Alone(kind, Layer(**given), tuple(told["operands"]), told["batched"], told["filters"], told["outputs"])
