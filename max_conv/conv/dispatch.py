"""Which CPU kernel a layer gets, and why. MEASUREMENTS.md has the numbers for every limit."""

from dataclasses import dataclass
from math import gcd
from typing import Any

from .geometry import PADDING_MODES, Geometry, TransposedGeometry, positive
from .layouts import Layout, check_layout

LEAST_OUTPUTS = 256
"""Least outputs, of all batch items together, for which transforming the filter on every call pays; see `winograd`."""
LEAST_PACKED = 8
"""The same for a filter that was transformed when the model was compiled."""

BYTES = {"float32": 4, "float64": 8, "float16": 2, "bfloat16": 2}


LANES = 16
"""The filters of a phase are padded to a multiple of this number, so that no vector holds two phases."""


PANEL = 32
"""Filters that are computed together and are adjacent in a packed filter; also in `kernels/lanes.mojo`."""
PANELS = {"winograd", "dense", "short", "paired"}
"""The kernels that compute panels of filters."""


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
        """Returns whether the filters of a group are a multiple of a panel's 32 filters, for a kernel."""
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


def choose(
    layer: Layer, batch: int | None = None, outputs: int | None = None, *, packed: bool = False, exact: bool = False
) -> Choice:
    """Returns the kernel for a layer.

    Args:
        layer: The layer.
        batch, outputs: The batch size and the output length, if they are known. For a short input, `winograd` falls
            back to another kernel. If they are unknown and the filter is not packed, the kernel decides at run time.
        packed: Whether the filter is packed when the model is compiled.
        exact: Whether only direct kernels are allowed.

    >>> choose(Layer(Geometry.of(3, padding=1), "NLC", 80, 384, 1)).kernel
    'winograd'
    """
    choice = paired(layer) or (None if exact else winograd(layer, packed)) or direct(layer)
    if choice.kernel != "winograd" or batch is None or outputs is None:
        return choice
    if layer.transposed:
        outputs = -(-outputs // layer.transposed.stride)
    shorter = too_short(layer.geometry, batch, outputs, packed)
    return Choice(direct(layer).kernel, f"winograd falls back, {shorter}") if shorter else choice


def paired(layer: Layer) -> Choice | None:
    """Returns the choice of the kernel for pairs of bfloat16 values; on other processors `direct` replaces it."""
    if layer.dtype != "bfloat16" or layer.group_channels < 8 or layer.filters < 16 or layer.groups > 16:
        return None
    # NCL data is transposed together with all rows between the first tap and the last.
    if layer.layout == "NCL" and layer.geometry.reach * layer.group_channels > 128 * 1024:
        return None
    return Choice("paired", "bfloat16 dot products of pairs, where the processor has AVX512_BF16")


def winograd(layer: Layer, packed: bool) -> Choice | None:
    """Returns the choice of Winograd's kernel, or None if it does not pay."""
    if (layer.groups > 1 and not packed) or min(layer.group_channels, layer.filters) < 32:
        # Measured against dense: 16 -> 16 k3 is 0.7 times as fast; 32 -> 32 1.2 times; 33 -> 65 k5 1.2 times.
        return None
    if layer.group_filters < 8:
        return None  # vectors would be half empty
    if layer.products < 1.25 * layer.quad_products:
        return None  # the transforms cost more than they save
    products = quad_products(layer.geometry)
    if products * layer.group_channels > 12288:
        return None  # a panel of the transformed filter would exceed 1.5 MiB
    spacing = quad_spacing(layer.geometry)
    rows = 4 * spacing * layer.geometry.stride + layer.geometry.reach
    if layer.layout == "NCL" and max(rows, products * spacing) * layer.group_channels > 128 * 1024:
        return None  # NCL data is transposed in blocks of whole quads, which would exceed 512 KiB
    return Choice("winograd", f"{layer.quad_products} multiplications for {layer.products} of a direct convolution")


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
    if layer.geometry.kernel_size * layer.group_channels <= 128:
        return Choice("short", "filters fill the vectors, and one running sum covers all taps and channels")
    return Choice("dense", "filters fill the vectors")


def quad_spacing(geometry: Geometry) -> int:
    """Returns the distance, in outputs, between the outputs of a quad."""
    return geometry.dilation // gcd(geometry.stride, geometry.dilation)


def tap_groups(geometry: Geometry) -> list[tuple[int, ...]]:
    """Returns the taps that Winograd's kernel computes together: threes of one phase of the stride, and what remains.

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


@dataclass(frozen=True)
class Explanation:
    """What `explain` found. It prints one fact per line.

    Attributes:
        kernel: The CPU kernel's name, "gpu" for a layer on a GPU.
        why: The reason for the choice.
        output_shape: (N, L_out, F), or (N, F, L_out) for NCL data.
        flops: Multiplications and additions of a direct convolution, taps in the padding included; for a transposed
            one, every input value is multiplied with every tap.
        multiplications: The multiplications of the chosen kernel: fewer with Winograd's algorithm.
        bytes: Input, weights and output, each moved once.
        bound: "compute" or "memory": whichever takes longer on a machine with the given peaks.
        seconds: The least time that it takes; for "compute", the least time of a direct convolution.
        exact: Whether the kernel is a direct one, so that no bit of an output depends on inputs outside its filter's
            reach.
        cost: What `exact=True` costs: a direct kernel's multiplications divided by this kernel's.
        shared: Whether the layer, alone in a graph, runs in the compiled graph of its kind, which fits all sizes.
    """

    kernel: str
    why: str
    output_shape: tuple[int, int, int]
    flops: int
    multiplications: int
    bytes: int
    bound: str
    seconds: float
    exact: bool
    cost: float
    shared: bool

    def __str__(self) -> str:
        return (
            f"kernel      {self.kernel}: {self.why}\n"
            f"output      {self.output_shape}\n"
            f"work        {self.flops / 1e6:,.2f} MFLOP, {self.multiplications / 1e6:,.2f} million multiplications\n"
            f"memory      {self.bytes / 1e6:,.2f} MB, {self.flops / self.bytes:.1f} FLOP per byte\n"
            f"bound       {self.bound}: {self.seconds * 1e3:,.3f} ms at least\n"
            f"exact       {'yes' if self.exact else f'no, exact=True costs {self.cost:.2f} times as many multiplications'}\n"
            f"compiled    {'once for all layers of its kind, if it is alone in a graph' if self.shared else 'for itself'}"
        )


def explain(
    layer: Any,
    *,
    length: int,
    batch: int = 1,
    channels: int | None = None,
    filters: int | None = None,
    groups: int = 1,
    layout: Layout = "NLC",
    dtype: str = "float32",
    packed: bool = True,
    exact: bool = False,
    gflops: float = 500.0,
    gbytes: float = 50.0,
) -> Explanation:
    """Prints and returns which kernel a layer gets for an input, why, and what bounds its time.

    Args:
        layer: A `Conv1D` or `ConvTranspose1D`, of the package or of a front end, a `Geometry` or a `TransposedGeometry`.
        length: The input's length, L.
        batch: The input's batch size, N.
        channels, filters, groups, layout, dtype: The layer's; needed only if `layer` is a `Geometry`.
        packed: Whether `max_conv.compile` packs the filter, as it does in float32 and float64; in a plain MAX session
            Winograd's kernel falls back to another one for more inputs.
        exact: Whether only direct kernels are allowed; always true for a layer that was made with `exact=True`.
        gflops: The machine's peak, 10^9 operations per second in float32; doubled for bfloat16, halved for float64.
        gbytes: The machine's memory bandwidth, 10^9 bytes per second.

    Raises:
        TypeError, ValueError: One sentence: a length that is too short, a Geometry without channels.

    >>> _ = explain(Geometry.of(3, padding=1), length=3000, channels=80, filters=384)
    kernel      winograd: 6 multiplications for 12 of a direct convolution
    output      (1, 3000, 384)
    work        552.96 MFLOP, 138.24 million multiplications
    memory      5.94 MB, 93.1 FLOP per byte
    bound       compute: 1.106 ms at least
    exact       no, exact=True costs 2.00 times as many multiplications
    compiled    once for all layers of its kind, if it is alone in a graph
    """
    on_gpu = False
    geometry = layer
    if not isinstance(layer, Geometry | TransposedGeometry):
        geometry = layer.geometry
        channels, filters, groups = layer.in_channels, layer.out_channels, layer.num_groups
        layout, dtype, exact = layer.layout, layer.dtype.name, exact or layer.exact
        on_gpu = layer.device is not None and not layer.device.is_cpu()
    elif channels is None or filters is None:
        raise TypeError("explain: a Geometry needs channels=... and filters=... as well.")
    check_layout(layout)
    if dtype not in BYTES:
        raise ValueError(f"explain: dtype must be one of {', '.join(BYTES)}, but is {dtype!r}.")
    length, batch, groups = positive("length", length), positive("batch", batch), positive("groups", groups)
    channels, filters = positive("channels", channels), positive("filters", filters)
    if channels % groups or filters % groups:
        raise ValueError(f"explain: {groups} groups must divide channels={channels} and filters={filters}.")
    geometry.check_length(length)
    described = Layer.of(geometry, layout, channels // groups, filters // groups, groups, dtype)
    outputs = geometry.output_length(length)
    choice = Choice("gpu", "one thread for each output")
    if not on_gpu:
        choice = choose(described, batch, outputs, packed=packed and BYTES[dtype] > 2, exact=exact)
    positions = length if described.transposed else outputs
    direct = multiplications = batch * positions * filters * geometry.kernel_size * described.group_channels
    if choice.kernel == "winograd":
        multiplications = direct * described.quad_products // described.products
    weights = filters * geometry.kernel_size * described.group_channels
    moved = BYTES[dtype] * (batch * length * channels + weights + batch * outputs * filters)
    compute = 2 * direct / (gflops * 1e9 * {"float64": 0.5, "bfloat16": 2.0}.get(dtype, 1.0))
    memory = moved / (gbytes * 1e9)
    found = Explanation(
        choice.kernel,
        choice.why,
        (batch, outputs, filters) if layout == "NLC" else (batch, filters, outputs),
        2 * direct,
        multiplications,
        moved,
        "compute" if compute > memory else "memory",
        max(compute, memory),
        choice.kernel != "winograd",
        direct / multiplications,
        not on_gpu,
    )
    print(found)
    return found


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
