"""What `explain` says about a layer: its kernel, its work, and whether compute or memory limits its time."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from . import tuned
from .dispatch import BYTES, Layer, choose
from .geometry import Geometry, TransposedGeometry, positive
from .layouts import Layout, check_layout

SPEED = {"float64": 0.5, "bfloat16": 2.0}
"""The peak of a dtype, as a part of the peak in float32."""


@dataclass(frozen=True)
class Explanation:
    """The result of `explain`. It prints one fact per line.

    Attributes:
        kernel: The kernel's name, the GPU's for a layer on a GPU.
        why: The reason for the choice.
        output_shape: (N, L_out, F), or (N, F, L_out) for NCL data.
        flops: Multiplications and additions of a direct convolution, taps in the padding included; for a transposed
            one, every input value is multiplied with every tap.
        multiplications: The multiplications of the chosen kernel: fewer with Winograd's algorithm.
        bytes: Input, weights and output, each moved once.
        bound: "compute" or "memory": whichever takes longer on a machine with the given peaks.
        seconds: The least time that the layer needs; for "compute", the least time of a direct convolution.
        exact: Whether the kernel is a direct one, so that no bit of an output depends on inputs outside its filter's
            reach.
        cost: The cost of `exact=True`: a direct kernel's multiplications divided by this kernel's.
        shared: Whether the layer, alone in a graph, runs in the compiled graph of its kind, which fits all sizes.
        times: Microseconds by kernel, if `compile(..., tune=...)` or `max-conv tune` timed the layer on this machine, at
            the number of outputs that is nearest.
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
    times: Mapping[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        times = sorted(self.times.items(), key=lambda item: item[1])
        timed = "\ntimed       " + ", ".join(f"{kernel} {time:,.0f} us" for kernel, time in times)
        return (
            f"kernel      {self.kernel}: {self.why}\n"
            f"output      {self.output_shape}\n"
            f"work        {self.flops / 1e6:,.2f} MFLOP, {self.multiplications / 1e6:,.2f} million multiplications\n"
            f"memory      {self.bytes / 1e6:,.2f} MB, {self.flops / self.bytes:.1f} FLOP per byte\n"
            f"bound       {self.bound}: {self.seconds * 1e3:,.3f} ms at least\n"
            f"exact       {'yes' if self.exact else f'no, exact=True costs {self.cost:.2f} times as many multiplications'}\n"
            f"compiled    {'once for all layers of its kind, if it is alone in a graph' if self.shared else 'for itself'}"
            f"{timed if times else ''}"
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
    device: str = "cpu",
    gflops: float = 500.0,
    gbytes: float = 50.0,
) -> Explanation:
    """Prints and returns which kernel a layer gets for an input, why, and whether compute or memory limits its time.

    Args:
        layer: A `Conv1D` or `ConvTranspose1D`, of the package or of a front end, a `Geometry` or a `TransposedGeometry`.
        length: The input's length, L.
        batch: The input's batch size, N.
        channels, filters, groups, layout, dtype: The layer's; needed only if `layer` is a `Geometry`.
        packed: Whether `max_conv.compile` packs the filter, as it does in float32 and float64; in a plain MAX session
            Winograd's kernel falls back to another one for more inputs.
        exact: Whether only direct kernels are allowed; always true for a layer that was made with `exact=True`.
        device: "cpu" or "gpu"; always "gpu" for a layer that was made for one.
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
    from .accelerators import accelerated  # imported here, because it needs MAX's devices

    geometry = layer
    if not isinstance(layer, Geometry | TransposedGeometry):
        geometry = layer.geometry
        channels, filters, groups = layer.in_channels, layer.out_channels, layer.num_groups
        layout, dtype, exact = layer.layout, layer.dtype.name, exact or layer.exact
        device = device if layer.device is None or layer.device.is_cpu() else "gpu"
    elif channels is None or filters is None:
        raise TypeError("explain: a Geometry needs channels=... and filters=... as well.")
    _check_names(layout, dtype, device)
    length, batch, groups = positive("length", length), positive("batch", batch), positive("groups", groups)
    channels, filters = positive("channels", channels), positive("filters", filters)
    if channels % groups or filters % groups:
        raise ValueError(f"explain: {groups} groups must divide channels={channels} and filters={filters}.")
    geometry.check_length(length)
    described = Layer.of(geometry, layout, channels // groups, filters // groups, groups, dtype)
    outputs = geometry.output_length(length)
    if device == "gpu":
        choice = accelerated(described, packed)
    else:
        choice = choose(described, batch, outputs, packed=packed, exact=exact, timed=packed)
    weights = filters * geometry.kernel_size * described.group_channels
    direct = batch * (length if described.transposed else outputs) * weights
    fewer = (described.quad_products, described.products) if choice.kernel == "winograd" else (1, 1)
    multiplications = direct * fewer[0] // fewer[1]
    moved = BYTES[dtype] * (batch * length * channels + weights + batch * outputs * filters)
    compute, memory = 2 * direct / (gflops * 1e9 * SPEED.get(dtype, 1.0)), moved / (gbytes * 1e9)
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
        device == "cpu",
        tuned.times(described.key, batch, outputs) if device == "cpu" and packed else {},
    )
    print(found)
    return found


def _check_names(layout: str, dtype: str, device: str) -> None:
    check_layout(layout)
    if dtype not in BYTES:
        raise ValueError(f"explain: dtype must be one of {', '.join(BYTES)}, but is {dtype!r}.")
    if device not in ("cpu", "gpu"):
        raise ValueError(f"explain: device must be cpu or gpu, but is {device!r}.")
