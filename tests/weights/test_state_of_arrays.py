"""A state dict in memory may hold arrays of any producer, in any strides."""

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import torch

from max_conv.weights import LayerMap, tensors, to_native
from max_conv.weights.tensors import of_value, values

VALUES = np.random.default_rng(0).standard_normal((4, 6, 8)).astype(np.float32)
VIEWS: dict[str, Any] = {
    "plain": lambda a: a,
    "transposed": lambda a: a.transpose(2, 0, 1) if not isinstance(a, torch.Tensor) else a.permute(2, 0, 1),
    "sliced": lambda a: a[:, 1:, ::2],
    "one": lambda a: a[1, 2, 3:4],
    "empty": lambda a: a[:0],
}
PRODUCERS: dict[str, Any] = {
    "numpy": lambda a: a,
    "torch": torch.from_numpy,
    "torch with a gradient": lambda a: torch.from_numpy(a.copy()).requires_grad_(),
    "mlx": mx.array,
}


@pytest.mark.parametrize("view", list(VIEWS))
@pytest.mark.parametrize("producer", list(PRODUCERS))
def test_strides(producer: str, view: str) -> None:
    got = of_value(VIEWS[view](PRODUCERS[producer](VALUES)), "a")
    assert got.dtype == "F32"
    np.testing.assert_array_equal(values(got), VIEWS[view](VALUES))


def test_what_torch_and_numpy_keep_back() -> None:
    complex = torch.from_numpy(VALUES[..., 0] + 1j * VALUES[..., 1])
    np.testing.assert_array_equal(values(of_value(complex.conj().imag, "a")), -VALUES[..., 1])
    np.testing.assert_array_equal(values(of_value(torch.tensor(2.0).expand(3), "a")), [2, 2, 2])
    for value in (torch.from_numpy(VALUES).bfloat16(), mx.array(VALUES).astype(mx.bfloat16).transpose(2, 1, 0)):
        assert of_value(value, "a").dtype == "BF16"
        want = torch.from_numpy(VALUES).bfloat16().double().numpy()
        got = values(of_value(value, "a"))
        np.testing.assert_array_equal(got, want if got.shape == want.shape else want.transpose(2, 1, 0))
    assert values(of_value(VALUES.astype(">f4"), "a")).tolist() == VALUES.tolist()
    assert of_value(np.float64(3), "a").bits.shape == ()


WRONG: dict[str, tuple[Any, str]] = {
    "list": ([1.0], "must be an array .* but is a list"),
    "none": (None, "must be an array .* but is a NoneType"),
    "text": ("a", "must be an array .* but is a str"),
    "object": (np.array([None]), "cannot be read: checkpoints hold no arrays of object"),
    "long double": (np.ones(2, np.longdouble), "cannot be read: checkpoints hold no arrays of"),
    "dates": (np.zeros(2, "datetime64[s]"), "cannot be read: checkpoints hold no arrays of datetime64"),
    "complex": (torch.ones(2, dtype=torch.complex128), "cannot be read: it holds complex128"),
    "sparse": (torch.eye(2).to_sparse(), "cannot be read: "),
    "meta": (torch.ones(2, device="meta"), "cannot be read: "),
}


@pytest.mark.parametrize("case", list(WRONG))
def test_refused_in_one_sentence(case: str) -> None:
    value, sentence = WRONG[case]
    with pytest.raises(TypeError, match=rf"^tensors: the tensor 'up\.bias' {sentence}") as caught:
        to_native({"up.weight": VALUES, "up.bias": value}, LayerMap(conv=("up.weight",), copy=("up.bias",)), "net")
    text = str(caught.value)
    assert "\n" not in text and text.endswith(".") and text.count(". ") == 0


@pytest.mark.parametrize(
    ("found", "sentence"),
    [(None, "it is not on the CPU"), ((np.zeros(2, np.uint8), "float8_e3m4"), "it holds float8_e3m4")],
)
def test_memory_and_dtypes_of_other_machines(found: Any, sentence: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The result of `dense` for a capsule: None for memory that the CPU cannot read."""
    monkeypatch.setattr(tensors, "dense", lambda value: found)
    with pytest.raises(TypeError, match=rf"^tensors: the tensor 'a' cannot be read: {sentence}; pass a dense array\.$"):
        of_value(mx.array(VALUES), "a")


def test_a_state_dict_of_torch() -> None:
    layer = torch.nn.Conv1d(6, 4, 8)
    got = to_native(layer.state_dict(), LayerMap(conv=("weight",), copy=("bias",)), "net")
    np.testing.assert_array_equal(got["weight"], layer.weight.detach().numpy().transpose(2, 1, 0))
