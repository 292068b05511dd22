"""Tensors as bits, of every dtype of a checkpoint; their values, and values rounded to a dtype."""

import sys
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..conv.dlpack import dense, reason

DTYPES = {
    "F64": ("float64", 8),
    "F32": ("float32", 4),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "F8_E4M3": ("float8_e4m3fn", 1),
    "F8_E5M2": ("float8_e5m2", 1),
    "F8_E4M3FNUZ": ("float8_e4m3fnuz", 1),
    "F8_E5M2FNUZ": ("float8_e5m2fnuz", 1),
    "F8_E8M0": ("float8_e8m0fnu", 1),
    "C64": ("complex64", 8),
    "I64": ("int64", 8),
    "I32": ("int32", 4),
    "I16": ("int16", 2),
    "I8": ("int8", 1),
    "U64": ("uint64", 8),
    "U32": ("uint32", 4),
    "U16": ("uint16", 2),
    "U8": ("uint8", 1),
    "BOOL": ("bool", 1),
}
"""safetensors' names of dtypes: PyTorch's name, and the width in bytes."""

CODES = {name: code for code, (name, _) in DTYPES.items()}
"""PyTorch's and NumPy's names of dtypes: safetensors' name."""

FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
"""The dtypes whose values can be read."""

ROUNDED = ("F64", "F32", "F16", "BF16")
"""The dtypes that values can be rounded to."""

_EXACT = {"F64": np.float64, "F32": np.float32, "F16": np.float16}


@dataclass(frozen=True)
class Tensor:
    """A tensor's bits: safetensors' name of its dtype, and an array of unsigned ints as wide as the dtype.

    Bits are moved, not values: so conversion is lossless, also for dtypes that NumPy does not have.
    """

    dtype: str
    bits: np.ndarray


def width(dtype: str) -> int:
    """Returns the bytes of one value.

    >>> width("BF16")
    2
    """
    return DTYPES[dtype][1]


def of_array(array: np.ndarray) -> Tensor:
    """Returns an array as bits.

    Args:
        array: Any shape; a dtype of NumPy, or one with PyTorch's name, such as the bfloat16 of ml_dtypes.

    Raises:
        TypeError: If checkpoints have no such dtype.

    >>> of_array(np.ones(2, np.float16)).bits.tolist()
    [15360, 15360]
    """
    code = CODES.get(array.dtype.name)
    if code is None:
        raise TypeError(f"tensors: checkpoints hold no arrays of {array.dtype}; cast it to float32.")
    shape = array.shape
    native = np.ascontiguousarray(array.astype(array.dtype.newbyteorder("="), copy=False))
    return Tensor(code, native.view(f"u{width(code)}").reshape(shape))


def of_value(value: Any, name: str) -> Tensor:
    """Returns an array of any producer as bits: NumPy, a torch tensor, or any object with `__dlpack__` on the CPU.

    Args:
        value: Any strides and any dtype of a checkpoint, bfloat16 also.
        name: The tensor's name, for errors.

    Raises:
        TypeError: If it is not an array, or not a dense one on the CPU of such a dtype.

    >>> of_value(np.arange(4, dtype=np.int8)[::-2], "a").bits.tolist()
    [3, 1]
    """
    try:
        if isinstance(value, np.ndarray | np.generic):
            return of_array(np.asarray(value))
        torch = sys.modules.get("torch")  # a tensor exists only if torch has been imported
        if torch is not None and isinstance(value, torch.Tensor):
            value = value.detach().cpu().resolve_neg().contiguous()
        if hasattr(value, "__dlpack__"):
            found = dense(value)
            if found is None:
                raise TypeError("it is not on the CPU")
            bits, dtype = found
            if dtype not in CODES:
                raise TypeError(f"it holds {dtype}")
            return Tensor(CODES[dtype], bits)
    except MemoryError:
        raise
    except Exception as error:  # a foreign producer may raise anything
        why = reason(error).removeprefix("tensors: ")
        raise TypeError(f"tensors: the tensor {name!r} cannot be read: {why}; pass a dense array.") from None
    raise TypeError(
        f"tensors: the tensor {name!r} must be an array (NumPy or DLPack), but is a {type(value).__name__}."
    )


def as_array(tensor: Tensor) -> np.ndarray:
    """Returns a tensor as an array that NumPy can compute with: float16, bfloat16 and 8-bit floats become float32.

    Raises:
        ValueError: If NumPy cannot represent the dtype's values.

    >>> as_array(Tensor("BF16", np.array([0x3FC0], np.uint16))).tolist()
    [1.5]
    """
    if tensor.dtype in FLOATS and tensor.dtype not in ("F64", "F32"):
        return values(tensor).astype(np.float32)
    name = DTYPES[tensor.dtype][0]
    if name.startswith("float8"):  # with ml_dtypes imported NumPy has some of these, but cannot compute with them
        raise ValueError(f"tensors: NumPy has no {name}; leave such tensors out.")
    return tensor.bits.view(name)


def values(tensor: Tensor) -> np.ndarray:
    """Returns a floating tensor's values in float64, which represents all of them exactly.

    >>> values(Tensor("F8_E4M3", np.array([0x38, 0x7F], np.uint8))).tolist()
    [1.0, nan]
    """
    bits = tensor.bits
    with np.errstate(invalid="ignore"):  # signalling NaNs
        match tensor.dtype:
            case "BF16":
                return (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
            case "F8_E5M2":
                return (bits.astype(np.uint16) << 8).view(np.float16).astype(np.float64)
            case "F8_E4M3":
                return _E4M3[bits]
            case _:
                return bits.view(_EXACT[tensor.dtype]).astype(np.float64)


def rounded(array: np.ndarray, dtype: str) -> Tensor:
    """Rounds float64 values to a dtype, once, to nearest, ties to even.

    Args:
        array: float64, any shape.
        dtype: "F64", "F32", "F16" or "BF16".

    Raises:
        OverflowError: If a finite value is too large for the dtype.
        ValueError: If values cannot be rounded to the dtype.

    >>> rounded(np.array([1.0, 1.00390625]), "BF16").bits.tolist() == [0x3F80, 0x3F80]
    True
    """
    if dtype not in ROUNDED:
        raise ValueError(f"tensors: nothing is rounded to {DTYPES[dtype][0]}; choose float64, 32, 16 or bfloat16.")
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        tensor = Tensor("BF16", _bfloat16(array)) if dtype == "BF16" else of_array(array.astype(_EXACT[dtype]))
    if not np.array_equal(np.isfinite(values(tensor)), np.isfinite(array)):
        worst = np.abs(array[np.isfinite(array)]).max()
        raise OverflowError(f"{worst:.6g} is too large for {DTYPES[dtype][0]}")
    return tensor


def _bfloat16(array: np.ndarray) -> np.ndarray:
    """Rounds to float32 first, to odd if inexact, so that the second rounding knows the direction of the first."""
    single = array.astype(np.float32)
    bits = single.view(np.uint32).copy()
    wide = single.astype(np.float64)
    inexact = (wide != array) & ~np.isnan(array) & (bits & 1 == 0)
    bits += (inexact & (np.abs(wide) < np.abs(array))).astype(np.uint32)
    bits -= (inexact & (np.abs(wide) > np.abs(array))).astype(np.uint32)
    halves = ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype(np.uint16)
    # A NaN's payload may be only in the bits that are cut off: the NaN must not become an infinity.
    return np.where(np.isnan(array), (bits >> 16).astype(np.uint16) | np.uint16(0x40), halves)


def _e4m3() -> np.ndarray:
    bits = np.arange(256)
    exponent, fraction = (bits >> 3) & 15, (bits & 7) / 8
    magnitude = np.where(exponent == 0, fraction * 2.0**-6, (1 + fraction) * 2.0 ** (exponent - 7))
    magnitude[bits & 0x7F == 0x7F] = np.nan
    return np.where(bits & 0x80, -magnitude, magnitude)


_E4M3 = _e4m3()
