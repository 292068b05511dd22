"""Reads DLPack capsules: MAX accepts their memory, but not their strides."""

import ctypes
import math
from typing import Any

import numpy as np

HOST = (1, 3, 11, 13)
"""Kinds of memory that the CPU can read: its own, and CUDA's and ROCm's pinned and managed memory."""

KINDS = {0: "int", 1: "uint", 2: "float", 4: "bfloat", 5: "complex", 6: "bool"}
"""DLPack's codes of dtypes; the codes of small floats are in `SMALL`."""

SMALL = {7: "float8_e3m4", 8: "float8_e4m3", 10: "float8_e4m3fn", 11: "float8_e4m3fnuz", 12: "float8_e5m2", 13: "float8_e5m2fnuz", 14: "float8_e8m0fnu"}  # fmt: skip


class _Tensor(ctypes.Structure):
    """DLTensor of dlpack.h."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


BEFORE = {b"dltensor": 0, b"dltensor_versioned": 32}
"""Capsule names, and the tensor's offset in the struct: a version, two pointers and flags may come before it."""

_name = ctypes.pythonapi.PyCapsule_GetName
_name.argtypes, _name.restype = (ctypes.py_object,), ctypes.c_char_p
_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_pointer.argtypes, _pointer.restype = (ctypes.py_object, ctypes.c_char_p), ctypes.c_void_p


def dense(value: Any) -> tuple[np.ndarray, str] | None:
    """Copies the values of an object with `__dlpack__` on the CPU, according to its strides.

    Returns:
        The bits in row-major order, as unsigned ints, and the name of their dtype; None for a contiguous array on a
        device.

    Raises:
        TypeError: If its dtype is not a real one, or it has strides on a device.

    >>> bits, dtype = dense(np.arange(3, dtype=np.float32)[::-1])
    >>> bits.view(np.float32).tolist(), dtype
    ([2.0, 1.0, 0.0], 'float32')
    """
    capsule = value.__dlpack__()  # its memory is valid as long as this name refers to it
    name = _name(capsule)
    if name not in BEFORE:
        raise TypeError(f"its capsule is named {name!r}")
    tensor = _Tensor.from_address(_pointer(capsule, name) + BEFORE[name])
    dtype = _dtype(tensor)
    shape = tuple(tensor.shape[: tensor.ndim])
    packed = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    strides = tensor.strides[: tensor.ndim] if tensor.strides else packed
    width = tensor.bits // 8
    if tensor.device_type not in HOST:
        if tensor.byte_offset or any(s != p and n > 1 for s, p, n in zip(strides, packed, shape, strict=True)):
            raise TypeError("it has strides, on a device; make it contiguous first")
        return None
    if 0 in shape:
        return np.empty(shape, f"u{width}"), dtype
    reach = [(size - 1) * stride * width for size, stride in zip(shape, strides, strict=True)]
    below, above = sum(min(end, 0) for end in reach), sum(max(end, 0) for end in reach)
    memory = (ctypes.c_char * (above - below + width)).from_address(tensor.data + tensor.byte_offset + below)
    view: np.ndarray = np.ndarray(shape, f"u{width}", memory, -below, [stride * width for stride in strides])
    return view.copy(order="C"), dtype


def _dtype(tensor: _Tensor) -> str:
    """Returns the name that MAX and PyTorch give to a capsule's dtype."""
    kind = KINDS.get(tensor.code)
    name = SMALL.get(tensor.code, f"{kind}{tensor.bits}" if kind else f"the dtype {tensor.code} of {tensor.bits} bits")
    if tensor.lanes != 1 or tensor.bits not in (8, 16, 32, 64) or kind == "complex" or name.startswith("the "):
        raise TypeError(f"it holds {name}{f' in vectors of {tensor.lanes}' if tensor.lanes != 1 else ''}")
    return "bool" if kind == "bool" else name


def reason(error: Exception) -> str:
    """Returns the message of another library's error, in one line and without a full stop."""
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__
