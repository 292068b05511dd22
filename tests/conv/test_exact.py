"""Inputs that an output does not see do not affect it: not finite or very large ones, `exact=True`, one error bound."""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from inspect import signature
from typing import Any

import numpy as np
import pytest
from max.dtype import DType
from max.graph import TensorType, Weight
from max_conv.graphs import conv1d as one_layer
from max_conv.graphs import tcn

import max_conv
from harness import HOST, normal
from max_conv import Conv1D, ConvTranspose1D, PackedGraph, conv1d, conv_transpose1d
from max_conv.conv.geometry import Geometry
from max_conv.conv.layouts import Layout
from max_conv.conv.reference import conv1d_ref, conv_transpose1d_ref
from max_conv.runtime.kinds import alone, ready

LENGTH = 211


@dataclass(frozen=True)
class Net:
    """One layer, separate from the others in the graph."""

    channels: int
    filters: int
    kernel_size: int
    options: Mapping[str, Any]
    transposed: bool = False
    layout: Layout = "NLC"

    @property
    def shape(self) -> tuple[int, int, int]:
        groups = self.options.get("groups", 1)
        if self.transposed:
            return self.kernel_size, self.filters // groups, self.channels
        return self.kernel_size, self.channels // groups, self.filters

    def emit(self, x: Any, w: Any, **more: Any) -> Any:
        return (conv_transpose1d if self.transposed else conv1d)(x, w, layout=self.layout, **self.options, **more)

    def reference(self, x: np.ndarray, w: np.ndarray) -> np.ndarray:
        with np.errstate(invalid="ignore", over="ignore"):
            return (conv_transpose1d_ref if self.transposed else conv1d_ref)(x, w, layout=self.layout, **self.options)

    def data(self, batch: int = 2, seed: int = 0) -> np.ndarray:
        """Returns normal data, (N, L, C) for every layout: `given` permutes it."""
        return normal(batch, LENGTH, self.channels, seed=seed)

    def given(self, x: np.ndarray) -> np.ndarray:
        return x if self.layout == "NLC" else np.ascontiguousarray(x.swapaxes(1, 2))


NETS = [
    Net(64, 64, 3, {"padding": 1}),
    Net(64, 48, 7, {"padding": 3}, layout="NCL"),
    Net(32, 40, 4, {"stride": 2, "padding": 1}),
    Net(64, 64, 3, {"padding": "causal", "dilation": 9}),
    Net(64, 64, 5, {"padding": 8, "dilation": 2, "padding_mode": "reflect"}, layout="NCL"),
    Net(16, 24, 3, {"padding": 1}),
    Net(16, 12, 3, {"padding": "causal"}, layout="NCL"),
    Net(64, 64, 5, {"stride": 2, "padding": 1}, transposed=True),
    Net(32, 40, 16, {"stride": 5, "padding": 3}, transposed=True, layout="NCL"),
    Net(64, 32, 4, {"stride": 2, "padding": "causal"}, transposed=True),
    Net(8, 12, 5, {"stride": 2}, transposed=True),
    Net(16, 16, 7, {"stride": 3, "padding": 2, "groups": 16}, transposed=True),
    Net(4, 3, 3, {"stride": 2}, transposed=True, layout="NCL"),
]
"""Winograd's kernel and the direct ones, with and without whole phases."""
FEW = [NETS[i] for i in (0, 1, 3, 7, 8)]

Model = Callable[[list[np.ndarray], list[np.ndarray]], list[np.ndarray]]


@cache
def model(dtype: str = "float32", packed: bool = True, exact: bool = False) -> tuple[list[Net], Model, list[str]]:
    """Returns layers, a function of their data and filters, and the names of their kernels."""
    nets = NETS if dtype == "float32" and packed else FEW
    graphs = [graph_of(net, dtype, packed, exact) for net in nets]
    layers = [alone(graph) for graph in graphs]
    ready(*(layer.kind for layer in layers if layer))

    compiled: dict[bytes, list[Any]] = {}

    def run(xs: list[np.ndarray], ws: list[np.ndarray]) -> list[np.ndarray]:
        filters = [w.astype(dtype) for w in ws]
        key = b"".join(w.tobytes() for w in ws)
        if key not in compiled:
            compiled.clear()
            compiled[key] = [
                max_conv.compile(graph, weights={"w": w})
                if packed
                else functools.partial(max_conv.compile(graph, ["x", "w"]), w=w)
                for graph, w in zip(graphs, filters)
            ]
        data = [net.given(x.astype(dtype)) for net, x in zip(nets, xs)]
        return [layer(x) for layer, x in zip(compiled[key], data)]

    return nets, run, [graph.emitted[0][0].kernel for graph in graphs]


def graph_of(net: Net, dtype: str, packed: bool, exact: bool) -> PackedGraph:
    """Returns the graph of a layer; its filter is a weight if it is packed, otherwise an input."""
    shape = [
        size if axis == "C" else axis for axis, size in zip(net.layout, net.given(np.zeros((1, 1, net.channels))).shape)
    ]
    types = [TensorType(DType[dtype], shape, HOST), TensorType(DType[dtype], list(net.shape), HOST)]
    with PackedGraph("layer", input_types=types[: 2 - packed], exact=exact) as graph:
        x, *rest = (value.tensor for value in graph.inputs)
        graph.output(net.emit(x, *rest or [Weight("w", DType[dtype], list(net.shape), HOST)]))
    return graph


KINDS = [("float32", True), ("float32", False), ("float64", True), ("float16", False)]
TOLERANCE = {"float32": 1e-6, "float64": 1e-14, "float16": 1e-3}


def compare(net: Net, x: np.ndarray, w: np.ndarray, y: np.ndarray, dtype: str) -> None:
    """Checks where `y` is NaN and where it is infinite, and every other value against the data that it sees."""
    x, w = (array.astype(dtype).astype(np.float64) for array in (x, w))
    want = net.reference(net.given(x), w)
    with np.errstate(over="ignore"):
        kept = want.astype(dtype)
    np.testing.assert_array_equal(np.isnan(y), np.isnan(kept), err_msg=str(net))
    np.testing.assert_array_equal(np.isinf(y), np.isinf(kept), err_msg=str(net))
    finite = np.isfinite(kept)
    largest = np.abs(w[np.isfinite(w)]).max()
    seen = net.reference(net.given(np.abs(x)), np.full_like(w, largest))
    assert (np.abs(y[finite] - want[finite]) <= TOLERANCE[dtype] * seen[finite]).all(), net


@pytest.mark.parametrize(("dtype", "packed"), KINDS)
def test_values_touch_what_sees_them(dtype: str, packed: bool) -> None:
    nets, run, kernels = model(dtype, packed)
    if packed:
        assert kernels.count("winograd") >= 4 and (dtype == "float64" or len(set(kernels)) >= 4)
    ws = [normal(*net.shape, seed=1) for net in nets]
    huge = {"float16": [], "float32": [1e38, 1e30], "float64": [5e307, 1e250]}[dtype]
    for value in (np.nan, np.inf, -np.inf, *huge):
        xs = [net.data() for net in nets]
        for number, x in enumerate(xs):
            rows = np.random.default_rng([number, 7]).integers(0, LENGTH, 3)
            x = xs[number] = x.astype(dtype)
            # A sum of two large values may overflow before its end, depending on its order.
            at = [*rows, 0, LENGTH - 1] if not np.isfinite(value) else [rows[0]]
            x[1, at, np.arange(len(at)) % 4] = value
        for net, x, w, y in zip(nets, xs, ws, run(xs, ws)):
            compare(net, x, w, y, dtype)


@pytest.mark.parametrize(("dtype", "packed"), KINDS)
@pytest.mark.parametrize("value", [np.inf, 1e30])
def test_filters_that_are_not_finite(dtype: str, packed: bool, value: float) -> None:
    """In one filter of a panel, at one tap; the others stay right. In zero padding, zero times such a tap is NaN."""
    nets, run, _ = model(dtype, packed)
    if dtype == "float16" and value == 1e30:
        value = np.nan
    xs, ws = [net.data() for net in nets], [normal(*net.shape, seed=1) for net in nets]
    for w in ws:
        w[1, -1, 0] = value
    for net, x, w, y in zip(nets, xs, ws, run(xs, ws)):
        compare(net, x, w, y, dtype)


@pytest.mark.parametrize(("dtype", "packed"), KINDS[:3])
def test_zeros_in_a_filter_stay_zeros(dtype: str, packed: bool) -> None:
    """Zero times infinity is NaN, and 1e-12 times infinity is not, though the transforms round both away."""
    nets, run, _ = model(dtype, packed)
    for small in (0.0, 1e-12):
        xs, ws = [net.data() for net in nets], [np.round(normal(*net.shape, seed=2) * 2) for net in nets]
        for x, w in zip(xs, ws):
            w[1] *= small
            x[0, LENGTH // 2, 0] = np.inf
        for net, x, w, y in zip(nets, xs, ws, run(xs, ws)):
            compare(net, x, w, y, dtype)


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("kind", ["normal", "uniform", "one sign"])
def test_one_bound_for_all_data(kind: str, exact: bool) -> None:
    """The bound that ARCHITECTURE.md states, for every kernel."""
    nets, run, _ = model(exact=exact)
    random = np.random.default_rng(5)
    draws: dict[str, Callable[..., Any]] = {
        "normal": random.standard_normal,
        "uniform": lambda shape: random.uniform(-1, 1, shape),
        "one sign": lambda shape: random.uniform(0, 1, shape),
    }
    draw = draws[kind]
    xs = [draw((2, LENGTH, net.channels)).astype(np.float32) for net in nets]
    ws = [draw(net.shape).astype(np.float32) for net in nets]
    for net, x, w, y in zip(nets, xs, ws, run(xs, ws)):
        want, seen = net.reference(net.given(x), w), net.reference(net.given(np.abs(x)), np.abs(w))
        terms = net.kernel_size * net.channels // net.options.get("groups", 1)
        largest = np.abs(x).max() * np.abs(w).max()
        eps = np.finfo(np.float32).eps
        assert (np.abs(y - want) <= 4 * eps * (np.sqrt(terms) * largest + seen.max()) + eps * np.abs(want)).all(), net


# exact=True


def test_exact_takes_direct_kernels() -> None:
    assert "winograd" in model()[2] and "winograd" not in model(exact=True)[2]
    x = TensorType(DType.float32, ["n", "l", 64], HOST)
    for made in (Conv1D(3, 64, 64, DType.float32, exact=True), ConvTranspose1D(4, 64, 64, DType.float32, exact=True)):
        assert PackedGraph("layer", made, input_types=[x]).emitted[0][0].kernel == "dense"
    weights = {"weight": np.zeros((3, 64, 64), np.float32)}
    kernels = [
        one_layer.build(one_layer.Config(), weights, exact=exact).emitted[0][0].kernel for exact in (False, True)
    ]
    assert kernels == ["winograd", "dense"]


@pytest.mark.parametrize("value", [1e8, np.nan, np.inf, 3e38])
def test_exact_sees_no_future(value: float) -> None:
    """Changing later inputs changes no bit of earlier outputs; without exact, a spike of 1e8 does."""
    cut = 101
    for exact in (True, False):
        nets, run, _ = model(exact=exact)
        ws = [normal(*net.shape, seed=1) for net in nets]
        xs = [net.data() for net in nets]
        before = run(xs, ws)
        for x in xs:
            x[:, cut:, ::3] = value
        same = []
        for net, one, other in zip(nets, before, run(xs, ws)):
            if net.options.get("padding") == "causal":
                kept = cut * net.options.get("stride", 1)
                along = net.layout.index("L")
                one, other = (np.moveaxis(y, along, 0)[:kept] for y in (one, other))
                same.append(one.tobytes() == other.tobytes())
        assert len(same) == 3 and (all(same) or not exact), same
        assert exact or value != 1e8 or not all(same), "this test could not fail"


def test_exact_keeps_integers() -> None:
    nets, run, _ = model(exact=True)
    random = np.random.default_rng(6)
    xs = [random.integers(-40, 41, (2, LENGTH, net.channels)).astype(np.float32) for net in nets]
    ws = [random.integers(-40, 41, net.shape).astype(np.float32) for net in nets]
    for net, x, w, y in zip(nets, xs, ws, run(xs, ws)):
        want = net.reference(net.given(x), w)
        assert np.abs(want).max() < 2**24
        np.testing.assert_array_equal(y, want, err_msg=str(net))


def test_exact_knows_no_neighbours() -> None:
    """A batch item's output is the same alone, and next to an item of NaN."""
    nets, run, _ = model(exact=True)
    ws, xs = [normal(*net.shape, seed=1) for net in nets], [net.data(3) for net in nets]
    alone = run([x[1:2] for x in xs], ws)
    for x in xs:
        x[::2] = np.nan
    for net, one, several in zip(nets, alone, run(xs, ws)):
        assert one[0].tobytes() == several[1].tobytes(), net


def test_exact_of_a_finished_graph() -> None:
    weights = {"weight": np.ones((3, 64, 64), np.float32)}
    graph = one_layer.build(one_layer.Config(), weights)
    with pytest.raises(
        TypeError, match=r"^compile: a finished Graph has its kernels already; build it with exact=True"
    ):
        max_conv.compile(graph, weights=weights, exact=True)


def test_explain_says_what_exact_costs(capsys: pytest.CaptureFixture[str]) -> None:
    layer = Conv1D(3, 80, 384, DType.float32, padding=1)
    fast, exact = (
        max_conv.explain(layer, length=3000),
        max_conv.explain(layer, length=3000, exact=True),
    )
    assert (fast.kernel, fast.exact, fast.cost) == ("winograd", False, 2.0)
    assert (exact.kernel, exact.exact, exact.cost) == ("dense", True, 1.0)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("exact")]
    assert lines == ["exact       no, exact=True costs 2.00 times as many multiplications", "exact       yes"]
    assert max_conv.explain(Conv1D(3, 80, 384, DType.float32, exact=True), length=9).kernel == "dense"


GALLERY = [
    "conv1d",
    "crepe",
    "dac",
    "encodec",
    "hifigan",
    "mamba",
    "pesto",
    "silero_vad",
    "tcn",
    "univnet",
    "vocos",
    "wav2vec2",
    "whisper",
]


@pytest.mark.parametrize("name", GALLERY)
def test_every_builder_takes_exact(name: str) -> None:
    module = __import__(f"max_conv.graphs.{name}", fromlist=["build"])
    builders = [getattr(module, key) for key in dir(module) if key.startswith("build")]
    assert builders
    for build in builders:
        assert signature(build).parameters["exact"].default is False


def test_exact_reaches_a_networks_layers() -> None:
    config = tcn.Config(inputs=64, channels=(64, 64), kernel_size=3)
    weights = {name: np.zeros(shape, np.float32) for name, shape in config.shapes().items()}
    fast, exact = ({e.kernel for es in tcn.build(config, weights, exact=x).emitted for e in es} for x in (False, True))
    assert "winograd" in fast and "winograd" not in exact


def test_reach_of_one_position() -> None:
    with pytest.raises(ValueError, match="reaches over 1 position "):
        Geometry.of(1).check_length(0)
