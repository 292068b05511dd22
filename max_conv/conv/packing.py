"""Packing: puts filters into the order in which the kernels read them, once, when a model is compiled.

`max_conv.compile` has the weights' values, so it packs the filters of the layers in a `PackedGraph`: there the
operation's filter is a separate weight, made from the documented one. In any other graph the kernels use the filter as
it is.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from max.driver import CPU, Buffer
from max.dtype import DType
from max.graph import Graph, TensorValue, Weight

from .accelerators import filter_order
from .dispatch import PACKED, PANEL, PANELS, Layer, quad_products, tap_groups
from .graph import derived, in_graph, packed_graph
from .layouts import by_group, permute

DEPTH = 32
"""Inputs of a step of "amx"; also in `kernels/amx.mojo`."""
LINE = 64
"""Bytes of a cache line. Vectors across two lines load half as fast."""

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
"""The values of a group of taps at Winograd's points, by the group's size; `filter_points` in `kernels/points.mojo`."""

LIMIT = {"float32": 2.0**54, "float64": 2.0**500}
"""Winograd's transforms are used only for values below this, by dtype; also `limit` in `kernels/careful.mojo`."""


@dataclass(frozen=True)
class Packing:
    """How a packed filter is made from the weight `source`."""

    source: str
    kernel: str
    layer: Layer
    filter_layout: str

    @property
    def name(self) -> str:
        """The packed weight's name; equal packings of one weight have the same name."""
        geometry = self.layer.transposed or self.layer.geometry
        kind = "t" if self.layer.transposed else ""
        step = f"{kind}s{geometry.stride}d{geometry.dilation}g{self.layer.groups}"
        return f"{self.source}.{self.kernel}.{self.filter_layout}.{step}"

    @property
    def order(self) -> str:
        """The axes of a filter that is not in panels."""
        return filter_order(self.kernel) or "SCF"

    @property
    def matrix(self) -> np.ndarray:
        """The factor of each tap in each of Winograd's products: (products, K)."""
        taps = self.layer.geometry.kernel_size
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
        """The packed shape: panels of 32 filters, of all groups; taps or products; channels and filters. Else `order`.

        "paired" has an even number of channels, "amx" enough inputs (channels of all taps) to fill its steps, and the
        two of a pair are adjacent.
        """
        layer = self.layer
        taps = layer.geometry.kernel_size
        if self.kernel not in PANELS:
            sizes = {"S": taps, "C": layer.group_channels, "F": layer.groups * layer.filters}
            first, second, third = (sizes[axis] for axis in self.order)
            return first, second, third
        panels = -(-layer.columns // PANEL)
        rows = quad_products(layer.geometry) if self.kernel == "winograd" else taps
        channels = layer.group_channels
        if self.kernel == "paired":
            channels += channels % 2
        elif self.kernel == "amx":
            rows, channels = 1, rounded_up(taps * self.tap_rows, DEPTH)
        return layer.groups * panels, rows, channels * PANEL

    @property
    def tap_rows(self) -> int:
        """Inputs of a tap for "amx": with a dilation, channels are filled up to whole steps."""
        channels = self.layer.group_channels
        return channels if self.layer.geometry.dilation == 1 else rounded_up(channels, DEPTH)

    def __call__(self, filter: np.ndarray) -> np.ndarray:
        """Packs a filter; the result starts on a cache line."""
        layer = self.layer
        taps = self.phased(filter) if layer.transposed else permute(filter, self.filter_layout, "SCF")
        room = aligned(self.shape, filter.dtype)
        if self.kernel not in PANELS:
            room[...] = permute(taps, "SCF", self.order)
            return room
        taps = taps.reshape(*taps.shape[:2], layer.groups, layer.columns)
        room[...] = 0
        if self.kernel == "amx":  # channels of all taps, one after the other
            filled = self.tap_rows - layer.group_channels
            taps = np.pad(taps, ((0, 0), (0, filled), (0, 0), (0, 0))).reshape(1, -1, *taps.shape[2:])
        rows, channels = self.shape[1], self.shape[2] // PANEL
        panels = room.reshape(layer.groups, -1, rows, channels, PANEL)
        for panel in range(panels.shape[1]):
            part = taps[..., panel * PANEL : (panel + 1) * PANEL].transpose(2, 0, 1, 3)
            target = panels[:, panel, :, : part.shape[2], : part.shape[-1]]
            if self.kernel == "winograd":
                self.multiply(part, target)
            else:
                target[...] = part
        if self.kernel in ("paired", "amx"):
            pairs = room.reshape(-1, 2, PANEL)
            room[...] = pairs.swapaxes(1, 2).reshape(room.shape)
        return room

    def multiply(self, taps: np.ndarray, products: np.ndarray) -> None:
        """Computes Winograd's products, (groups, products, C, F), from taps, (groups, K, C, F).

        If the data is unfit for the transforms (not finite, or too large), the kernel recovers the taps from the
        products (`restore_taps` in `kernels/careful.mojo`). If a group of taps is unfit itself, its last products are
        the taps and its first ones NaN.
        """
        groups = tap_groups(self.layer.geometry)
        parts, size = len(groups), taps.shape[1]
        threes = sum(len(group) == 3 for group in groups)
        one, minus_one = products[:, parts : parts + threes], products[:, 2 * parts : 2 * parts + threes]
        middle = taps[:, [group[1] for group in groups[:threes]]]
        with np.errstate(over="ignore", invalid="ignore"):
            products[...] = np.moveaxis(np.tensordot(self.matrix, taps.astype(np.float64), (1, 1)), 0, 1)
            # The middle tap is recovered from the sum of these two, which must not lose it: 0 times infinity is NaN.
            lost = (one + minus_one == 0) & (middle != 0)
        one[lost] = np.nextafter(one[lost], np.copysign(np.inf, middle[lost]), dtype=taps.dtype)
        limit = LIMIT[taps.dtype.name]
        for given, made in zip(taps, products, strict=True):
            if not (-limit < given.min() and given.max() < limit):
                made[:parts] = np.nan
                made[-size:] = given

    def phased(self, filter: np.ndarray) -> np.ndarray:
        """Returns a transposed convolution's filter as an SCF filter whose filters are the phases of the original ones.

        The order of the filters: the first group's first phase, its second phase, and so on; for "depthwise" the first
        phase of all channels comes first. `Transposed.scf` in `kernels/transposed.mojo` does the same.
        """
        layer, geometry = self.layer, self.layer.transposed
        assert geometry is not None
        taps, step, phases = layer.geometry.kernel_size, geometry.step, geometry.phases
        given = by_group(filter, self.filter_layout, layer.groups)
        lanes = layer.columns // phases if self.kernel in PANELS else layer.group_filters
        room = np.zeros((taps, layer.group_channels, layer.groups, phases, lanes), filter.dtype)
        for k in range(geometry.kernel_size):
            room[taps - 1 - k // step, :, :, k % step, : layer.group_filters] = given[k].swapaxes(0, 1)
        if self.kernel == "depthwise":
            room = room.swapaxes(2, 3)
        return room.reshape(taps, layer.group_channels, -1)


def held(filter: TensorValue) -> bool:
    """Returns whether `compile` has a filter's values and can pack them: a weight in a PackedGraph."""
    return packed_graph() is not None and isinstance(filter, Weight) and filter.shard_idx is None


def packable(dtype: DType, kernel: str = "") -> bool:
    """Returns whether filters of a dtype can be packed: float32, float64, and bfloat16 for the kernels of pairs."""
    if kernel in ("paired", "amx"):
        return dtype == DType.bfloat16
    return dtype.name in PACKED


def filter_operand(filter: TensorValue, filter_layout: str, layer: Layer, kernel: str) -> tuple[TensorValue, str]:
    """Returns the filter as the kernel reads it, packed if `compile` can do that, and the name of its layout."""
    if filter.device.is_cpu():
        order = "SCF" if kernel == "depthwise" or (layer.layout == "NLC" and kernel != "lengthwise") else ""
        packs = packable(filter.dtype, kernel)
    else:
        order, packs = filter_order(kernel), kernel != "each"
    permuted = order not in ("", filter_layout) and not layer.transposed
    if held(filter) and packs and (kernel in PANELS or permuted or layer.transposed):
        assert isinstance(filter, Weight)
        return _packed(filter, filter_layout, layer, kernel)
    filter = in_graph(filter)
    return (permute(filter, filter_layout, order), order) if permuted else (filter, filter_layout)


def _packed(filter: Weight, filter_layout: str, layer: Layer, kernel: str) -> tuple[TensorValue, str]:
    packing = Packing(filter.name, kernel, layer, filter_layout)

    def make(buffer: Buffer) -> Buffer:
        bits = buffer.to(CPU())
        if buffer.dtype == DType.bfloat16:
            bits = bits.view(DType.uint16, buffer.shape)
        return Buffer.from_numpy(packing(bits.to_numpy())).view(buffer.dtype, packing.shape)

    weight = derived(Weight(packing.name, filter.dtype, packing.shape, filter.device), (filter,), make)
    assert weight is not None, "the graph is a PackedGraph"
    layout = "packed"
    if kernel not in PANELS:
        layout = {"SCF": "phased", "FSC": "phased FSC"}[packing.order] if layer.transposed else packing.order
    return Graph.current.add_weight(weight), layout


def rounded_up(count: int, unit: int) -> int:
    """Returns the least multiple of a number that is not less than `count`."""
    return -(-count // unit) * unit


def aligned(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Returns an uninitialised array that starts on a cache line."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    room = np.empty(size + LINE, np.uint8)
    start = -room.ctypes.data % LINE
    return room[start : start + size].view(dtype).reshape(shape)
