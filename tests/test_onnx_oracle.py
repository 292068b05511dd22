"""The Conv1d models of ONNX's backend tests, with their stored inputs and outputs (converted from PyTorch)."""

from pathlib import Path

import numpy as np
import onnx
import onnx.backend.test
import pytest
from onnx import numpy_helper

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
    kwargs = {
        "stride": attributes.pop("strides")[0],
        "padding": tuple(attributes.pop("pads")),
        "dilation": attributes.pop("dilations")[0],
        "groups": attributes.pop("group"),
    }
    weights = {w.name: numpy_helper.to_array(w) for w in graph.initializer}
    x_name, *weight_names = node.input
    w, *bias = [weights[weight] for weight in weight_names]
    assert attributes.pop("kernel_shape") == [w.shape[2]]
    assert not attributes, "an attribute that the case does not carry"
    assert x_name not in weights
    data = FOLDER / name / "test_data_set_0"
    x, expected = stored(data / "input_0.pb"), stored(data / "output_0.pb")
    return Case(name, x, w, *bias, kwargs=kwargs | {"layout": "NCL", "filter_layout": "FCS"}, expected=expected)


CASES = [case_of(name) for name in MODELS]


@pytest.fixture(scope="module")
def results() -> dict[str, Array]:
    return dict(zip(ids(CASES), run(CASES), strict=True))


def test_these_are_all() -> None:
    assert sorted(path.name for path in FOLDER.glob("test_Conv1d*")) == MODELS
    assert len(MODELS) == 8
    assert all(len(list((FOLDER / name).glob("test_data_set_*"))) == 1 for name in MODELS)


@pytest.mark.parametrize("case", CASES, ids=ids(CASES))
def test_model(case: Case, results: dict[str, Array]) -> None:
    check_reference(case)
    check(case, results[case.id])
