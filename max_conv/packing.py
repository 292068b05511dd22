"""Filters in the order in which kernels read them, made once when a model is compiled.

`max_conv.compile` holds the weights, so it packs the filters of the layers that it traces: `conv1d` then takes a weight
of its own, beside the documented one, from which it is made. In a plain MAX session kernels take the filter as it is.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import numpy as np
from max.dtype import DType
from max.graph import DeviceRef, Graph, TensorValue, Weight

from .dispatch import Layer, tap_groups
from .layouts import permute

PACK = 32
"""Filters side by side; also in `kernels/lanes.mojo`."""
LINE = 64
"""Bytes of a cache line. Vectors across two lines load half as fast."""
PACKED = {"winograd", "dense", "short"}
"""The kernels that take packed filters."""

POINTS = {
    3: (
        (1, 0, 0),
        (1 / 3, 1 / 3, 1 / 3),
        (-1 / 3, 1 / 3, -1 / 3),
        (0, 0, 1),
        (-16 / 15, -8 / 15, -4 / 15),
        (1 / 15, -2 / 15, 4 / 15),
    ),
    2: ((2, 0), (1, 1), (-1 / 3, 1 / 3), (0, 1), (-8 / 3, -4 / 3)),
    1: ((1,), (1 / 2,), (1 / 2,), (1,)),
}
"""What groups of taps are at Winograd's points, for each size of a group: `filter_points` in `kernels/points.mojo`."""


@dataclass(frozen=True)
class Packing:
    """How a packed filter is made of the weight `source`."""

    source: str
    kernel: str
    layer: Layer
    filter_layout: str

    @property
    def name(self) -> str:
        """The packed weight's name; equal packings of a weight share it."""
        geometry = self.layer.geometry
        step = f"s{geometry.stride}d{geometry.dilation}g{self.layer.groups}"
        return f"{self.source}.{self.kernel}.{self.filter_layout}.{step}"

    @property
    def matrix(self) -> np.ndarray:
        """Rows of a packed filter as sums of taps: (rows, K)."""
        taps = self.layer.geometry.kernel_size
        if self.kernel != "winograd":
            return np.eye(taps)
        groups = tap_groups(self.layer.geometry)
        rows = [
            (group, POINTS[len(group)][point])
            for point in range(len(POINTS[3]))
            for group in groups
            if point < len(POINTS[len(group)])
        ]
        matrix = np.zeros((len(rows), taps))
        for row, (group, factors) in zip(matrix, rows, strict=True):
            row[list(group)] = factors
        return matrix

    @property
    def shape(self) -> tuple[int, int, int]:
        """Groups and panels of 32 filters, rows, channels and filters."""
        panels = -(-self.layer.group_filters // PACK)
        return self.layer.groups * panels, len(self.matrix), self.layer.group_channels * PACK

    def __call__(self, filter: np.ndarray) -> np.ndarray:
        """Packs a filter, at the start of a cache line."""
        layer = self.layer
        taps = permute(filter, self.filter_layout, "SCF")
        taps = taps.reshape(*taps.shape[:2], layer.groups, layer.group_filters)
        panels = -(-layer.group_filters // PACK)
        room = aligned((layer.groups, panels, len(self.matrix), layer.group_channels, PACK), filter.dtype)
        room[...] = 0
        for panel in range(panels):
            part = taps[..., panel * PACK : (panel + 1) * PACK]
            # (rows, C, groups, filters)
            rows = part if self.kernel != "winograd" else np.tensordot(self.matrix, part.astype(np.float64), 1)
            room[:, panel, ..., : part.shape[-1]] = rows.transpose(2, 0, 1, 3)
        return room.reshape(self.shape)


_packings: ContextVar[dict[str, Packing] | None] = ContextVar("packings", default=None)


@contextmanager
def collected() -> Iterator[dict[str, Packing]]:
    """Lets `conv1d` ask for packed filters, and gives what it asked for."""
    packings: dict[str, Packing] = {}
    token = _packings.set(packings)
    try:
        yield packings
    finally:
        _packings.reset(token)


def packs() -> bool:
    """Tells whether someone holds the weights and will pack them."""
    return _packings.get() is not None


def packed(filter: Any, kernel: str, layer: Layer, filter_layout: str) -> TensorValue | None:
    """Returns the packed filter of a layer in the current graph, or None where it is not to be had."""
    packings = _packings.get()
    if packings is None or kernel not in PACKED or not isinstance(filter, Weight) or not filter.device.is_cpu():
        return None
    if filter.dtype not in (DType.float32, DType.float64):
        return None  # sums are in another type than the filter
    packing = Packing(filter.name, kernel, layer, filter_layout)
    packings[packing.name] = packing
    return Graph.current.add_weight(Weight(packing.name, filter.dtype, packing.shape, DeviceRef.CPU()))


def aligned(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Returns an array that is not filled, at the start of a cache line."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    room = np.empty(size + LINE, np.uint8)
    start = -room.ctypes.data % LINE
    return room[start : start + size].view(dtype).reshape(shape)


def with_packed(packings: Mapping[str, Packing], weights: Mapping[str, Any], used: Any, read: Any) -> dict[str, Any]:
    """Returns the weights that a graph uses, with the packed ones. `read` makes an array of a weight."""
    made = {name: packing(read(weights[packing.source])) for name, packing in packings.items()}
    sources = {packing.source for packing in packings.values()}
    kept = {name: value for name, value in weights.items() if name in used or name not in sources}
    return kept | made
