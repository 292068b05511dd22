"""Arrays of any library as memory for MAX, and back; also bfloat16, which NumPy lacks."""

import sys
from typing import Any

import numpy as np
from max.driver import CPU, Buffer
from max.dtype import DType

from .dlpack import dense, reason

ARRAYS = (np.ndarray, np.generic)


def buffer_of(value: Any, kind: str, name: str) -> Buffer:
    """Returns an array's values as memory for MAX. Every input and every weight goes through this function.

    Args:
        value: A NumPy array, a torch tensor, a `max.driver.Buffer`, or any object with `__dlpack__` (JAX, MLX, CuPy). The
            first three are not copied if they are contiguous and writeable. Strided arrays, and arrays of any other
            library on the CPU, are copied.
        kind: What the value is, for errors: the operation and a noun, such as "model: input".
        name: The name of the value.

    Raises:
        TypeError: If it is not an array, or MAX cannot read it.

    >>> buffer_of(np.arange(6, dtype=np.float32)[::-2], "model: input", "x").to_numpy().tolist()
    [5.0, 3.0, 1.0]
    """
    if type(value) is np.ndarray and value.dtype in _PLAIN and value.flags.carray:
        return Buffer.from_dlpack(value)
    if isinstance(value, Buffer):
        return value if value.is_contiguous else value.contiguous()
    try:
        if isinstance(value, ARRAYS):
            return _of_numpy(value)
        torch = sys.modules.get("torch")  # a tensor exists only if torch has been imported
        if torch is not None and isinstance(value, torch.Tensor):
            return _of_tensor(value, torch)
        if hasattr(value, "__dlpack__"):
            found = dense(value)
            if found is None:  # it is contiguous and not on the CPU
                return Buffer.from_dlpack(value)
            bits, dtype = found
            return Buffer.from_numpy(bits).view(DType[dtype], list(bits.shape))
    except MemoryError:
        raise
    except Exception as error:  # another library may raise anything
        raise TypeError(
            f"{kind} {name!r} cannot be read: {reason(error)}; pass a dense array of a real dtype that MAX has."
        ) from None
    raise TypeError(f"{kind} {name!r} must be an array (NumPy or DLPack), but is a {type(value).__name__}.")


_PLAIN = frozenset(np.dtype(code) for code in ("f4", "f8", "f2", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "?"))
"""NumPy's dtypes, in the machine's byte order, that MAX also has."""


def _of_numpy(value: Any) -> Buffer:
    """Reads an array that is not plain: strided, read-only, byte-swapped, a scalar, a subclass, or of ml_dtypes."""
    if isinstance(value, np.ma.MaskedArray) and np.ma.is_masked(value):
        raise TypeError("it has masked values")
    dtype = value.dtype.newbyteorder("=")
    shape = np.shape(value)
    if dtype in _PLAIN:
        return Buffer.from_numpy(np.array(value, dtype, order="C", subok=False).reshape(shape))
    if dtype.kind not in "Vf" or dtype.fields or dtype.name not in DType.__members__:
        raise TypeError(f"it holds {dtype}")
    bits = np.array(value, order="C", subok=False).reshape(-1).view(f"u{dtype.itemsize}")
    return Buffer.from_numpy(bits).view(DType[dtype.name], list(shape))


def _of_tensor(value: Any, torch: Any) -> Buffer:
    """Reads a tensor of PyTorch, whose negation may be a flag that has not been applied yet."""
    if value.is_meta or value.layout != torch.strided or value.is_quantized or value.is_complex():
        kind = "meta" if value.is_meta else str(value.layout if value.layout != torch.strided else value.dtype)
        raise TypeError(f"it is a {kind.removeprefix('torch.')} tensor")
    return Buffer.from_dlpack(value.detach().resolve_neg().contiguous())


def bytes_of(buffer: Buffer) -> np.ndarray:
    """Returns the bytes of a buffer; on the CPU they share its memory."""
    host = buffer.to(CPU())
    return host.view(DType.uint8, [host.num_elements * host.dtype.size_in_bytes]).to_numpy()


def copy_of(buffer: Buffer) -> Buffer:
    """Returns a copy in the CPU's memory. `Buffer.copy` returns before it has copied, which may be too late."""
    return Buffer.from_numpy(bytes_of(buffer).copy()).view(buffer.dtype, list(buffer.shape))


def as_buffer(values: np.ndarray, dtype: DType) -> Buffer:
    """Returns values rounded to `dtype`."""
    if dtype != DType.bfloat16:
        return Buffer.from_numpy(np.ascontiguousarray(values, dtype.to_numpy()))
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    # Round half to even: add half of the last kept bit, minus one if that bit is zero.
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return Buffer.from_numpy(rounded.astype(np.uint16)).view(DType.bfloat16, list(values.shape))


def as_float64(value: Any, kind: str = "weight", name: str = "weight") -> np.ndarray:
    """Returns the values of anything that `buffer_of` accepts."""
    buffer = buffer_of(value, kind, name).to(CPU())
    if buffer.dtype != DType.bfloat16:
        return buffer.to_numpy().astype(np.float64)
    bits = buffer.view(DType.uint16, buffer.shape).to_numpy()
    return (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
