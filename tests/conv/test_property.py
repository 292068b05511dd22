"""The kernels against the reference on random convolutions, each on half of its possible kernels; see properties.py."""

import math
from dataclasses import dataclass
from functools import cache

import numpy as np
import pytest
from hypothesis import strategies as st
from max.dtype import DType

from live import check_live, check_ragged
from max_conv.conv import dispatch
from max_conv.conv.geometry import PADDING_MODES, Geometry
from max_conv.conv.packing import Packing
from max_conv.conv.reference import conv1d_ref
from properties import (
    BLOCKS,
    CHANNELS,
    EDGES,
    EPS,
    LARGEST,
    ROUNDING,
    SHARES,
    SKIPPED,
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
    ("dense", "NLC", "SCF"),
    ("short", "NLC", "SCF"),
    ("depthwise", "NLC", "SCF"),
    ("depthwise", "NCL", "SCF"),
    ("lengthwise", "NLC", "SCF"),
    ("lengthwise", "NCL", "FCS"),
    ("winograd", "NLC", "SCF"),
    ("winograd", "NCL", "FCS"),
    ("dense", "NLC", "packed"),
    ("short", "NLC", "packed"),
    ("winograd", "NLC", "packed"),
    ("winograd", "NCL", "packed"),
    ("paired", "NLC", "SCF"),
    ("paired", "NCL", "FCS"),
    ("paired", "NLC", "packed"),
    ("paired", "NCL", "packed"),
    ("amx", "NLC", "packed"),
    ("amx", "NCL", "packed"),
)
"""Every kernel, in the layouts that it is for."""

LIVE_SKIPPED = 0.7
"""The same for live layers."""


@dataclass(frozen=True)
class Layer:
    """One random layer: its sizes, its geometry, and the seed of its data."""

    batch: int
    length: int
    group_channels: int
    group_filters: int
    groups: int
    kernel_size: int
    stride: int
    dilation: int
    padding: tuple[int, int]
    padding_mode: str
    bias: bool
    seed: int


@st.composite
def layers(draw: st.DrawFn) -> Layer:
    """Draws a layer whose padded input is at least as long as its filter; a batch and a length may be zero."""
    kernel_size = draw(st.one_of(st.integers(1, 9), st.sampled_from((11, 16, 31, 64))))
    stride = draw(st.sampled_from((1, 1, 1, 2, 3, 4, 5, 7, 16)))
    dilation = draw(st.sampled_from((1, 1, 2, 3, 5, 8, 25)))
    kind = draw(st.integers(0, 3))
    if kind == 0:  # depthwise, mostly with one filter per channel
        group_channels, group_filters = 1, draw(st.sampled_from((1, 1, 1, 2, 3, 9)))
        groups = draw(st.one_of(st.sampled_from(CHANNELS), st.integers(1, 200)))
        kernel_size = draw(st.sampled_from((kernel_size, kernel_size, 129, 300)))
    else:
        groups = 1 if kind == 1 else draw(st.integers(1, 4))
        group_channels = draw(st.sampled_from(CHANNELS + BLOCKS))
        group_filters = draw(st.one_of(st.sampled_from(CHANNELS), st.integers(1, 40)))
    reach = dilation * (kernel_size - 1) + 1
    left, right = draw(st.integers(0, reach + 2)), draw(st.integers(0, reach + 2))
    batch = draw(st.sampled_from((0, 1, 1, 1, 1, 2, 3)))
    cost = max(1, batch) * groups * group_channels * group_filters * kernel_size
    longest = max(1, draw(st.sampled_from(LARGEST)) // cost)
    outputs = min(longest, draw(st.one_of(st.sampled_from(EDGES), st.integers(1, 40)))) or 1
    spare = draw(st.integers(0, stride - 1))
    mode = draw(st.sampled_from(PADDING_MODES))
    length = max(0 if mode == "zeros" else 1, (outputs - 1) * stride + reach + spare - left - right)
    if mode in ("reflect", "circular"):
        widest = length - (mode == "reflect")
        left, right = min(left, widest), min(right, widest)
        length = max(length, reach - left - right)
    seed = draw(st.integers(0, 2**32 - 1))
    bias = draw(st.booleans())
    return Layer(
        batch,
        length,
        group_channels,
        group_filters,
        groups,
        kernel_size,
        stride,
        dilation,
        (left, right),
        mode,
        bias,
        seed,
    )


def fits(way: Way, layer: Layer) -> bool:
    """Returns whether a kernel accepts a layer; if not, the kernel raises an error."""
    match way[:2]:
        case "depthwise", layout:
            return layer.group_channels == layer.group_filters == 1 and (layout == "NLC" or layer.stride == 1)
        case "short", _:
            return layer.kernel_size * layer.group_channels <= 128
    return True


@cache
def models() -> dict[tuple[DType, Way], Execute]:
    return compile_ways(dict.fromkeys(WAYS, False))


def compare(layer: Layer, dtype: DType) -> None:
    """Runs about half of the kernels that accept the layer and compares with the reference."""
    random = np.random.default_rng(layer.seed)
    channels = layer.groups * layer.group_channels
    filters = layer.groups * layer.group_filters
    x = to_bits(random.standard_normal((layer.batch, layer.length, channels)), dtype)
    w = to_bits(random.standard_normal((layer.kernel_size, layer.group_channels, filters)), dtype)
    bias = to_bits(random.standard_normal(filters if layer.bias else 0), dtype)
    values = [from_bits(bits, dtype) for bits in (x, w, bias)]
    want = conv1d_ref(
        values[0],
        values[1],
        values[2] if layer.bias else None,
        stride=layer.stride,
        padding=layer.padding,
        dilation=layer.dilation,
        groups=layer.groups,
        padding_mode=layer.padding_mode,
    )
    scale = max(np.abs(values[0]).max(initial=0) * np.abs(values[1]).max(), np.abs(values[2]).max(initial=0))

    mode = PADDING_MODES.index(layer.padding_mode)
    numbers = (layer.stride, layer.dilation, *layer.padding, mode, layer.groups, layer.kernel_size)
    held = {"NLC": x, "NCL": x.transpose(0, 2, 1), "SCF": w, "FCS": w.transpose(2, 1, 0), "F": bias}
    buffers = {name: guarded(bits, dtype, int(random.integers(0, 64))) for name, bits in held.items()}
    for way in WAYS:
        if not compiles(way, dtype) or not fits(way, layer) or random.random() < SKIPPED:
            continue
        kernel, layout, filter_layout = way
        if filter_layout == "packed":
            described = dispatch.Layer(
                Geometry(layer.kernel_size, layer.stride, layer.dilation, *layer.padding, "zeros"),
                "NLC",
                layer.group_channels,
                layer.group_filters,
                layer.groups,
            )
            filter = Packing("weight", kernel, described, "SCF")(w)
            buffers["packed"] = guarded(filter, dtype, int(random.integers(0, 64)))
        operands = operands_of(buffers[layout], buffers[filter_layout], buffers["F"], numbers, want.shape)
        out = answer(models()[dtype, way], operands, dtype)
        if layout == "NCL":
            out = out.transpose(0, 2, 1)
        terms = (layer.kernel_size, layer.group_channels)
        check_answer(" ".join(way), out, want, dtype, kernel, terms, scale)


@pytest.mark.parametrize("dtype", list(SHARES), ids=lambda dtype: dtype.name)
def test_random_layers(dtype: DType, pytestconfig: pytest.Config) -> None:
    run_layers(layers(), compare, dtype, pytestconfig.getoption("configurations"))


def compare_live(layer: Layer, dtype: DType) -> None:
    """Runs some of the kernels that accept the layer live, in random chunks, and on a ragged batch.

    Both are compared with the whole signals, one by one.
    """
    if layer.padding_mode == "circular" or not layer.length:
        return
    random = np.random.default_rng(layer.seed)
    channels, filters = layer.groups * layer.group_channels, layer.groups * layer.group_filters
    lengths = (layer.length, layer.length + int(random.integers(0, 40)))
    signals = [to_bits(random.standard_normal((length, channels)), dtype) for length in lengths]
    w = to_bits(random.standard_normal((layer.kernel_size, layer.group_channels, filters)), dtype)
    bias = guarded(to_bits(random.standard_normal(filters if layer.bias else 0), dtype), dtype, 0)
    geometry = Geometry.of(layer.kernel_size, layer.stride, layer.padding, layer.dilation, layer.padding_mode)
    scale = max(np.abs(from_bits(bits, dtype)).max(initial=0) for bits in signals) * np.abs(from_bits(w, dtype)).max()
    for way in WAYS:
        if not compiles(way, dtype) or not fits(way, layer) or random.random() < LIVE_SKIPPED:
            continue
        kernel, layout, filter_layout = way
        sizes = (layer.group_channels, layer.group_filters, layer.groups, dtype.name)
        described = dispatch.Layer.of(geometry, "NLC" if layout == "NLC" else "NCL", *sizes)
        filter = Packing("weight", kernel, described, "SCF")(w) if filter_layout == "packed" else w
        filter = filter.transpose(2, 1, 0) if filter_layout == "FCS" else filter
        count = layer.kernel_size * max(layer.group_channels, 32)
        error = (8 * EPS[dtype] * math.sqrt(count) + 2 * ROUNDING[dtype] * count**0.5) * scale * (kernel == "winograd")
        operands = (guarded(filter, dtype, 0), bias)
        check_live(f"{' '.join(way)} {layer}", models()[dtype, way], described, operands, signals, random, error)
        check_ragged(f"ragged {' '.join(way)} {layer}", models()[dtype, way], described, operands, signals)


@pytest.mark.parametrize("dtype", list(SHARES), ids=lambda dtype: dtype.name)
def test_random_live_layers(dtype: DType, pytestconfig: pytest.Config) -> None:
    run_layers(layers(), compare_live, dtype, pytestconfig.getoption("configurations") // 5)
