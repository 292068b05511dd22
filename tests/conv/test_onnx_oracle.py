"""ONNX's backend tests: the stored Conv1d models (converted from PyTorch), and the cases of the node ConvTranspose."""

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.backend.test
import pytest
from onnx import numpy_helper
from onnx.backend.test.case.node import collect_testcases
from onnx.reference import ReferenceEvaluator

from harness import Array, Case, check, check_reference, ids, run

FOLDER = Path(onnx.backend.test.__file__).parent / "data" / "pytorch-converted"
MODELS = [
    "test_Conv1d",
    "test_Conv1d_dilated",
    "test_Conv1d_groups",
    "test_Conv1d_pad1",
    "test_Conv1d_pad1size1",
    "test_Conv1d_pad2",
    "test_Conv1d_pad2size1",
    "test_Conv1d_stride",
]


def stored(path: Path) -> np.ndarray:
    tensor = onnx.TensorProto()
    tensor.ParseFromString(path.read_bytes())
    return numpy_helper.to_array(tensor)


def case_of(name: str) -> Case:
    graph = onnx.load(FOLDER / name / "model.onnx").graph
    (node,) = graph.node
    assert node.op_type == "Conv"
    attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    kwargs: dict[str, Any] = {
        "stride": attributes.pop("strides")[0],
        "padding": tuple(attributes.pop("pads")),
        "dilation": attributes.pop("dilations")[0],
        "groups": attributes.pop("group"),
    }
    weights = {w.name: numpy_helper.to_array(w) for w in graph.initializer}
    x_name, *weight_names = node.input
    w, *rest = [weights[weight] for weight in weight_names]
    assert len(rest) <= 1
    assert attributes.pop("kernel_shape") == [w.shape[2]]
    assert not attributes, "an attribute that the case does not carry"
    assert x_name not in weights
    data = FOLDER / name / "test_data_set_0"
    x, expected = stored(data / "input_0.pb"), stored(data / "output_0.pb")
    return Case(
        name, x, w, rest[0] if rest else None, kwargs | {"layout": "NCL", "filter_layout": "FCS"}, expected=expected
    )


def transposed_cases() -> Iterator[Case]:
    """The case in one dimension, and all other cases along their last axis, with ONNX's own evaluator as the oracle."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # other nodes' cases overflow on purpose
        found = collect_testcases("ConvTranspose")
    for case in found:
        assert case.model is not None and case.data_sets is not None
        (node,) = case.model.graph.node
        x, w = (np.asarray(a) for a in case.data_sets[0][0])
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        axes = x.ndim - 2
        last: dict[str, Any] = {
            name: value[-1:] if isinstance(value, list) else value for name, value in attributes.items()
        }
        if "pads" in attributes:
            last["pads"] = [attributes["pads"][axes - 1], attributes["pads"][-1]]
        between: tuple[Any, ...] = (slice(None), slice(None), *[0] * (axes - 1))
        x, w = (np.ascontiguousarray(a[between]) for a in (x, w))
        line = onnx.helper.make_node("ConvTranspose", ["X", "W"], ["Y"], **last)
        (expected,) = ReferenceEvaluator(line).run(None, {"X": x, "W": w})
        assert isinstance(expected, np.ndarray)
        if axes == 1:
            np.testing.assert_array_equal(expected, case.data_sets[0][1][0])
        kwargs: dict[str, Any] = {"layout": "NCL", "filter_layout": "CFS", "stride": last.pop("strides", [1])[0]}
        kwargs |= {"dilation": last.pop("dilations", [1])[0], "groups": last.pop("group", 1)}
        kwargs |= {"output_padding": last.pop("output_padding", [0])[0], "padding": tuple(last.pop("pads", (0, 0)))}
        if "output_shape" in last:
            kwargs["output_size"] = last.pop("output_shape")[0]
        if last.pop("auto_pad", None) == b"SAME_UPPER":
            total = max(0, w.shape[2] - kwargs["stride"])
            kwargs["padding"] = (total // 2, total - total // 2)
            kwargs["output_size"] = x.shape[2] * kwargs["stride"]
        assert last.pop("kernel_shape", [w.shape[2]]) == [w.shape[2]]
        assert not last, f"{case.name}: attributes that the case does not carry: {last}"
        yield Case(case.name, x, w, None, kwargs, expected=expected, transposed=True)


TRANSPOSED = list(transposed_cases())
CASES = [case_of(name) for name in MODELS] + TRANSPOSED


@pytest.fixture(scope="module")
def results() -> dict[str, Array]:
    return dict(zip(ids(CASES), run(CASES), strict=True))


def test_these_are_all() -> None:
    assert sorted(path.name for path in FOLDER.glob("test_Conv1d*")) == MODELS
    assert len(MODELS) == 8
    assert len(TRANSPOSED) == 11 and "test_convtranspose_1d" in [case.id for case in TRANSPOSED]
    assert all(len(list((FOLDER / name).glob("test_data_set_*"))) == 1 for name in MODELS)


@pytest.mark.parametrize("case", CASES, ids=ids(CASES))
def test_model(case: Case, results: dict[str, Array]) -> None:
    check_reference(case)
    check(case, results[case.id])
