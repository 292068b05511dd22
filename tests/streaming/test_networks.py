"""Networks of the gallery, live in chunks of any size and ragged, against their own answer to each whole signal."""

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from math import floor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from max_conv.graphs import hifigan, tcn, wav2vec2

import max_conv
from max_conv.serving import open_network
from max_conv.serving.live import LiveServed
from max_conv.serving.metrics import Metrics
from max_conv.serving.protocol import Request
from max_conv.serving.served import Options, Served, Whole
from max_conv.streaming import RaggedGraph, Stream, Timing

VOCODER = hifigan.Config(
    mels=20, channels=32, rates=(4, 2), rate_kernel_sizes=(8, 4), kernel_sizes=(3, 7), dilations=((1,), (3,))
)
TCN = tcn.Config(inputs=20, channels=(32, 32), kernel_size=3)
FEATURES = wav2vec2.Config(channels=(32,) * 3, kernel_sizes=(10, 3, 2), strides=(5, 2, 2), norm="layer", hidden=32)


@dataclass(frozen=True)
class Case:
    """A network, and the shape of a position of each of its inputs.

    Attributes:
        positions: One for each input.
        shortest: The length of its shortest signal.
    """

    build: Callable[..., Any]
    config: Any
    positions: tuple[tuple[int, ...], ...] = ((),)
    shortest: int = 40

    @property
    def name(self) -> str:
        return self.build.__module__.rpartition(".")[2]


CASES = [
    Case(hifigan.build, VOCODER, ((20,),)),
    Case(tcn.build, TCN, ((20,),)),
    Case(wav2vec2.build_features, FEATURES, shortest=100),
]
NAMES = [case.name for case in CASES]
FORMS = ("live", "ragged", "whole")


def weights_of(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """Returns random weights with which signals neither vanish nor explode."""
    rng, weights = np.random.default_rng(5), {}
    for name, shape in shapes.items():
        if name.endswith("window"):
            weights[name] = np.hanning(shape[0]).astype(np.float32)
        elif name.endswith(("alpha", "gamma")) or ("norm" in name and name.endswith("weight")):
            weights[name] = rng.uniform(0.5, 1.5, shape).astype(np.float32)
        else:
            size = 0.1 if len(shape) == 1 else 1 / np.sqrt(np.prod(shape[:-1]))
            weights[name] = (size * rng.standard_normal(shape)).astype(np.float32)
    return weights


def graphs() -> dict[str, tuple[max_conv.PackedGraph, dict[str, np.ndarray]]]:
    """Returns every network live, ragged and whole."""
    found: dict[str, tuple[max_conv.PackedGraph, dict[str, np.ndarray]]] = {}
    for case in CASES:
        weights = weights_of(case.config.shapes())
        found[f"{case.name}, live"] = max_conv.streaming(case.build, case.config, weights), weights
        found[f"{case.name}, ragged"] = case.build(case.config, weights, ragged=True), weights
        found[f"{case.name}, whole"] = case.build(case.config, weights), weights
    return found


def signal(case: Case, rng: np.random.Generator, length: int) -> list[np.ndarray]:
    """Returns a signal: a row of each input."""
    return [rng.standard_normal((length, *shape)).astype(np.float32) for shape in case.positions]


def as_tuple(result: Any) -> tuple[np.ndarray, ...]:
    return result if isinstance(result, tuple) else (result,)


def answers(stream: Stream, signals: list[list[np.ndarray]], rng: np.random.Generator) -> list[list[np.ndarray]]:
    """Pushes signals of different length, in chunks of any size; returns each signal's outputs."""
    size, at = [len(inputs[0]) for inputs in signals], [0] * len(signals)
    pieces: list[list[list[np.ndarray]]] = [[] for _ in signals]
    while any(n < end for n, end in zip(at, size, strict=True)):
        counts = [min(end - n, int(rng.choice([0, 1, 3, 20, 70]))) for n, end in zip(at, size, strict=True)]
        chunks = []
        for kind, array in enumerate(signals[0]):
            chunk = np.full((len(signals), max(counts), *array.shape[1:]), np.nan, np.float32)
            for row, (n, count) in enumerate(zip(at, counts, strict=True)):
                chunk[row, :count] = signals[row][kind][n : n + count]
            chunks.append(chunk)
        last = np.array([n + count == end > n for n, count, end in zip(at, counts, size, strict=True)])
        results = as_tuple(stream.push(*chunks, last=last, lengths=np.array(counts)))
        for row, count in enumerate(counts):
            pieces[row].append([result[row, : stream.lengths[row]] for result in results])
            at[row] += count
    return [[np.concatenate(parts) for parts in zip(*row, strict=True)] for row in pieces]


def near(got: np.ndarray, want: np.ndarray, message: str) -> None:
    assert got.shape == want.shape, f"{message}: {got.shape}, not {want.shape}"
    off = np.abs(got - want).max(initial=0)
    assert off <= 1e-5 * np.abs(want).max(initial=1e-30), f"{message}: off by {off:.2g}"


@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_a_network_in_chunks_is_the_network(case: Case, models: dict[str, max_conv.Model]) -> None:
    live, _, whole = (models[f"{case.name}, {form}"] for form in FORMS)
    rng = np.random.default_rng(3)
    stream = live.stream(2)
    # Signals that are given up leave no state.
    stream.push(*(np.stack([array, 1e3 * array]) for array in signal(case, rng, 55)))
    for _ in range(2):
        stream.reset()
        signals = [signal(case, rng, case.shortest + int(rng.integers(0, 60))) for _ in range(2)]
        for row, (got, given) in enumerate(zip(answers(stream, signals, rng), signals, strict=True)):
            want = as_tuple(whole(*(array[None] for array in given)))
            for number, (one, other) in enumerate(zip(got, want, strict=True)):
                near(one, other[0], f"{case.name}, row {row}, output {number}")


@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_the_delay_is_the_least_possible(case: Case, models: dict[str, max_conv.Model]) -> None:
    timing = models[f"{case.name}, live"].timing
    assert isinstance(timing, Timing)
    assert timing.lookahead is not None
    assert timing.delay == floor(timing.lookahead * timing.per_tick / timing.tick)


@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_a_ragged_batch_is_its_signals_one_by_one(case: Case, models: dict[str, max_conv.Model]) -> None:
    _, ragged, whole = (models[f"{case.name}, {form}"] for form in FORMS)
    rng = np.random.default_rng(4)
    lengths = [case.shortest + extra for extra in (0, 37, 60, 11)]
    signals = [signal(case, rng, length) for length in lengths]
    batch = []
    for kind, array in enumerate(signals[0]):
        room = np.full((len(signals), max(lengths) + 5, *array.shape[1:]), np.nan, np.float32)
        for row, inputs in zip(room, signals, strict=True):
            row[: len(inputs[kind])] = inputs[kind]
        batch.append(room)
    results = as_tuple(ragged(*batch, np.array(lengths)))
    for row, given in enumerate(signals):
        for result, want in zip(results, as_tuple(whole(*(array[None] for array in given))), strict=True):
            own = want[0]
            np.testing.assert_array_equal(result[row, : len(own)], own, err_msg=f"{case.name}, row {row}")
            assert not result[row, len(own) :].any(), f"{case.name}, row {row}: not zero after its end"


async def asked(served: Served, signals: list[list[np.ndarray]]) -> list[dict[str, np.ndarray]]:
    """Returns a served model's answers to signals that come at the same time."""
    served.start()
    names = [name for name, spec in served.inputs.items() if spec.needed]
    calls = [served.infer(Request([]), {n: x[None] for n, x in zip(names, given)}) for given in signals]
    try:
        return await asyncio.gather(*calls)
    finally:
        served.stop()


class Counted:
    """A ragged model with its inputs' names, which counts the rows of its calls."""

    def __init__(self, model: max_conv.Model) -> None:
        *inputs, lengths = model.inputs
        self.model, self.rows = model, list[int]()
        self.inputs, self.outputs = (*inputs, replace(lengths, name="lengths")), model.outputs
        self.timing, self.facts = model.timing, model.facts

    def __call__(self, *arrays: np.ndarray) -> Any:
        self.rows.append(len(arrays[0]))
        return self.model(*arrays)


@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_callers_of_a_server_get_what_they_would_get_alone(case: Case, models: dict[str, max_conv.Model]) -> None:
    """Ragged to the bit, live within the bound; a signal of NaN among them touches nobody."""
    live, ragged, whole = (models[f"{case.name}, {form}"] for form in FORMS)
    rng = np.random.default_rng(6)
    signals = [signal(case, rng, case.shortest + extra) for extra in (0, 37, 60, 11, 60, 200)]
    signals[2] = [np.full_like(array, np.nan) for array in signals[2]]
    counted: Any = Counted(ragged)
    batched = asyncio.run(asked(Whole("m", counted, Options(), Metrics()), signals))
    streamed = asyncio.run(asked(LiveServed("m", live, Options(), Metrics()), signals))
    assert max(counted.rows) > 1, "requests share a call"
    for row, given in enumerate(signals):
        wants = as_tuple(whole(*(array[None] for array in given)))
        for got, pieces, want in zip(batched[row].values(), streamed[row].values(), wants):
            np.testing.assert_array_equal(got, want, err_msg=f"{case.name}, row {row}")
            if row != 2:
                near(pieces, want, f"{case.name}, row {row}")


def test_a_ragged_network_is_opened_and_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, models: dict[str, max_conv.Model]
) -> None:
    """The network is compiled already, with others, so it is not compiled again here."""
    from safetensors.numpy import save_file

    ragged = models["tcn, ragged"]
    graphs = []

    def compiled(graph: RaggedGraph, **_: Any) -> max_conv.Model:
        graphs.append(graph)
        return ragged

    monkeypatch.setattr("max_conv.runtime.compile", compiled)
    weights = weights_of(TCN.shapes())
    save_file({name: np.ascontiguousarray(value.T) for name, value in weights.items()}, tmp_path / "w.safetensors")
    model = open_network("tcn", TCN, weights=tmp_path / "w.safetensors", ragged=True).model
    assert isinstance(graphs[0], RaggedGraph) and graphs[0].input_names[-1] == "lengths"
    model.save(tmp_path / "tcn.maxconv")
    again = open_network("tcn", TCN, saved=tmp_path / "tcn.maxconv", ragged=True).model
    assert again.facts == {"ragged": True, "network": "tcn", "kind": "features", "rate": 0}
    x, lengths = np.random.default_rng(7).standard_normal((2, 50, 20)).astype(np.float32), np.array([50, 41])
    np.testing.assert_array_equal(again(x, lengths), model(x, lengths))
    with pytest.raises(ValueError, match="is a ragged model, which `max-conv serve` runs"):
        open_network("tcn", TCN, saved=tmp_path / "tcn.maxconv")
    with pytest.raises(ValueError, match="live models need no --ragged"):
        open_network("tcn", TCN, weights=tmp_path / "w.safetensors", ragged=True, live=True)
    with pytest.raises(ValueError, match="silero_vad: has no ragged form"):
        open_network("silero_vad", ragged=True)
