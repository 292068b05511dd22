"""The common part of the property tests: random sizes, NaN around each input, three runs of each layer, error bounds.

One compiled graph per kernel and dtype serves all layers: the graph of the kind, `runtime/kinds.py`. Sizes are near
the sizes of tiles, blocks and vectors. `--configurations` sets the count; up to the default the layers are the same in
every run, above it they are new ones.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from max.driver import Buffer
from max.dtype import DType

from conftest import DEFAULT
from max_conv.conv.dispatch import Form
from max_conv.conv.processor import has_pairs, has_tiles
from max_conv.runtime.kinds import Kind, ready

GUARD = 1024
"""NaN values before and after each input."""
EDGES = sorted({max(0, n * m + d) for n in (4, 8, 14, 16, 48, 96, 112) for m in (1, 2, 3) for d in (-1, 0, 1)})
CHANNELS = (1, 2, 3, 5, 8, 15, 16, 17, 31, 32, 33, 48, 64, 65)
BLOCKS = (127, 128, 129, 256, 257)
"""Numbers of channels near the block of one running sum."""
LARGEST = (100_000,) * 9 + (1_000_000,)
"""Multiplications in one layer: every tenth layer is above the size from which kernels start a second thread."""

Way = tuple[str, str, str]
Execute = Callable[[Sequence[Buffer]], Any]

SKIPPED = 0.5
"""Share of its layers that each kernel leaves to the others, by the layer's seed."""
SHARES = {DType.float32: 0.7, DType.float64: 0.1, DType.float16: 0.1, DType.bfloat16: 0.1}
EPS = {DType.float32: 2.0**-23, DType.float64: 2.0**-52, DType.float16: 2.0**-23, DType.bfloat16: 2.0**-23}
"""Machine epsilon of the sums. Sixteen-bit results are rounded once more."""
ROUNDING = {DType.float32: 2.0**-24, DType.float64: 2.0**-53, DType.float16: 2.0**-11, DType.bfloat16: 2.0**-8}


ALSO = {
    False: """
    lengthwise NCL CFS: float32
    lengthwise NCL FSC: float32
    lengthwise NCL SCF: float32 float64
    lengthwise NCL SFC: float32
    lengthwise NLC CFS: float32
    lengthwise NLC FCS: float32
    lengthwise NLC FSC: float32
    lengthwise NLC SFC: float32
    winograd NCL FCS: float32
    winograd NCL SCF: float16 float32
    winograd NLC SCF: float16 float32
    """,
    True: """
    dense NLC FSC: float32
    depthwise NLC FSC: float32
    depthwise NLC SFC: float32
    lengthwise NCL CFS: bfloat16 float16 float32 float64
    lengthwise NLC FSC: float32
    lengthwise NLC SFC: float32
    short NLC FSC: float32
    short NLC SFC: float16 float32 float64
    winograd NCL SFC: float16 float32
    winograd NLC SFC: float16 float32
    """,
}
"""Kinds of plain and of transposed convolutions that other files run: kernel, layouts, dtypes. Compiled with the rest."""


def compiles(way: Way, dtype: DType) -> bool:
    """Returns whether a kernel exists for a dtype."""
    if way[0] in ("paired", "amx"):
        return dtype == DType.bfloat16 and (has_pairs() if way[0] == "paired" else has_tiles())
    return dtype in (DType.float32, DType.float64) or (way[2] != "packed" and way[:2] != ("depthwise", "NCL"))


def to_bits(values: np.ndarray, dtype: DType) -> np.ndarray:
    """Returns values in the dtype's own bits; bfloat16 as uint16, rounded by truncation."""
    if dtype == DType.bfloat16:
        return (np.ascontiguousarray(values, np.float32).view(np.uint32) >> 16).astype(np.uint16)
    return np.ascontiguousarray(values, dtype.to_numpy())


def from_bits(bits: np.ndarray, dtype: DType) -> np.ndarray:
    if dtype == DType.bfloat16:
        return (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return bits.astype(np.float64)


def kinds_of(ways: Mapping[Way, bool]) -> dict[tuple[DType, Way], Kind]:
    """Returns a kind for each dtype and way; the way's value is whether it is a transposed convolution.

    A kernel that would fall back to another one is made to compute all layers.
    """
    return {
        (dtype, way): Kind.of(Form(*way, transposed, least=0), dtype)
        for dtype in SHARES
        for way, transposed in ways.items()
        if compiles(way, dtype)
    }


def compile_ways(ways: Mapping[Way, bool]) -> dict[tuple[DType, Way], Execute]:
    """Returns the function that runs each kind; see `kinds_of`."""
    wanted = kinds_of(ways)
    transposed = any(ways.values())
    also = []
    for line in ALSO[transposed].split("\n"):
        words, _, dtypes = line.partition(":")
        if words.strip():
            kernel, layout, filter_layout = words.split()
            form = Form(kernel, layout, filter_layout, transposed)
            also += [Kind.of(form, DType[dtype]) for dtype in dtypes.split()]
    return {key: found.execute for key, found in zip(wanted, ready(*wanted.values(), *also), strict=False)}


def operands_of(x: Buffer, filter: Buffer, bias: Buffer, numbers: Sequence[int], shape: Sequence[int]) -> list[Buffer]:
    """Returns the inputs of a kind's graph; the output's shape is (N, L_out, F)."""
    geometry, sizes = np.array(numbers, np.int64), np.empty((*shape[1:], 0), np.int8)
    return [x, filter, bias, Buffer.from_numpy(geometry), Buffer.from_numpy(sizes)]


def guarded(bits: np.ndarray, dtype: DType, offset: int) -> Buffer:
    """Returns a buffer with NaN values before and after it, at any alignment."""
    nan = to_bits(np.array([np.nan]), dtype)
    room = np.full(2 * GUARD + offset + bits.size, nan, bits.dtype)
    inside = room[GUARD + offset : GUARD + offset + bits.size].reshape(bits.shape)
    inside[...] = bits
    return Buffer.from_numpy(inside).view(dtype, list(bits.shape))


def answer(execute: Execute, inputs: list[Buffer], dtype: DType) -> np.ndarray:
    """Runs a kind three times and returns its output, which must not change."""
    carrier = DType.uint16 if dtype == DType.bfloat16 else dtype
    first, *more = [out.view(carrier, out.shape).to_numpy() for (out,) in (execute(inputs) for _ in range(3))]
    for again in more:
        assert first.tobytes() == again.tobytes(), "the same call gave two answers"
    return from_bits(first, dtype)


def check_answer(
    name: str, out: np.ndarray, want: np.ndarray, dtype: DType, kernel: str, terms: tuple[int, int], scale: float
) -> None:
    """Compares with the reference. An output sums `terms`, taps and channels; `scale` bounds products and bias."""
    assert out.shape == want.shape, name
    # Winograd's transforms lose digits for any number of channels: it is chosen from 32 on.
    count = terms[0] * max(terms[1], 32 if kernel == "winograd" else 1)
    rounding = ROUNDING[dtype] * np.abs(want) + 2.0**-24 * (dtype == DType.float16)
    bound = 4 * EPS[dtype] * math.sqrt(count) * scale + rounding
    wrong = ~(np.abs(out - want) <= bound)  # NaN is wrong, too
    assert not wrong.any(), f"{name}: {wrong.sum()} of {wrong.size} wrong, first at {np.argwhere(wrong)[0]}"


def run_layers(layers: st.SearchStrategy[Any], compare: Callable[[Any, DType], None], dtype: DType, count: int) -> None:
    """Compares random layers, as many as the share of `dtype` in `count`."""
    examples = math.ceil(count * SHARES[dtype])
    ran = 0

    @settings(
        max_examples=examples,
        derandomize=count <= DEFAULT,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate, Phase.shrink],
    )
    @given(layers)
    def check(layer: Any) -> None:
        nonlocal ran
        ran += 1
        compare(layer, dtype)

    check()
    assert ran >= examples
