"""Every kernel against the reference on random transposed convolutions, and against the kernels of Conv1D: the one is the
other's adjoint, `<conv_transpose(x), y> = <x, conv(y)>`. See properties.py.
"""

import math
from dataclasses import dataclass
from functools import cache

import numpy as np
import pytest
from hypothesis import strategies as st
from max.driver import Buffer
from max.dtype import DType

from live import check_live, check_ragged
from max_conv.conv import dispatch
from max_conv.conv.geometry import TransposedGeometry
from max_conv.conv.layouts import permute
from max_conv.conv.packing import Packing
from max_conv.conv.reference import conv_transpose1d_ref
from properties import (
    BLOCKS,
    CHANNELS,
    EDGES,
    EPS,
    LARGEST,
    ROUNDING,
    SHARES,
    Execute,
    Way,
    answer,
    check_answer,
    compile_ways,
    compiles,
    from_bits,
    guarded,
    operands_of,
    run_layers,
    to_bits,
)

WAYS: tuple[Way, ...] = (
    ("dense", "NLC", "SFC"),
    ("dense", "NLC", "packed"),
    ("short", "NLC", "CFS"),
    ("short", "NLC", "packed"),
    ("depthwise", "NLC", "CFS"),
    ("depthwise", "NLC", "phased"),
    ("depthwise", "NCL", "SFC"),
    ("lengthwise", "NLC", "phased"),
    ("lengthwise", "NCL", "FSC"),
    ("lengthwise", "NCL", "phased"),
    ("winograd", "NLC", "FSC"),
    ("winograd", "NCL", "CFS"),
    ("winograd", "NLC", "packed"),
    ("winograd", "NCL", "packed"),
    ("paired", "NLC", "SFC"),
    ("paired", "NCL", "CFS"),
    ("paired", "NLC", "packed"),
    ("paired", "NCL", "packed"),
    ("amx", "NLC", "packed"),
    ("amx", "NCL", "packed"),
)
"""Every kernel, in the layouts that it is for, and each filter layout."""

SKIPPED = 0.8
"""Share of its layers that each kernel leaves to the others, by the layer's seed."""

CONVOLUTION: Way = ("lengthwise", "NLC", "SCF")
"""Of the adjoint."""


@dataclass(frozen=True)
class Layer:
    """One random layer: its sizes, its geometry, and the seed of its data."""

    batch: int
    length: int
    group_channels: int
    group_filters: int
    groups: int
    geometry: TransposedGeometry
    bias: bool
    seed: int

    @property
    def taps(self) -> int:
        """Taps of an output."""
        return self.geometry.convolution.kernel_size


@st.composite
def layers(draw: st.DrawFn) -> Layer:
    """Draws a layer with at least one output; a batch may be zero."""
    kernel_size = draw(st.one_of(st.integers(1, 9), st.sampled_from((11, 16, 31, 64))))
    stride = draw(st.sampled_from((1, 2, 2, 3, 4, 5, 7, 8, 16)))
    dilation = draw(st.sampled_from((1, 1, 1, 2, 3, 4, 6, 25)))
    kind = draw(st.integers(0, 3))
    if kind == 0:  # depthwise, mostly with one filter per channel
        group_channels, group_filters = 1, draw(st.sampled_from((1, 1, 1, 2, 9)))
        groups = draw(st.one_of(st.sampled_from(CHANNELS), st.integers(1, 200)))
    else:
        groups = 1 if kind == 1 else draw(st.integers(1, 4))
        group_channels = draw(st.sampled_from(CHANNELS + BLOCKS))
        group_filters = draw(st.one_of(st.sampled_from(CHANNELS), st.integers(1, 40)))
    batch = draw(st.sampled_from((0, 1, 1, 1, 1, 2, 3)))
    cost = max(1, batch) * groups * group_channels * group_filters * kernel_size
    longest = max(1, draw(st.sampled_from(LARGEST)) // cost)
    length = min(longest, draw(st.one_of(st.sampled_from(EDGES), st.integers(1, 40)))) or 1
    output_padding = draw(st.integers(0, max(stride, dilation) - 1))
    reach = dilation * (kernel_size - 1) + 1
    outputs = (length - 1) * stride + reach + output_padding
    left = draw(st.integers(0, min(outputs - 1, reach + 2)))
    right = draw(st.integers(0, min(outputs - 1 - left, reach + 2)))
    geometry = TransposedGeometry.of(kernel_size, stride, (left, right), output_padding, dilation)
    seed, bias = draw(st.integers(0, 2**32 - 1)), draw(st.booleans())
    return Layer(batch, length, group_channels, group_filters, groups, geometry, bias, seed)


def fits(way: Way, layer: Layer) -> bool:
    """Returns whether a kernel accepts a layer; if not, the kernel raises an error."""
    match way[0]:
        case "depthwise":
            return layer.group_channels == layer.group_filters == 1
        case "short":
            return layer.taps * layer.group_channels <= 128
    return True


@cache
def models() -> dict[tuple[DType, Way], Execute]:
    return compile_ways(dict.fromkeys(WAYS, True) | {CONVOLUTION: False})


def described(layer: Layer) -> dispatch.Layer:
    return dispatch.Layer.of(layer.geometry, "NLC", layer.group_channels, layer.group_filters, layer.groups)


def compare(layer: Layer, dtype: DType) -> None:
    """Runs about a fifth of the kernels that accept the layer; checks with the reference, and one with the adjoint."""
    random = np.random.default_rng(layer.seed)
    geometry, groups = layer.geometry, layer.groups
    channels, filters = groups * layer.group_channels, groups * layer.group_filters
    x = to_bits(random.standard_normal((layer.batch, layer.length, channels)), dtype)
    w = to_bits(random.standard_normal((geometry.kernel_size, layer.group_filters, channels)), dtype)
    bias = to_bits(random.standard_normal(filters if layer.bias else 0), dtype)
    values = [from_bits(bits, dtype) for bits in (x, w, bias)]
    want = conv_transpose1d_ref(
        values[0],
        values[1],
        values[2] if layer.bias else None,
        stride=geometry.stride,
        padding=(geometry.left, geometry.right),
        output_padding=geometry.output_padding,
        dilation=geometry.dilation,
        groups=groups,
    )
    scale = max(np.abs(values[0]).max(initial=0) * np.abs(values[1]).max(), np.abs(values[2]).max(initial=0))

    numbers = (geometry.stride, geometry.dilation, geometry.left, geometry.right, 0, groups, geometry.kernel_size)
    by_channel = w.reshape(geometry.kernel_size, layer.group_filters, groups, layer.group_channels)
    fsc = by_channel.transpose(2, 1, 0, 3).reshape(filters, geometry.kernel_size, layer.group_channels)
    held = {"NLC": x, "NCL": x.transpose(0, 2, 1), "SFC": w, "CFS": permute(w, "SFC", "CFS"), "FSC": fsc, "F": bias}
    buffers = {name: guarded(bits, dtype, int(random.integers(0, 64))) for name, bits in held.items()}
    for way in WAYS:
        if not compiles(way, dtype) or not fits(way, layer) or random.random() < SKIPPED:
            continue
        kernel, layout, filter_layout = way
        if filter_layout in ("packed", "phased"):
            filter = Packing("weight", kernel, described(layer), "SFC")(w)
            buffers[filter_layout] = guarded(filter, dtype, int(random.integers(0, 64)))
        operands = operands_of(buffers[layout], buffers[filter_layout], buffers["F"], numbers, want.shape)
        out = answer(models()[dtype, way], operands, dtype)
        if layout == "NCL":
            out = out.transpose(0, 2, 1)
        check_answer(" ".join(way), out, want, dtype, kernel, (layer.taps, layer.group_channels), scale)
        if filter_layout == "SFC":
            check_adjoint(layer, dtype, buffers["SFC"], values, out, random)


def check_adjoint(
    layer: Layer, dtype: DType, w: Buffer, values: list[np.ndarray], out: np.ndarray, random: np.random.Generator
) -> None:
    """Checks `<conv_transpose(x), y> = <x, conv(y)>` with the output of Conv1D's kernel for the same filter."""
    geometry = layer.geometry
    bits = to_bits(random.standard_normal(out.shape), dtype)
    y = from_bits(bits, dtype)
    padded = out.shape[1] + geometry.left + geometry.right
    outputs = (padded - geometry.reach) // geometry.stride + 1  # with much output_padding more than x has
    numbers = (geometry.stride, geometry.dilation, geometry.left, geometry.right, 0, layer.groups, geometry.kernel_size)
    none = guarded(bits[:0, 0, 0], dtype, 0)
    shape = (layer.batch, outputs, values[0].shape[2])
    operands = operands_of(guarded(bits, dtype, 1), w, none, numbers, shape)
    back = answer(models()[dtype, CONVOLUTION], operands, dtype)[:, : layer.length]
    linear = out - values[2] if layer.bias else out
    one, other = np.sum(linear * y), np.sum(values[0] * back)
    # The bounds of all terms' errors, added up: the error of each sum, and its rounding to the dtype.
    eps = EPS[dtype] + ROUNDING[dtype]
    products = np.sum(np.abs(values[0]) * np.abs(back)) + np.sum(np.abs(out) * np.abs(y)) + np.abs(values[2]).sum()
    terms = geometry.kernel_size * max(layer.group_channels, layer.group_filters)
    largest = np.abs(values[0]).max(initial=0) * np.abs(values[1]).max() * np.abs(y).max(initial=0)
    limit = 8 * eps * (products + largest * terms * np.sqrt(out.size + 1)) + 2.0**-20 * (dtype == DType.float16)
    assert abs(one - other) <= limit, f"adjoint: {one} and {other}, more than {limit} apart"


@pytest.mark.parametrize("dtype", list(SHARES), ids=lambda dtype: dtype.name)
def test_random_layers(dtype: DType, pytestconfig: pytest.Config) -> None:
    run_layers(layers(), compare, dtype, pytestconfig.getoption("configurations"))


def compare_live(layer: Layer, dtype: DType) -> None:
    """Runs some of the kernels that accept the layer live, in random chunks, and on a ragged batch.

    Both are compared with the whole signals, one by one.
    """
    random = np.random.default_rng(layer.seed)
    geometry, groups = layer.geometry, layer.groups
    channels, filters = groups * layer.group_channels, groups * layer.group_filters
    lengths = (layer.length, layer.length + int(random.integers(0, 40)))
    signals = [to_bits(random.standard_normal((length, channels)), dtype) for length in lengths]
    w = to_bits(random.standard_normal((geometry.kernel_size, layer.group_filters, channels)), dtype)
    bias = guarded(to_bits(random.standard_normal(filters if layer.bias else 0), dtype), dtype, 0)
    scale = max(np.abs(from_bits(bits, dtype)).max(initial=0) for bits in signals) * np.abs(from_bits(w, dtype)).max()
    for way in WAYS:
        kernel, layout, filter_layout = way
        if filter_layout == "FSC" or not compiles(way, dtype) or not fits(way, layer) or random.random() < SKIPPED:
            continue
        sizes = (layer.group_channels, layer.group_filters, groups, dtype.name)
        live = dispatch.Layer.of(geometry, "NLC" if layout == "NLC" else "NCL", *sizes)
        filter = permute(w, "SFC", "CFS") if filter_layout == "CFS" else w
        if filter_layout in ("packed", "phased"):
            filter = Packing("weight", kernel, live, "SFC")(w)
        count = layer.taps * max(layer.group_channels, 32)
        error = (8 * EPS[dtype] * math.sqrt(count) + 2 * ROUNDING[dtype] * count**0.5) * scale * (kernel == "winograd")
        operands = (guarded(filter, dtype, 0), bias)
        check_live(f"{' '.join(way)} {layer}", models()[dtype, way], live, operands, signals, random, error)
        check_ragged(f"ragged {' '.join(way)} {layer}", models()[dtype, way], live, operands, signals)


@pytest.mark.parametrize("dtype", list(SHARES), ids=lambda dtype: dtype.name)
def test_random_live_layers(dtype: DType, pytestconfig: pytest.Config) -> None:
    run_layers(layers(), compare_live, dtype, pytestconfig.getoption("configurations") // 5)
