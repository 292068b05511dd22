"""Several layers in one graph: the names that their weights get, and the values that they use."""

import re
from typing import Any

import numpy as np
import pytest
from max.dtype import DType
from max.graph import Graph, KernelLibrary, TensorType, ops

import max_conv
from harness import HOST, is_one_sentence, normal
from max_conv import Conv1D, ConvTranspose1D, PackedGraph, WeightNormConv1D
from max_conv.conv.reference import conv1d_ref, conv_transpose1d_ref

X = [TensorType(DType.float32, ["n", "l", 16], HOST)]


def layer(filters: int = 16, seed: int = 0, loaded: bool = True, **options: Any) -> Conv1D:
    conv = Conv1D(3, 16, filters, DType.float32, padding=1, has_bias=True, **options)
    if loaded:
        prefix = f"{options['name']}." if "name" in options else ""
        values = {"weight": normal(3, 16, filters, seed=seed), "bias": normal(filters, seed=seed)}
        conv.load_state_dict({prefix + name: value for name, value in values.items()})
    return conv


def expected(x: np.ndarray, seed: int) -> np.ndarray:
    return conv1d_ref(x, normal(3, 16, 16, seed=seed), normal(16, seed=seed), padding=1)


def test_layers_without_a_name() -> None:
    """Equal sizes, so that a mix-up gives another output, not an error; one of them is called twice."""
    first, second, up = layer(seed=1), layer(seed=2), ConvTranspose1D(4, 16, 8, DType.float32, stride=2)
    up.load_state_dict({"weight": normal(4, 8, 16)})

    def network(x: Any) -> Any:
        return up(first(second(first(x))) + x)

    x = normal(2, 50, 16)
    want = conv_transpose1d_ref(expected(expected(expected(x, 1), 2), 1) + x, normal(4, 8, 16), stride=2)
    names = ["weight", "bias", "layer2.weight", "layer2.bias", "layer3.weight"]
    for _ in range(2):  # the names are the graph's, not left over from another one
        graph = PackedGraph("network", network, input_types=X)
        assert list(graph.loaded()) == names
    model = max_conv.compile(network, X)
    np.testing.assert_allclose(model(x), want, atol=2e-2)
    np.testing.assert_array_equal(max_conv.compile(graph)(x), model(x))
    assert [*first.state_dict()] == ["weight", "bias"]
    # Values by name take precedence over the layers' own.
    other = max_conv.compile(network, X, weights={"layer2.weight": normal(3, 16, 16, seed=3)})
    inner = conv1d_ref(expected(x, 1), normal(3, 16, 16, seed=3), normal(16, seed=2), padding=1)
    want = conv_transpose1d_ref(expected(inner, 1) + x, normal(4, 8, 16), stride=2)
    np.testing.assert_allclose(other(x), want, atol=2e-2)


def test_names_follow_the_first_call() -> None:
    first, second = layer(8, loaded=False), layer(loaded=False)
    graph = PackedGraph("network", lambda x: first(second(x)), input_types=X)
    sizes = {name: [int(n) for n in entry.weight.shape] for name, entry in graph._weights.items() if "bias" in name}
    assert sizes == {"bias": [16], "layer2.bias": [8]}
    with pytest.raises(ValueError, match=r"^compile: the weight '(layer2\.)?(weight|bias)' has no value"):
        max_conv.compile(graph)


DIRECTIONS = [normal(3, 16, 16, seed=seed) for seed in (1, 2)]


def graphs() -> dict[str, tuple[Graph, dict[str, Any]]]:
    """A graph of two layers with weight norm and without names, and a plain graph of two layers with names."""
    layers = [WeightNormConv1D(3, 16, 16, DType.float32, padding=1) for _ in "ab"]
    unnamed = PackedGraph("unnamed", lambda x: layers[1](layers[0](x)), input_types=X)
    g, (first, second) = np.ones((16, 1, 1), np.float32), DIRECTIONS
    weights = {"weight_g": g, "weight_v": first, "layer2.weight_g": g, "layer2.weight_v": second}
    named = [layer(seed=1, name="a"), layer(seed=2, name="b")]
    plain = Graph("plain", lambda x: named[1](named[0](x)), input_types=X)
    values = {name: value for conv in named for name, value in conv.state_dict().items()}
    return {"unnamed": (unnamed, weights), "plain": (plain, values)}


def test_weight_norm_without_a_name(models: dict[str, max_conv.Model]) -> None:
    x = normal(1, 20, 16)
    want = x
    for v in DIRECTIONS:
        want = conv1d_ref(want, v / np.sqrt((v**2).sum((0, 1))), padding=1)
    np.testing.assert_allclose(models["unnamed"](x), want, atol=1e-5)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", [Graph, PackedGraph])
def test_two_layers_of_one_name(kind: Any, bias: bool) -> None:
    a, b = (Conv1D(3, 16, 16, DType.float32, padding=1, has_bias=bias, name="conv") for _ in "ab")
    with pytest.raises(ValueError, match=r"another weight named 'conv\.weight'.*name=") as error:
        kind("network", lambda x: b(a(x)), input_types=X)
    assert is_one_sentence(str(error.value))


def test_a_plain_graph_asks_for_names(models: dict[str, max_conv.Model]) -> None:
    a, b = layer(seed=1), layer(seed=2)
    with pytest.raises(ValueError, match=re.escape("another weight named 'weight'")) as error:
        Graph("network", lambda x: ops.relu(b(a(x))), input_types=X)
    assert is_one_sentence(str(error.value)) and "name=" in str(error.value)
    x = normal(1, 20, 16)
    np.testing.assert_allclose(models["plain"](x), expected(expected(x, 1), 2), atol=2e-2)


def test_a_graph_accepts_a_kernel_library() -> None:
    own = KernelLibrary()
    assert PackedGraph("own", kernel_library=own)._kernel_library is own
