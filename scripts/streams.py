"""The costs of live networks: `bench.py --streaming` calls this file.

Signals are pushed chunk by chunk. Contenders run in separate processes, alternately; a contender's time is the median over
the rounds of the median of a round's pushes. The answer in chunks is compared with PyTorch's answer to the whole signal
before anything is timed. A peer uses one thread or all, whichever is faster for the chunk.

- efficiency: our model of the whole signal, over the sum of the chunks' times; the median of the rounds' ratios;
- 32 streams in a batch, and 32 streams that are pushed one after the other;
- the memory of a stream: how much the process grows for each of many streams;
- MAX's empty call: its own model of one ReLU on 28 values.

In ONNX Runtime the states of all layers are inputs and outputs of the graph. A network whose outputs depend on later inputs
has no such form: for every chunk, its peers compute all inputs that the chunk's outputs depend on.
"""

import os
import shutil
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from contest import Racer, note, prepare, start
from live_networks import NETWORKS, Facts
from report import OURS, header

CHUNKS = (20, 80, 320)
SCRIPT = str(Path(__file__).resolve().parent / "live_racers.py")
LIMIT = 2.0
"""Seconds of pushes in a round; ours, which are summed up, use the whole signal."""
BATCH, SHORT = 32, 40
"""How many streams share a batch, and the milliseconds of the chunks for which that is timed."""
WHOLE, EMPTY = f"{OURS} whole", "MAX empty call"

option = click.option("--streaming", is_flag=True, help="Instead, push live networks chunk by chunk.")
chunks_option = click.option(
    "--chunks",
    multiple=True,
    type=click.FloatRange(1),
    metavar="MS",
    help="With --streaming, the milliseconds of a chunk (may be repeated); 20, 80 and 320 if left out.",
)


# Racing.


def ask(racer: Racer, name: str, chunk: int, streams: int = 1, **more: Any) -> dict[str, Any]:
    """Asks a contender to push a signal in chunks of some positions."""
    question: dict[str, Any] = {"network": name, "chunk": chunk, "streams": streams, "batched": False, "limit": LIMIT}
    return racer.ask(question | more)


def race_chunk(
    name: str, chunk: int, racers: Mapping[str, Racer], rounds: int
) -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, str]]]:
    """Returns the seconds of every push by contender, round by round; for contenders that failed, how and why."""
    told: dict[str, dict[str, Any]] = {contender: {"rounds": []} for contender in racers}
    failed: dict[str, dict[str, str]] = {}
    for turn in range(rounds + 1):
        for contender in [each for each in racers if each not in failed]:
            limit = 3600.0 if contender == OURS else LIMIT
            answer = ask(racers[contender], name, chunk, limit=limit)
            if "failed" in answer:
                failed[contender] = answer
                note(f"{contender}: {answer['failed']} on {name}: {answer['why']}")
            elif turn:  # the first one verifies
                told[contender]["rounds"].append(answer["seconds"])
                told[contender]["threads"] = answer.get("threads", 0)
    return {key: facts for key, facts in told.items() if key not in failed}, failed


def race_streams(name: str, chunk: int, racer: Racer, rounds: int) -> dict[str, Any]:
    """Returns the seconds that one chunk for each of many streams takes, in a batch and one by one."""
    seconds: dict[str, list[float]] = {"batch": [], "single": []}
    for turn in range(rounds + 1):
        for kind, times in seconds.items():
            answer = ask(racer, name, chunk, BATCH, batched=kind == "batch")
            if "failed" in answer:
                note(f"{OURS}, {BATCH} streams, {kind}: {answer['failed']} on {name}: {answer['why']}")
                return {"failed": answer}
            if turn:
                times.append(statistics.median(steady(answer["seconds"])))
    return {"rounds": seconds} | {kind: statistics.median(times) for kind, times in seconds.items()}


def steady(pushes: Sequence[float]) -> Sequence[float]:
    """Returns the pushes without the first ones, which wait for the network's begin, and without the last one."""
    return pushes[min(8, len(pushes) // 2) : max(1, len(pushes) - 1)] or pushes


def compete(names: Sequence[str], chunks: Sequence[float], result: dict[str, Any], folder: Path) -> None:
    """Races network by network, prints the results and adds them to `result`."""
    peers = [name for name in result["versions"] if name not in (OURS, WHOLE, EMPTY)]
    result["load"] = [os.getloadavg()[0]]
    print("\n".join(header(result) + head(peers)), flush=True)
    for name in names:
        place = folder / "network"
        place.mkdir()
        facts = prepare(name, [SCRIPT, name, str(place)])
        note(f"{name}: {facts}")
        contenders = [each for each in result["versions"] if each in NETWORKS[name].contenders]
        racers = start([SCRIPT], contenders, result["threads"], folder, [str(place), name])
        try:
            for milliseconds in chunks:
                race(name, milliseconds, racers, peers, result)
            if OURS in racers:
                many(name, chunks, racers[OURS], result, place)
        finally:
            for racer in racers.values():
                racer.stop()
        shutil.rmtree(place)
    result["load"].append(os.getloadavg()[0])
    print("\n".join(tail(peers, result)), flush=True)


def race(name: str, milliseconds: float, racers: Mapping[str, Racer], peers: Sequence[str], result: Any) -> None:
    chunk = NETWORKS[name].positions(milliseconds)
    told, failed = race_chunk(name, chunk, racers, result["rounds"])
    key = f"{name}, {milliseconds:g} ms"
    found = result["layers"][key] = row(name, chunk, told, failed) | {"load": os.getloadavg()[0]}
    print(line(key, peers, found), flush=True)


def many(name: str, chunks: Sequence[float], racer: Racer, result: Any, folder: Path) -> None:
    """Adds the times of streams in a batch, and the memory of a stream."""
    facts = Facts.read(folder)
    for milliseconds in [each for each in chunks if each < SHORT]:
        chunk = NETWORKS[name].positions(milliseconds)
        found = race_streams(name, chunk, racer, result["rounds"])
        grown = ask(racer, name, max(chunk, facts.first), state=facts.state)
        key = f"{name}, {milliseconds:g} ms"
        if "failed" in found:
            result["layers"][key]["failed"][f"{OURS}, {BATCH} streams"] = found["failed"]
        result.setdefault("streams", {})[key] = found | {"state": facts.state, "bytes": grown.get("bytes")}


# The printed tables.


def row(
    name: str, chunk: int, told: Mapping[str, Mapping[str, Any]], failed: Mapping[str, Mapping[str, str]]
) -> dict[str, Any]:
    """Returns all results of one size of chunks of a network."""
    pushes = {who: [steady(one) for one in facts["rounds"]] for who, facts in told.items()}
    ms = {who: statistics.median(map(statistics.median, rounds)) * 1e3 for who, rounds in pushes.items()}
    found: dict[str, Any] = {"positions": chunk, "ms": ms, "failed": dict(failed), "told": dict(told), "ratios": {}}
    if OURS not in ms:
        return found
    if peers := [time for who, time in ms.items() if who not in (OURS, WHOLE, EMPTY)]:
        found["ratios"] = {"best peer / ours": min(peers) / ms[OURS]}
    every = sorted(time * 1e3 for one in pushes[OURS] for time in one)
    found |= {"p10": percentile(every, 10), "p99": percentile(every, 99)}
    found["times real time"] = chunk * 1e3 / NETWORKS[name].rate / ms[OURS]
    if WHOLE in told:
        wholes, sums = ([sum(one) for one in told[who]["rounds"]] for who in (WHOLE, OURS))
        found["efficiency"] = statistics.median(whole / all_ for whole, all_ in zip(wholes, sums, strict=True))
    if EMPTY in ms:
        found["over"] = (ms[OURS] - ms[EMPTY]) * 1e3
    return found


def percentile(values: Sequence[float], percent: int) -> float:
    """Returns the value that `percent` of 100 sorted values are below."""
    return values[min(len(values) - 1, len(values) * percent // 100)]


def head(peers: Sequence[str]) -> list[str]:
    columns = ["chunk", "positions", OURS, "p10", "p99", *peers, "best peer / ours", "efficiency", "times real time"]
    columns.append("us over MAX's empty call")
    return [f"| {' | '.join(columns)} |", "|---|" + "---:|" * (len(columns) - 1)]


def line(key: str, peers: Sequence[str], found: Mapping[str, Any]) -> str:
    def cell(who: str) -> str:
        if who in found["ms"]:
            return f"{found['ms'][who]:.3f}"
        return found["failed"][who]["failed"] if who in found["failed"] else "–"

    def figure(name: str, form: str) -> str:
        return format(found[name], form) if name in found else "–"

    best = f"{found['ratios']['best peer / ours']:.2f}" if found["ratios"] else "–"
    cells = [str(found["positions"]), cell(OURS), figure("p10", ".3f"), figure("p99", ".3f"), *map(cell, peers), best]
    cells += [figure("efficiency", ".2f"), figure("times real time", ".1f"), figure("over", ".0f")]
    return f"| {key} | {' | '.join(cells)} |"


def tail(peers: Sequence[str], result: Mapping[str, Any]) -> list[str]:
    """Returns the last line of the table, and the table of many streams."""
    ratios = [found["ratios"]["best peer / ours"] for found in result["layers"].values() if found["ratios"]]
    mean = f"{statistics.geometric_mean(ratios):.2f}" if ratios else "–"
    lines = [f"| geometric mean |{' |' * (4 + len(peers))} {mean} | | | |", ""]
    if many := result.get("streams"):
        lines.append(
            f"| {BATCH} streams | in a batch | one by one | ratio | state of a stream, bytes | memory, bytes |"
        )
        lines.append("|---|---:|---:|---:|---:|---:|")
    for key, found in (many or {}).items():
        times = "failed | failed | –"
        if "batch" in found:
            batch, single = found["batch"], found["single"]
            times = f"{batch * 1e3:.3f} | {single * 1e3:.3f} | {single / batch:.2f}"
        grown = "–" if found["bytes"] is None else found["bytes"]
        lines.append(f"| {key} | {times} | {found['state']} | {grown} |")
    return [*lines, "", "- load average: " + ", then ".join(f"{load:.1f}" for load in result["load"])]
