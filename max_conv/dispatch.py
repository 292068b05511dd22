"""Which CPU kernel a layer gets, and why. The measurements behind the gates stand in ARCHITECTURE.md."""

from dataclasses import dataclass
from math import ceil, gcd

from .geometry import Geometry
from .layouts import Layout

LEAST_OUTPUTS = 256
"""Outputs of all batch items together from which a transformed filter is worth making; see `winograd`."""


@dataclass(frozen=True)
class Layer:
    """What is known of a layer when the graph is built."""

    geometry: Geometry
    layout: Layout
    group_channels: int
    group_filters: int
    groups: int
    dtype: str = "float32"


@dataclass(frozen=True)
class Choice:
    """A kernel's name and the reason for it."""

    kernel: str
    why: str


def choose(layer: Layer) -> Choice:
    """Returns the kernel for a layer; `winograd` gives way to the next one that fits on short inputs.

    >>> choose(Layer(Geometry.of(3, padding=1), "NLC", 80, 384, 1)).kernel
    'winograd'
    """
    return paired(layer) or winograd(layer) or direct(layer)


def paired(layer: Layer) -> Choice | None:
    """Returns the choice of the kernel for pairs of bfloat16 values, which other processors replace by `direct`."""
    if layer.dtype != "bfloat16" or layer.group_channels < 8 or layer.group_filters < 16 or layer.groups > 16:
        return None
    # NCL data is turned with all rows between the first tap and the last.
    if layer.layout == "NCL" and layer.geometry.reach * layer.group_channels > 128 * 1024:
        return None
    return Choice("paired", "bfloat16 dot products of pairs, where the processor has AVX512_BF16")


def winograd(layer: Layer) -> Choice | None:
    """Returns the choice of Winograd's kernel where it pays."""
    products = quad_products(layer.geometry)
    direct_products = 4 * layer.geometry.kernel_size
    if layer.groups > 1 or min(layer.group_channels, layer.group_filters) < 32:
        return None  # 16 -> 16 k3: 0.7 times as fast as dense; 32 -> 32: 1.2 times; 33 -> 65 k5: 1.2 times
    if direct_products < 1.25 * products:
        return None  # the transforms take more than is saved
    if products * layer.group_channels > 12288:
        return None  # a panel of the transformed filter would exceed 1.5 MiB
    spacing = layer.geometry.dilation // gcd(layer.geometry.stride, layer.geometry.dilation)
    rows = 4 * spacing * layer.geometry.stride + layer.geometry.reach
    if layer.layout == "NCL" and max(rows, products * spacing) * layer.group_channels > 128 * 1024:
        return None  # NCL data is turned in blocks of whole quads, which would exceed 512 KiB
    return Choice("winograd", f"{products} multiplications for {direct_products} of a direct convolution")


def direct(layer: Layer) -> Choice:
    """Returns the choice among the direct kernels."""
    if layer.layout == "NCL":
        return Choice("lengthwise", "NCL data has its positions side by side")
    if layer.group_channels == layer.group_filters == 1 and layer.groups >= 8:
        return Choice("depthwise", "one channel in and one out a group")
    if layer.group_filters < 8:
        return Choice("lengthwise", "fewer filters than half a vector")
    if layer.geometry.kernel_size * layer.group_channels <= 128:
        return Choice("short", "filters fill the vectors, and one running sum takes all taps and channels")
    return Choice("dense", "filters fill the vectors")


def quad_products(geometry: Geometry) -> int:
    """Returns the multiplications that Winograd's kernel needs for four outputs, one channel and one filter.

    Taps that meet the same phase of the stride are taken in threes, which cost 6; a rest of two costs 5, of one 4.

    >>> quad_products(Geometry.of(11)), quad_products(Geometry.of(3, stride=2))
    (23, 9)
    """
    step = geometry.stride // gcd(geometry.stride, geometry.dilation)
    taps = [ceil((geometry.kernel_size - phase) / step) for phase in range(min(step, geometry.kernel_size))]
    return sum(6 * (count // 3) + (0, 4, 5)[count % 3] for count in taps)
