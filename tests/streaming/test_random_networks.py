"""Random networks live, in random chunks, against themselves on the whole signal; both run with NumPy.

So the tracing is tested: lines, delays, windows, joins. `tests/conv/` tests the kernels live, `test_networks.py` both together.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from max.dtype import DType
from max.graph import DeviceRef, TensorType, TensorValue, Weight, ops

import max_conv
from interpreter import Interpreter
from max_conv import PackedGraph, conv1d, conv_transpose1d
from max_conv.conv import signals
from max_conv.streaming import Stream
from max_conv.streaming.timing import Chunk

CHANNELS = 4
NETWORKS = 200
CPU = DeviceRef.CPU()


class Network:
    """A random network of 3 to 8 layers: strides down and up, branches of different lookahead, sums, activations."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self.weights: dict[str, np.ndarray] = {}

    def __call__(self, x: TensorValue) -> TensorValue:
        self._random, self._count = np.random.default_rng(self._seed), 0
        layers = int(self._random.integers(3, 9))
        while self._count < layers:
            step = self._random.integers(4)
            if step == 0:
                x = x + self._same(self._same(x))
            elif step == 1:
                x = x + self._down_and_up(x)
            elif step == 2:
                both = ops.concat([x, self._same(x)], axis=2)
                x = conv1d(both, self._filter((1, 2 * CHANNELS, CHANNELS)))
            else:
                x = self._strided(x)
            x = ops.tanh(x)
        return x

    def _filter(self, shape: tuple[int, ...]) -> Weight:
        self._count += 1
        name = f"layer{self._count}"
        scale = np.float32(1 / np.sqrt(shape[0] * shape[-2 if len(self.weights) else 1]))
        self.weights.setdefault(name, scale * np.random.default_rng(self._count).standard_normal(shape, np.float32))
        return Weight(name, DType.float32, shape, CPU)

    def _same(self, x: TensorValue) -> TensorValue:
        """A layer that keeps the length."""
        taps, dilation = int(self._random.integers(1, 6)), int(self._random.choice([1, 1, 2, 3]))
        over = dilation * (taps - 1)
        left = int(self._random.choice([over, 0, over // 2, int(self._random.integers(0, over + 1))]))
        mode = str(self._random.choice(["zeros", "zeros", "replicate", "reflect"]))
        groups = int(self._random.choice([1, 2, CHANNELS]))
        filter = self._filter((taps, CHANNELS // groups, CHANNELS))
        padding = (left, over - left)
        return conv1d(x, filter, padding=padding, dilation=dilation, groups=groups, padding_mode=mode)

    def _strided(self, x: TensorValue) -> TensorValue:
        """A layer down or up, with any padding."""
        taps, stride = int(self._random.integers(1, 7)), int(self._random.integers(1, 4))
        left, right = (int(v) for v in self._random.integers(0, taps + 1, 2))
        if self._random.integers(2):
            return conv1d(x, self._filter((taps, CHANNELS, CHANNELS)), stride=stride, padding=(left, right))
        filter = self._filter((taps, CHANNELS, CHANNELS))
        spare = int(self._random.integers(0, stride))
        return conv_transpose1d(x, filter, stride=stride, padding=(left // 2, right // 2), output_padding=spare)

    def _down_and_up(self, x: TensorValue) -> TensorValue:
        """Two layers, down and up again, and as many positions as before."""
        stride = int(self._random.integers(2, 4))
        left, right = (int(v) for v in self._random.integers(0, stride + 1, 2))
        filter = self._filter((2 * stride, CHANNELS, CHANNELS))
        down = ops.tanh(conv1d(x, filter, stride=stride, padding=(left, right + 2 * stride)))
        return signals().as_long_as(
            conv_transpose1d(down, self._filter((2 * stride, CHANNELS, CHANNELS)), stride=stride), x
        )


def stream_of(graph: Any, run: Callable[..., Any], batch: int) -> Stream:
    per_position = Chunk("x", "float32", (None, None, CHANNELS), 1)
    return Stream(run, graph.timing, [per_position], [per_position], batch)


@pytest.mark.parametrize("part", range(8))
def test_random_networks(part: int) -> None:
    types = [TensorType(DType.float32, ["batch", "length", CHANNELS], CPU)]
    for seed in range(part, NETWORKS, 8):
        network = Network(seed)
        graph = max_conv.streaming(network, types)
        whole = Interpreter(PackedGraph("whole", network, input_types=types), network.weights)
        live = Interpreter(graph, network.weights)
        random = np.random.default_rng(seed)
        timing = graph.timing
        shortest = 60 + timing.tick * timing.first
        given = [
            random.standard_normal((n, CHANNELS)).astype(np.float32)
            for n in random.integers(shortest, shortest + 40, 2)
        ]
        stream = stream_of(graph, live, 2)
        stream._state[...] = 0xFF
        found: list[list[np.ndarray]] = [[], []]
        at, restart = [0, 0], bool(random.integers(2))
        while any(n < len(signal) for n, signal in zip(at, given, strict=True)):
            counts = [min(len(s) - n, int(random.choice([1, 2, 9, 30]))) for n, s in zip(at, given, strict=True)]
            chunk = np.full((2, max(counts), CHANNELS), np.nan, np.float32)
            for n, count in enumerate(counts):
                chunk[n, :count] = given[n][at[n] : at[n] + count]
            last = np.array([0 < count == len(s) - n for n, count, s in zip(at, counts, given, strict=True)])
            got = stream.push(chunk, last=last, lengths=np.array(counts))
            for n, count in enumerate(counts):
                at[n] += count
                found[n].append(got[n, : stream.lengths[n]])
            if restart and at[1] > 20 and not last[1]:
                restart, at[1], found[1] = False, 0, []
                stream.reset([1])
        for n, signal in enumerate(given):
            (want,) = whole(signal[None])
            have = np.concatenate(found[n])
            assert have.shape == want[0].shape, f"network {seed}, row {n}: {have.shape}, not {want[0].shape}"
            off = np.abs(have - want[0]).max(initial=0)
            assert off <= 1e-5, f"network {seed}, row {n}: off by {off:.2g}"
