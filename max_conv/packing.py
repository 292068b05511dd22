"""Filters in the order in which kernels read them, made once when a model is compiled.

`max_conv.compile` holds the weights, so it packs the filters of the layers in a `PackedGraph`: there `conv1d` takes a
weight of its own, made of the documented one. In any other graph kernels take the filter as it is.
"""

import platform
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
from max.driver import CPU, Buffer
from max.dtype import DType
from max.graph import DeviceRef, Graph, TensorValue, Weight

from .dispatch import PANEL, PANELS, Layer, quad_products, tap_groups
from .layouts import by_group, permute

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
        geometry = self.layer.transposed or self.layer.geometry
        kind = "t" if self.layer.transposed else ""
        step = f"{kind}s{geometry.stride}d{geometry.dilation}g{self.layer.groups}"
        return f"{self.source}.{self.kernel}.{self.filter_layout}.{step}"

    @property
    def matrix(self) -> np.ndarray:
        """What Winograd's products take of each tap: (products, K)."""
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
        """Groups and panels of 32 filters, taps or products, channels and filters; for other kernels SCF.

        "paired" has an even number of channels, and the two of a pair side by side.
        """
        layer = self.layer
        taps = layer.geometry.kernel_size
        if self.kernel not in PANELS:
            return taps, layer.group_channels, layer.groups * layer.filters
        panels = -(-layer.columns // PANEL)
        rows = quad_products(layer.geometry) if self.kernel == "winograd" else taps
        channels = layer.group_channels + (self.kernel == "paired" and layer.group_channels % 2)
        return layer.groups * panels, rows, channels * PANEL

    def __call__(self, filter: np.ndarray) -> np.ndarray:
        """Packs a filter, at the start of a cache line."""
        layer = self.layer
        taps = self.phased(filter) if layer.transposed else permute(filter, self.filter_layout, "SCF")
        room = aligned(self.shape, filter.dtype)
        if self.kernel not in PANELS:
            room[...] = taps
            return room
        taps = taps.reshape(*taps.shape[:2], layer.groups, layer.columns)
        room[...] = 0
        rows, channels = self.shape[1], self.shape[2] // PANEL
        panels = room.reshape(layer.groups, -1, rows, channels, PANEL)
        matrix = self.matrix if self.kernel == "winograd" else None
        for panel in range(panels.shape[1]):
            part = taps[..., panel * PANEL : (panel + 1) * PANEL]
            if matrix is not None:
                part = np.tensordot(matrix, part.astype(np.float64), 1)
            panels[:, panel, :, : layer.group_channels, : part.shape[-1]] = part.transpose(2, 0, 1, 3)
        if self.kernel == "paired":
            pairs = room.reshape(-1, 2, PANEL)
            room[...] = pairs.swapaxes(1, 2).reshape(room.shape)
        return room

    def phased(self, filter: np.ndarray) -> np.ndarray:
        """Returns a transposed convolution's filter as SCF of the convolution that its phases are filters of.

        Filters are those of the first group's first phase, of its second, and so on; for "depthwise" those of all
        channels' first phase come first. `Transposed.scf` in `kernels/transposed.mojo` is its twin.
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


@dataclass(frozen=True)
class Derived:
    """A weight that `compile` makes of others, by name and in this order: packed filters, and folded ones before them."""

    weight: Weight
    sources: tuple[Weight, ...]
    make: Callable[..., Buffer]


@dataclass(frozen=True)
class Emitted:
    """A layer that a kernel of this package computes in a graph.

    Attributes:
        name: The weight that holds its filter, "computed" where none does.
        layer: A convolution's; None for an LSTM.
        kernel: The convolution's kernel.
        outputs: The convolution's output length, where it is known.
        units: An LSTM's.
    """

    name: str
    layer: Layer | None = None
    kernel: str = ""
    outputs: int | None = None
    units: int = 0


class PackedGraph(Graph):
    """A graph whose layers take weights made of their own, which `max_conv.compile` makes once.

    A `Graph` in every other way. A plain MAX session takes one with the weights that `max_conv.registry` returns.

    Attributes:
        derived: The weights to make, by name.
        emitted: The layers of this package's operations, in order.
    """

    derived: dict[str, Derived]
    emitted: list[tuple[Emitted, ...]]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.derived = {}
        self.emitted = []
        super().__init__(*args, **kwargs)

    def __enter__(self) -> "PackedGraph":
        super().__enter__()
        return self


def packed_graph() -> PackedGraph | None:
    """Returns the current graph, if there is one and it takes weights made of others."""
    try:
        graph = Graph.current
    except LookupError:
        return None
    return graph if isinstance(graph, PackedGraph) else None


def record(*layers: Emitted) -> None:
    """Tells the current graph which layers its next operation computes."""
    if graph := packed_graph():
        graph.emitted.append(layers)


def weight_name(filter: TensorValue) -> str:
    """Returns the name of the weight that a filter is, "computed" where it is none."""
    return filter.name if isinstance(filter, Weight) else "computed"


def derived(weight: Weight, sources: tuple[Weight, ...], make: Callable[..., Buffer]) -> Weight | None:
    """Returns a weight that `compile` will make of others, or None where nobody will."""
    graph = packed_graph()
    # A graph takes a single weight of a name.
    return graph.derived.setdefault(weight.name, Derived(weight, sources, make)).weight if graph else None


def packable(filter: Any, kernel: str | None = None) -> TypeGuard[Weight]:
    """Tells whether a filter can be packed, for a kernel: a weight on the CPU that `compile` holds."""
    if packed_graph() is None or not isinstance(filter, Weight) or filter.shard_idx is not None:
        return False
    if kernel == "paired":
        fits = filter.dtype == DType.bfloat16 and "avx512_bf16" in cpu_features()
    else:
        fits = filter.dtype in (DType.float32, DType.float64)  # those of their sums
    return filter.device.is_cpu() and fits


def packed(filter: Weight, kernel: str, layer: Layer, filter_layout: str) -> tuple[TensorValue, str]:
    """Returns the packed filter of a layer in the current graph, and the name of its layout."""
    packing = Packing(filter.name, kernel, layer, filter_layout)

    def make(buffer: Buffer) -> Buffer:
        bits = buffer.to(CPU())
        if buffer.dtype == DType.bfloat16:
            bits = bits.view(DType.uint16, buffer.shape)
        return Buffer.from_numpy(packing(bits.to_numpy())).view(buffer.dtype, packing.shape)

    weight = derived(Weight(packing.name, filter.dtype, packing.shape, DeviceRef.CPU()), (filter,), make)
    assert weight is not None, "asked for by packable"
    layout = "packed" if kernel in PANELS else "phased" if layer.transposed else "SCF"
    return Graph.current.add_weight(weight), layout


@cache
def cpu_features() -> frozenset[str]:
    """Returns the CPU's instruction set extensions, the names that compiled code may depend on."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return frozenset([platform.processor() or platform.machine()])
    line = re.search(r"^(?:flags|Features)\s*:(.*)$", text, re.MULTILINE)
    kinds = r"(avx|sse|ssse|fma|f16c|bmi|amx|aes|vaes|vpclmul|gfni|sha|adx|movbe|popcnt|abm|asimd|sve|bf16|i8mm|fphp)"
    return frozenset(flag for flag in line.group(1).split() if re.match(kinds, flag)) if line else frozenset()


def aligned(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Returns an array that is not filled, at the start of a cache line."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    room = np.empty(size + LINE, np.uint8)
    start = -room.ctypes.data % LINE
    return room[start : start + size].view(dtype).reshape(shape)
