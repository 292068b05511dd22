"""Which CPU kernel a layer gets, and why. MEASUREMENTS.md has the numbers for every limit."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from math import gcd

from . import tuned
from .geometry import PADDING_MODES, Geometry, TransposedGeometry
from .layouts import Layout
from .processor import has_pairs, has_tiles

LEAST_OUTPUTS = 256
"""From so many outputs on, all batch items together, it pays to transform the filter on every call; see `winograd`."""
LEAST_PACKED = 8
"""The same for a filter that was transformed when the model was compiled."""

SHORT = 128
"""The most taps times channels of one running sum: "short" has only one."""

BYTES = {"float32": 4, "float64": 8, "float16": 2, "bfloat16": 2}


LANES = 16
"""The filters of a phase are padded to a multiple of this number, so that no vector holds two phases."""


PANEL = 32
"""Filters that are computed together and are adjacent in a packed filter; also in `kernels/lanes.mojo`."""
PANELS = {"winograd", "dense", "short", "paired", "amx"}
"""The kernels that compute panels of filters."""
PACKED = ("float32", "float64")
"""Dtypes whose filters are packed for every kernel of panels."""
CPU_KERNELS = {*PANELS, "lengthwise", "depthwise"}


@dataclass(frozen=True)
class Layer:
    """The facts about a layer that are known when the graph is built.

    For a transposed convolution, `geometry` is the convolution of stride 1 that computes all its phases as filters.
    """

    geometry: Geometry
    layout: Layout
    group_channels: int
    group_filters: int
    groups: int
    dtype: str = "float32"
    transposed: TransposedGeometry | None = None

    @classmethod
    def of(
        cls,
        geometry: Geometry | TransposedGeometry,
        layout: Layout,
        group_channels: int,
        group_filters: int,
        groups: int,
        dtype: str = "float32",
    ) -> "Layer":
        """Describes a convolution or a transposed one."""
        sizes = (group_channels, group_filters, groups, dtype)
        if isinstance(geometry, TransposedGeometry):
            return cls(geometry.convolution, layout, *sizes, transposed=geometry)
        return cls(geometry, layout, *sizes)

    @property
    def numbers(self) -> tuple[int, ...]:
        """The operation's vector `geometry`; `Numbers` in `kernels/tensors.mojo`. Transposed layers have no padding mode."""
        given = self.transposed or self.geometry
        mode = 0 if self.transposed else PADDING_MODES.index(self.geometry.padding_mode)
        return given.stride, given.dilation, given.left, given.right, mode, self.groups, given.kernel_size

    @property
    def key(self) -> str:
        """The layer's name among the layers that were timed: all that decides which kernel is fastest.

        >>> Layer.of(Geometry.of(3, padding=1), "NLC", 80, 384, 1).key
        'conv1d k3 s1 d1 80 -> 384 g1 NLC float32'
        """
        given = self.transposed or self.geometry
        taps = f"k{given.kernel_size} s{given.stride} d{given.dilation}"
        sizes = f"{self.groups * self.group_channels} -> {self.groups * self.group_filters} g{self.groups}"
        return f"{'conv_transpose1d' if self.transposed else 'conv1d'} {taps} {sizes} {self.layout} {self.dtype}"

    @property
    def columns(self) -> int:
        """Filters of a group that kernels of whole vectors compute; for a transposed convolution, of all phases."""
        if self.transposed is None:
            return self.group_filters
        return self.transposed.phases * -(-self.group_filters // LANES) * LANES

    @property
    def filters(self) -> int:
        """Filters of a group, of all phases."""
        return self.group_filters * (self.transposed.phases if self.transposed else 1)

    def whole(self, kernel: str) -> bool:
        """Returns whether the filters of a group are a multiple of a panel's 32 filters, for a kernel.

        For a GPU's kernel, whether 8 divides the channels and the filters of a group, or all channels of "rows".
        """
        if kernel == "rows":
            return self.groups % 8 == 0
        if kernel.startswith(("tiles", "hopper")):
            return self.group_channels % 8 == 0 and self.group_filters % 8 == 0
        return (self.columns if kernel in PANELS else self.filters) % PANEL == 0

    @property
    def products(self) -> int:
        """Multiplications of a direct convolution for four outputs, or four of each phase, one channel and one filter."""
        return 4 * (self.transposed or self.geometry).kernel_size

    @property
    def quad_products(self) -> int:
        """The same for Winograd's kernel."""
        return quad_products(self.geometry) * (self.transposed.phases if self.transposed else 1)


@dataclass(frozen=True)
class Form:
    """The properties of an operation that are compiled into it.

    Attributes:
        kernel: The kernel's name.
        layout: The data's layout.
        filter_layout: The filter's layout, or "packed" or "phased" if `Packing` made it.
        transposed: Whether it is `conv_transpose1d`.
        whole: Whether the filters of a group are a multiple of 32: then less code is compiled.
        full: Whether the filters of a phase are a multiple of 16: then less code is compiled.
        least: The number of outputs below which "winograd" falls back to another kernel; with 0 it never does.
    """

    kernel: str
    layout: str
    filter_layout: str
    transposed: bool = False
    whole: bool = False
    full: bool = False
    least: int = LEAST_OUTPUTS

    @classmethod
    def of(cls, layer: Layer, kernel: str, filter_layout: str) -> "Form":
        """Returns the form of a layer's operation."""
        transposed = layer.transposed is not None
        full = layer.group_filters % LANES == 0
        return cls(kernel, layer.layout, filter_layout, transposed, layer.whole(kernel), full)


@dataclass(frozen=True)
class Choice:
    """A kernel's name and the reason for it."""

    kernel: str
    why: str


_only: ContextVar[str | None] = ContextVar("only", default=None)


@contextmanager
def only(kernel: str) -> Iterator[None]:
    """Gives this kernel to every layer of the graphs that are built meanwhile, to time and check kernels."""
    token = _only.set(kernel)
    try:
        yield
    finally:
        _only.reset(token)


def choose(
    layer: Layer,
    batch: int | None = None,
    outputs: int | None = None,
    *,
    packed: bool = False,
    exact: bool = False,
    timed: bool = False,
) -> Choice:
    """Returns the kernel for a layer.

    Args:
        layer: The layer.
        batch, outputs: The batch size and the output length, if they are known. For a short input, `winograd` falls
            back to another kernel. If they are unknown and the filter is not packed, the kernel decides at run time.
        packed: Whether `compile` has the filter, and packs it if the kernel and the dtype allow that.
        exact: Whether only direct kernels are allowed.
        timed: Whether the fastest kernel is chosen, if `compile(..., tune=...)` has timed the layer on this machine. Only
            layers whose filters `compile` has are timed.

    >>> choose(Layer(Geometry.of(3, padding=1), "NLC", 80, 384, 1)).kernel
    'winograd'
    """
    if kernel := _only.get():
        return Choice(kernel, "it is timed or checked")
    # Exact layers get one kernel for all lengths, so that a signal in chunks is to the bit the whole one.
    if timed and (times := tuned.times(layer.key, *((None, None) if exact else (batch, outputs)))):
        kernel = min((kernel for kernel in times if not (exact and kernel == "winograd")), key=times.__getitem__)
        return Choice(kernel, "the fastest of the kernels that were timed on this machine")
    bfloat16 = (amx(layer) if packed else None) or paired(layer)
    packed = packed and layer.dtype in PACKED
    choice = bfloat16 or (None if exact else winograd(layer, packed)) or direct(layer)
    if choice.kernel != "winograd" or batch is None or outputs is None:
        return choice
    if layer.transposed:
        outputs = -(-outputs // layer.transposed.stride)
    shorter = too_short(layer.geometry, batch, outputs, packed)
    return Choice(direct(layer).kernel, f"winograd falls back, {shorter}") if shorter else choice


def amx(layer: Layer) -> Choice | None:
    """Returns the choice of the kernel for matrix tiles, or None if the processor lacks them or it does not pay."""
    inputs = layer.group_channels * layer.geometry.kernel_size
    if inputs < 8 or not fits_pairs(layer) or not has_tiles():
        return None
    return Choice("amx", "bfloat16 matrix tiles of the processor (AMX)")


def paired(layer: Layer) -> Choice | None:
    """Returns the choice of the kernel for pairs of bfloat16 values, or None if the processor lacks them."""
    if layer.group_channels < 8 or not fits_pairs(layer) or not has_pairs():
        return None
    return Choice("paired", "bfloat16 dot products of pairs (AVX512_BF16)")


def fits_pairs(layer: Layer) -> bool:
    """Returns whether the kernels of bfloat16 pairs, "amx" and "paired", suit a layer's dtype, filters, groups and rows."""
    if layer.dtype != "bfloat16" or layer.filters < 16 or layer.groups > 16:
        return False
    # NCL data is transposed together with all rows between the first tap and the last.
    return layer.layout == "NLC" or layer.geometry.reach * layer.group_channels <= 128 * 1024


def winograd(layer: Layer, packed: bool) -> Choice | None:
    """Returns the choice of Winograd's kernel, or None if it does not pay."""
    if (layer.groups > 1 and not packed) or min(layer.group_channels, layer.filters) < 32:
        # Measured against dense: 16 -> 16 k3 is 0.7 times as fast; 32 -> 32 1.2 times; 33 -> 65 k5 1.2 times.
        return None
    if layer.group_filters < 8:
        return None  # vectors would be half empty
    if layer.products < 1.25 * layer.quad_products:
        return None  # the transforms cost more than they save
    if not fits_winograd(layer):
        return None
    return Choice("winograd", f"{layer.quad_products} multiplications for {layer.products} of a direct convolution")


def fits_winograd(layer: Layer) -> bool:
    """Returns whether the transformed data and filters of Winograd's kernel stay in the caches."""
    products = quad_products(layer.geometry)
    if products * layer.group_channels > 12288:
        return False  # a panel of the transformed filter would exceed 1.5 MiB
    spacing = quad_spacing(layer.geometry)
    rows = 4 * spacing * layer.geometry.stride + layer.geometry.reach
    # NCL data is transposed in blocks of whole quads, which would exceed 512 KiB.
    return layer.layout == "NLC" or max(rows, products * spacing) * layer.group_channels <= 128 * 1024


def direct(layer: Layer) -> Choice:
    """Returns the choice among the direct kernels."""
    depthwise = layer.group_channels == layer.group_filters == 1 and layer.groups >= 8
    if layer.layout == "NCL":
        # Conformer's 31 taps: `depthwise` 0.121 ms, `lengthwise` 0.145 ms; Vocos' 7 taps: 0.127 ms and 0.097 ms.
        if depthwise and layer.geometry.kernel_size >= 16 and layer.geometry.stride == 1 and BYTES[layer.dtype] > 2:
            return Choice(
                "depthwise", "one channel in and one out per group, and enough taps to pay for transposing the data"
            )
        return Choice("lengthwise", "positions of NCL data are adjacent in memory")
    if depthwise:
        return Choice("depthwise", "one channel in and one out per group")
    if layer.group_filters < 8:
        return Choice("lengthwise", "fewer filters than half a vector")
    if layer.geometry.kernel_size * layer.group_channels <= SHORT:
        return Choice("short", "filters fill the vectors, and one running sum covers all taps and channels")
    return Choice("dense", "filters fill the vectors")


def able(layer: Layer) -> list[str]:
    """Returns the kernels that can compute a layer whose filter `compile` has, and that may be the fastest.

    The one that `choose` returns comes first.

    >>> able(Layer.of(Geometry.of(3, padding=1), "NLC", 8, 16, 1))
    ['short', 'lengthwise', 'winograd']
    """
    found = [choose(layer, packed=True).kernel, direct(layer).kernel]
    found += [choice.kernel for choice in [paired(layer)] if choice]
    depthwise = layer.group_channels == layer.group_filters == 1
    if layer.layout == "NCL":
        found += ["lengthwise"]
        plain = layer.geometry.stride == 1 and layer.transposed is None and BYTES[layer.dtype] > 2
        found += ["depthwise"] if depthwise and plain else []
    else:
        short = layer.geometry.kernel_size * layer.group_channels <= SHORT
        found += ["short" if short else "dense"] if layer.filters >= 4 else []
        found += ["depthwise"] if depthwise else []
        found += ["lengthwise"] if layer.group_filters <= 32 else []
    saves = layer.quad_products < layer.products and fits_winograd(layer)
    if saves and min(layer.group_channels, layer.filters) >= 8 and (layer.dtype in PACKED or layer.groups == 1):
        found += ["winograd"]
    return list(dict.fromkeys(found))


def quad_spacing(geometry: Geometry) -> int:
    """Returns the distance, in outputs, between the outputs of a quad."""
    return geometry.dilation // gcd(geometry.stride, geometry.dilation)


def tap_groups(geometry: Geometry) -> list[tuple[int, ...]]:
    """Returns the taps that Winograd's kernel computes together: threes of one phase of the stride, and the rest.

    >>> tap_groups(Geometry.of(4)), tap_groups(Geometry.of(3, stride=2))
    ([(0, 1, 2), (3,)], [(0, 2), (1,)])
    """
    step = geometry.stride // gcd(geometry.stride, geometry.dilation)
    phases = [range(phase, geometry.kernel_size, step) for phase in range(min(step, geometry.kernel_size))]
    groups = [tuple(taps[i : i + 3]) for taps in phases for i in range(0, len(taps), 3)]
    return sorted(groups, key=len, reverse=True)


def quad_products(geometry: Geometry) -> int:
    """Returns the multiplications that Winograd's kernel needs for four outputs, one channel and one filter.

    Three taps cost 6, a remaining pair costs 5, a single tap 4.

    >>> quad_products(Geometry.of(11)), quad_products(Geometry.of(3, stride=2))
    (23, 9)
    """
    return sum(len(group) + 3 for group in tap_groups(geometry))


def too_short(geometry: Geometry, batch: int, outputs: int, packed: bool) -> str | None:
    """Returns why Winograd's kernel falls back to another one for an input, or None.

    `pays` in winograd.mojo does the same for filters that are not packed. With a packed filter, 512 -> 512 k3, it is
    faster than `dense` from 8 outputs on, and with a dilation of 9 from 36 outputs on: a quad spans four dilations.
    """
    least, dilations = (LEAST_PACKED, 4) if packed else (LEAST_OUTPUTS, 16)
    if batch * outputs < least:
        return f"{batch * outputs} outputs are fewer than {least}"
    short = outputs < dilations * quad_spacing(geometry)
    return f"{outputs} outputs are fewer than {dilations} dilations" if short else None
