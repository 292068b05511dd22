"""Ragged batches: signals of different length in one tensor, each computed as if it were alone."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from max.dtype import DType
from max.graph import DeviceRef, Dim, TensorType, TensorValue, ops

from .geometry import Geometry, TransposedGeometry
from .graph import custom_op
from .lines import WHOLE, Line, Window

QUAD = 4
"""Outputs that Winograd's kernel computes together."""


def ragged_window(
    geometry: Geometry | TransposedGeometry, line: Line = WHOLE
) -> tuple[Window, int, Geometry | TransposedGeometry]:
    """Returns the window of a layer, how many more rows it has than its input, and the geometry to read it with.

    If the padding is zeros, zeros follow the signal's end: they are the padding. Other padding is written into the window.
    """
    if isinstance(geometry, TransposedGeometry):
        return Window(line, 0, 0), 0, geometry
    if geometry.padding_mode == "zeros":
        return Window(line, 0, 0, None, geometry), 0, geometry
    # More rows, as many as a quad reads after its last output: they, too, must hold the values that a signal alone has.
    spare = QUAD * geometry.stride * geometry.dilation + geometry.reach
    emitted = replace(geometry, left=0, right=-spare, padding_mode="zeros")
    return Window(line, geometry.left, 0, None, geometry), geometry.left + geometry.right + spare, emitted


def ragged_input(
    x: TensorValue,
    lengths: TensorValue,
    geometry: Geometry | TransposedGeometry,
    layout: str,
    line: Line = WHOLE,
) -> tuple[TensorValue, Geometry | TransposedGeometry]:
    """Returns the layer's input in which each signal is padded at its own end, and the geometry to read it with.

    Args:
        x: (N, L, C) or (N, C, L).
        lengths: (N,) int64: the positions of each signal, in the network's input.
        geometry: The layer's.
        layout: "NLC" or "NCL".
        line: How the lengths here follow from the lengths in the network's input.
    """
    window, more, emitted = ragged_window(geometry, line)
    return laid_out(x, lengths, window, x.shape[layout.index("L")] + more, layout), emitted


def inside(x: TensorValue, lengths: TensorValue, axis: int, line: Line = WHOLE) -> TensorValue:
    """Returns a value of any shape with zeros after each signal's own positions, which are along an axis."""
    shape: list[Any] = list(x.shape)
    before, after = (_product(sizes) for sizes in (shape[1:axis], shape[axis + 1 :]))
    if before == 1:
        flat, layout = [shape[0], shape[axis], after], "NLC"
    elif after == 1:
        flat, layout = [shape[0], before, shape[axis]], "NCL"
    else:
        raise ValueError("conv1d: the positions of a ragged value must be its first axis after the batch, or its last.")
    own = laid_out(ops.reshape(x, flat), lengths, Window(line, 0, 0), shape[axis], layout)
    return ops.reshape(own, shape)


def laid_out(x: TensorValue, lengths: TensorValue, window: Window, size: Dim, layout: str) -> TensorValue:
    """Emits the operation that writes `size` rows of every signal's window."""
    plan = ops.constant(np.array(window.numbers(0), np.int64), DType.int64, device=DeviceRef.CPU())
    shape = [size if axis == "L" else x.shape[i] for i, axis in enumerate(layout)]
    result = TensorType(x.dtype, shape, x.device)
    return custom_op("max_conv.ragged_window", x.device, [x, lengths, plan], [result], {"layout": layout})[0]


def _product(sizes: Sequence[Any]) -> int:
    return int(np.prod([int(size) for size in sizes], dtype=int))
