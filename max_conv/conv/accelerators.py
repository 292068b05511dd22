"""Which GPU kernel a layer gets, and why. MEASUREMENTS.md has the numbers for every limit."""

import functools
from contextvars import ContextVar
from pathlib import Path

from ..cache import cache_dir
from .dispatch import Choice, Layer
from .library import kernel_key

HOPPER = "sm_90"
"""The architecture of Hopper's kernels, and the one on which all kernels have been compared with the reference."""
FEWEST = 4
"""From so many filters per group on, a tile pays, although most of its filters do not exist."""


@functools.cache
def architecture() -> str:
    """Returns the name of the machine's first accelerator, real or virtual; "" if there is none."""
    from max.driver import accelerator_architecture_name, accelerator_count

    return accelerator_architecture_name() if accelerator_count() else ""


trying: ContextVar[bool] = ContextVar("trying", default=False)
"""Set while `max-conv check` tries all kernels of a GPU."""


def check_file() -> Path:
    """Returns the file that says that these kernels were right on this machine's GPU; `max-conv check` writes it."""
    return cache_dir() / "checks" / f"{kernel_key()}.{architecture()}"


def trusted() -> bool:
    """Returns whether layers get fast kernels: all kernels were right, on this GPU or on the one they were written for.

    On another GPU they get "each", the simplest one.
    """
    return trying.get() or architecture().startswith(HOPPER) or check_file().exists()


def accelerated(layer: Layer, made: bool) -> Choice:
    """Returns the GPU kernel for a layer.

    Args:
        layer: The layer.
        made: Whether the filter is put into the kernel's order when the model is compiled.
    """
    each = functools.partial(Choice, "each")
    if not trusted():
        return each("one thread for each output; run `max-conv check --device gpu` to allow faster kernels on this GPU")
    if layer.dtype == "float64":
        return each("one thread for each output, in float64")
    if layer.transposed:
        given = layer.transposed
        if not made:
            return each("one thread for each output, as the filter is known only when the graph runs")
        if given.dilation != 1 or given.kernel_size % given.stride:
            return each("one thread for each output, as the phases differ in their taps")
    elif layer.group_channels == layer.group_filters == 1 and layer.groups > 1:
        return Choice("rows", "one channel in and one out per group: bound by memory")
    filters = layer.filters
    if filters < FEWEST:
        return each(f"one thread for each output, as fewer than {FEWEST} filters leave a tile empty")
    sixteen = layer.dtype in ("float16", "bfloat16") and layer.group_channels % 8 == 0
    if architecture().startswith(HOPPER) and sixteen and layer.layout == "NLC" and plain(layer):
        # 192 leaves fewer blocks idle for Whisper's 384 filters; for 1,024 filters it is a fifth slower than 128.
        width = 192 if filters in (192, 384) else next((width for width in (32, 64) if width >= filters), 128)
        return Choice(f"hopper{width}", "tensor cores, which Hopper's copy engine feeds")
    widths = (32, 64, 128) if layer.layout == "NLC" else (32, 64)
    width = next((width for width in widths if width >= filters), widths[-1])
    return Choice(f"tiles{width}", "tiles in shared memory, multiplied and summed in float32")


def plain(layer: Layer) -> bool:
    """Returns whether neighbouring outputs read neighbouring rows, and only zeros around the data."""
    return layer.geometry.stride == 1 and layer.geometry.padding_mode == "zeros"


def filter_order(kernel: str) -> str:
    """Returns the order in which a kernel reads an SCF filter; "" for any."""
    return "" if kernel == "each" else "FSC" if kernel.startswith("hopper") else "SCF"
