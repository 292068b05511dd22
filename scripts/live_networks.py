"""The networks that bench.py --streaming races: their sizes, random weights, and signals."""

import fnmatch
import functools
import importlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np


@dataclass(frozen=True)
class Network:
    """A network of the race.

    Attributes:
        graph: The module of the graphs, and the function in it that builds ours.
        rate: Input positions per second.
        seconds: The length of the signal that is pushed.
        contenders: The contenders that take part.
        options: The arguments of the module's `Config`.
        codes: The number of codes, for a network that reads codes.
    """

    graph: tuple[str, str]
    rate: float
    seconds: float
    contenders: tuple[str, ...]
    options: dict[str, Any] = field(default_factory=dict)
    codes: int = 0

    @property
    def axis(self) -> int:
        """The axis of the positions, in our input; outputs are (batch, positions, ...)."""
        return 2 if self.codes else 1

    @property
    def length(self) -> int:
        """Positions of the signal."""
        return round(self.seconds * self.rate)

    def positions(self, milliseconds: float) -> int:
        """Returns the positions of a chunk that comes nearest to some milliseconds."""
        return max(1, round(milliseconds * self.rate / 1e3))


class Facts(NamedTuple):
    """The facts that contenders need about a network.

    Attributes:
        left, right: Input positions before and after its own that an output depends on; None is without limit.
        first: Positions that the first call must bring.
        state: Bytes of a stream.
        hop: Output positions per input position.
    """

    left: int | None
    right: int | None
    first: int
    state: int
    hop: int

    def write(self, folder: Path) -> None:
        (folder / "facts.json").write_text(json.dumps(self._asdict()))

    @classmethod
    def read(cls, folder: Path) -> "Facts":
        return cls(**json.loads((folder / "facts.json").read_text()))


OVERLAP = ("PyTorch overlap", "ONNX Runtime overlap")
STATE = ("PyTorch cat", "Moshi", "ONNX Runtime state")
OURS = ("max_conv", "max_conv whole")
NETWORKS = {
    "HiFi-GAN V1": Network(("hifigan", "build"), 22050 / 256, 3.91, OURS + OVERLAP),
    "EnCodec decoder": Network(("encodec", "build_decoder"), 75, 9.92, OURS + STATE, codes=1024),
    "TCN": Network(
        ("tcn", "build"),
        100,
        9.92,
        (*OURS, *STATE, *OVERLAP, "MAX empty call"),
        {"inputs": 20, "channels": (32, 32, 32), "kernel_size": 3},
    ),
}
"""HiFi-GAN reads later inputs, so its peers compute overlaps again. EnCodec's LSTM remembers all, so they cannot."""


def module_of(name: str) -> Any:
    return importlib.import_module(f"max_conv.graphs.{NETWORKS[name].graph[0]}")


def config_of(name: str) -> Any:
    return module_of(name).Config(**NETWORKS[name].options)


@functools.cache
def weights_of(name: str) -> dict[str, np.ndarray]:
    """Returns random native weights with which signals neither vanish nor explode."""
    random, weights = np.random.default_rng(0), {}
    transposed = module_of(name).LAYERS.conv_transpose
    for key, shape in config_of(name).shapes().items():
        if len(shape) == 1:
            scale = 0.1
        elif key.endswith("embed"):
            scale = 0.3
        elif any(fnmatch.fnmatch(key, pattern) for pattern in transposed):
            scale = (2 * shape[2]) ** -0.5  # taps are twice the stride: an output depends on two inputs
        else:
            scale = float(np.prod(shape[:-1]) if len(shape) == 3 else shape[1]) ** -0.5
        weights[key] = (random.standard_normal(shape) * scale).astype(np.float32)
    return weights


def signal_of(name: str) -> np.ndarray:
    """Returns the signal, in the layout of our input."""
    network, config, random = NETWORKS[name], config_of(name), np.random.default_rng(1)
    if network.codes:
        return random.integers(0, network.codes, (1, config.quantizers, network.length))
    channels = getattr(config, "mels", None) or config.inputs
    return random.standard_normal((1, network.length, channels)).astype(np.float32)


def cut(signal: np.ndarray, axis: int, start: int, stop: int | None = None) -> np.ndarray:
    """Returns a copy of some positions."""
    return np.ascontiguousarray(signal[(slice(None),) * axis + (slice(start, stop),)])
