"""Arrays of values as MAX buffers, and back; also of bfloat16, which NumPy lacks."""

from typing import Any

import numpy as np
from max.driver import CPU, Buffer
from max.dtype import DType


def as_buffer(values: np.ndarray, dtype: DType) -> Buffer:
    """Returns values rounded to `dtype`."""
    if dtype != DType.bfloat16:
        return Buffer.from_numpy(np.ascontiguousarray(values, dtype.to_numpy()))
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    # Round half to even: add half of the last kept bit, less one where that bit is zero.
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return Buffer.from_numpy(rounded.astype(np.uint16)).view(DType.bfloat16, list(values.shape))


def as_float64(value: Any) -> np.ndarray:
    """Returns the values of an array or of anything with DLPack."""
    if isinstance(value, np.ndarray):
        return value.astype(np.float64)
    buffer = (value if isinstance(value, Buffer) else Buffer.from_dlpack(value)).to(CPU())
    if buffer.dtype != DType.bfloat16:
        return buffer.to_numpy().astype(np.float64)
    bits = buffer.view(DType.uint16, buffer.shape).to_numpy()
    return (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
