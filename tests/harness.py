"""The common part of the tests: a case, a way to run many cases in one graph, and one checker.

Compiling costs seconds a graph and about 0.2 s for each different signature, so a file runs all its cases at once.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from max.driver import CPU, Buffer
from max.dtype import DType
from max.engine import InferenceSession, Model
from max.graph import DeviceRef, Graph, TensorType
from max.mlir import StringAttr

import max_conv
from max_conv import PackedGraph, conv1d, conv_transpose1d
from max_conv.conv.geometry import TransposedGeometry
from max_conv.conv.library import kernel_library
from max_conv.conv.reference import conv1d_ref, conv_transpose1d_ref
from max_conv.runtime.compiler import compile_graphs
from max_conv.runtime.devices import port_of
from max_conv.runtime.kinds import alone, ready

Array = np.ndarray | torch.Tensor
"""NumPy has no bfloat16: such cases hold torch tensors."""

HOST = DeviceRef.CPU()


@dataclass(frozen=True)
class Case:
    """One convolution, and its output according to other libraries."""

    id: str
    x: Array
    filter: Array
    bias: Array | None = None
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    expected: Array | None = None
    """The oracle's output for the same data; its dtype says how exact it is."""
    peer: Array | None = None
    """torch's output in the case's own dtype: our error may be at most 4 times torch's."""
    symbolic: bool = False
    """Whether the graph is built without knowing batch and length."""
    transposed: bool = False
    """Whether it is a transposed convolution."""

    @property
    def operands(self) -> list[Array]:
        return [self.x, self.filter] + ([] if self.bias is None else [self.bias])

    def input_types(self, device: DeviceRef = HOST) -> list[TensorType]:
        types = [TensorType(dtype_of(a), list(a.shape), device) for a in self.operands]
        if self.symbolic:
            axes = self.kwargs.get("layout", "NLC")[-self.x.ndim :]
            name = re.sub(r"\W", "_", self.id)
            shape = [size if axis == "C" else f"{name}_{axis}" for axis, size in zip(axes, self.x.shape)]
            types[0] = TensorType(types[0].dtype, shape, device)
        return types


def dtype_of(array: Array) -> DType:
    return DType[dtype_name(array)]


def dtype_name(array: Array) -> str:
    return str(array.dtype).removeprefix("torch.")


def eps_of(array: Array) -> float:
    return torch.finfo(getattr(torch, dtype_name(array))).eps


def wide(array: Array) -> np.ndarray:
    """Returns the values in float64."""
    return array.detach().double().numpy() if isinstance(array, torch.Tensor) else np.asarray(array, np.float64)


def normal(*shape: int, dtype: Any = np.float32, seed: int = 0) -> np.ndarray:
    """Returns standard normal values, the same for the same shape and seed."""
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(dtype)


def compiled(graph: Graph, weights: Mapping[str, Any] | None = None) -> Model:
    return InferenceSession(devices=[CPU()]).load(graph, weights_registry=weights)


def compile_together(*graphs: tuple[Graph, Mapping[str, Any]]) -> list[max_conv.Model]:
    """Compiles graphs, each with its weights, in hardly more time than the largest of them needs alone.

    It moves the graphs into the first one's module, and puts a number before the names of their weights.
    """
    values: dict[str, Buffer] = {}
    for number, (graph, weights) in enumerate(graphs):
        loaded = graph.loaded() if isinstance(graph, PackedGraph) else {}
        registry = max_conv.registry(graph, {**loaded, **weights})
        operation = graph._mlir_op
        operation.attributes["sym_name"] = StringAttr.get(f"graph{number}", operation.context)
        for constant in operation.regions[0].blocks[0].operations:
            if constant.operation.name == "mo.constant.external":
                name = StringAttr(constant.attributes["name"]).value
                constant.attributes["name"] = StringAttr.get(f"{number}.{name}", operation.context)
                values[f"{number}.{name}"] = registry[name]
        if number:
            operation.move_after(graphs[number - 1][0]._mlir_op)
    compiled = compile_graphs(graphs[0][0].module, [kernel_library()])
    models = []
    for number, (graph, _) in enumerate(graphs):
        inputs = [port_of(f"input{i}", value.type) for i, value in enumerate(graph.inputs)]
        outputs = [port_of(f"output{i}", type_) for i, type_ in enumerate(graph.output_types)]
        timing = getattr(graph, "timing", None)
        models.append(max_conv.Model(compiled, values, inputs, outputs, number=number, timing=timing))
    return models


def shapes(values: Iterable[Any]) -> list[tuple[int | str, ...]]:
    """Returns the shapes of a graph's inputs or output types, as a compiled model's ports have them."""
    return [port_of("", getattr(value, "type", value)).shape for value in values]


def execute(model: Model, arrays: Sequence[Array]) -> list[Array]:
    """Runs a model on arrays; returns tensors if the first input is a tensor, otherwise NumPy arrays."""
    contiguous = [a.detach().contiguous() if isinstance(a, torch.Tensor) else np.asarray(a, order="C") for a in arrays]
    results = model.execute(*[Buffer.from_dlpack(a) for a in contiguous])
    return [torch.from_dlpack(r) if r.dtype == DType.bfloat16 else r.to_numpy() for r in results]


def graph_of(cases: Sequence[Case], device: DeviceRef = HOST) -> PackedGraph:
    """Returns a graph of cases through the public functions; data, filter and bias of each are its inputs."""
    types = [case.input_types(device) for case in cases]
    with PackedGraph("cases", input_types=[t for case_types in types for t in case_types]) as graph:
        values = iter(graph.inputs)
        outputs = []
        for case, case_types in zip(cases, types):
            try:
                function = conv_transpose1d if case.transposed else conv1d
                outputs.append(function(*[next(values).tensor for _ in case_types], **case.kwargs))
            except Exception as error:
                error.add_note(f"in case {case.id}")
                raise
        graph.output(*outputs)
    return graph


def graphs_of(cases: Sequence[Case]) -> dict[str, tuple[PackedGraph, Mapping[str, Any]]]:
    """Returns a graph of the cases that are no single operation, for a file's `graphs`; without such cases, none."""
    rest = [case for case in cases if not alone(graph_of([case]))]
    return {"cases": (graph_of(rest), {})} if rest else {}


def run(
    cases: Sequence[Case], models: Mapping[str, max_conv.Model] | None = None, times: int = 2, device: DeviceRef = HOST
) -> list[Array]:
    """Runs cases through the public functions, and checks that running again changes no bit.

    A case that is one operation runs in the graph of its kind; all kinds are compiled together. The others run together:
    in the model of `graphs_of`, or compiled here.
    """
    graphs = [graph_of([case], device) for case in cases]
    layers = [alone(graph) if device.is_cpu() else None for graph in graphs]
    ready(*(layer.kind for layer in layers if layer))
    found: dict[str, Array] = {}

    def answer(model: max_conv.Model, some: Sequence[Case]) -> None:
        operands = [torch.as_tensor(array).detach() for case in some for array in case.operands]
        runs = [model(*operands) for _ in range(times)]
        for number, case in enumerate(some):
            one, *more = [as_given(result[number] if isinstance(result, tuple) else result, case.x) for result in runs]
            for other in more:
                np.testing.assert_array_equal(wide(one), wide(other), err_msg=f"{case.id} differs from run to run")
            found[case.id] = one

    for case, graph, layer in zip(cases, graphs, layers):
        if layer:
            answer(max_conv.compile(graph), [case])
    if rest := [case for case, layer in zip(cases, layers) if not layer]:
        answer(models["cases"] if models else max_conv.compile(graph_of(rest, device)), rest)
    return [found[case.id] for case in cases]


def as_given(result: Buffer, like: Array) -> Array:
    """Returns a result as a tensor if `like` is one, otherwise as a NumPy array."""
    return torch.from_dlpack(result).cpu() if isinstance(like, torch.Tensor) else result.to_numpy()


def reference(case: Case) -> np.ndarray:
    """Returns the float64 reference."""
    bias = None if case.bias is None else wide(case.bias)
    return (conv_transpose1d_ref if case.transposed else conv1d_ref)(
        wide(case.x), wide(case.filter), bias, **case.kwargs
    )


def terms_of(case: Case) -> int:
    """Returns how many products an output sums: taps times the channels of a group."""
    axes = case.kwargs.get("filter_layout", "SFC" if case.transposed else "SCF")
    taps, channels = (case.filter.shape[axes.index(axis)] for axis in "SC")
    if case.transposed:
        channels //= 1 if axes == "FSC" else case.kwargs.get("groups", 1)
        stride, dilation = (case.kwargs.get(name, 1) for name in ("stride", "dilation"))
        taps = TransposedGeometry.of(taps, stride, dilation=dilation).convolution.kernel_size
    return taps * channels


def bound(case: Case, eps: float, reference: np.ndarray) -> np.ndarray:
    """Returns the largest error allowed for each value; sixteen-bit types are summed in float32, and then rounded."""
    terms = terms_of(case)
    x, w = (np.abs(wide(a)).max(initial=0) for a in (case.x, case.filter))
    sum_eps = min(eps, torch.finfo(torch.float32).eps)
    return 4 * sum_eps * np.sqrt(terms) * x * w + eps * np.abs(reference)


def check(case: Case, got: Array) -> None:
    """Checks shape, dtype, finiteness and every value of `got` against the float64 reference."""
    want, eps = reference(case), eps_of(case.x)
    assert tuple(got.shape) == want.shape, f"{case.id}: shape {tuple(got.shape)}, not {want.shape}"
    assert dtype_name(got) == dtype_name(case.x), f"{case.id}: {got.dtype}"
    values = wide(got)
    assert np.isfinite(values).all(), f"{case.id}: {np.count_nonzero(~np.isfinite(values))} values are not finite"
    assert_within(case.id, values, want, bound(case, eps, want))
    if case.peer is not None:
        ours, theirs = (np.abs(v - want).max(initial=0) for v in (values, wide(case.peer)))
        # A few values can be exact by luck: no more is required than a correctly rounded largest value.
        rounded = eps / 2 * np.abs(want).max(initial=0)
        assert ours <= 4 * max(theirs, rounded), f"{case.id}: off by {ours:.2g}, torch {theirs:.2g}"


def check_reference(case: Case) -> None:
    """Checks the reference itself against the oracle's output, as exactly as the oracle computes."""
    assert case.expected is not None, f"{case.id} has no oracle"
    want = wide(case.expected)
    got = reference(case)
    assert got.shape == want.shape, f"{case.id}: shape {got.shape}, not {want.shape}"
    assert_within(case.id, got, want, bound(case, eps_of(case.expected), want))


def assert_within(name: str, got: np.ndarray, want: np.ndarray, limit: np.ndarray) -> None:
    excess = np.abs(got - want) - limit
    if excess.size and excess.max() > 0:
        at = np.unravel_index(excess.argmax(), excess.shape)
        where = f"{name} at {tuple(map(int, at))}: {got[at]!r}, not {want[at]!r} within {limit[at]:.2g}"
        raise AssertionError(f"{where} ({np.count_nonzero(excess > 0)} of {excess.size} values are off)")


def is_one_sentence(message: str) -> bool:
    """Returns whether an error has the form `conv1d: ….`, on one line, with one full stop."""
    return re.fullmatch(r"(conv1d|conv_transpose1d): [^\n]+[^.]\.", message) is not None and ". " not in message


def ids(cases: Iterable[Case]) -> list[str]:
    """Returns the cases' names; no two are the same."""
    names = [case.id for case in cases]
    assert len(set(names)) == len(names), sorted({n for n in names if names.count(n) > 1})
    return names
