"""Reads the weights of an ONNX file without the package onnx; nothing in the file is run.

The formats: https://protobuf.dev/programming-guides/encoding and https://github.com/onnx/onnx/blob/main/onnx/onnx.proto
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from .safetensors_file import AXES_LIMIT, check_name

DTYPES: dict[int, np.dtype[Any]] = {1: np.dtype("<f4"), 10: np.dtype("<f2"), 11: np.dtype("<f8")}
"""The weights' dtypes, by ONNX's numbers."""

DEPTH_LIMIT = 16
"""The deepest nesting of graphs, which are the bodies of conditions and loops."""

_NUMBER, _BYTES = 0, 2  # protobuf's wire types
_FIXED = {1: 8, 5: 4}  # the bytes of two more wire types


def read_onnx(path: str | Path) -> dict[str, np.ndarray]:
    """Reads the weights of an ONNX file: initializers, and the values of Constant nodes, also inside branches.

    Args:
        path: The file.

    Returns:
        float32, float16 and float64 arrays by name. Other types, numbers without axes and empty arrays are left out.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is damaged, holds no weights, or keeps them in another file.

    >>> read_onnx(__file__)
    Traceback (most recent call last):
    ValueError: checkpoint: ... is not an ONNX file, or is damaged (...).
    """
    path = Path(path)
    found: dict[str, np.ndarray] = {}
    data = memoryview(path.read_bytes())
    try:
        for key, value in _fields(data):
            if key == (7, _BYTES):
                for name, array in _graph(value, 1):
                    if name in found:
                        raise ValueError(f"the name {name!a:.60} comes twice")
                    found[name] = array
    except ValueError as error:
        raise ValueError(f"checkpoint: {path} is not an ONNX file, or is damaged ({error}).") from None
    if not found:
        raise ValueError(
            f"checkpoint: {path} holds no weights as initializers or constants; export them with the graph."
        )
    for name in found:
        check_name(name, path)
    return found


def _graph(graph: memoryview, depth: int) -> Iterator[tuple[str, np.ndarray]]:
    """Yields the weights of a GraphProto."""
    if depth > DEPTH_LIMIT:
        raise ValueError(f"it nests more than {DEPTH_LIMIT} graphs")
    for key, value in _fields(graph):
        if key == (5, _BYTES):
            yield from _weight(value)
        elif key == (1, _BYTES):
            yield from _node(value, depth)


def _node(node: memoryview, depth: int) -> Iterator[tuple[str, np.ndarray]]:
    """Yields the value of a NodeProto that is a Constant, with its output's name, and the weights of graphs in it."""
    output = kind = b""
    for key, value in _fields(node):
        if key == (2, _BYTES):
            output = output or bytes(value)
        elif key == (4, _BYTES):
            kind = bytes(value)
    for key, attribute in _fields(node):
        if key != (5, _BYTES):
            continue
        for key, value in _fields(attribute):
            if key == (5, _BYTES) and kind == b"Constant":
                yield from _weight(value, output)
            elif key == (6, _BYTES):
                yield from _graph(value, depth + 1)


def _weight(tensor: memoryview, output: bytes = b"") -> Iterator[tuple[str, np.ndarray]]:
    """Yields the name and the values of a TensorProto, if it is a weight."""
    name, kind, data = output, 0, memoryview(b"")
    shape: list[int] = []
    for key, value in _fields(tensor):
        if key == (1, _NUMBER):
            shape.append(value)
        elif key == (1, _BYTES):
            shape += _numbers(value)
        elif key == (2, _NUMBER):
            kind = value
        elif key == (8, _BYTES):
            name = output or bytes(value)
        elif key == (9, _BYTES):
            data = value
    dtype = DTYPES.get(kind)
    if dtype is None or not shape or 0 in shape:
        return
    text = name.decode()
    if len(shape) > AXES_LIMIT:
        raise ValueError(f"{text!a:.60} has {len(shape)} axes")
    if len(data) != (wanted := math.prod(shape) * dtype.itemsize):
        size = wanted if wanted < 1 << 64 else "more than 2^64"
        raise ValueError(f"{text!a:.60} has {len(data)} bytes of raw data, where its shape asks for {size}")
    yield text, np.frombuffer(data, dtype).astype(dtype.newbyteorder("=")).reshape(shape)


def _fields(data: memoryview) -> Iterator[tuple[tuple[int, int], Any]]:
    """Yields a message's fields: the number and wire type, and the value, an int or bytes."""
    at = 0
    while at < len(data):
        tag, at = _number(data, at)
        kind = tag & 7
        if kind == _NUMBER:
            value, at = _number(data, at)
            yield (tag >> 3, kind), value
            continue
        if kind == _BYTES:
            size, at = _number(data, at)
        elif kind in _FIXED:
            size = _FIXED[kind]
        else:
            raise ValueError(f"byte {at} begins no field")
        if size > len(data) - at:
            raise ValueError(f"a field of {size} bytes has {len(data) - at}")
        yield (tag >> 3, kind), data[at : at + size]
        at += size


def _numbers(data: memoryview) -> list[int]:
    """Returns the numbers of a packed field."""
    found, at = [], 0
    while at < len(data):
        number, at = _number(data, at)
        found.append(number)
    return found


def _number(data: memoryview, at: int) -> tuple[int, int]:
    """Reads a number that is stored with seven bits per byte; returns it, and the position of its end."""
    number = 0
    for i, byte in enumerate(data[at : at + 10]):
        number |= (byte & 127) << 7 * i
        if byte < 128:
            return number, at + i + 1
    raise ValueError("a number has no end")
