"""The arithmetic, the contenders and the tables of the race of live networks. Nothing is compiled, and nothing is timed."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

import bench
import live_networks
import live_racers
import streams
from live_contenders import CONTENDERS, Overlap, Peer
from live_networks import NETWORKS, Facts, config_of, cut, signal_of, weights_of

FACTS = Facts(left=3, right=2, first=1, state=64, hop=2)
SILENT = {"failed": "crashed", "why": "SIGSEGV"}


def told(*rounds: Sequence[float]) -> dict[str, Any]:
    return {"rounds": [list(one) for one in rounds], "threads": 1}


def test_every_network_has_its_contenders() -> None:
    for name, network in NETWORKS.items():
        assert set(network.contenders) <= CONTENDERS.keys()
        assert network.positions(streams.CHUNKS[0]) >= 1
        assert signal_of(name).shape[network.axis] == network.length
    assert NETWORKS["EnCodec decoder"].positions(20) == 2 and NETWORKS["TCN"].positions(0.1) == 1


def test_weights_are_those_of_the_config() -> None:
    weights = weights_of("TCN")
    assert {name: array.shape for name, array in weights.items()} == config_of("TCN").shapes()
    assert weights["network.0.conv1.weight"].std() == pytest.approx((3 * 20) ** -0.5, rel=0.1)


def test_facts_are_written_and_read(tmp_path: Path) -> None:
    FACTS.write(tmp_path)
    assert Facts.read(tmp_path) == FACTS


def test_row() -> None:
    """Begin and end of a signal do not count, except in the sum; threads of no interest are not shown."""
    ours = told([9, *[0.002] * 7, 9], [9, *[0.004] * 7, 9])
    facts = {"max_conv": ours, "max_conv whole": told([9], [9.014]), "PyTorch cat": told([0.006] * 5, [0.006] * 5)}
    found = streams.row("TCN", 2, facts | {"MAX empty call": told([0.001], [0.001])}, {"Moshi": SILENT})
    assert found["ms"]["max_conv"] == pytest.approx(3)
    assert found["ratios"] == pytest.approx({"best peer / ours": 2})
    assert found["efficiency"] == pytest.approx(0.5, rel=1e-2)
    assert found["times real time"] == pytest.approx(20 / 3)
    assert (found["p10"], found["p99"]) == pytest.approx((2, 4)) and found["over"] == pytest.approx(2000)
    assert json.loads(json.dumps(found)) == found


def test_row_without_ours() -> None:
    found = streams.row("TCN", 2, {"PyTorch cat": told([0.006])}, {"max_conv": SILENT})
    assert found["ratios"] == {} and "efficiency" not in found
    assert bench.verdict({"TCN": found}, 0) == ["TCN: max_conv crashed"]
    assert "| crashed | – | – | 6.000 | – |" in streams.line("TCN", ["PyTorch cat", "Moshi"], found)


def test_table() -> None:
    peers = ["PyTorch cat", "Moshi"]
    facts = {"max_conv": told([0.002] * 9), "max_conv whole": told([0.009]), "PyTorch cat": told([0.006] * 4)}
    found = streams.row("TCN", 2, facts, {"Moshi": SILENT})
    many = {"batch": 0.002, "single": 0.006, "state": 64, "bytes": 100}
    result = {"layers": {"TCN, 20 ms": found}, "streams": {"TCN, 20 ms": many}, "load": [1.0, 2.0]}
    lines = [*streams.head(peers), streams.line("TCN, 20 ms", peers, found), *streams.tail(peers, result)]
    assert {line.count("|") for line in lines[:4]} == {12}
    assert lines[2] == "| TCN, 20 ms | 2 | 2.000 | 2.000 | 2.000 | 6.000 | crashed | 3.00 | 0.50 | 10.0 | – |"
    assert lines[3].startswith("| geometric mean | | | | | | | 3.00 |")
    assert lines[7:] == ["| TCN, 20 ms | 2.000 | 6.000 | 3.00 | 64 | 100 |", "", "- load average: 1.0, then 2.0"]
    failed = {"failed": SILENT, "state": 64, "bytes": None}
    assert "| failed | failed | – | 64 | – |" in "".join(streams.tail(peers, result | {"streams": {"a": failed}}))


def test_percentiles_and_steady_pushes() -> None:
    assert [streams.percentile(range(200), percent) for percent in (10, 50, 99)] == [20, 100, 198]
    assert streams.percentile([5.0], 99) == 5
    assert streams.steady(range(100)) == range(8, 99)
    assert streams.steady([1.0]) == [1.0] and streams.steady([1, 2, 3, 4]) == [3]


class Script:
    """A contender that answers without a process."""

    def __init__(self, answer: Mapping[str, Any]) -> None:
        self.answer, self.asked = answer, 0

    def ask(self, question: Mapping[str, Any]) -> Mapping[str, Any]:
        self.asked += 1
        assert json.loads(json.dumps(question)) == question
        return self.answer

    def stop(self) -> None:
        pass


def test_who_fails_is_asked_once(capsys: pytest.CaptureFixture[str]) -> None:
    racers: Any = {"max_conv": Script({"seconds": [0.1]}), "Moshi": Script(SILENT)}
    got, failed = streams.race_chunk("TCN", 2, racers, rounds=3)
    assert got["max_conv"]["rounds"] == [[0.1]] * 3 and failed == {"Moshi": SILENT}
    assert (racers["max_conv"].asked, racers["Moshi"].asked) == (4, 1)
    assert capsys.readouterr().err == "bench: Moshi: crashed on TCN: SIGSEGV\n"
    assert "failed" in streams.race_streams("TCN", 2, racers["Moshi"], rounds=3)
    assert streams.race_streams("TCN", 2, racers["max_conv"], rounds=3)["batch"] == 0.1


class Sums(Overlap):
    """Every output position is the sum of six inputs, and there are two for each input."""

    def __init__(self) -> None:
        self.facts, self.axis, self.turn, self.threads, self.waiting = FACTS, 2, False, [1], None
        self.run = self.compute

    def use(self, threads: int) -> None:
        pass

    def compute(self, window: np.ndarray) -> np.ndarray:
        padded = np.pad(window[0, 0], (FACTS.left or 0, FACTS.right or 0))
        return np.repeat(np.convolve(padded, np.ones(6), "valid"), 2)[None]


@pytest.mark.parametrize("chunk", [1, 2, 5, 40])
def test_overlaps_are_cut_out(chunk: int) -> None:
    live = Sums()
    signal = np.random.default_rng(0).standard_normal((1, 1, 23))
    want = live.compute(signal)
    pieces = live.pieces(signal, chunk, 1, False)
    live.begin(1, False)
    assert live_racers.verify(live, pieces, 1, want, float("inf")) is None
    live.begin(1, False)
    assert (
        live_racers.verify(live, pieces, 1, want + 1, float("inf"))
        == f"off by {1 / np.abs(want + 1).max():.1e} of the largest value"
    )
    live.begin(1, False)
    assert "has shape" in str(live_racers.verify(live, pieces, 1, want[:, 2:], float("inf")))


class Early(Peer):
    """A network that begins with three positions."""

    def __init__(self) -> None:
        self.facts, self.axis, self.turn, self.threads, self.waiting = FACTS._replace(first=3), 2, False, [1], None

    def use(self, threads: int) -> None:
        pass

    def step(self, piece: Any) -> Any:
        return piece[0]


def test_first_chunks_wait() -> None:
    live = Early()
    live.begin(1, False)
    answers = [live.push(piece) for piece in live.pieces(np.arange(8).reshape(1, 1, 8), 2, 1, False)]
    assert answers[0] is None and [answer.shape[1] for answer in answers[1:]] == [4, 2, 2]


def test_a_race_verifies_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    live = Sums()
    signal = np.random.default_rng(0).standard_normal((1, 1, 23))
    np.save(tmp_path / "input.npy", signal)
    np.save(tmp_path / "output.npy", live.compute(signal))
    race, question = live_racers.Race(live, tmp_path), {"chunk": 4, "streams": 1, "batched": False, "limit": 1.0}
    assert len(race.answer(question)["seconds"]) == 6
    monkeypatch.setattr(live_racers, "verify", None)
    assert race.answer(question)["threads"] == 1
    np.save(tmp_path / "output.npy", signal)
    monkeypatch.undo()
    assert race.answer(question | {"chunk": 3})["failed"] == "wrong"


def test_cut() -> None:
    codes = np.arange(12).reshape(1, 2, 6)
    assert cut(codes, 2, 4, 9).tolist() == [[[4, 5], [10, 11]]] and cut(codes, 2, 4).flags.c_contiguous


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--chunks", "20"], "bench: --chunks are those of --streaming; add it, or leave them out."),
        (["--streaming", "--networks"], "bench: --streaming races in float32 and draws no chart; leave out the rest."),
        (["--streaming", "--layers", "no"], "bench: there is no network 'no'; the networks are HiFi-GAN V1, EnCodec "),
        (["--streaming", "--contenders", "no"], "bench: there is no contender 'no'; the contenders are max_conv, "),
    ],
)
def test_mistakes_are_one_sentence(words: list[str], sentence: str) -> None:
    result = CliRunner().invoke(bench.main, words)
    assert result.exit_code == 2
    assert result.output.startswith(sentence) and result.output.count("\n") == 1


def test_layers_in_chunks_are_the_layers() -> None:
    """PyTorch's network in chunks, by torch.cat, is its network of the whole signal."""
    torch = pytest.importorskip("torch")
    import live_torch

    config, weights = config_of("TCN"), live_networks.weights_of("TCN")
    x = torch.from_numpy(np.ascontiguousarray(signal_of("TCN").swapaxes(1, 2)[:, :, :40]))
    layers = live_torch.Cached(weights)
    parts = [live_torch.tcn(layers, x[:, :, at : at + 7], config) for at in range(0, 40, 7)]
    want = live_torch.tcn(live_torch.Whole(weights), x, config)
    assert (torch.cat(parts, 2) - want).abs().max() < 1e-5
