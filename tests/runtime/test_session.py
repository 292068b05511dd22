"""`compile`, `save` and `load`, and calls of models on arrays."""

import contextlib
import io
import json
import logging
import os
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from max.driver import Buffer
from max.dtype import DType
from max.graph import DeviceRef, Graph, TensorType, TensorValue
from max.nn import Module

import max_conv
from max_conv.conv.reference import conv1d_ref
from max_conv.runtime import kinds, notice, session
from max_conv.runtime.compiled import Found
from max_conv.runtime.ports import Port, check_inputs, too_short

CPU_REF = DeviceRef.CPU()
RANDOM = np.random.default_rng(0)
STATE = {
    "weight": RANDOM.standard_normal((3, 4, 8)).astype(np.float32),
    "bias": RANDOM.standard_normal(8).astype(np.float32),
}
X = RANDOM.standard_normal((2, 20, 4)).astype(np.float32)
WANT = conv1d_ref(X, STATE["weight"], STATE["bias"], padding=1)


def layer() -> max_conv.Conv1D:
    conv = max_conv.Conv1D(3, 4, 8, DType.float32, padding=1, has_bias=True)
    conv.load_state_dict(STATE)
    return conv


def layer16() -> max_conv.Conv1D:
    return max_conv.Conv1D(3, 4, 8, DType.bfloat16, padding=1, has_bias=True, permute=True)


@pytest.fixture(scope="module")
def model() -> max_conv.Model:
    """The layer. The kinds of all layers of this file are compiled together."""
    graphs = [max_conv.PackedGraph("layer", conv, input_types=conv.input_types()) for conv in (layer(), layer16())]
    kinds.ready(*(alone.kind for graph in graphs if (alone := kinds.alone(graph))))
    return max_conv.compile(layer())


PAIR = TensorType(DType.float32, ["n", 3], CPU_REF)


@pytest.fixture(scope="module")
def two() -> max_conv.Model:
    """A function of two inputs with two outputs, which share the dimension n."""
    return max_conv.compile(lambda a, b: (a + b, a - b), {"a": PAIR, "b": PAIR})


def close(got: Any) -> None:
    np.testing.assert_allclose(got, WANT, atol=1e-5)


def test_arrays_by_position_and_by_name(model: max_conv.Model) -> None:
    close(model(X))
    close(model(x=X))
    assert repr(model) == "Model(x: float32(batch, length, 4)) -> output0: float32(batch, length, 8)"


def test_numpy_in_numpy_out_and_dlpack_in_dlpack_out(model: max_conv.Model) -> None:
    assert isinstance(model(X), np.ndarray)
    y = model(torch.from_numpy(X))
    assert isinstance(y, Buffer)
    close(torch.from_dlpack(y).numpy())
    close(model(Buffer.from_numpy(X)).to_numpy())


def test_strided_and_read_only_arrays(model: max_conv.Model) -> None:
    close(model(np.ascontiguousarray(X.transpose(0, 2, 1)).transpose(0, 2, 1)))
    close(torch.from_dlpack(model(torch.from_numpy(X).transpose(1, 2).contiguous().transpose(1, 2))).numpy())
    frozen = X.copy()
    frozen.flags.writeable = False
    close(model(frozen))
    close(torch.from_dlpack(model(torch.from_numpy(X).requires_grad_())).numpy())


def test_inputs_are_not_copied(model: max_conv.Model) -> None:
    from max_conv.conv.arrays import buffer_of

    view = np.full(X.size + 32, np.nan, np.float32)[7 : 7 + X.size].reshape(X.shape)
    buffer = buffer_of(view, "model: input", "x")
    view[...] = X
    close(model(buffer).to_numpy())


def test_two_inputs_two_outputs(two: max_conv.Model) -> None:
    a, b = np.ones((2, 3), np.float32), np.full((2, 3), 5, np.float32)
    total, difference = two(a, b=b)
    assert (total == 6).all() and (difference == -4).all()


ROW = np.zeros((2, 3), np.float32)
REFUSED: dict[str, tuple[Callable[[Any, Any], Any], str]] = {
    "too many": (lambda m, t: m(X, X), "model: takes 1 inputs (x), but got 2."),
    "unknown name": (lambda m, t: m(y=X), "model: has no input 'y'; its inputs are x."),
    "twice": (lambda m, t: m(X, x=X), "model: input 'x' came twice, by position and by name."),
    "missing": (lambda m, t: t(ROW), "model: input 'b' is missing; the inputs are a, b."),
    "no array": (lambda m, t: m(3), "model: input 'x' must be an array (NumPy or DLPack), but is a int."),
    "dtype": (lambda m, t: m(X.astype(float)), "model: input 'x' must be float32, but is float64; cast it first."),
    "channels": (
        lambda m, t: m(X[..., :3]),
        "model: input 'x' must have shape (batch, length, 4), but has (2, 20, 3).",
    ),
    "rank": (lambda m, t: m(X[0]), "model: input 'x' must have shape (batch, length, 4), but has (20, 4)."),
    "symbol": (
        lambda m, t: t(ROW, ROW[:1]),
        "model: dimension 'n' is 2 in input 'a' but 1 in input 'b'; pass the same.",
    ),
}


@pytest.mark.parametrize("case", list(REFUSED))
def test_refuses(case: str, model: max_conv.Model, two: max_conv.Model) -> None:
    call, sentence = REFUSED[case]
    with pytest.raises((TypeError, ValueError)) as caught:
        call(model, two)
    assert str(caught.value) == sentence


def test_errors_of_the_kernels_are_one_sentence(model: max_conv.Model) -> None:
    with pytest.raises(ValueError) as caught:
        model(X[:, :0])
    assert str(caught.value) == (
        "conv1d: the filter reaches over 3 positions, but the padded input has only 2; pad more or pass a longer input."
    )


class Tree(Module):
    """Two layers: at least eleven positions make an output."""

    def __init__(self) -> None:
        super().__init__()
        self.first = max_conv.Conv1D(3, 4, 8, DType.float32, stride=2, has_bias=True)
        self.first.load_state_dict(STATE)
        self.second = max_conv.Conv1D(5, 8, 2, DType.float32)

    def __call__(self, x: TensorValue) -> TensorValue:
        return self.second(self.first(x))


HEAD = RANDOM.standard_normal((5, 8, 2)).astype(np.float32)
STATES = {**{f"first.{name}": value for name, value in STATE.items()}, "second.weight": HEAD}

SHORT = r"model: input 'x' is too short: its dimension 'length' must be at least 11, but is {}\."


def test_an_input_that_is_too_short_for_the_network(tmp_path: Path) -> None:
    """MAX would print a page about memory: each layer's length is known, and too short an input makes it negative."""
    model = max_conv.compile(Tree(), layer().input_types(), weights=STATES)
    model.save(tmp_path / "m")
    for net in (model, max_conv.load(tmp_path / "m")):
        assert net(np.zeros((1, 11, 4), np.float32)).shape == (1, 1, 2)
        for length in (1, 8):
            with pytest.raises(ValueError, match=rf"^{SHORT.format(length)}$"):
                net(np.zeros((1, length, 4), np.float32))
        with pytest.raises(ValueError, match=r"^conv1d: the filter reaches over 5 positions"):
            net(np.zeros((1, 9, 4), np.float32))  # no output: the kernel's error


PORTS: list[tuple[str, dict[str, int], tuple[str, int | None] | None]] = [
    ("length + -2", {"length": 1}, ("length", 3)),
    ("length + -2", {"length": 2}, None),
    ("(((length + 1) // 2) + -4) * 8", {"batch": 0, "length": 3}, ("length", 9)),
    ("length * -1", {"length": 3}, ("length", None)),
    ("a + b + -9", {"a": 3, "b": 4}, ("a", 6)),
    ("length + unknown", {"length": 3}, None),
    ("max(length, 3) + -9", {"length": 3}, None),
    ("__import__('os')", {"length": 3}, None),
    ("9 //", {"length": 3}, None),
    ("length // 0", {"length": 3}, None),
    ("long", {"lo": 3, "long": -1}, ("long", 1)),
]


@pytest.mark.parametrize(("text", "sizes", "want"), PORTS)
def test_sizes_of_outputs(text: str, sizes: dict[str, int], want: Any) -> None:
    assert too_short([("batch", text, 4)], sizes) == want


def test_a_network_without_any_length_that_works() -> None:
    inputs, outputs = [Port("x", "float32", ("n",))], [Port("y", "float32", ("n * -1",))]
    with pytest.raises(
        ValueError, match=r"^model: input 'x' is too short: its dimension 'n' gives an output of negative "
    ):
        check_inputs(inputs, outputs, [(DType.float32, [3])])


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


SLOW = "compiling the net takes over 0.01 s; the next time it comes from the cache."


@pytest.mark.parametrize("shown", [False, True])
@pytest.mark.parametrize("kind", [Terminal, io.StringIO])
def test_a_slow_compile_says_so_once(kind: type[io.StringIO], shown: bool, monkeypatch: Any, caplog: Any) -> None:
    """To logging always, and to a terminal that logging does not write to."""
    stderr, handler = kind(), None
    monkeypatch.setattr(notice, "SECONDS", 0.01)
    monkeypatch.setattr(sys, "stderr", stderr)
    caplog.set_level(logging.INFO if shown else logging.WARNING, "max_conv")
    said = threading.Event()
    seen = notice._say

    def say(name: str) -> None:
        seen(name)
        said.set()

    monkeypatch.setattr(notice, "_say", say)
    if shown:
        handler = logging.StreamHandler(stderr)
        notice.LOG.addHandler(handler)
    try:
        with notice.slow_compile("the net"):
            assert said.wait(10)
    finally:
        if handler:
            notice.LOG.removeHandler(handler)
    assert [record.getMessage() for record in caplog.records] == ([SLOW] if shown else [])
    want = [SLOW] if shown else [f"max_conv: {SLOW}"] if kind is Terminal else []
    assert stderr.getvalue().splitlines() == want


def test_a_fast_compile_says_nothing(monkeypatch: Any) -> None:
    said: list[str] = []
    monkeypatch.setattr(notice, "SECONDS", 0.05)
    monkeypatch.setattr(notice, "_say", said.append)
    with notice.slow_compile("the net"):
        pass
    threading.Event().wait(0.2)
    assert not said


def test_compile_reports_what_it_compiles(monkeypatch: Any) -> None:
    names: list[str] = []

    @contextlib.contextmanager
    def told(name: str) -> Any:
        names.append(name)
        yield

    monkeypatch.setattr(session, "slow_compile", told)
    monkeypatch.setattr(session, "compiled", lambda graph, compile: Found(compile()))  # not from the cache
    max_conv.compile(lambda a, b: (a + b, a - b), [PAIR, PAIR])
    assert names == ["<lambda>"]


def test_compile_refuses() -> None:
    with pytest.raises(ValueError, match=r"compile: the weight 'weight' of Conv1D has no value; call load_state_dict"):
        max_conv.compile(max_conv.Conv1D(3, 4, 8, DType.float32))
    with pytest.raises(TypeError, match=r"compile: <lambda> needs the types of its inputs"):
        max_conv.compile(lambda x: x)
    with pytest.raises(TypeError, match=r"compile: takes a layer, a function or a Graph, but got a int\."):
        max_conv.compile(3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"compile: a Graph knows its inputs' types; pass 1 names"):
        max_conv.compile(Graph("g", layer(), layer().input_types()), ["a", "b"])


WRONG_WEIGHTS: dict[str, tuple[dict[str, Any], str]] = {
    "missing": ({"bias": None}, "compile: the weight 'bias' has no value; pass it in weights=."),
    "dtype": (
        {"bias": np.zeros(8)},
        "compile: the weight 'bias' must be float32 of shape (8,), but is float64 of shape (8,).",
    ),
    "short": (
        {"bias": np.zeros(3, np.float32)},
        "compile: the weight 'bias' must be float32 of shape (8,), but is float32 of shape (3,).",
    ),
}


@pytest.mark.parametrize("case", list(WRONG_WEIGHTS))
def test_weights_of_a_graph_must_fit(case: str) -> None:
    changes, sentence = WRONG_WEIGHTS[case]
    weights = {name: value for name, value in {**STATE, **changes}.items() if value is not None}
    conv = layer()
    with pytest.raises(ValueError) as caught:
        max_conv.compile(Graph("fit", conv, conv.input_types()), weights=weights)
    assert str(caught.value) == sentence


def test_strided_foreign_and_read_only_weights(model: max_conv.Model) -> None:
    frozen = STATE["bias"].copy()
    frozen.flags.writeable = False
    turned = np.ascontiguousarray(STATE["weight"].transpose(2, 1, 0)).transpose(2, 1, 0)
    conv = layer()
    graph = Graph("Conv1D", conv, conv.input_types())
    close(max_conv.compile(graph, weights={"weight": turned.astype(">f4"), "bias": frozen})(X))
    close(model(X.astype(">f4")))


def test_weights_stay_alive() -> None:
    conv = max_conv.Conv1D(3, 4, 8, DType.float32, padding=1, has_bias=True)
    model = max_conv.compile(conv, weights={name: value.copy() for name, value in STATE.items()})
    del conv
    rubbish = [np.full((3, 4, 8), np.nan, np.float32) for _ in range(200)]
    close(model(X))
    assert len(rubbish) == 200


def test_a_graph_a_function_and_a_tree_of_layers() -> None:
    conv = layer()
    graph = Graph("named", conv, conv.input_types())
    close(max_conv.compile(graph, ["sound"], weights=conv.state_dict())(sound=X))

    w = TensorType(DType.float32, [3, 4, 8], CPU_REF)
    function = max_conv.compile(
        lambda x, filter: max_conv.conv1d(x, filter, padding=1), {"x": conv.input_types()[0], "filter": w}
    )
    np.testing.assert_allclose(function(X, STATE["weight"]), WANT - STATE["bias"], atol=1e-5)

    want = conv1d_ref(conv1d_ref(X, STATE["weight"], STATE["bias"], stride=2), HEAD)
    tree = Tree()
    np.testing.assert_allclose(max_conv.compile(tree, conv.input_types(), weights=STATES)(X), want, atol=1e-4)
    own = Tree()  # each layer has its own weights, like the front ends' layers
    with pytest.raises(ValueError, match=r"compile: the weight 'second\.weight' of Tree has no value"):
        max_conv.compile(own, conv.input_types())
    own.second.load_state_dict({"weight": HEAD})
    np.testing.assert_allclose(max_conv.compile(own, conv.input_types())(X), want, atol=1e-4)


def test_names_of_a_function_that_takes_any_number() -> None:
    model = max_conv.compile(lambda *xs: (xs[0] + xs[1], xs[0] - xs[1]), [PAIR, PAIR])
    assert [port.name for port in model.inputs] == ["input0", "input1"]
    with pytest.raises(ValueError, match=r"model: input 'input1' must have shape \(n, 3\), but has \(3,\)\."):
        model(ROW, ROW[0])


def test_threads(model: max_conv.Model) -> None:
    inputs = [RANDOM.standard_normal((1, 20 + i, 4)).astype(np.float32) for i in range(6)]
    wants = [model(x) for x in inputs]
    wrong: list[int] = []

    def work(i: int) -> None:
        for _ in range(200):
            if not np.array_equal(model(inputs[i]), wants[i]):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.fixture(scope="module")
def saved(model: max_conv.Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "layer.maxconv"
    model.save(path)
    return path


def test_saved_and_loaded(saved: Path) -> None:
    loaded = max_conv.load(saved)
    close(loaded(X))
    assert loaded.inputs[0].shape == ("batch", "length", 4)
    assert list(saved.parent.iterdir()) == [saved]


def test_loads_in_a_new_process_without_compiling(saved: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", X)
    code = (
        "import sys, numpy as np, max_conv; import max.engine;"
        "max.engine.InferenceSession.compile = max.engine.InferenceSession.compile_async = None;"
        "y = max_conv.load(sys.argv[1])(np.load(sys.argv[2])); np.save(sys.argv[3], y)"
    )
    arguments = [str(saved), str(tmp_path / "x.npy"), str(tmp_path / "y.npy")]
    # MAX exports a PYTHONEXECUTABLE with which the new process would leave its virtual environment.
    subprocess.run([sys.executable, "-c", code, *arguments], check=True, env=dict(os.environ))
    close(np.load(tmp_path / "y.npy"))


def test_bfloat16_weights_are_saved_bit_for_bit(tmp_path: Path) -> None:
    reference = torch.nn.Conv1d(4, 8, 3, padding=1).to(torch.bfloat16)
    model = max_conv.compile(layer16(), weights={n: value.detach() for n, value in reference.state_dict().items()})
    model.save(tmp_path / "m")
    x = torch.randn(1, 4, 9, dtype=torch.bfloat16)
    assert torch.equal(torch.from_dlpack(max_conv.load(tmp_path / "m")(x)), torch.from_dlpack(model(x)))


def edited(saved: Path, target: Path, **changes: Any) -> Path:
    """Copies a saved model, with other facts about the machine it was made for."""
    with zipfile.ZipFile(saved) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            data = old.read(name)
            new.writestr(name, json.dumps({**json.loads(data), **changes}) if name == "meta.json" else data)
    return target


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"max": "1.2.3"}, r"load: .* was compiled by MAX 1\.2\.3, but this is .*; compile it again\."),
        ({"machine": "vax"}, r"load: .* was compiled for vax, but this is .*; compile it again\."),
        (
            {"cpu": ["avx9000"]},
            r"load: .* was compiled for a CPU with avx9000, which this one lacks; compile it again\.",
        ),
        (
            {"accelerator": "sm_1"},
            r"load: .* was compiled for the accelerator sm_1, which is not here; compile it again\.",
        ),
        ({"inputs": [1]}, r"load: .* is not a model that max_conv saved, or is damaged"),
        ({"format": 99}, r"load: .* has format 99, but this max_conv reads 4; save it again\."),
    ],
    ids=["max", "machine", "cpu", "accelerator", "inputs", "format"],
)
def test_load_refuses_what_was_made_elsewhere(saved: Path, tmp_path: Path, changes: dict, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        max_conv.load(edited(saved, tmp_path / "m", **changes))


def test_load_refuses_a_model_for_a_device_that_is_not_there(saved: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(saved) as file:
        inputs = json.loads(file.read("meta.json"))["inputs"]
    inputs[0]["device"] = "gpu:99"
    with pytest.raises(ValueError, match=r"model: needs gpu:99, but this machine has \d+ accelerators"):
        max_conv.load(edited(saved, tmp_path / "m", inputs=inputs))


@pytest.mark.parametrize("keep", [0, 10, 1000, -1])
def test_load_refuses_damaged_files(saved: Path, tmp_path: Path, keep: int) -> None:
    (tmp_path / "m").write_bytes(saved.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"load: .* is not a model that max_conv saved, or is damaged"):
        max_conv.load(tmp_path / "m")


def test_load_refuses_a_damaged_graph(saved: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(saved) as old, zipfile.ZipFile(tmp_path / "m", "w") as new:
        for name in old.namelist():
            new.writestr(name, b"rubbish" if name == "model.mef" else old.read(name))
    with pytest.raises(ValueError, match=r"load: .* is not a model that max_conv saved, or is damaged"):
        max_conv.load(tmp_path / "m")


def test_load_of_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        max_conv.load(tmp_path / "nothing")


def test_save_leaves_nothing_behind_when_it_fails(model: max_conv.Model, tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "m").write_text("precious")
    monkeypatch.setattr(zipfile.ZipFile, "write", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        model.save(tmp_path / "m")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["precious"]
