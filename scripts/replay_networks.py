"""The networks of graphs/ that replay.py records: few layers, but the published channels, which decide the kernels.

Weights and inputs are random.
"""

import importlib
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from max.driver import Buffer


@dataclass(frozen=True)
class Network:
    """A network that is recorded.

    Attributes:
        inputs: The shapes of the inputs; inputs that are codes have integers.
        config: The differences from the published config.
        graph: The module in graphs/, if its name differs from the network's.
        dtype: The dtype that the network computes in.
    """

    inputs: Sequence[tuple[int, ...]]
    config: Mapping[str, Any] = field(default_factory=dict)
    graph: str = ""
    dtype: str = "float32"


TWO_BOOKS = {"codebooks": 2, "quantizers": 2}
NETWORKS = {
    "silero_vad": Network([(2, 3, 512), (2, 320)]),
    "crepe": Network([(2, 1500)]),
    "mamba": Network([(2, 37, 768)], {"layers": 1}),
    "tcn": Network([(2, 50, 80)], {"channels": (256, 256, 256)}),
    "whisper": Network([(2, 101, 80)], {"layers": 1}),
    "vocos": Network([(2, 30, 100)], {"layers": 1}),
    "wav2vec2": Network([(2, 6000)]),
    "pesto": Network([(2, 3000)]),
    "univnet": Network([(2, 9, 100), (2, 9, 64)], {"dilations": ((1, 27),) * 3, "predictor_blocks": 1}),
    "hifigan": Network([(2, 9, 80)], {"kernel_sizes": (3, 11), "dilations": ((1, 3), (1, 5))}),
    "dac": Network([(2, 1100)], {"ratios": (2, 8), "decoder_channels": 384, **TWO_BOOKS}),
    "encodec": Network([(2, 3300)], {"lstm_layers": 1, **TWO_BOOKS}),
    "silero_vad_bfloat16": Network([(2, 3, 512), (2, 320)], graph="silero_vad", dtype="bfloat16"),
    "tcn_bfloat16": Network([(2, 50, 80)], {"channels": (256, 256)}, "tcn", "bfloat16"),
}


def weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Returns a random weight with which signals neither vanish nor explode."""
    random = np.random.default_rng(zlib.crc32(name.encode()))
    if name.endswith(("alpha", "running_var", "window")):
        return (0.5 + random.random(shape)).astype(np.float32)
    values = random.standard_normal(shape)
    if name == "stft_conv.weight":
        return mirrored(values[:, 0]).astype(np.float32)[:, None] / 16
    last = name.rpartition(".")[2]
    if last in ("bias", "gamma", "shift", "running_mean") or last.startswith("bias_"):
        return (0.1 * values).astype(np.float32)
    if len(shape) < 2 or "norm" in name:
        return (1 + 0.1 * values).astype(np.float32)
    terms = shape[1] if len(shape) == 2 else shape[0] * shape[1]
    return (values / np.sqrt(terms)).astype(np.float32)


def mirrored(values: np.ndarray) -> np.ndarray:
    """Returns values with the symmetries of a windowed Fourier transform, which Silero's kernel uses."""
    turns = np.where(np.arange(len(values)) % 2, -1, 1)[:, None]
    halves = []
    for waves, sign in zip(np.split(values, 2, axis=1), (1, -1), strict=True):
        waves = waves + sign * np.roll(waves[::-1], 1, axis=0)
        halves.append(waves + sign * turns * waves[:, ::-1])
    return np.concatenate(halves, axis=1)


def outputs(name: str) -> "Sequence[Buffer]":
    """Compiles and runs a network."""
    from max.driver import Buffer
    from max.dtype import DType

    import max_conv

    network = NETWORKS[name]
    module = importlib.import_module(f"max_conv.graphs.{network.graph or name}")
    config = module.Config(**network.config)
    weights = {key: weight(key, shape) for key, shape in config.shapes().items()}
    graph = module.build(config, weights, dtype=DType[network.dtype])
    random = np.random.default_rng(0)
    inputs = [random.standard_normal(shape).astype(np.float32) for shape in network.inputs]
    made = max_conv.compile(graph, weights=weights)(*map(Buffer.from_numpy, inputs))
    made = made if isinstance(made, tuple) else (made,)
    for values in (output.to_numpy() for output in made):
        # Otherwise any kernel would give the same output.
        if not np.isfinite(values).all() or values.min() == values.max():
            raise ValueError(f"replay: {name} makes nothing of random weights; change how they are drawn.")
    return made
