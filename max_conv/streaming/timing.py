"""The facts about a live network before it runs: its ticks, its latency and the memory of a signal."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from fractions import Fraction
from typing import Any

from ..conv.lines import Line


@dataclass(frozen=True)
class Signal:
    """An output of a live network: the axis of its positions, and when they are available."""

    axis: int
    line: Line


@dataclass(frozen=True)
class Chunk:
    """An input or output of a live model: its name, dtype and shape, with None for batch and positions."""

    name: str
    dtype: str
    shape: tuple[int | None, ...]
    axis: int
    """The axis of the positions."""


@dataclass(frozen=True)
class Timing:
    """When a live network's outputs are available.

    Attributes:
        tick: Input positions that are computed together: each call gets a multiple of it.
        first: Ticks that the first call of a signal must bring, because layers mirror the begin.
        axes: The axis of the positions of each input.
        outputs: The network's outputs.
        state: Bytes of the state of one signal.
        lookahead: Input positions after its own that an output depends on; None means without limit.
        field: Input positions that an output depends on; None means without limit.
        rate: Samples per second of the sound that the network reads or makes, if it is known.
    """

    tick: int
    first: int
    axes: tuple[int, ...]
    outputs: tuple[Signal, ...]
    state: int
    lookahead: Fraction | None
    field: int | None
    rate: int | None = None

    @property
    def per_tick(self) -> int:
        """Positions of the first output that a tick brings."""
        return self.outputs[0].line.per_tick

    @property
    def delay(self) -> int:
        """How many positions the first output is late."""
        return self.outputs[0].line.delay

    @property
    def latency(self) -> int:
        """The most input positions, from an output's own position on, that must come before it is available."""
        lines = [signal.line for signal in self.outputs]
        return max(-(-line.delay * self.tick // line.per_tick) + self.tick for line in lines)

    @property
    def milliseconds(self) -> float | None:
        """The latency in milliseconds; None if the rate is not known."""
        return None if self.rate is None else 1e3 * self.latency / self.positions_per_second

    @property
    def positions_per_second(self) -> float:
        """Input positions per second. `rate` belongs to the sound that is read or made, the faster side."""
        assert self.rate is not None, "the rate is known"
        return float(self.rate * min(Fraction(self.tick, self.per_tick), Fraction(1)))

    def ticks(self, end: int) -> int:
        """Returns after how many ticks all outputs of a signal of `end` positions are available."""
        return max(signal.line.ticks(end) for signal in self.outputs)

    def to_json(self) -> dict[str, Any]:
        """Returns the values for `from_json`."""
        return asdict(self) | {"lookahead": None if self.lookahead is None else str(self.lookahead)}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Timing":
        """Returns the timing from the values that `to_json` returned."""
        outputs = []
        for signal in values["outputs"]:
            line = signal["line"] | {"steps": tuple(tuple(step) for step in signal["line"]["steps"])}
            outputs.append(Signal(signal["axis"], Line(**line)))
        lookahead = None if values["lookahead"] is None else Fraction(values["lookahead"])
        own = {"axes": tuple(values["axes"]), "outputs": tuple(outputs), "lookahead": lookahead}
        return cls(**{**values, **own})
