"""Kernels that are timed on this machine: which are tried, which times are kept, and which layers get the fastest."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from max.dtype import DType
from max.graph import Graph, TensorType, TensorValue, ops

import max_conv
from harness import HOST, normal
from max_conv import Conv1D, ConvTranspose1D, PackedGraph, conv1d, explain
from max_conv.cli.main import main
from max_conv.conv import tuned
from max_conv.conv.dispatch import Layer, able, choose
from max_conv.conv.geometry import Geometry, TransposedGeometry
from max_conv.conv.reference import conv1d_ref
from max_conv.runtime import tune, tuning

F32 = DType.float32
K3 = Layer.of(Geometry.of(3, padding=1), "NLC", 64, 64, 1)


@pytest.fixture(autouse=True)
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Keeps the times apart from the user's, and makes timing quick."""
    monkeypatch.setattr(tuned, "folder", lambda: tmp_path / "tuned")
    monkeypatch.setattr(tuning, "ROUNDS", 1)
    monkeypatch.setattr(tuning, "BURST", 0)
    tuned._read.cache_clear()
    return tmp_path / "tuned"


def made(**options: Any) -> Conv1D:
    layer = Conv1D(3, 64, 64, F32, padding=1, **options)
    layer.load_state_dict({name: normal(*map(int, w.shape)) for name, w in layer.raw_state_dict().items()})
    return layer


def kernel_of(layer: Conv1D, **options: Any) -> str:
    graph = PackedGraph("layer", layer, input_types=layer.input_types(), **options)
    return graph.emitted[0][0].kernel


# Layers, each with the kernels that may compute it; the first is the usual one.
ABLE: list[tuple[Geometry | TransposedGeometry, str, tuple[int, int, int], list[str]]] = [
    (Geometry.of(3, padding=1), "NLC", (64, 64, 1), ["winograd", "dense"]),
    (Geometry.of(3, padding=1), "NCL", (64, 64, 1), ["winograd", "lengthwise"]),
    (Geometry.of(3, padding=1), "NLC", (17, 17, 1), ["short", "lengthwise", "winograd"]),
    (Geometry.of(7, 3), "NLC", (33, 65, 2), ["winograd", "dense"]),
    (Geometry.of(7, padding=3, padding_mode="reflect"), "NLC", (1, 1, 24), ["depthwise", "lengthwise"]),
    (Geometry.of(7, dilation=2), "NCL", (1, 1, 24), ["lengthwise", "depthwise"]),
    (Geometry.of(5), "NLC", (1, 1, 3), ["lengthwise", "depthwise"]),
    (Geometry.of(7, padding=3), "NLC", (40, 4, 1), ["lengthwise", "dense"]),
    (Geometry.of(1), "NLC", (20, 40, 1), ["short"]),
    (TransposedGeometry.of(16, 8, 4), "NLC", (64, 32, 1), ["winograd", "short", "lengthwise"]),
    (TransposedGeometry.of(4, 2, 1), "NCL", (33, 40, 1), ["winograd", "lengthwise"]),
    (TransposedGeometry.of(5, 2), "NLC", (1, 1, 16), ["depthwise", "lengthwise"]),
]


@pytest.mark.parametrize(("geometry", "layout", "sizes", "kernels"), ABLE)
def test_kernels_that_are_tried_agree(
    geometry: Geometry | TransposedGeometry, layout: Any, sizes: tuple[int, int, int], kernels: list[str]
) -> None:
    """`tune` compares the answers, and raises an error where they differ."""
    layer = Layer.of(geometry, layout, *sizes)
    assert able(layer) == kernels
    rows = tune(tuning._graph(layer, kernels[0]), [37, 150], batch=2)
    assert len(rows) == (2 if len(kernels) > 1 else 0)
    for row in rows:
        assert list(row.times) == kernels and row.usual == kernels[0] and row.fastest in kernels and row.batch == 2
        assert row.layer == layer.key and min(row.times.values()) > 0
        assert tuned.times(layer.key, 2, row.outputs) == pytest.approx(row.times)


def test_all_kernels_of_a_layer_are_tried_in_exact_graphs() -> None:
    """Otherwise an exact layer would be left without a kernel where only Winograd's was timed."""
    for geometry, layout, sizes, _ in ABLE:
        layer = Layer.of(geometry, layout, *sizes)  # type: ignore[arg-type]
        assert choose(layer, exact=True).kernel in able(layer)


def test_layers_get_the_fastest() -> None:
    assert kernel_of(made()) == "winograd"
    tuned.keep({K3.key: {"100": {"winograd": 9.0, "dense": 8.0}, "10000": {"winograd": 5.0, "dense": 8.0}}})
    assert kernel_of(made()) == "winograd"  # 45 / 64 of the time of both
    assert kernel_of(made(), exact=True) == "dense"
    tuned.keep({K3.key: {"10000": {"winograd": 500.0, "dense": 400.0}}})
    assert kernel_of(made()) == "dense"


def test_the_nearest_number_of_outputs_counts() -> None:
    tuned.keep({K3.key: {"100": {"winograd": 2.0, "dense": 1.0}, "10000": {"winograd": 1.0, "dense": 2.0}}})
    found = {n: choose(K3, 1, n, packed=True, timed=True).kernel for n in (10, 900, 1100, 10**6)}
    assert found == {10: "dense", 900: "dense", 1100: "winograd", 10**6: "winograd"}
    assert choose(K3, 11, 100, packed=True, timed=True).kernel == "winograd"
    assert choose(K3, 1, 10, packed=True).kernel == "winograd", "nothing is read unless the caller asks"
    # One kernel for every length, so that a signal in chunks is to the bit the whole one.
    assert {choose(K3, 1, n, packed=True, timed=True, exact=True).kernel for n in (10, 10**6)} == {"dense"}


def test_filters_that_compile_does_not_have() -> None:
    tuned.keep({K3.key: {"100": {"winograd": 2.0, "dense": 1.0}}})
    types = [TensorType(F32, ["n", "l", 64], HOST), TensorType(F32, [3, 64, 64], HOST)]
    graph = PackedGraph("given", lambda x, w: conv1d(x, w, padding=1), input_types=types)
    assert graph.emitted[0][0].kernel == "winograd"


def test_explain_says_the_times(capsys: pytest.CaptureFixture[str]) -> None:
    assert explain(made(), length=100).times == {} and "timed" not in capsys.readouterr().out
    tuned.keep({K3.key: {"100": {"winograd": 12.4, "dense": 8.0}}})
    found = explain(made(), length=100)
    assert found.kernel == "dense" and found.times == {"winograd": 12.4, "dense": 8.0}
    assert capsys.readouterr().out.endswith("timed       dense 8 us, winograd 12 us\n")
    assert explain(made(), length=100, packed=False).times == {}


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "{}", '{"KEY": 3}', '{"KEY": {"a": {}}}', '{"KEY": {"9": {"dense": -1}}}', '{"KEY": {"9": {}}}'],
)
def test_a_damaged_table_counts_as_empty(text: str, folder: Path) -> None:
    folder.mkdir()
    tuned.table_file().write_text(text.replace("KEY", K3.key))
    assert kernel_of(made()) == "winograd"
    tuned.keep({K3.key: {"100": {"winograd": 2.0, "dense": 1.0}}})
    assert kernel_of(made()) == "dense" and json.loads(tuned.table_file().read_text())


def test_another_processor_or_kernel_has_another_table(monkeypatch: pytest.MonkeyPatch) -> None:
    files = {tuned.table_file()}
    monkeypatch.setattr(tuned, "processor", lambda: "another")
    files.add(tuned.table_file())
    monkeypatch.setattr(tuned, "kernel_key", lambda: "newer")
    files.add(tuned.table_file())
    assert len(files) == 3


def test_compile_times_a_layer_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def times(layer: Layer, models: Any, batch: int, outputs: int) -> dict[str, float]:
        asked.append((batch, outputs))
        return {"winograd": 3.0, "dense": 2.0}

    monkeypatch.setattr(tuning, "_times", times)
    layer, x = made(), normal(1, 20, 64)
    model = max_conv.compile(layer, tune=[100, {"batch": 4, "length": 30}])
    assert asked == [(1, 100), (4, 30)]
    assert model._alone is not None and model._alone.kind.form.kernel == "dense"
    want = conv1d_ref(x, np.from_dlpack(layer._weight_values["weight"]), padding=1)
    np.testing.assert_allclose(model(x), want, rtol=0, atol=1e-4 * np.abs(want).max())
    max_conv.compile(layer, tune=[100])
    assert len(asked) == 2
    max_conv.compile(layer, tune=[100, 101])
    assert asked[2:] == [(1, 101)]


def test_layers_of_a_network_and_their_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def times(layer: Layer, models: Any, batch: int, outputs: int) -> dict[str, float]:
        asked.append((layer.key.partition(" ")[0], batch, outputs))
        return {"dense": 1.0}

    monkeypatch.setattr(tuning, "_times", times)
    first, second = Conv1D(3, 8, 64, F32, stride=2, name="a"), ConvTranspose1D(8, 64, 32, F32, stride=4, name="b")
    x = TensorType(F32, ["batch", "length", 8], HOST)
    graph = PackedGraph("network", lambda x: second(ops.relu(first(x))), input_types=[x])
    rows = tune(graph, [41], batch=3)
    assert set(asked) == {("conv1d", 3, 20), ("conv_transpose1d", 3, 84)}
    assert {(row.batch, row.outputs) for row in rows} == {(3, 20), (3, 84)}


def not_packed() -> Graph:
    with Graph("relu", input_types=[TensorType(F32, ["n", 4], HOST)]) as graph:
        graph.output(ops.relu(graph.inputs[0].tensor))
    return graph


def network(x: TensorValue) -> TensorValue:
    return made(name="named")(x)


WRONG: dict[str, tuple[Any, type[Exception], str]] = {
    "no lengths": (lambda: max_conv.compile(made(), tune=[]), ValueError, "tune: takes a list of lengths"),
    "no list": (lambda: max_conv.compile(made(), tune=30), ValueError, "tune: takes a list of lengths"),  # type: ignore[arg-type]
    "no length": (lambda: max_conv.compile(made(), tune=["a"]), TypeError, "tune: length must be"),  # type: ignore[list-item]
    "less than one": (lambda: max_conv.compile(made(), tune=[0]), ValueError, "tune: length must be"),
    "no layer": (lambda: tune(not_packed(), [9]), ValueError, "tune: the graph has no layer"),
    "sizes that are missing": (
        lambda: max_conv.compile(made(), tune=[{"batch": 1}]),
        ValueError,
        r"tune: the sizes \{'batch': 1\} do not give",
    ),
    "too short": (
        lambda: tune(tuning._graph(Layer.of(Geometry.of(9), "NLC", 64, 64, 1), "dense"), [5]),
        ValueError,
        "has no output at",
    ),
    "a graph": (
        lambda: max_conv.compile(PackedGraph("g", made(), input_types=made().input_types()), tune=[9]),
        TypeError,
        "compile: a finished Graph has its kernels already",
    ),
    "a wrong kernel": (
        lambda: tuning._times(K3, {"dense": lambda x: x.to_numpy(), "winograd": lambda x: 2 * x.to_numpy()}, 1, 9),  # type: ignore[dict-item]
        RuntimeError,
        "tune: the kernel winograd is wrong on this machine",
    ),
    "not finite": (
        lambda: tuning._times(K3, {"dense": lambda x: x.to_numpy(), "winograd": lambda x: x.to_numpy() * np.nan}, 1, 9),  # type: ignore[dict-item]
        RuntimeError,
        "tune: the kernel winograd is wrong on this machine",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_refuses_in_one_sentence(name: str) -> None:
    call, error, match = WRONG[name]
    with pytest.raises(error, match=match) as caught:
        call()
    assert "\n" not in str(caught.value) and str(caught.value).endswith(".")
    assert not tuned.folder().exists()


def test_the_command() -> None:
    result = CliRunner().invoke(main, ["tune", "tcn", "--length", "30", "--length", "300", "--json"])
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)
    assert {row["outputs"] for row in rows} >= {30, 300} and all(row["fastest"] in row["times"] for row in rows)
    result = CliRunner().invoke(main, ["tune", "tcn", "--length", "30"])
    assert result.exit_code == 0 and f"of {len(rows) // 2} rows" in result.output
    result = CliRunner().invoke(main, ["tune", "nothing"])
    assert result.exit_code == 2 and "there is no model 'nothing'" in result.output
