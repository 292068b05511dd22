"""Which layers run in the graph of their kind; every bit equals the bit of a graph of the layer's own sizes."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from max.dtype import DType
from max.graph import Graph, TensorType, ops

import max_conv
from harness import HOST, Case, bound, check, normal, wide
from max_conv import Conv1D, ConvTranspose1D, PackedGraph, conv1d
from max_conv.conv.reference import conv1d_ref, conv_transpose1d_ref
from max_conv.frontends import torch as theirs
from max_conv.runtime import kinds

F32 = DType.float32

# Taps, channels, filters, options. Each kernel, with whole panels of filters and without.
LAYERS: dict[str, tuple[Any, tuple[int, int, int], dict[str, Any]]] = {
    "winograd": (Conv1D, (3, 64, 64), {"padding": 1, "has_bias": True}),
    "winograd, odd": (Conv1D, (7, 40, 33), {"padding": "same", "dilation": 2, "permute": True}),
    "dense": (Conv1D, (1, 200, 64), {}),
    "dense, odd": (Conv1D, (5, 65, 9), {"stride": 7, "padding": (3, 9), "has_bias": True}),
    "short": (Conv1D, (4, 8, 48), {"stride": 2, "padding_mode": "reflect", "padding": 3}),
    "depthwise": (Conv1D, (4, 48, 48), {"num_groups": 48, "padding": "causal", "has_bias": True}),
    "lengthwise": (Conv1D, (5, 6, 4), {"num_groups": 2, "padding": 2, "permute": True}),
    "up": (ConvTranspose1D, (16, 64, 32), {"stride": 8, "padding": 4, "has_bias": True}),
    "up, odd": (ConvTranspose1D, (5, 9, 7), {"stride": 2, "output_padding": 1}),
    "up, depthwise": (ConvTranspose1D, (4, 16, 16), {"stride": 2, "num_groups": 16, "padding": "causal"}),
}


def made(name: str) -> Any:
    kind, (taps, channels, filters), options = LAYERS[name]
    layer = kind(taps, channels, filters, F32, **options)
    layer.load_state_dict({n: normal(*map(int, w.shape), seed=1) for n, w in layer.raw_state_dict().items()})
    return layer


def data(layer: Any, batch: int = 2, length: int = 67) -> np.ndarray:
    x = normal(batch, length, layer.in_channels)
    return np.ascontiguousarray(x.swapaxes(1, 2)) if layer.permute else x


def own(name: str) -> PackedGraph:
    layer = made(name)
    return PackedGraph("layer", layer, input_types=layer.input_types())


def graphs() -> dict[str, tuple[PackedGraph, dict[str, Any]]]:
    """Each layer, for its own sizes."""
    return {name: (own(name), {}) for name in LAYERS}


@pytest.fixture(scope="module")
def both(models: dict[str, max_conv.Model]) -> dict[str, tuple[max_conv.Model, max_conv.Model]]:
    """Each layer through its kind, and compiled for its own sizes."""
    found = [kinds.alone(own(name)) for name in LAYERS]
    assert all(found)
    kinds.ready(*(layer.kind for layer in found if layer))
    return {name: (max_conv.compile(made(name)), models[name]) for name in LAYERS}


@pytest.mark.parametrize("length", [21, 67, 300])
@pytest.mark.parametrize("name", LAYERS)
def test_no_bit_differs(name: str, length: int, both: dict[str, tuple[max_conv.Model, max_conv.Model]]) -> None:
    x = data(made(name), length=length)
    kind, own = (model(x) for model in both[name])
    assert kind.shape == own.shape and kind.tobytes() == own.tobytes()


@pytest.mark.parametrize("name", LAYERS)
def test_saved_and_loaded(name: str, tmp_path: Path) -> None:
    model, x = max_conv.compile(made(name)), data(made(name))
    model.save(tmp_path / "layer.maxconv")
    assert max_conv.load(tmp_path / "layer.maxconv")(x).tobytes() == model(x).tobytes()


def random_layers(count: int) -> Iterator[tuple[Any, int, int]]:
    """Yields layers, each with a batch size and a length."""
    random = np.random.default_rng(0)
    for number in range(count):
        taps, stride, dilation = (int(random.integers(1, most)) for most in (9, 5, 4))
        groups = int(random.choice([1, 1, 2, 16]))
        channels, filters = (groups * int(random.choice([1, 3, 8, 33, 40])) for _ in "CF")
        options: dict[str, Any] = {
            "stride": stride,
            "dilation": dilation,
            "num_groups": groups,
            "has_bias": bool(number % 2),
        }
        options["permute"] = bool(random.integers(2))
        padding = int(random.integers(0, taps + 2))
        if number % 3:
            layer: Any = Conv1D(taps, channels, filters, F32, padding=padding, **options)
        else:
            layer = ConvTranspose1D(taps, channels, filters, F32, padding="causal", **options)
        layer.load_state_dict({n: normal(*map(int, w.shape), seed=number) for n, w in layer.raw_state_dict().items()})
        yield layer, int(random.integers(0, 4)), dilation * taps + int(random.integers(0, 50))


def test_500_random_layers() -> None:
    """One after the other, as a user makes them; only the kinds are compiled."""
    eps = float(np.finfo(np.float32).eps)
    for layer, batch, length in random_layers(500):
        x = data(layer, batch, length)
        state = {name: value.to_numpy() for name, value in layer.state_dict().items()}
        options = {"stride": layer.stride, "dilation": layer.dilation, "groups": layer.num_groups}
        options |= {"layout": layer.layout, "filter_layout": layer.filter_layout, "padding": layer.padding}
        function: Any = conv1d_ref if isinstance(layer, Conv1D) else conv_transpose1d_ref
        operands = [wide(value) for value in (x, state["weight"], *([state["bias"]] if "bias" in state else []))]
        want = function(*operands, **options)
        case = Case("layer", x, state["weight"], state.get("bias"), options, transposed=not isinstance(layer, Conv1D))
        got = max_conv.compile(layer)(x)
        assert got.shape == want.shape
        # Winograd's transforms lose digits for any number of channels.
        assert (np.abs(got - want) <= 4 * bound(case, eps, want) + 1e-5).all(), (layer, length)


X = TensorType(F32, ["n", "l", 8], HOST)
W = TensorType(F32, [3, 8, 48], HOST)


def graph_of(function: Callable[..., Any], *types: TensorType) -> PackedGraph:
    return PackedGraph("layer", function, input_types=types)


def test_what_is_alone() -> None:
    layer = Conv1D(3, 8, 48, F32, has_bias=True)
    flat = TensorType(F32, ["l", 8], HOST)
    for graph in (
        graph_of(layer, X),
        graph_of(lambda x: layer(x), X),
        graph_of(layer, TensorType(F32, [2, 30, 8], HOST)),
        graph_of(layer, flat),
        graph_of(lambda w, x: conv1d(x, w), W, X),
        graph_of(lambda x, w, other: conv1d(x, w), X, W, X),
    ):
        assert kinds.alone(graph)


OTHERS: dict[str, Callable[[], Graph]] = {
    "no convolution": lambda: graph_of(lambda x: x, X),
    "followed by": lambda: graph_of(lambda x, w: ops.relu(conv1d(x, w)), X, W),
    "after": lambda: graph_of(lambda x, w: conv1d(ops.relu(x), w), X, W),
    "two": lambda: graph_of(lambda x, w: (conv1d(x, w), conv1d(x, w, padding=1)), X, W),
    "two outputs": lambda: graph_of(lambda x, w: (conv1d(x, w), x), X, W),
    "another output": lambda: graph_of(lambda x, w: (conv1d(x, w), x)[1], X, W),
    "a reshape": lambda: graph_of(
        lambda x, w: ops.reshape(conv1d(ops.reshape(x, [1, 30, 8]), w), [28, 48]), TensorType(F32, [3, 80], HOST), W
    ),
    "a filter in the graph": lambda: graph_of(lambda x: conv1d(x, ops.constant(normal(3, 8, 48), F32, device=HOST)), X),
    "a bias in the graph": lambda: graph_of(
        lambda x, w: conv1d(x, w, ops.constant(normal(48), F32, device=HOST)), X, W
    ),
    "a turned filter": lambda: graph_of(
        lambda x, w: conv1d(x, w, filter_layout="FSC"), X, TensorType(F32, [48, 3, 8], HOST)
    ),
    "a plain graph": lambda: Graph("plain", lambda x, w: conv1d(x, w), [X, W]),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_not_alone(name: str) -> None:
    assert kinds.alone(OTHERS[name]()) is None


def test_inputs_in_any_order_and_without_a_batch() -> None:
    w, x = normal(3, 8, 48), normal(20, 8)
    graph = graph_of(lambda w, b, x: conv1d(x, w, b), W, TensorType(F32, [48], HOST), TensorType(F32, ["l", 8], HOST))
    model = max_conv.compile(graph, ["w", "b", "x"])
    check(Case("layer", x, w, normal(48)), model(x=x, w=w, b=normal(48)))


def test_sizes_of_the_graph_are_checked() -> None:
    model = max_conv.compile(graph_of(made("short"), TensorType(F32, [2, 30, 8], HOST)))
    assert model(normal(2, 30, 8)).shape == (2, 17, 48)
    with pytest.raises(ValueError, match=r"^model: input 'input0' must have shape \(2, 30, 8\), but has \(2, 31, 8\)"):
        model(normal(2, 31, 8))
    with pytest.raises(ValueError, match=r"^conv1d: padding of 3 with values of the input needs more than its 3 pos"):
        max_conv.compile(made("short"))(normal(1, 3, 8))


def test_a_front_end_of_many_output_sizes() -> None:
    """`output_size` is data: each one is another model of the same kind."""
    layer = theirs.ConvTranspose1d(9, 7, 5, stride=4, generator=0)
    x = normal(1, 9, 20)
    assert [layer(x, output_size=[size]).shape[2] for size in (81, 82, 83, 84)] == [81, 82, 83, 84]


def test_damaged_layers_of_a_saved_model_are_refused(tmp_path: Path) -> None:
    import json
    import zipfile

    path = tmp_path / "layer.maxconv"
    max_conv.compile(made("short")).save(path)
    with zipfile.ZipFile(path) as file:
        parts = {name: file.read(name) for name in file.namelist()}
    meta = json.loads(parts["meta.json"])
    del meta["alone"]["layer"]["geometry"]
    with zipfile.ZipFile(path, "w") as file:
        for name, content in (parts | {"meta.json": json.dumps(meta).encode()}).items():
            file.writestr(name, content)
    with pytest.raises(ValueError, match=r"is not a model that max_conv saved, or is damaged"):
        max_conv.load(path)


def test_common_kinds() -> None:
    names = [kind.name for kind in kinds.common()]
    assert len(set(names)) == len(names) == 15
    for name in LAYERS:
        layer = made(name)
        found = kinds.alone(PackedGraph("layer", layer, input_types=layer.input_types()))
        assert found and found.kind.name in names, name
