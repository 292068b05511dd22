"""MAX gets the same values that NumPy sees, for every producer, view and dtype."""

import importlib.util
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from max.driver import Buffer
from max.dtype import DType
from max.graph import Graph

import max_conv
from max_conv.conv import dlpack
from max_conv.conv.arrays import as_float64, buffer_of
from max_conv.conv.reference import conv1d_ref
from max_conv.frontends import mlx as ours_mlx
from max_conv.frontends import torch as ours_torch

mx = pytest.importorskip("mlx.core", reason="mlx is not to be had here")


class Foreign:
    """Like old arrays of CuPy: only `__dlpack__`, without the keywords of later versions."""

    def __init__(self, array: np.ndarray) -> None:
        self._array = array

    def __dlpack__(self, stream: None = None) -> Any:
        return self._array.__dlpack__()


class Offset(Foreign):
    """A producer whose values begin after the address that it gives."""

    def __dlpack__(self, stream: None = None) -> Any:
        capsule = super().__dlpack__()
        tensor = dlpack._Tensor.from_address(dlpack._pointer(capsule, b"dltensor"))
        if tensor.data:
            tensor.data -= 64
            tensor.byte_offset += 64
        return capsule


class Versioned(Foreign):
    """A producer that only supports capsules of DLPack 1."""

    def __dlpack__(self, stream: None = None) -> Any:
        return self._array.__dlpack__(max_version=(1, 0))


class OnDevice(Foreign):
    """Memory that the CPU cannot read."""

    def __dlpack__(self, stream: None = None) -> Any:
        capsule = super().__dlpack__()
        dlpack._Tensor.from_address(dlpack._pointer(capsule, b"dltensor")).device_type = 2
        return capsule


def view(array: Any, axes: tuple[int, ...], slices: tuple[slice, ...], permute: Callable[[Any, Any], Any]) -> Any:
    return permute(array, axes)[slices]


NUMPY_DTYPES = ["float32", "float64", "float16", "int32", "uint8", "bool", "bfloat16"]
AXES = st.permutations(range(3)).map(tuple)


def slices(steps: list[int]) -> st.SearchStrategy[tuple[slice, ...]]:
    one = st.builds(slice, st.integers(0, 2), st.just(None), st.sampled_from([n for n in steps if n > 0]))
    back = st.builds(slice, st.just(None), st.just(None), st.sampled_from(steps))
    return st.tuples(*[one | back] * 3)


def base(dtype: str) -> np.ndarray:
    values = np.arange(4 * 5 * 6).reshape(4, 5, 6) % 120
    return values.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)


def of_torch(array: np.ndarray) -> torch.Tensor:
    wide = torch.from_numpy(array.astype(np.float64))
    return wide.to(getattr(torch, array.dtype.name))


def of_mlx(array: np.ndarray) -> Any:
    return mx.array(array.astype(np.float32)).astype(getattr(mx, "bool_" if array.dtype == bool else array.dtype.name))


def of_buffer(array: np.ndarray) -> Buffer:
    return buffer_of(array.copy(), "test", "x")


def of_jax(array: np.ndarray) -> Any:
    import jax.numpy

    return jax.numpy.asarray(array)


def foreign(kind: type[Foreign]) -> Callable[[np.ndarray], Any]:
    return kind


PRODUCERS: dict[str, tuple[Callable[[np.ndarray], Any], list[int], list[str]]] = {
    "numpy": (lambda a: a, [1, 2, -1, -2], NUMPY_DTYPES),
    "torch": (of_torch, [1, 2, 3], NUMPY_DTYPES),
    "mlx": (of_mlx, [1, 2, -1, -2], [d for d in NUMPY_DTYPES if d != "float64"]),
    "buffer": (of_buffer, [1, 2], NUMPY_DTYPES[:-2]),
    "jax": (of_jax, [1, 2, -1], ["float32", "float16", "int32", "bfloat16"]),
}


@pytest.mark.parametrize("producer", list(PRODUCERS))
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_views_are_what_numpy_sees(producer: str, data: st.DataObject) -> None:
    if producer == "jax" and importlib.util.find_spec("jax") is None:
        pytest.skip("jax is not to be had here")
    make, steps, dtypes = PRODUCERS[producer]
    array = base(data.draw(st.sampled_from(dtypes)))
    axes = data.draw(AXES) if producer != "buffer" else (0, 1, 2)
    parts = data.draw(slices(steps))
    want = array.transpose(axes)[parts]
    value = make(array)
    turned = value if producer == "buffer" else value.permute(axes) if producer == "torch" else value.transpose(*axes)
    got = buffer_of(turned[parts], "test", "x")
    assert got.dtype.name == array.dtype.name and tuple(got.shape) == want.shape and got.is_contiguous
    np.testing.assert_array_equal(as_float64(got), want.astype(np.float64))


@settings(max_examples=60, deadline=None)
@given(kind=st.sampled_from([Foreign, Offset, Versioned]), axes=AXES, parts=slices([1, 2, -1, -2]), data=st.data())
def test_views_of_any_producer(kind: type[Foreign], axes: tuple[int, ...], parts: tuple, data: st.DataObject) -> None:
    array = base(data.draw(st.sampled_from(NUMPY_DTYPES[:-1])))
    want = array.transpose(axes)[parts]
    got = buffer_of(kind(want), "test", "x")
    array[...] = 0  # it is a copy: later changes by the producer have no effect
    fresh = base(array.dtype.name).transpose(axes)[parts]
    np.testing.assert_array_equal(as_float64(got), fresh.astype(np.float64))


X = np.arange(6, dtype=np.float32).reshape(2, 3)
with torch.inference_mode():
    INFERENCE = torch.from_numpy(X.copy()).clone()
OTHERS: dict[str, tuple[Callable[[], Any], Any]] = {
    "byte-swapped": (lambda: X.astype(">f4"), X),
    "byte-swapped scalar": (lambda: np.array(2, ">f8"), 2),
    "Fortran's order": (lambda: np.asfortranarray(X), X),
    "zero strides": (lambda: np.broadcast_to(np.float32(3), (2, 2)), np.full((2, 2), 3)),
    "unaligned": (lambda: np.frombuffer(bytearray(b"." + X.tobytes()), np.float32, 6, 1).reshape(2, 3), X),
    "scalar": (lambda: np.float32(5), 5),
    "0-d of MLX": (lambda: mx.array(5.0), 5),
    "scalar bfloat16": (lambda: ml_dtypes.bfloat16(5), 5),
    "empty": (lambda: np.zeros((0, 3), np.float32), np.zeros((0, 3))),
    "empty of MLX": (lambda: mx.zeros((0, 3)), np.zeros((0, 3))),
    "matrix": (lambda: np.matrix(X).T, X.T),
    "mask without masked values": (lambda: np.ma.array(X), X),
    "gradient": (lambda: torch.from_numpy(X.copy()).requires_grad_(), X),
    "parameter": (lambda: torch.nn.Parameter(torch.from_numpy(X.copy())), X),
    "lazy sign": (lambda: torch._neg_view(torch.from_numpy(X)), -X),
    "sign of a conjugate": (lambda: torch.complex(torch.zeros(2, 3), torch.from_numpy(X)).conj().imag, -X),
    "expanded": (lambda: torch.tensor([[3.0]]).expand(2, 3), np.full((2, 3), 3)),
    "channels last": (
        lambda: torch.arange(24.0).reshape(1, 2, 3, 4).to(memory_format=torch.channels_last),
        np.arange(24.0).reshape(1, 2, 3, 4),
    ),
    "inference mode": (lambda: INFERENCE, X),
    "broadcast of MLX": (lambda: mx.broadcast_to(mx.array([[1.0], [2.0]]), (2, 3)), np.repeat([[1, 2]], 3, 0).T),
}


@pytest.mark.filterwarnings("ignore::PendingDeprecationWarning")
@pytest.mark.parametrize("case", list(OTHERS))
def test_other_arrays(case: str) -> None:
    make, want = OTHERS[case]
    buffer = buffer_of(make(), "test", "x")
    assert buffer._aligned(buffer.dtype.align) or not np.size(want)
    got = as_float64(buffer)
    np.testing.assert_array_equal(got, want)
    assert got.shape == np.shape(want)


def test_contiguous_arrays_are_read_where_they_are() -> None:
    array, tensor = np.zeros(3, np.float32), torch.zeros(3)
    buffers = buffer_of(array, "test", "x"), buffer_of(tensor, "test", "x")
    array[:], tensor[:] = 1, 1
    assert all((buffer.to_numpy() == 1).all() for buffer in buffers)
    assert buffer_of(buffers[0], "test", "x") is buffers[0]


REST = r"; pass a dense array of a real dtype that MAX has\."
READ = {
    "complex64": lambda: np.zeros(2, np.complex64),
    "object": lambda: np.zeros(2, object),
    "<U1": lambda: np.array(["a"]),
    r"datetime64\[s\]": lambda: np.zeros(2, "M8[s]"),
    r"timedelta64\[s\]": lambda: np.zeros(2, "m8[s]"),
    "float128|longdouble|float64": lambda: np.zeros(2, np.longdouble),
    r"\|V2": lambda: np.zeros(2, "V2"),
    r"\[\('a', '<f2'\)\]": lambda: np.zeros(2, [("a", "f2")]),
    "int4": lambda: np.zeros(2, ml_dtypes.int4),
    "complex64 ": lambda: mx.zeros(2, dtype=mx.complex64),
}
CASES: dict[str, tuple[Callable[[], Any], str]] = {
    **{name: (make, rf"cannot be read: it holds ({name.strip()}){REST}") for name, make in READ.items()},
    "masked": (lambda: np.ma.array(X, mask=X > 2), rf"cannot be read: it has masked values{REST}"),
    "meta": (lambda: torch.zeros(2, device="meta"), rf"cannot be read: it is a meta tensor{REST}"),
    "sparse": (lambda: torch.eye(2).to_sparse(), rf"cannot be read: it is a sparse_coo tensor{REST}"),
    "compressed": (lambda: torch.eye(2).to_sparse_csr(), rf"cannot be read: it is a sparse_csr tensor{REST}"),
    "quantised": (
        lambda: torch.quantize_per_tensor(torch.zeros(2), 1, 0, torch.qint8),
        rf"cannot be read: it is a qint8 tensor{REST}",
    ),
    "complex tensor": (lambda: torch.zeros(2, dtype=torch.cfloat), rf"cannot be read: it is a complex64 tensor{REST}"),
    "nested": (lambda: torch.nested.nested_tensor([torch.ones(2)]), rf"cannot be read: .*{REST}"),
    "list": (lambda: [1.0], r"must be an array \(NumPy or DLPack\), but is a list\."),
    "None": (lambda: None, r"must be an array \(NumPy or DLPack\), but is a NoneType\."),
    "str": (lambda: "a", r"must be an array \(NumPy or DLPack\), but is a str\."),
    "strides on a device": (
        lambda: OnDevice(X.T),
        rf"cannot be read: it has strides, on a device; make it contiguous first{REST}",
    ),
    "no capsule": (lambda: NoCapsule(), rf"cannot be read: .*{REST}"),
}


class NoCapsule:
    def __dlpack__(self) -> int:
        return 3


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("case", list(CASES))
def test_what_is_no_array_of_real_numbers(case: str) -> None:
    make, sentence = CASES[case]
    with pytest.raises(TypeError, match=rf"^model: input 'x' {sentence}$") as caught:
        buffer_of(make(), "model: input", "x")
    assert "\n" not in str(caught.value)


def test_layers_take_weights_of_any_producer() -> None:
    weight = np.random.default_rng(0).standard_normal((9, 4, 3)).astype(np.float32)
    turned = mx.array(np.ascontiguousarray(weight.T)).transpose(2, 1, 0)
    layers: list[Any] = [
        ours_torch.Conv1d(4, 9, 3, bias=False),
        max_conv.Conv1D(3, 4, 9, DType.float32, permute=True),
        max_conv.ConvTranspose1D(3, 9, 4, DType.float32, permute=True),
    ]
    for layer in layers:
        layer.load_state_dict({"weight": turned})
        np.testing.assert_array_equal(layer.state_dict()["weight"].to_numpy(), weight)
        with pytest.raises(TypeError, match=rf"^{layer.op}: weight 'weight' must be an array .*, but is a list\.$"):
            layer.load_state_dict({"weight": [1.0]})
    normed = max_conv.WeightNormConv1D(3, 4, 9, DType.float32, permute=True)
    norms = np.linalg.norm(weight.astype(np.float64), axis=(1, 2), keepdims=True).astype(np.float32)
    normed.load_state_dict({"weight_g": mx.array(norms), "weight_v": turned})
    np.testing.assert_allclose(as_float64(normed.state_dict()["weight"]), weight, rtol=1e-6)


def test_registry_takes_weights_of_any_producer() -> None:
    layer = max_conv.Conv1D(3, 4, 9, DType.float32)
    graph = Graph("plain", layer, layer.input_types())
    weight = np.random.default_rng(0).standard_normal((3, 4, 9)).astype(np.float32)
    turned = mx.array(np.ascontiguousarray(weight.T)).transpose(2, 1, 0)
    np.testing.assert_array_equal(as_float64(max_conv.registry(graph, {"weight": turned})["weight"]), weight)
    with pytest.raises(TypeError, match=r"^compile: weight 'weight' cannot be read: it holds complex64"):
        max_conv.registry(graph, {"weight": weight.astype(np.complex64)})


def test_models_and_front_ends_read_views() -> None:
    """From end to end, with one compiled layer."""
    conv = ours_mlx.Conv1d(4, 8, 3, padding=1, generator=0)
    weight, bias = (as_float64(conv.state_dict()[name]) for name in ("weight", "bias"))
    wide = np.random.default_rng(0).standard_normal((2, 8, 40)).astype(np.float32)
    array = mx.array(wide)
    for x, values in (
        (array[:, ::2, 9:].transpose(0, 2, 1), wide[:, ::2, 9:].transpose(0, 2, 1)),
        (array[0, ::2, ::-3].T, wide[0, ::2, ::-3].T),
        (Foreign(wide[:, 4:].transpose(0, 2, 1)), wide[:, 4:].transpose(0, 2, 1)),
        (torch._neg_view(torch.from_numpy(wide[:, :4])).transpose(1, 2), -wide[:, :4].transpose(0, 2, 1)),
    ):
        want = conv1d_ref(np.atleast_3d(values.astype(np.float64)) if values.ndim == 3 else values[None].astype(float), weight.transpose(1, 2, 0), bias, padding=1)  # fmt: skip
        got = conv(x).to_numpy()
        np.testing.assert_allclose(got, want if values.ndim == 3 else want[0], atol=1e-5)
    with pytest.raises(TypeError, match=r"^conv1d: input 'x' must be an array \(NumPy or DLPack\), but is a list\.$"):
        conv([1.0])
