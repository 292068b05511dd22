"""The reader of ONNX files against the package onnx, and on damaged files."""

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from max_conv.weights.onnx_file import DEPTH_LIMIT, read_onnx

ARRAYS = {
    "single": np.arange(24, dtype=np.float32).reshape(2, 3, 4) - 7.5,
    "half": np.linspace(-1, 1, 5, dtype=np.float16),
    "double": np.array([[np.pi], [np.nan]]),
}
LEFT_OUT = {"number": np.float32(2), "empty": np.zeros((0, 3), np.float32), "counts": np.arange(4)}


def model(*nodes: onnx.NodeProto, weights: Iterable[onnx.TensorProto] = ()) -> bytes:
    """A model of these nodes and initializers, as bytes."""
    return helper.make_model(helper.make_graph(nodes, "graph", [], [], list(weights))).SerializeToString()


def weight(name: str, array: Any) -> onnx.TensorProto:
    return numpy_helper.from_array(np.asarray(array), name)


def constant(name: str, array: Any, kind: str = "Constant") -> onnx.NodeProto:
    return helper.make_node(kind, [], [name], value=weight("inner", array))


def branches(*nodes: onnx.NodeProto) -> onnx.NodeProto:
    """A condition with two graphs of the same nodes, except for their names."""
    parts = {}
    for branch in ("then_branch", "else_branch"):
        renamed = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
        for node in renamed:
            if node.output:
                node.output[0] = f"{branch}.{node.output[0]}"
        parts[branch] = helper.make_graph(renamed, branch, [], [])
    return helper.make_node("If", ["condition"], [], **parts)


@pytest.fixture
def read(tmp_path: Path) -> Callable[[bytes], dict[str, np.ndarray]]:
    def function(data: bytes) -> dict[str, np.ndarray]:
        path = tmp_path / "model.onnx"
        path.write_bytes(data)
        return read_onnx(path)

    return function


def same(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert found[name].dtype == array.dtype and found[name].flags.writeable
        np.testing.assert_array_equal(found[name], array, name)


def test_initializers(read: Callable[[bytes], dict[str, np.ndarray]]) -> None:
    same(read(model(weights=[weight(*item) for item in (ARRAYS | LEFT_OUT).items()])), ARRAYS)


def test_constants_in_every_branch(read: Callable[[bytes], dict[str, np.ndarray]]) -> None:
    inside = [constant(name, array) for name, array in (ARRAYS | LEFT_OUT).items()]
    other = constant("no.constant", np.ones(3, np.float32), "ConstantOfShape")
    found = read(model(constant("top", np.array([1], np.float32)), branches(*inside, other)))
    expected = {f"{branch}.{name}": ARRAYS[name] for branch in ("then_branch", "else_branch") for name in ARRAYS}
    same(found, {"top": np.array([1], np.float32), **expected})


def test_packed_and_unknown_fields(read: Callable[[bytes], dict[str, np.ndarray]]) -> None:
    # A TensorProto: dims 2 and 3 in one packed field, float, the name, raw data, and fields of every wire type after.
    tensor = b"\x0a\x02\x02\x03\x10\x01\x42\x01w\x4a\x18" + np.arange(6, dtype="<f4").tobytes()
    tensor += b"\xf8\x01\x05" + b"\xf9\x01" + bytes(8) + b"\xfd\x01" + bytes(4) + b"\xfa\x01\x00"
    graph = b"\x2a" + bytes([len(tensor)]) + tensor
    same(read(b"\x3a" + bytes([len(graph)]) + graph), {"w": np.arange(6, dtype=np.float32).reshape(2, 3)})


def nested(depth: int) -> bytes:
    node = constant("deep", np.array([1], np.float32))
    for _ in range(depth - 1):
        node = helper.make_node("Loop", [], [], body=helper.make_graph([node], "body", [], []))
    return model(node)


def test_depth(read: Callable[[bytes], dict[str, np.ndarray]]) -> None:
    same(read(nested(DEPTH_LIMIT)), {"deep": np.array([1], np.float32)})


def outside() -> bytes:
    tensor = TensorProto(name="w", dims=[3], data_type=TensorProto.FLOAT, data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="/etc/passwd")
    return model(weights=[tensor])


def claiming(*dims: int) -> bytes:
    return model(weights=[TensorProto(name="w", dims=dims, data_type=TensorProto.FLOAT, raw_data=bytes(12))])


TWICE = [weight("w", np.array([1], np.float32))] * 2
FAULTS = {
    "text": (b"no network at all", "is not an ONNX file, or is damaged ("),
    "empty": (b"", "holds no weights as initializers or constants; export them with the graph."),
    "integers alone": (model(weights=[weight("w", [1])]), "holds no weights as initializers or constants;"),
    "values elsewhere": (outside(), "('w' has 0 bytes of raw data, where its shape asks for 12)."),
    "larger than its data": (claiming(1 << 40), f"('w' has 12 bytes of raw data, where its shape asks for {4 << 40})."),
    "beyond any memory": (
        claiming(*[1 << 60] * 3),
        "('w' has 12 bytes of raw data, where its shape asks for more than",
    ),
    "negative": (claiming(-3), "('w' has 12 bytes of raw data, where its shape asks for more than 2^64)."),
    "many axes": (claiming(3, *[1] * 32), "('w' has 33 axes)."),
    "a name twice": (model(weights=TWICE), "(the name 'w' comes twice)."),
    "no name": (model(weights=[weight("", [1.0])]), "which is no name of a weight."),
    "two lines": (model(weights=[weight("a\nb", [1.0])]), "which is no name of a weight."),
    "deep": (nested(DEPTH_LIMIT + 1), "(it nests more than 16 graphs)."),
    "a number without end": (b"\xff" * 20, "(a number has no end)."),
    "a group": (b"\x0b", "(byte 1 begins no field)."),
    "cut off": (model(weights=[weight("w", [1.0])])[:-9], "(a field of "),
}


@pytest.mark.parametrize(("data", "sentence"), FAULTS.values(), ids=FAULTS)
def test_refuses_in_one_sentence(read: Callable[[bytes], dict[str, np.ndarray]], data: bytes, sentence: str) -> None:
    with pytest.raises(ValueError) as caught:
        read(data)
    said = str(caught.value)
    assert re.fullmatch(r"checkpoint: \S*model\.onnx [^\n]+\.", said) and sentence in said, said


def test_damage_is_refused_or_harmless(read: Callable[[bytes], dict[str, np.ndarray]]) -> None:
    whole = model(branches(constant("c", np.ones(5, np.float32))), weights=[weight(*item) for item in ARRAYS.items()])
    random = np.random.default_rng(0)
    damaged = [whole[:end] for end in range(len(whole))]
    for _ in range(3000):
        changed = bytearray(whole)
        for at in random.integers(0, len(changed), random.integers(1, 4)):
            changed[at] = random.integers(0, 256)
        damaged.append(bytes(changed))
    refused = 0
    for data in damaged:
        try:
            read(data)
        except ValueError as error:
            assert re.fullmatch(r"checkpoint: \S*model\.onnx [^\n]+\.", str(error)), error
            refused += 1
    assert refused > len(damaged) / 3


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_onnx(tmp_path / "gone.onnx")
