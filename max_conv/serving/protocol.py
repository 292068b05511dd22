"""The Open Inference Protocol, version 2, with binary tensors: bytes to arrays and back. There is no server in here.

Source: https://github.com/kserve/open-inference-protocol and the binary tensor data extension,
https://github.com/triton-inference-server/server/blob/main/docs/protocol/extension_binary_data.md
"""

import functools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import msgspec
import numpy as np

DATATYPES = {
    "float32": "FP32",
    "float64": "FP64",
    "float16": "FP16",
    "bfloat16": "BF16",
    "int64": "INT64",
    "int32": "INT32",
    "int16": "INT16",
    "int8": "INT8",
    "uint64": "UINT64",
    "uint32": "UINT32",
    "uint16": "UINT16",
    "uint8": "UINT8",
    "bool": "BOOL",
}
"""The protocol's name of each dtype."""
LARGEST = 1 << 62
"""Sizes from here on are refused before they are multiplied."""


class Refused(Exception):
    """A request that is refused: one sentence, and the HTTP status.

    Attributes:
        status: The HTTP status.
        closes: Whether the connection has to be closed, because the request's body was not read to its end.
    """

    def __init__(self, message: str, status: int = 400, closes: bool = False) -> None:
        super().__init__(message)
        self.status, self.closes = status, closes


class Spec(NamedTuple):
    """An input or output as clients see it: its dtype, and its shape with names for the sizes that a request chooses."""

    dtype: str
    shape: tuple[int | str, ...]
    needed: bool = True

    def __str__(self) -> str:
        return f"({', '.join(map(str, self.shape))})"

    @property
    def numpy(self) -> np.dtype[Any]:
        """NumPy's dtype. NumPy lacks bfloat16: its values are bits, uint16."""
        return _numpy_dtype(self.dtype)


@functools.cache
def _numpy_dtype(name: str) -> np.dtype[Any]:
    return np.dtype("uint16" if name == "bfloat16" else name)


_Parameters = dict[str, bool | int | float | str]


class _Tensor(msgspec.Struct):
    name: str
    shape: list[int]
    datatype: str
    data: msgspec.Raw = msgspec.Raw(b"")
    parameters: _Parameters = {}


class _Wanted(msgspec.Struct):
    name: str
    parameters: _Parameters = {}


class Request(msgspec.Struct):
    """A client's request, without the arrays."""

    inputs: list[_Tensor]
    outputs: list[_Wanted] | None = None
    id: str = ""
    parameters: _Parameters = {}

    def number(self, name: str) -> int:
        """Returns a parameter that is a number from 0 on; 0 if it is absent."""
        value = self.parameters.get(name, 0)
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise Refused(f"the parameter {name} must be a whole number from 0 on, but is {str(value)[:40]!r}.")
        return value

    def flag(self, name: str) -> bool:
        """Returns a parameter that is true or false; false if it is absent."""
        value = self.parameters.get(name, False)
        if not isinstance(value, bool):
            raise Refused(f"the parameter {name} must be true or false, but is {str(value)[:40]!r}.")
        return value

    def sequence(self) -> int | str:
        """Returns the parameter sequence_id, a number or a text; 0 if it is absent or empty."""
        value = self.parameters.get("sequence_id", 0)
        if isinstance(value, bool) or not isinstance(value, int | str):
            raise Refused("the parameter sequence_id must be a whole number or a text.")
        return value or 0

    def wants(self, name: str) -> bool:
        """Whether an output is asked for by its name."""
        return any(output.name == name for output in self.outputs or ())


_decoder = msgspec.json.Decoder(Request)


def decode(body: bytes, header: str | None, inputs: Mapping[str, Spec]) -> tuple[Request, dict[str, np.ndarray]]:
    """Reads a request.

    Args:
        body: JSON, followed by the binary tensors in the order of the inputs.
        header: The header Inference-Header-Content-Length: how many bytes the JSON has; None if the body is JSON alone.
        inputs: The model's inputs by name.

    Returns:
        The request, and the arrays by name. Arrays that came in binary are views of the body.

    Raises:
        Refused: If anything is wrong with it.

    >>> body = b'{"inputs": [{"name": "x", "shape": [1, 2], "datatype": "FP32", "data": [1, 2.5]}]}'
    >>> decode(body, None, {"x": Spec("float32", ("batch", "length"))})[1]
    {'x': array([[1. , 2.5]], dtype=float32)}
    """
    size = len(body)
    if header is not None:
        if not header.isascii() or not header.isdigit() or len(header) > 18 or int(header) > size:
            raise Refused(f"Inference-Header-Content-Length must be a number up to {size}, but is {header[:20]!r}.")
        size = int(header)
    try:
        request = _decoder.decode(memoryview(body)[:size])
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise Refused(f"the request's JSON is not understood: {str(error)[:200]}.") from None
    arrays: dict[str, np.ndarray] = {}
    at = size
    for tensor in request.inputs:
        spec = _fitting(tensor, inputs, arrays)
        length = tensor.parameters.get("binary_data_size")
        if length is None:
            arrays[tensor.name] = _from_json(tensor, spec)
            continue
        need = math.prod(tensor.shape) * spec.numpy.itemsize
        if length is True or length != need or need > len(body) - at:
            raise Refused(
                f"input {tensor.name!r} of shape {tuple(tensor.shape)} needs {need} bytes, but binary_data_size is "
                f"{str(length)[:40]} and {len(body) - at} bytes are left in the body."
            )
        arrays[tensor.name] = np.frombuffer(body, spec.numpy, need // spec.numpy.itemsize, at).reshape(tensor.shape)
        at += need
    if at != len(body):
        raise Refused(f"{len(body) - at} bytes of the body belong to no input.")
    _check_sizes(inputs, arrays)
    return request, arrays


def _fitting(tensor: _Tensor, inputs: Mapping[str, Spec], arrays: Mapping[str, np.ndarray]) -> Spec:
    """Returns the input that a tensor is for, if its dtype and shape fit."""
    name = tensor.name[:40]
    spec = inputs.get(tensor.name)
    if spec is None:
        raise Refused(f"there is no input {name!r}; the inputs are {', '.join(inputs)}.")
    if tensor.name in arrays:
        raise Refused(f"input {name!r} came twice; send it once.")
    if tensor.datatype != DATATYPES[spec.dtype]:
        raise Refused(f"input {name!r} must be {DATATYPES[spec.dtype]}, but is {tensor.datatype[:20]!r}.")
    if len(tensor.shape) != len(spec.shape) or not all(
        0 <= size < LARGEST and (size == want or isinstance(want, str))
        for size, want in zip(tensor.shape, spec.shape, strict=True)
    ):
        raise Refused(f"input {name!r} must have shape {spec}, but has {str(tuple(tensor.shape[:9]))[:200]}.")
    return spec


def _from_json(tensor: _Tensor, spec: Spec) -> np.ndarray:
    """Returns the numbers in a tensor's JSON, a flat list or lists in lists."""
    kind, depth = spec.numpy.kind, _depth(tensor.data)
    try:
        if not memoryview(tensor.data).nbytes:
            raise ValueError("it has neither data nor binary_data_size")
        if spec.dtype == "bfloat16":
            raise ValueError("BF16 must be sent in binary")
        if depth > len(tensor.shape):
            raise ValueError("there are more brackets than axes")
        with np.errstate(over="raise"):
            values = np.array(_lists(kind, depth).decode(tensor.data), spec.numpy)
    except (msgspec.DecodeError, ValueError, OverflowError, FloatingPointError, RecursionError) as error:
        raise Refused(f"input {tensor.name!r}: its data is no list of {spec.dtype} ({str(error)[:200]}).") from None
    if values.size != math.prod(tensor.shape) or (depth > 1 and values.shape != tuple(tensor.shape)):
        raise Refused(
            f"input {tensor.name!r} of shape {tuple(tensor.shape)} needs {math.prod(tensor.shape)} numbers, but its data "
            f"has shape {values.shape}."
        )
    return values.reshape(tensor.shape)


def _depth(data: msgspec.Raw) -> int:
    """Returns the number of opening brackets at the begin of the data."""
    start = bytes(memoryview(data)[:64])
    return max(1, start[: len(start) - len(start.lstrip(b"[ \t\r\n"))].count(b"["))


@functools.cache
def _lists(kind: str, depth: int) -> msgspec.json.Decoder[Any]:
    """Returns the decoder of lists in lists of numbers. Texts and null are not accepted as numbers."""
    type_: Any = {"b": bool, "f": float}.get(kind, int)
    for _ in range(depth):
        type_ = list[type_]
    return msgspec.json.Decoder(type_)


def _check_sizes(inputs: Mapping[str, Spec], arrays: Mapping[str, np.ndarray]) -> None:
    """Checks that sizes of one name are the same in all inputs."""
    known: dict[str, tuple[int, str]] = {}
    for name, array in arrays.items():
        for want, size in zip(inputs[name].shape, array.shape, strict=True):
            if isinstance(want, str) and known.setdefault(want, (size, name))[0] != size:
                raise Refused(
                    f"the size {want!r} is {known[want][0]} in input {known[want][1]!r} and {size} in {name!r}; send the same."
                )


def encode(model: str, request: Request, results: Mapping[str, np.ndarray]) -> tuple[bytes, dict[str, str]]:
    """Writes a response: JSON, followed by the outputs that the client wants in binary.

    Args:
        model: The model's name.
        request: What `decode` returned.
        results: The arrays by name, C-contiguous; bfloat16 as `Bits`.

    Returns:
        The body and its headers.

    Raises:
        Refused: If an output is not known, or holds a value that JSON cannot represent.
    """
    wanted = request.outputs if request.outputs is not None else [_Wanted(name) for name in results]
    default = request.flag("binary_data_output")
    entries, seen = [], set()
    parts: list[bytes | memoryview] = [b""]
    for output in wanted:
        if output.name not in results or output.name in seen:
            what = "came twice" if output.name in seen else "is unknown"
            raise Refused(f"output {output.name[:40]!r} {what}; the outputs are {', '.join(results)}.")
        seen.add(output.name)
        array = results[output.name]
        dtype = "bfloat16" if isinstance(array, Bits) else array.dtype.name
        entry: dict[str, Any] = {"name": output.name, "datatype": DATATYPES[dtype], "shape": array.shape}
        if output.parameters.get("binary_data", default) is True:
            entry["parameters"] = {"binary_data_size": array.nbytes}
            parts.append(array.data.cast("B") if array.size else b"")
        else:
            entry["data"] = _to_json(output.name, array)
        entries.append(entry)
    answer = {"model_name": model, "model_version": "1", "outputs": entries}
    head = msgspec.json.encode(answer | {"id": request.id} if request.id else answer)
    if len(parts) == 1:
        return head, {"content-type": "application/json"}
    parts[0] = head
    return b"".join(parts), {
        "content-type": "application/octet-stream",
        "inference-header-content-length": str(len(head)),
    }


class Bits(np.ndarray):
    """The bits of bfloat16 values, as uint16."""


def _to_json(name: str, array: np.ndarray) -> list[Any]:
    if isinstance(array, Bits):
        raise Refused(f"output {name!r} is BF16, which JSON cannot carry; ask for it with binary_data.")
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise Refused(f"output {name!r} holds NaN or infinity, which JSON cannot carry; ask for it with binary_data.")
    return array.ravel().tolist()
