"""The errors of MAX's own `max.nn.Conv1D`, and all places in which `max_conv.Conv1D` replaces it."""

import importlib.util
import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import max.nn
import numpy as np
import pytest
from max.dtype import DType
from max.graph import DeviceRef, Graph, TensorType, TensorValue, ops

import max_conv
from harness import HOST, Array, Case, check, compiled, execute, ids, normal, reference, run

F32 = DType.float32
NCL = {"layout": "NCL", "filter_layout": "FCS"}

# Name: (N, L), Cin, Cout, and the layer's other arguments. The issues are in github.com/modular/modular.
WRONG: dict[str, tuple[tuple[int, int], int, int, dict[str, Any]]] = {
    "hifigan-resblock": ((1, 6400), 128, 128, dict(kernel_size=11, padding=25, dilation=5)),
    "k15-p7": ((1, 64), 16, 16, dict(kernel_size=15, padding=7)),
    "k5-p8-d4": ((1, 64), 16, 16, dict(kernel_size=5, padding=8, dilation=4)),
    "k51-d8-permuted": ((4, 15100), 15, 15, dict(kernel_size=51, dilation=8)),
    "process-crash": ((1, 12800), 32, 32, dict(kernel_size=11, padding=25, dilation=5)),
    "issue-6129-hubert-positions": ((1, 200), 768, 768, dict(kernel_size=128, padding=64, num_groups=16)),
    "issue-6248-eight-channels": ((1, 40), 8, 16, dict(kernel_size=3)),
    "issue-6248-wide": ((1, 40), 192, 512, dict(kernel_size=7)),
    "issue-6461-padded-edges": ((1, 130), 64, 64, dict(kernel_size=7, padding=(6, 0))),
    "issue-6712-full-padding": ((2, 100), 32, 48, dict(kernel_size=16, padding=15)),
    "issue-5614-grouped": ((2, 60), 24, 48, dict(kernel_size=3, padding=1, num_groups=3)),
}
SYMBOLIC = {"k15-p7", "k5-p8-d4", "issue-6712-full-padding"}


class Tree(max.nn.Module):
    """Some layers as one module, each with a separate input."""

    def __init__(self, layers: Sequence[max.nn.Module]) -> None:
        super().__init__()
        self.layers = max.nn.LayerList(layers)

    def __call__(self, *inputs: TensorValue) -> list[TensorValue]:
        return [layer(x) for layer, x in zip(self.layers, inputs, strict=True)]


def case_of(name: str, permute: bool) -> tuple[Case, max_conv.Conv1D]:
    (batch, length), channels, filters, given = WRONG[name]
    layer = max_conv.Conv1D(
        in_channels=channels, out_channels=filters, dtype=F32, has_bias=True, permute=permute, **given
    )
    kwargs = {"groups" if key == "num_groups" else key: value for key, value in given.items() if key != "kernel_size"}
    x = normal(batch, channels, length) if permute else normal(batch, length, channels)
    case = Case(
        f"{name}-{'NCL' if permute else 'NLC'}",
        x,
        normal(*map(int, layer.filter.shape), seed=1),
        normal(filters, seed=2),
        kwargs | (NCL if permute else {}),
        symbolic=name in SYMBOLIC,
    )
    return case, layer


CASES, LAYERS = zip(*[case_of(name, permute) for name in WRONG for permute in (False, True)])


@pytest.fixture(scope="module")
def runs() -> dict[str, list[Array]]:
    """Every case three times: MAX's own outputs differ from call to call."""
    models = []
    for case, layer in zip(CASES, LAYERS):
        layer.load_state_dict(weights_of(case))
        models.append(max_conv.compile(layer, case.input_types()[:1]))
    return {case.id: [model(case.x) for _ in range(3)] for case, model in zip(CASES, models)}


def weights_of(case: Case) -> dict[str, Array]:
    return {"weight": case.filter} | ({} if case.bias is None else {"bias": case.bias})


@pytest.mark.parametrize("case", CASES, ids=ids(CASES))
def test_max_gets_this_wrong(case: Case, runs: dict[str, list[Array]]) -> None:
    first, *others = runs[case.id]
    check(case, first)
    for other in others:
        np.testing.assert_array_equal(first, other)


@pytest.fixture(scope="module")
def unpacked() -> dict[str, Array]:
    """Every case with its filter as an input, which the kernels read as it is; run three times, too."""
    return dict(zip(ids(CASES), run(CASES, times=3)))


@pytest.mark.parametrize("case", CASES, ids=ids(CASES))
def test_max_gets_this_wrong_with_unpacked_filters(case: Case, unpacked: dict[str, Array]) -> None:
    check(case, unpacked[case.id])


# The layer itself.


def test_arguments_are_those_of_max() -> None:
    ours, theirs = (list(inspect.signature(cls).parameters.values()) for cls in (max_conv.Conv1D, max.nn.Conv1D))
    shared = ours[: len(theirs)]
    assert [(p.name, p.default, p.kind) for p in shared] == [(p.name, p.default, p.kind) for p in theirs]
    assert {p.kind for p in ours[len(theirs) :]} == {inspect.Parameter.KEYWORD_ONLY}


POSITIONAL: dict[str, tuple[Any, ...]] = {
    "defaults": (3, 8, 16, F32),
    "all": (5, 8, 12, F32, 2, (1, 3), 2, 4, HOST, True, True, "stem"),
    "no-permute": (5, 8, 12, F32, 2, 1, 2, 4, HOST, True, False, "stem"),
    "no-device": (3, 8, 16, DType.bfloat16, 1, 1, 1, 1, None, True),
}


@pytest.mark.parametrize("arguments", POSITIONAL.values(), ids=POSITIONAL)
def test_weights_are_those_of_max(arguments: tuple[Any, ...]) -> None:
    def described(cls: Any) -> Any:
        layer = cls(*arguments)
        alone = {name: (w.dtype, list(w.shape), w.device) for name, w in layer.raw_state_dict().items()}
        nested = {name: list(w.shape) for name, w in Tree([layer, cls(*arguments)]).raw_state_dict().items()}
        values = {"stride", "padding", "dilation", "num_groups", "permute", "kernel_size", "device"}
        return alone, nested, {name: getattr(layer, name) for name in values}, layer.filter.name

    assert described(max_conv.Conv1D) == described(max.nn.Conv1D)


GEOMETRIES = [(3, 1, 0, 1), (3, 1, 1, 1), (3, 2, 1, 1), (4, 2, 1, 1), (10, 5, 0, 1), (7, 3, (2, 5), 2), (1, 2, 0, 1)]


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize("permute", [False, True], ids=["NLC", "NCL"])
@pytest.mark.parametrize("length", [100, "length"])
def test_output_type_is_that_of_max(geometry: tuple[Any, ...], permute: bool, length: int | str) -> None:
    """The symbolic expressions are the same, too: MAX adds two values only if their dimensions are equal."""
    kernel_size, stride, padding, dilation = geometry
    types = []
    for cls in (max_conv.Conv1D, max.nn.Conv1D):
        layer = cls(kernel_size, 8, 16, F32, stride, padding, dilation, has_bias=True, permute=permute)
        shape = ["batch", 8, length] if permute else ["batch", length, 8]
        with Graph("types", input_types=[TensorType(F32, shape, HOST)]) as graph:
            types.append(layer(graph.inputs[0].tensor).type)
    ours, theirs = types
    assert ours == theirs


class Tagger(max.nn.Module):
    """Convolutions between layers of MAX, one and two levels down."""

    def __init__(self, conv: type) -> None:
        super().__init__()
        self.embed = max.nn.Embedding(20, 8, F32, HOST)
        self.blocks = max.nn.LayerList(
            [
                max.nn.Sequential(
                    [conv(3, 8, 8, F32, padding=1, has_bias=True), max.nn.LayerNorm(8, [HOST], F32, eps=1e-5)]
                )
                for _ in range(2)
            ]
        )
        self.named = conv(3, 8, 8, F32, padding=1, has_bias=True, name="head")
        self.classify = max.nn.Linear(8, 5, F32, HOST, has_bias=True)

    def features(self, tokens: TensorValue) -> TensorValue:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.named(x)

    def __call__(self, tokens: TensorValue) -> TensorValue:
        return self.classify(self.features(tokens))


TOKENS = TensorType(DType.int64, ["batch", "length"], HOST)


def random_state(module: max.nn.Module) -> dict[str, np.ndarray]:
    state = module.raw_state_dict().items()
    return {name: normal(*map(int, w.shape), seed=i) * np.float32(0.3) for i, (name, w) in enumerate(state)}


def convolved(x: np.ndarray, state: Mapping[str, np.ndarray], prefix: str, **kwargs: Any) -> np.ndarray:
    return reference(Case(prefix, x, state[f"{prefix}.weight"], state[f"{prefix}.bias"], kwargs))


def test_tree_has_the_names_of_max() -> None:
    ours, theirs = Tagger(max_conv.Conv1D), Tagger(max.nn.Conv1D)
    state = random_state(ours)
    assert {"blocks.1.0.weight", "blocks.1.0.bias", "named.head.weight", "classify.weight"} < set(state)
    for tree in (ours, theirs):
        tree.load_state_dict(state)
        held = tree.state_dict()
        assert set(held) == set(state)
        for name, value in state.items():
            np.testing.assert_array_equal(np.from_dlpack(held[name]), value)
    graphs = [Graph("tagger", tree, [TOKENS]) for tree in (ours, theirs)]
    assert graphs[0].output_types == graphs[1].output_types


def test_tree_with_layers_of_max(models: dict[str, max_conv.Model]) -> None:
    state = random_state(Tagger(max_conv.Conv1D))
    tokens = np.random.default_rng(0).integers(0, 20, (2, 21))
    got = models["features"](tokens)
    want = state["embed.weight"].astype(np.float64)[tokens]
    for i in range(2):
        want = convolved(want, state, f"blocks.{i}.0", padding=1)
        want = (want - want.mean(-1, keepdims=True)) / np.sqrt(want.var(-1, keepdims=True) + 1e-5)
        want = want * state[f"blocks.{i}.1.weight"] + state[f"blocks.{i}.1.bias"]
    want = convolved(want, state, "named.head", padding=1)
    assert got.shape == want.shape and got.dtype == np.float32
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * np.abs(want).max())


@pytest.mark.parametrize("damage", ["missing", "unexpected", "shape"])
def test_load_state_dict_refuses(damage: str) -> None:
    tagger = Tagger(max_conv.Conv1D)
    state = random_state(tagger)
    if damage == "missing":
        del state["blocks.0.0.weight"]
    elif damage == "unexpected":
        state["blocks.0.0.scale"] = normal(8)
    else:
        state["blocks.0.0.weight"] = normal(8, 8, 4)
    with pytest.raises(ValueError, match=r"blocks\.0\.0\.(weight|scale)"):
        tagger.load_state_dict(state)


# Whisper's encoder, as MAX ships it; only the import is changed.


class WhisperConfig:
    num_mel_bins, d_model, max_source_positions = 80, 64, 50
    encoder_layers, encoder_attention_heads, n_heads, encoder_ffn_dim = 1, 2, 2, 128


THEIR_IMPORT, OUR_IMPORT = "from max.nn.conv import Conv1D\n", "from max_conv import Conv1D\n"


def make_encoder(import_line: str) -> Any:
    """Returns an encoder, with seeded weights, from MAX's source with the given import."""
    root = importlib.util.find_spec("max.pipelines")
    assert root and root.submodule_search_locations
    source = Path(root.submodule_search_locations[0], "architectures/whisper/encoder.py").read_text()
    assert source.count(THEIR_IMPORT) == 1
    scope: dict[str, Any] = {"__name__": "encoder"}
    exec(compile(source.replace(THEIR_IMPORT, import_line), "encoder.py", "exec"), scope)
    encoder = scope["WhisperEncoder"](WhisperConfig, F32, HOST)
    encoder.load_state_dict(random_state(encoder))
    return encoder


def stem_graph(encoder: Any, shape: Sequence[Any]) -> Graph:
    """Builds the first part of `WhisperEncoder.__call__`."""
    with Graph("stem", input_types=[TensorType(F32, shape, HOST)]) as graph:
        embeds = ops.gelu(encoder.conv1(graph.inputs[0].tensor))
        graph.output(ops.gelu(encoder.conv2(embeds)))
    return graph


def gelu(x: np.ndarray) -> np.ndarray:
    import torch

    return torch.nn.functional.gelu(torch.from_numpy(x)).numpy()


def test_whisper_stem(models: dict[str, max_conv.Model]) -> None:
    """MAX declares (batch, mel bins, length) and passes it to an NLC layer: the last axis must be the mel bins."""
    encoder = make_encoder(OUR_IMPORT)
    assert type(encoder.conv1) is type(encoder.conv2) is max_conv.Conv1D
    (declared,) = encoder.input_types()
    assert [str(dim) for dim in declared.shape] == ["batch_size", "num_mel_bins", "sequence_length"]
    state = random_state(encoder)
    x = normal(2, 100, 80)
    got = models["stem"](x)
    want = gelu(convolved(gelu(convolved(x, state, "conv1", padding=1)), state, "conv2", stride=2, padding=1))
    assert got.shape == want.shape == (2, 50, 64)
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-6 * np.abs(want).max())


@pytest.mark.parametrize("shape", [["b", "mel", "length"], ["b", "length", 80], [2, 100, 80]], ids=str)
def test_whisper_stem_has_the_type_of_the_original(shape: list[Any]) -> None:
    ours, theirs = (stem_graph(make_encoder(line), shape) for line in (OUR_IMPORT, THEIR_IMPORT))
    assert ours.output_types == theirs.output_types


@pytest.mark.parametrize("line", [THEIR_IMPORT, OUR_IMPORT], ids=["max.nn", "max_conv"])
def test_whisper_encoder_builds_where_the_original_does(line: str) -> None:
    """The whole encoder builds for lengths that are known; with the declared ones, neither import does."""
    encoder = make_encoder(line)
    graph = Graph("encoder", encoder, [TensorType(F32, ["batch", 100, 80], HOST)])
    output = graph.output_types[0]
    assert isinstance(output, TensorType)
    assert [str(dim) for dim in output.shape] == ["batch", "50", "64"]
    with pytest.raises(ValueError, match="neither equivalent nor broadcastable"):
        Graph("encoder", make_encoder(line), make_encoder(line).input_types())


# Places in which a layer is called.


class Everywhere(max.nn.Module):
    """One layer of ours in a subgraph called twice, a function's subgraph, unbatched, and under symbolic sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = max.nn.LayerList([max_conv.Conv1D(3, 8, 8, F32, padding=1, has_bias=True) for _ in range(2)])
        # A weight belongs to the graph or subgraph that first reads it, so a layer is called in one of them only.
        self.flat = max_conv.Conv1D(3, 8, 8, F32, padding=1, has_bias=True)
        self.turned = max_conv.Conv1D(4, 8, 12, F32, stride=2, has_bias=True, permute=True)

    def __call__(self, x: TensorValue, flat: TensorValue, turned: TensorValue) -> list[TensorValue]:
        first = self.blocks[0]
        assert isinstance(first, max_conv.Conv1D)
        block = first.build_subgraph("block", [x], weight_prefix="blocks.0.")
        twice = x
        for i in range(2):
            (value,) = ops.call(block, twice, prefix=f"blocks.{i}.")
            twice = value.tensor
        w = ops.constant(normal(2, 8, 4, seed=9), F32, device=HOST)
        with Graph.current.add_subgraph("function", input_types=[x.type, w.type]) as function:
            function.output(max_conv.conv1d(*[value.tensor for value in function.inputs], padding="causal"))
        (value,) = ops.call(function, x, w)
        return [twice, value.tensor, self.flat(flat), self.turned(x.transpose(1, 2)), self.turned(turned)]


def graphs() -> dict[str, tuple[Any, Any]]:
    """Plain graphs: a tree with layers of MAX, and the begin of Whisper's encoder."""
    tagger = Tagger(max_conv.Conv1D)
    tagger.load_state_dict(random_state(tagger))
    # Without its Linear, whose matrix product takes MAX half a minute to compile.
    features = Graph("features", tagger.features, [TOKENS])
    encoder = make_encoder(OUR_IMPORT)
    (declared,) = encoder.input_types()
    stem = stem_graph(encoder, declared.shape)
    return {"features": (features, tagger.state_dict()), "stem": (stem, encoder.state_dict())}


@pytest.fixture(scope="module")
def everywhere() -> tuple[Any, dict[str, np.ndarray]]:
    """Compiled alone: its subgraphs would have to move with it."""
    module = Everywhere()
    state = random_state(module)
    module.load_state_dict(state)
    sizes: list[list[int | str]] = [["batch", "length", 8], ["frames", 8], [8, "steps"]]
    graph = Graph("everywhere", module, [TensorType(F32, size, HOST) for size in sizes])
    assert not module.state_dict().keys() ^ state.keys()
    return compiled(graph, module.state_dict()), state


@pytest.mark.parametrize("batch, length", [(1, 4), (2, 37), (3, 64), (0, 20)])
def test_everywhere(batch: int, length: int, everywhere: tuple[Any, dict[str, np.ndarray]]) -> None:
    model, state = everywhere
    x, flat, turned = normal(batch, length, 8), normal(length + 3, 8), normal(8, length + 5)
    got = execute(model, [x, flat, turned])
    want = [
        convolved(convolved(x, state, "blocks.0", padding=1), state, "blocks.1", padding=1),
        reference(Case("function", x, normal(2, 8, 4, seed=9), kwargs={"padding": "causal"})),
        convolved(flat, state, "flat", padding=1),
        convolved(x.transpose(0, 2, 1), state, "turned", stride=2, **NCL),
        convolved(turned, state, "turned", stride=2, **NCL),
    ]
    for one, other in zip(got, want, strict=True):
        assert one.shape == other.shape and one.dtype == np.float32
        np.testing.assert_allclose(one, other, rtol=0, atol=2e-6 * np.abs(other).max(initial=0))
    assert (got[0].size == 0) == (batch == 0)


def test_plain_graphs_twice_in_a_process() -> None:
    """Without custom_extensions, a process's second graph finds the kernels as the first one does."""
    x, w = normal(1, 30, 5), normal(3, 5, 20, seed=1)
    case = Case("plain", x, w, kwargs={"padding": "same"})
    for _ in range(2):
        with Graph("plain", input_types=case.input_types()) as graph:
            graph.output(max_conv.conv1d(*[value.tensor for value in graph.inputs], **case.kwargs))
        (got,) = execute(compiled(graph), case.operands)
        check(case, got)


def test_device_is_kept() -> None:
    layer = max_conv.Conv1D(3, 8, 16, F32, device=DeviceRef.GPU(0), has_bias=True)
    assert layer.bias is not None
    assert layer.filter.device == layer.bias.device == DeviceRef.GPU(0)
