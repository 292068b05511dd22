"""The other networks of the gallery live, in random chunks, against themselves on the whole signal; both run with NumPy.

`test_networks.py` compiles some.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from max_conv.graphs import crepe, dac, encodec, mamba, univnet, vocos
from test_networks import Case, answers, as_tuple, signal, weights_of

import max_conv
from interpreter import Interpreter
from max_conv.streaming import Stream
from max_conv.streaming.timing import Chunk

UNIVNET = univnet.Config(
    mels=10,
    noise=8,
    channels=8,
    rates=(2, 3),
    kernel_sizes=(3, 3),
    dilations=((1, 3), (1, 3)),
    predictor_blocks=1,
    predictor_channels=8,
)
DAC = dac.Config(channels=2, decoder_channels=4, ratios=(3,), codebooks=2, quantizers=2, codebook_size=16)
ENCODEC = encodec.Config(channels=4, ratios=(4, 3, 2, 2), hidden=16, codebooks=2, codebook_size=32, quantizers=2)
VOCOS = vocos.Config(mels=20, channels=16, hidden=32, layers=2, window=64, hop=16)
MAMBA = mamba.Config(hidden=16, intermediate=32, layers=1)


@dataclass(frozen=True)
class Numpy(Case):
    """A network that NumPy runs."""

    def models(self) -> tuple[Callable[[int], Stream], Callable[..., Any]]:
        """Returns the function that makes streams of the network, and the whole network."""
        weights = weights_of(self.config.shapes())
        graph = max_conv.streaming(self.build, self.config, weights)
        live, whole = Interpreter(graph, weights), Interpreter(self.build(self.config, weights), weights)
        chunks = [Chunk("x", "float32", (None, None, *shape), 1) for shape in self.positions]
        results = [Chunk("y", "float32", shape_of(type_), 1) for type_ in graph.output_types[:-1]]

        def stream(batch: int) -> Stream:
            return Stream(live, graph.timing, chunks, results, batch)

        return stream, lambda *arrays: whole(*arrays)


def shape_of(type_: Any) -> tuple[int | None, ...]:
    """Returns an output's shape, with None for batch and positions, its first axes."""
    return (None, None, *(int(size) for size in type_.shape[2:]))


CASES = [
    Numpy(univnet.build, UNIVNET, ((10,), (8,)), 20),
    Numpy(vocos.build, VOCOS, ((20,),)),
    Numpy(mamba.build, MAMBA, ((16,),)),
    Numpy(encodec.build, ENCODEC, shortest=48 * 8),
    Numpy(dac.build, DAC, shortest=60),
]


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_a_network_in_chunks_is_the_network(case: Numpy) -> None:
    make, whole = case.models()
    rng = np.random.default_rng(3)
    stream = make(2)
    stream._state[...] = 0xFF
    signals = [signal(case, rng, case.shortest + int(rng.integers(0, 30))) for _ in range(2)]
    for row, (got, given) in enumerate(zip(answers(stream, signals, rng), signals, strict=True)):
        for number, (one, want) in enumerate(zip(got, as_tuple(tuple(whole(*(a[None] for a in given)))), strict=True)):
            assert one.shape == want[0].shape, f"row {row}, output {number}: {one.shape}, not {want[0].shape}"
            off = np.abs(one - want[0]).max()
            assert off <= 1e-5 * np.abs(want).max(), f"row {row}, output {number}: off by {off:.2g}"


def test_crepe_live_has_the_frames_of_the_whole_sound() -> None:
    config = crepe.Config()
    weights = {name: np.broadcast_to(np.float32(0), shape) for name, shape in config.shapes().items()}
    timing = max_conv.streaming(crepe.build, config, weights).timing
    assert (timing.tick, timing.delay, timing.per_tick) == (160, 6, 1)
    for samples in (1024, 1183, 1184, 16000):
        assert timing.outputs[0].line.length(samples) == (samples - 1024) // 160 + 1
