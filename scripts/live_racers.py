"""Prepares the networks of bench.py --streaming, and runs its contenders. Each one runs in a separate process per network.

    python scripts/live_racers.py NETWORK FOLDER                       prepares a network: writes the contenders' files
    python scripts/live_racers.py CONTENDER THREADS FOLDER NETWORK     answers questions on stdin, one line of JSON each

A question has the positions of a chunk, how many streams there are, whether they share a batch, and the seconds after
which nothing more is pushed. When a question comes for the first time, the answer in chunks is compared with PyTorch's
to the whole signal. Every reply has the seconds of every push.
"""

import json
import os
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from live_contenders import CONTENDERS, EmptyCall, Live, Ours, Peer
from live_networks import NETWORKS, Facts, config_of, cut, module_of, signal_of, weights_of
from network_racers import memory

TOLERANCE = 1e-4
"""The largest error allowed, relative to the largest value."""
PROOF = 30.0
"""Seconds after which a peer's answer is compared with the begin of the right one; ours is always compared to the end."""
LEAST = 16
"""The least pushes of a round, and of a proof: the first pushes return nothing."""
STREAMS, MEMORY = 1000, 32 << 20
"""To see the memory of a stream: streams at most, and bytes of state that are enough."""


# Preparing.


def facts_of(graph: Any) -> Facts:
    """Returns the facts of a live graph."""
    timing = graph.timing
    right = None if timing.lookahead is None else -int(-timing.lookahead // 1)
    left = None if timing.field is None or right is None else max(right, timing.field - 1 - right)
    return Facts(left, right, timing.first * timing.tick, timing.state, timing.per_tick // timing.tick)


def export(name: str, folder: Path, signal: Any, first: int) -> None:
    """Writes the network for ONNX Runtime: whole; if it is causal, also with the states as inputs."""
    import torch

    import live_torch

    given: dict[str, Any] = {"dynamo": False, "opset_version": 17, "dynamic_axes": {"x": {2: "length"}}}
    weights, config = weights_of(name), config_of(name)
    if "PyTorch overlap" in NETWORKS[name].contenders:
        step = live_torch.Step(name, config, live_torch.Whole(weights))
        torch.onnx.export(step, (signal,), folder / "whole.onnx", input_names=["x"], **given)
    if "PyTorch cat" in NETWORKS[name].contenders:
        layers = live_torch.Cached(weights)
        live_torch.NETWORKS[name](layers, signal[:, :, : first + 1], config)
        names, states = tuple(layers.state), tuple(layers.state.values())
        step = live_torch.Step(name, config, layers, names)
        inputs, outputs = ["x", *names], ["y", *(f"new {n}" for n in names)]
        words = {"input_names": inputs, "output_names": outputs} | given
        torch.onnx.export(step, (signal[:, :, first : first + 5], *states), folder / "state.onnx", **words)


def prepare(name: str, folder: Path) -> dict[str, Any]:
    """Writes the signal, PyTorch's answer, the ONNX files, and our compiled models; returns the seconds of compiling."""
    import torch

    import live_torch
    import max_conv

    network, config, weights = NETWORKS[name], config_of(name), weights_of(name)
    told: dict[str, Any] = {}
    build = getattr(module_of(name), network.graph[1])
    signal = signal_of(name)
    live = max_conv.streaming(build, config, weights)
    facts = facts_of(live)
    facts.write(folder)
    given = torch.from_numpy(np.ascontiguousarray(signal if network.codes else signal.swapaxes(1, 2)))
    with torch.no_grad():
        answer = live_torch.NETWORKS[name](live_torch.Whole(weights), given, config).numpy()
        try:
            export(name, folder, given, facts.first)
        except Exception as error:
            told["onnx"] = str(error).splitlines()[0][:300]
    assert answer.std() > 0.01 * np.abs(answer).max(), "the answer is silence"
    np.save(folder / "input.npy", signal)
    np.save(folder / "output.npy", answer.swapaxes(1, 2) if answer.ndim == 3 else answer)
    for kind, graph in (("live", live), ("whole", build(config, weights))):
        start = time.perf_counter()
        max_conv.compile(graph, weights=weights).save(folder / f"{kind}.maxconv")
        told[f"compile {kind}"] = round(time.perf_counter() - start, 1)
    return told | facts._asdict()


# Racing.


def verify(live: Live, pieces: Sequence[Any], streams: int, want: np.ndarray, limit: float) -> str | None:
    """Returns what is wrong with the answer in chunks. After the limit in seconds, the end of the signal is left out."""
    got, begin, whole = [], time.perf_counter(), True
    for piece in pieces:
        got.append(live.push(piece))
        if len(got) >= LEAST and time.perf_counter() - begin > limit:
            whole = False
            break
    if whole:
        got.append(live.flush())
    parts = [live.read(answer) for answer in got if answer is not None]
    if not sum(part.shape[1] for part in parts):
        return "there is no answer"
    answer = np.concatenate(parts, 1)
    want = np.repeat(want if whole else want[:, : answer.shape[1]], streams, 0)
    if answer.shape != want.shape:
        return f"has shape {answer.shape}, not {want.shape}"
    off = np.abs(answer - want).max() / np.abs(want).max()
    return None if off <= TOLERANCE else f"off by {off:.1e} of the largest value"


def times(live: Live, pieces: Sequence[Any], limit: float) -> list[float]:
    """Returns the seconds of every push, until the limit in seconds."""
    seconds: list[float] = []
    begin = time.perf_counter()
    for piece in pieces:
        start = time.perf_counter()
        live.push(piece)
        seconds.append(time.perf_counter() - start)
        if len(seconds) >= LEAST and time.perf_counter() - begin > limit:
            break
    return seconds


def bytes_of_a_stream(model: Any, piece: np.ndarray, state: int) -> int:
    """Returns by how many bytes the process grows with each stream that has had a chunk.

    The first quarter of the streams does not count: it fills memory that the process had before.
    """
    streams, sizes = [], []
    for _ in range(min(STREAMS, max(20, MEMORY // max(state, 1)))):
        streams.append(model.stream())
        streams[-1].push(piece)
        sizes.append(memory("VmRSS"))
    quarter = len(sizes) // 4
    return (sizes[-1] - sizes[quarter]) // (len(sizes) - 1 - quarter)


class Race:
    """The pieces of signals that have been verified, and the number of threads that is fastest."""

    def __init__(self, live: Live, folder: Path) -> None:
        self.live, self.folder = live, folder
        self.known: dict[tuple[int, int, bool], tuple[list[Any], int]] = {}

    def answer(self, question: dict[str, Any]) -> dict[str, Any]:
        key = (question["chunk"], question["streams"], question["batched"])
        if question.get("state"):
            piece = cut(np.load(self.folder / "input.npy"), NETWORKS[question["network"]].axis, 0, key[0])
            assert isinstance(self.live, Ours)
            return {"bytes": bytes_of_a_stream(self.live.model, piece, question["state"])}
        if key not in self.known:
            pieces = self.live.pieces(np.load(self.folder / "input.npy"), *key)
            self.live.begin(*key[1:])
            wrong = None
            if not isinstance(self.live, EmptyCall):
                alone = PROOF if isinstance(self.live, Peer) else float("inf")
                limit = question["limit"] if key[1] > 1 else alone
                wrong = verify(self.live, pieces, key[1], np.load(self.folder / "output.npy"), limit)
            if wrong:
                return {"failed": "wrong", "why": wrong}
            self.known[key] = (pieces, self.fastest(pieces))
        pieces, threads = self.known[key]
        if isinstance(self.live, Peer):
            self.live.use(threads)
        self.live.begin(*key[1:])
        return {"seconds": times(self.live, pieces, question["limit"]), "threads": threads}

    def fastest(self, pieces: Sequence[Any], limit: float = 1.0) -> int:
        """Returns a peer's best number of threads; MAX uses all cores."""
        if not isinstance(self.live, Peer):
            return 0
        medians = {}
        for count in self.live.threads:
            self.live.use(count)
            self.live.begin(1, False)
            medians[count] = statistics.median(times(self.live, pieces, limit)[-LEAST // 2 :])
        return min(medians, key=lambda count: medians[count])


def work(contender: str, threads: int, folder: Path, name: str) -> None:
    """Answers questions on stdin until it is closed."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # text that libraries print would be read as a reply
    race: Race | None = None
    for line in sys.stdin:
        try:
            race = race or Race(CONTENDERS[contender].build(name, folder, threads), folder)
            answer = race.answer(json.loads(line))
        except Exception as error:
            words = str(error).strip() or type(error).__name__
            answer = {"failed": "refused", "why": words.splitlines()[0][:300]}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    if len(sys.argv) == 3:
        print(json.dumps(prepare(sys.argv[1], Path(sys.argv[2]))))
    else:
        work(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4])
