"""The Open Inference Protocol as bytes: right requests come back bit for bit, and wrong requests are refused in a sentence."""

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from max_conv.serving.protocol import DATATYPES, Bits, Refused, Request, Spec, decode, encode

INPUTS = {
    "x": Spec("float32", ("batch", "length", 2)),
    "n": Spec("int8", ("batch",)),
    "flags": Spec("bool", ("batch", "length"), needed=False),
    "half": Spec("float16", ("any",)),
    "brain": Spec("bfloat16", ("some",)),
    "large": Spec("uint64", ("many",)),
}


def tensor(name: str, shape: list[int], datatype: str, **rest: Any) -> dict[str, Any]:
    return {"name": name, "shape": shape, "datatype": datatype, **rest}


def body(*tensors: Any, **rest: Any) -> bytes:
    return json.dumps({"inputs": tensors, **rest}).encode()


def arrays(shape: tuple[int, ...], dtype: Any) -> st.SearchStrategy[np.ndarray]:
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return st.binary(min_size=size, max_size=size).map(lambda data: np.frombuffer(data, dtype).reshape(shape))


@given(st.data(), st.integers(0, 3), st.integers(0, 4))
def test_binary_tensors_come_back_to_the_bit(data: st.DataObject, batch: int, length: int) -> None:
    sent = {
        "x": data.draw(arrays((batch, length, 2), np.float32)),
        "n": data.draw(arrays((batch,), np.int8)),
        "brain": data.draw(arrays((length,), np.uint16)),
    }
    tensors = [
        tensor(name, list(a.shape), DATATYPES[INPUTS[name].dtype], parameters={"binary_data_size": a.nbytes})
        for name, a in sent.items()
    ]
    head = body(*tensors, id="7", parameters={"binary_data_output": True})
    request, got = decode(head + b"".join(a.tobytes() for a in sent.values()), str(len(head)), INPUTS)
    assert {name: (a.dtype, a.shape, a.tobytes()) for name, a in got.items()} == {
        name: (a.dtype, a.shape, a.tobytes()) for name, a in sent.items()
    }
    answer, headers = encode("m", request, {**got, "brain": got["brain"].view(Bits)})
    size = (
        int(headers["inference-header-content-length"]) if "inference-header-content-length" in headers else len(answer)
    )
    told = json.loads(answer[:size])
    assert (told["model_name"], told["model_version"], told["id"]) == ("m", "1", "7")
    for entry in told["outputs"]:
        part, answer = (
            answer[size : size + entry["parameters"]["binary_data_size"]],
            answer[:size] + answer[size:][entry["parameters"]["binary_data_size"] :],
        )
        assert (entry["datatype"], part) == (DATATYPES[INPUTS[entry["name"]].dtype], sent[entry["name"]].tobytes())
    assert len(answer) == size


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=4, max_size=4), st.booleans())
def test_numbers_in_json_come_back(numbers: list[float], nested: bool) -> None:
    data = np.array(numbers, np.float32).reshape(1, 2, 2).tolist() if nested else numbers
    request, got = decode(body(tensor("x", [1, 2, 2], "FP32", data=data)), None, INPUTS)
    np.testing.assert_array_equal(got["x"].ravel(), np.array(numbers, np.float32))
    answer, _ = encode("m", request, got)
    np.testing.assert_array_equal(json.loads(answer)["outputs"][0]["data"], np.array(numbers, np.float32))


X = tensor("x", [1, 1, 2], "FP32", data=[1, 2])
DEEP = b'{"inputs": [{"name": "x", "shape": [1, 1, 2], "datatype": "FP32", "data": ' + b"[" * 100_000
WRONG = {
    "not JSON": (b"\xff\x00", "not understood"),
    "empty": (b"", "not understood"),
    "no inputs": (b"{}", "not understood"),
    "deep": (b'{"inputs": ' + b"[" * 100_000, "not understood"),
    "deep data": (DEEP, "not understood"),
    "deep data that ends": (DEEP + b"]" * 100_000 + b"}]}", "not understood"),
    "NaN": (body(X).replace(b"2]", b"NaN]"), "not understood"),
    "another input": (body(tensor("y", [1], "FP32", data=[1])), "there is no input 'y'; the inputs are x, n,"),
    "twice": (body(X, X), "input 'x' came twice"),
    "dtype": (body(X | {"datatype": "FP64"}), "input 'x' must be FP32, but is 'FP64'"),
    "no dtype": (body(X | {"datatype": "BYTES"}), "input 'x' must be FP32, but is 'BYTES'"),
    "rank": (body(X | {"shape": [1, 2]}), r"input 'x' must have shape \(batch, length, 2\), but has \(1, 2\)"),
    "size": (body(X | {"shape": [1, 2, 1]}), r"must have shape"),
    "below 0": (body(X | {"shape": [-1, -1, 2]}), r"must have shape"),
    "2^62": (body(X | {"shape": [1 << 62, 1 << 62, 2]}), r"must have shape"),
    "2^80": (body(X | {"shape": [1 << 80, 1, 2]}), r"must have shape|not understood"),
    "float shape": (body(X | {"shape": [1.5, 1, 2]}), "not understood"),
    "too few": (body(X | {"data": [1]}), r"input 'x' of shape \(1, 1, 2\) needs 2 numbers, but its data has shape \(1,\)"),
    "brackets": (body(X | {"data": [[[[1, 2]]]]}), "there are more brackets than axes"),
    "another nesting": (body(X | {"data": [[1], [2]]}), r"its data has shape \(2, 1\)"),
    "ragged": (body(X | {"data": [[1, 2], [3]]}), "input 'x': its data is no list of float32"),
    "text": (body(X | {"data": ["1", 2]}), "input 'x': its data is no list of float32"),
    "null": (body(X | {"data": [None, 2]}), "input 'x': its data is no list of float32"),
    "bool": (body(X | {"data": [True, 2]}), "input 'x': its data is no list of float32"),
    "too large": (body(X | {"data": [1e39, 2]}), "input 'x': its data is no list of float32"),
    "too large for a byte": (body(tensor("n", [1], "INT8", data=[128])), "input 'n': its data is no list of int8"),
    "no whole number": (body(tensor("n", [1], "INT8", data=[1.5])), "input 'n': its data is no list of int8"),
    "below 0, unsigned": (body(tensor("large", [1], "UINT64", data=[-1])), "input 'large': its data is no list of uint64"),
    "number for a bool": (body(tensor("flags", [1, 1], "BOOL", data=[1])), "input 'flags': its data is no list of bool"),
    "no data": (body({k: v for k, v in X.items() if k != "data"}), "neither data nor binary_data_size"),
    "bfloat16 in JSON": (body(tensor("brain", [1], "BF16", data=[1])), "BF16 must be sent in binary"),
    "bytes that are not there": (body(X | {"parameters": {"binary_data_size": 8}}), "needs 8 bytes, but binary_data_size is 8 and 0"),
    "a size that lies": (body(X | {"parameters": {"binary_data_size": 4}}), "needs 8 bytes, but binary_data_size is 4"),
    "a size below 0": (body(X | {"parameters": {"binary_data_size": -8}}), "needs 8 bytes, but binary_data_size is -8"),
    "a size of true": (body(X | {"parameters": {"binary_data_size": True}}), "needs 8 bytes, but binary_data_size is True"),
    "a parameter that is a list": (body(X | {"parameters": {"a": []}}), "not understood"),
    "sizes that differ": (body(X, tensor("n", [2], "INT8", data=[1, 2])), "the size 'batch' is 1 in input 'x' and 2 in 'n'"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_refused(case: str) -> None:
    data, sentence = WRONG[case]
    with pytest.raises(Refused, match=sentence) as error:
        decode(data, None, INPUTS)
    assert error.value.status == 400 and "\n" not in str(error.value) and len(str(error.value)) < 500


@pytest.mark.parametrize("header", ["-1", "1e3", "", "+1", "٣", "99999999999999999999", "1000000", " 5"])
def test_a_header_that_lies(header: str) -> None:
    with pytest.raises(Refused, match="Inference-Header-Content-Length must be a number up to"):
        decode(body(X), header, INPUTS)


def test_bytes_that_belong_to_nothing() -> None:
    data = body(X)
    with pytest.raises(Refused, match="3 bytes of the body belong to no input"):
        decode(data + b"abc", str(len(data)), INPUTS)


def test_parameters() -> None:
    def request(**parameters: Any) -> Request:
        return decode(body(X, parameters=parameters), None, INPUTS)[0]

    assert request().number("timeout") == 0 and request(timeout=5).number("timeout") == 5
    assert request(sequence_id="a").sequence() == "a" and request(sequence_id="").sequence() == 0
    assert request(sequence_start=True).flag("sequence_start")
    for wrong in (True, -1, 1.5, "1"):
        with pytest.raises(Refused, match="the parameter timeout must be a whole number from 0 on"):
            request(timeout=wrong).number("timeout")
    for wrong in (1, "true"):
        with pytest.raises(Refused, match="the parameter sequence_end must be true or false"):
            request(sequence_end=wrong).flag("sequence_end")
    for wrong in (1.5, True):
        with pytest.raises(Refused, match="the parameter sequence_id must be"):
            request(sequence_id=wrong).sequence()


@pytest.mark.parametrize(
    ("outputs", "sentence"),
    [
        ([{"name": "z"}], "output 'z' is unknown; the outputs are y, brain"),
        (
            [{"name": "brain", "parameters": {"binary_data": True}}, {"name": "brain"}],
            "output 'brain' came twice; the outputs are y, brain",
        ),
        ([{"name": "y"}], "output 'y' holds NaN or infinity, which JSON cannot carry; ask for it with binary_data"),
        ([{"name": "brain"}], "output 'brain' is BF16, which JSON cannot carry"),
    ],
)
def test_outputs_that_cannot_be_told(outputs: Any, sentence: str) -> None:
    request, _ = decode(body(X, outputs=outputs), None, INPUTS)
    results = {"y": np.array([np.nan], np.float32), "brain": np.zeros(1, np.uint16).view(Bits)}
    with pytest.raises(Refused, match=sentence):
        encode("m", request, results)


def mutated(data: bytes, edits: list[tuple[int, int, bytes]]) -> bytes:
    for at, drop, put in edits:
        at %= len(data) + 1
        data = data[:at] + put + data[at + drop :]
    return data


PIECES = [
    b"[",
    b"]",
    b"{",
    b"}",
    b'"',
    b",",
    b":",
    b"-1",
    b"1e400",
    b"null",
    b"true",
    b"9" * 30,
    b"\\u0000",
    b"\xff",
    b'"x"',
]
GOOD = [
    body(X),
    body(X | {"data": [[[1.5, -2e3]]]}, parameters={"sequence_id": 3, "binary_data_output": False}, id="a"),
    body(tensor("n", [3], "INT8", data=[1, -2, 3]), outputs=[{"name": "n", "parameters": {"binary_data": True}}]),
    body(tensor("half", [2], "FP16", parameters={"binary_data_size": 4})) + b"\x00\x3c\x00\x7e",
]


def check_any_bytes(data: bytes, header: str | None) -> None:
    """Either a sentence, or arrays that fit the inputs; never another error."""
    try:
        request, got = decode(data, header, INPUTS)
        encode("m", request, got)
    except Refused as error:
        assert error.status == 400 and str(error)
        return
    for name, array in got.items():
        spec = INPUTS[name]
        assert array.dtype == spec.numpy and array.ndim == len(spec.shape)
        assert all(size == want or isinstance(want, str) for size, want in zip(array.shape, spec.shape))


EDITS = st.lists(
    st.tuples(st.integers(0, 400), st.integers(0, 9), st.sampled_from(PIECES) | st.binary(max_size=4)), max_size=6
)
ANY = st.builds(mutated, st.sampled_from(GOOD), EDITS) | st.binary(max_size=300)
HEADERS = st.none() | st.integers(0, 400).map(str) | st.text(max_size=5)


@settings(max_examples=2000, deadline=None)
@given(ANY, HEADERS)
def test_any_bytes(data: bytes, header: str | None) -> None:
    check_any_bytes(data, header)


@pytest.mark.nightly
@settings(max_examples=100_000, deadline=None)
@given(ANY, HEADERS)
def test_many_bytes(data: bytes, header: str | None) -> None:
    check_any_bytes(data, header)
