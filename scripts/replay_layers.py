"""The random layers that replay.py records: drawn by number, traced by the public functions, run by few compiled graphs.

`conv1d` or `conv_transpose1d` emits each layer, and chooses its kernel; the operation is recorded. A graph in which
every size is symbolic runs it: one graph for all layers whose operations have the same parameters and dtypes.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
from max.driver import CPU, Buffer
from max.dtype import DType
from max.engine import InferenceSession, Model
from max.graph import DeviceRef, Graph, Module, TensorType, Weight, ops

import max_conv

HOST = DeviceRef.CPU()
OUTPUTS = (1, 2, 3, 4, 7, 8, 13, 16, 28, 47, 48, 97, 113, 192, 257, 300)
"""Lengths near the lengths of tiles and blocks."""
POISONS = ("finite",) * 7 + ("filter nan", "filter inf", "filter huge", "input nan", "input inf", "input huge")
"""Kinds of special values in a layer: kernels must not let them affect other outputs."""
WORK = (200_000,) * 19 + (4_000_000,)
"""Multiplications in one layer: some layers are above the size from which kernels start a second thread."""

WHOLE, UNEVEN, FEW, SINGLE = (32, 64, 96), (33, 40, 65), (1, 2, 3, 5, 7), (1,)
HALF = (17, 24, 31, 57)
"""Filters that do not fill a vector; with padding lanes they fill panels."""
WIDE, NARROW, ANY = (129, 200, 257), (1, 2, 3, 5, 8, 15, 16), (1, 2, 3, 8, 15, 16, 17, 31)
MANY = (32, 33, 48, 64, 65)

KINDS: dict[str, tuple[Sequence[int], Sequence[int], Sequence[int]]] = {
    "dense": (WIDE, (1, 2, 3, 5), (1,)),
    "short": (NARROW, (1, 2, 3, 4, 5, 7, 8), (1, 1, 2, 3)),
    "depthwise": (SINGLE, (1, 2, 3, 4, 7, 9, 31, 64), (8, 16, 17, 40, 64, 200)),
    "long depthwise": (SINGLE, (16, 17, 31, 64), (8, 16, 40, 200)),
    "lengthwise": (ANY, (1, 2, 3, 4, 7, 11, 31), (1, 1, 2, 3)),
    "winograd": (MANY, (3, 3, 3, 4, 5, 6, 7, 9, 11), (1, 1, 1, 2)),
    "paired": ((8, 16, 17, 32, 65), (1, 2, 3, 5, 7), (1, 1, 2)),
}
"""Channels of a group, taps and groups of layers that only one kernel computes."""

ROWS = """
float32 conv NLC * dense UNEVEN     | float32 conv NLC packed dense UNEVEN   | float32 conv NLC packed dense WHOLE
float32 conv NLC * short UNEVEN     | float32 conv NLC packed short WHOLE    | float32 conv NLC * depthwise SINGLE
float32 conv NLC * winograd UNEVEN  | float32 conv NLC packed winograd WHOLE | float32 conv NLC packed winograd UNEVEN
float32 conv NLC SCF lengthwise FEW | float32 conv NLC FSC lengthwise FEW    | float32 conv NCL SCF lengthwise UNEVEN
float32 conv NCL FCS lengthwise FEW | float32 conv NCL * long_depthwise SINGLE
float32 conv NCL FCS winograd WHOLE | float32 conv NCL packed winograd UNEVEN
float32 transposed NLC packed dense WHOLE     | float32 transposed NLC CFS short HALF
float32 transposed NLC packed short HALF      | float32 transposed NLC packed depthwise SINGLE
float32 transposed NCL packed lengthwise FEW  | float32 transposed NLC FSC winograd WHOLE
float32 transposed NLC packed winograd HALF   | float32 transposed NCL packed winograd WHOLE
float32 transposed NCL SFC lengthwise FEW     | float32 transposed NLC SFC depthwise SINGLE
float64 conv NLC packed winograd WHOLE | float64 conv NCL CFS lengthwise FEW | float64 transposed NLC packed short HALF
float16 conv NLC * dense WHOLE | float16 conv NCL SFC lengthwise FEW | float16 transposed NCL CFS lengthwise FEW
bfloat16 conv NLC * paired WHOLE | bfloat16 conv NCL FCS paired UNEVEN | bfloat16 transposed NLC SFC paired HALF
bfloat16 conv NLC * depthwise SINGLE
"""
"""The rows of layers: dtype, operation, the data's axes, the filter's axes, kernel, and filters of a group.

Each takes seconds to compile. `*` is any order, which the graph permutes; `packed` is any order, in a weight.
"""


@dataclass(frozen=True)
class Layer:
    """One random layer. `filter_layout` is the filter's layout; `packed` is whether the filter is a weight."""

    number: int
    transposed: bool
    dtype: str
    batch: int
    length: int
    taps: int
    group_channels: int
    group_filters: int
    options: dict[str, Any]
    packed: bool
    known: bool
    bias: bool
    poison: str

    @property
    def groups(self) -> int:
        return self.options["groups"]

    @property
    def name(self) -> str:
        kind = "conv_transpose1d" if self.transposed else "conv1d"
        sizes = f"{self.batch}x{self.length} {self.group_channels}->{self.group_filters} k{self.taps}"
        flags = [flag for flag in ("packed", "known", "bias") if getattr(self, flag)]
        options = " ".join(f"{key}={value}".replace(" ", "") for key, value in self.options.items())
        return f"layer {self.number} {' '.join([kind, self.dtype, sizes, options, *flags, self.poison])}"

    @property
    def x_shape(self) -> tuple[int, ...]:
        return self.by_axis(self.options["layout"], N=self.batch, L=self.length, C=self.groups * self.group_channels)

    @property
    def filter_shape(self) -> tuple[int, ...]:
        channels, filters = self.group_channels, self.groups * self.group_filters
        if self.transposed and self.options["filter_layout"] != "FSC":
            channels, filters = self.groups * self.group_channels, self.group_filters
        return self.by_axis(self.options["filter_layout"], S=self.taps, C=channels, F=filters)

    @property
    def output_shape(self) -> tuple[int, ...]:
        options, stride = self.options, self.options["stride"]
        reach, padding = options["dilation"] * (self.taps - 1) + 1, sum(options["padding"])
        if self.transposed:
            outputs = (self.length - 1) * stride + reach + options["output_padding"] - padding
        else:
            outputs = (self.length + padding - reach) // stride + 1
        return self.by_axis(options["layout"], N=self.batch, L=outputs, C=self.groups * self.group_filters)

    @staticmethod
    def by_axis(axes: str, **sizes: int) -> tuple[int, ...]:
        return tuple(sizes[axis] for axis in axes)


def pick(random: np.random.Generator, values: Sequence[Any]) -> Any:
    return values[int(random.integers(len(values)))]


def draw(number: int) -> Layer:
    """Returns the layer with a number: the same in every run, independent of the other layers."""
    random = np.random.default_rng([1, number])
    rows = [row.split() for row in ROWS.replace("|", "\n").strip().splitlines()]
    dtype, operation, layout, order, kind, size = rows[number % len(rows)]
    transposed, packed, kind = operation == "transposed", order == "packed", kind.replace("_", " ")
    channels, taps, groups = (pick(random, sizes) for sizes in KINDS[kind])
    filters = pick(random, globals()[size])
    strides = (1,) if kind == "long depthwise" else (1, 1, 2) if kind == "winograd" else (1, 1, 2, 3, 5, 16)
    stride = pick(random, (2, 3, 4, 8) if transposed and kind != "winograd" else strides)
    dilation = pick(random, (1, 1, 1, 2, 3, 8, 25))
    if transposed and kind == "winograd":  # a phase uses every second tap
        taps, groups = taps * stride, 1
    reach = dilation * (taps - 1) + 1
    batch = pick(random, (1, 1, 1, 2, 3))
    most = max(8, pick(random, WORK) // (batch * groups * channels * filters * taps))
    positions = pick(random, OUTPUTS) if kind == "winograd" else min(most, pick(random, OUTPUTS))
    options: dict[str, Any] = {"stride": stride, "dilation": dilation, "groups": groups, "layout": layout}
    left, right = (int(random.integers(reach + 2)) for _ in "lr")
    if transposed:
        extra = int(random.integers(max(stride, dilation)))
        length, outputs = positions, (positions - 1) * stride + reach + extra
        left = min(left, outputs - 1)
        options |= {"padding": (left, min(right, outputs - 1 - left)), "output_padding": extra}
    else:
        mode = pick(random, ("zeros", "zeros", "reflect", "replicate", "circular"))
        length = max(1, (positions - 1) * stride + reach + int(random.integers(stride)) - left - right)
        if mode in ("reflect", "circular"):
            left, right = (min(side, length - (mode == "reflect")) for side in (left, right))
        length = max(length, reach - left - right)
        options |= {"padding": (left, right), "padding_mode": mode}
    if order in ("*", "packed"):
        order = pick(random, ("SFC", "CFS", "FSC") if transposed else ("SCF", "SCF", "FCS", "FSC", "CFS", "SFC"))
    exact = kind in ("dense", "lengthwise") or (number % 8 == 0 and kind == "winograd")
    options |= {"filter_layout": order, "exact": exact}
    known, bias = (bool(random.random() < share) for share in (0.3, 0.5))
    sizes = (batch, length, taps, channels, filters)
    return Layer(number, transposed, dtype, *sizes, options, packed, known, bias, pick(random, POISONS))


def buffer(values: np.ndarray, dtype: str) -> Buffer:
    """Returns values in a dtype; for bfloat16 they are truncated."""
    if dtype == "bfloat16":
        bits = (np.asarray(values, np.float32, order="C").view(np.uint32) >> 16).astype(np.uint16)
        return Buffer.from_numpy(bits).view(DType.bfloat16, list(bits.shape))
    with np.errstate(over="ignore"):
        return Buffer.from_numpy(np.asarray(values, dtype, order="C"))


def data(layer: Layer, order: str = "") -> dict[str, Buffer]:
    """Returns a layer's input, filter and bias; the filter in another axis order, if `order` is one."""
    random = np.random.default_rng([2, layer.number])
    shapes = {"input": layer.x_shape, "filter": layer.filter_shape, "bias": (layer.groups * layer.group_filters,)}
    values = {name: random.standard_normal(shape) for name, shape in shapes.items()}
    where, _, what = layer.poison.partition(" ")
    if what:
        spots = random.integers(values[where].size, size=1 + values[where].size // 500)
        signs = random.choice((-1, 1), spots.size)
        values[where].flat[spots] = signs * {"nan": np.nan, "inf": np.inf, "huge": 1e30}[what]
    given = layer.options["filter_layout"]
    if sorted(order) == sorted(given):
        values["filter"] = values["filter"].transpose([given.index(axis) for axis in order])
    return {name: buffer(array, layer.dtype) for name, array in values.items()}


class Way(NamedTuple):
    """An operation in a graph: everything that its compiled code depends on, except its sizes."""

    name: str
    parameters: str
    operands: tuple[tuple[str, int], ...]
    """Dtypes and ranks."""
    result: tuple[str, int]


class Traced(NamedTuple):
    """A layer, its way, and the way's operands in order: names of the layer's data, or constants."""

    layer: Layer
    way: Way
    operands: list[str | np.ndarray]
    filter: Buffer | None
    """The packed filter, if there is one."""

    @property
    def parameters(self) -> dict[str, Any]:
        return json.loads(self.way.parameters)


def trace(layers: Sequence[Layer]) -> tuple[list[Traced], list[Path]]:
    """Lets the public functions choose how each layer is computed; also returns the compiled kernels."""
    calls: list[tuple[Any, ...]] = []
    constants: dict[int, tuple[Any, np.ndarray]] = {}
    emit, constant = ops.custom, ops.constant

    def noted_constant(value: Any, dtype: Any = None, device: Any = None) -> Any:
        result = constant(value, dtype, device)
        constants[id(result)] = result, np.asarray(value)  # kept, so that no other object gets its id
        return result

    def noted_emit(name: str, device: Any, values: Any, out_types: Any, parameters: Any = None) -> Any:
        calls.append((name, list(values), out_types[0], parameters))
        return emit(name, device, values, out_types, parameters)

    types = []
    for layer in layers:
        names = [f"{axis}{layer.number}" if axis in "NL" else None for axis in layer.options["layout"]]
        shape = [size if layer.known else name or size for name, size in zip(names, layer.x_shape, strict=True)]
        types += [TensorType(DType[layer.dtype], size, HOST) for size in (shape, layer.filter_shape)]
        types.append(TensorType(DType[layer.dtype], [layer.groups * layer.group_filters], HOST))
    patches = mock.patch.multiple(ops, custom=noted_emit, constant=noted_constant)
    with patches, max_conv.PackedGraph("layers", input_types=types) as graph:
        inputs = [value.tensor for value in graph.inputs]
        for i, layer in enumerate(layers):
            x, filter, bias = inputs[3 * i : 3 * i + 3]
            if layer.packed:
                filter = Weight(f"w{layer.number}", DType[layer.dtype], layer.filter_shape, HOST)
            function = max_conv.conv_transpose1d if layer.transposed else max_conv.conv1d
            function(x, filter, bias if layer.bias else None, **layer.options)
        graph.output()
    weights = {f"w{layer.number}": data(layer)["filter"] for layer in layers if layer.packed}
    registry = max_conv.registry(graph, weights)
    packed = {name.partition(".")[0]: value for name, value in registry.items() if "." in name}
    result = []
    for layer, (name, values, out_type, parameters) in zip(layers, calls, strict=True):
        known = [constants.get(id(value), (None, None))[1] for value in values]
        rest = iter(("input", "filter", "bias"))
        operands = [next(rest) if value is None else value for value in known]
        kinds = tuple((value.type.dtype.name, value.type.rank) for value in values)
        way = Way(name, json.dumps(parameters, sort_keys=True), kinds, (out_type.dtype.name, out_type.rank))
        result.append(Traced(layer, way, operands, packed.get(f"w{layer.number}")))
    return result, graph.kernel_libraries_paths


def compile_ways(ways: Sequence[Way], libraries: Sequence[Path]) -> list[Model]:
    """Compiles a graph for each way, with a symbol for every size."""
    module = Module()
    for number, way in enumerate(ways):
        kinds = [(f"s{i}", *kind) for i, kind in enumerate(way.operands)]
        types = [
            TensorType(DType[dtype], [f"{name}_{axis}" for axis in range(rank)], HOST) for name, dtype, rank in kinds
        ]
        sizes = [f"out_{axis}" for axis in range(way.result[1])]
        types.append(TensorType(DType.int8, sizes, HOST))
        with Graph(f"way{number}", input_types=types, custom_extensions=libraries, module=module) as graph:
            *operands, out = (value.tensor for value in graph.inputs)
            results = [TensorType(DType[way.result[0]], out.shape, HOST)]
            (y,) = ops.custom(way.name, HOST, operands, results, json.loads(way.parameters))
            graph.output(y)
    loaded = InferenceSession(devices=[CPU()]).load_all(module, custom_extensions=libraries)
    return [loaded[f"way{number}"] for number in range(len(ways))]


def outputs(count: int) -> Iterator[tuple[str, str, Buffer]]:
    """Yields the name, the kernel and the output of `count` layers."""
    traced, libraries = trace([draw(number) for number in range(count)])
    ways = list(dict.fromkeys(item.way for item in traced))
    models = dict(zip(ways, compile_ways(ways, libraries), strict=True))
    for item in traced:
        values = data(item.layer, item.parameters.get("filter_layout", ""))
        if item.filter is not None:
            values["filter"] = item.filter
        operands = [
            values[value] if isinstance(value, str) else buffer(value, dtype)
            for value, (dtype, _) in zip(item.operands, item.way.operands, strict=True)
        ]
        shape = Buffer.from_numpy(np.zeros(item.layer.output_shape, np.int8))
        (result,) = models[item.way].execute(*operands, shape)
        yield item.layer.name, item.parameters.get("kernel", ""), result
