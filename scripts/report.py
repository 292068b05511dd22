"""Turns the times that bench.py measures into figures, a table and a chart."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from layers import Layer
from max_conv.conv import BYTES
from racers import Race

LEAST = 0.95
"""The least ratio of the best peer's time to ours that --check accepts."""
OURS = "max_conv"
"""The names of our contenders begin with this."""


def roof(layer: Layer, dtype: str, peaks: Mapping[str, Any]) -> float:
    """Returns the least seconds of a direct convolution, for its float32 multiply-adds or its memory traffic.

    Winograd's algorithm multiplies less and may be faster, and so may bfloat16's instructions.
    """
    size = layer.values * BYTES[dtype]
    rate = next(level["GB/s"] for level in peaks["copy"].values() if level["fits"] is None or size <= level["fits"])
    return max(layer.flop / peaks["fma_all"], size / rate) / 1e9


def row(
    race: Race,
    layer: Layer,
    seconds: Mapping[str, Sequence[float]],
    failed: Mapping[str, Mapping[str, str]],
    peaks: Mapping[str, Any],
) -> dict[str, Any]:
    """Returns all results of one layer."""
    ms = {name: statistics.median(times) * 1e3 for name, times in seconds.items()}
    peers = [time for name, time in ms.items() if not name.startswith(OURS)]
    best = {"ms": min(peers)} if peers else {}
    above = {name: ms.get(top) if top else best.get("ms") for name, (top, _) in race.ratios.items()}
    ratios = {
        name: time / ms[race.ratios[name][1]] for name, time in above.items() if time and race.ratios[name][1] in ms
    }
    found: dict[str, Any] = {
        "shape": str(layer),
        "flop": layer.flop,
        "bytes": layer.values * BYTES[race.dtype],
        "rounds": {name: [time * 1e3 for time in times] for name, times in seconds.items()},
        "ms": ms,
        "failed": dict(failed),
        "ratios": ratios,
    }
    if race.main in ms:
        found["GFLOP/s"] = layer.flop / ms[race.main] / 1e6
        found["of roof"] = roof(layer, race.dtype, peaks) * 1e3 / ms[race.main]
    return found


def means(race: Race, rows: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Returns geometric means over layers: of times relative to the main contender's, of ratios, of shares."""
    lists: dict[str, dict[str, list[float]]] = {"times": {}, "ratios": {}, "of roof": {}}
    for found in rows.values():
        if race.main not in found["ms"]:
            continue
        for name, ms in found["ms"].items():
            lists["times"].setdefault(name, []).append(ms / found["ms"][race.main])
        for name, ratio in found["ratios"].items():
            lists["ratios"].setdefault(name, []).append(ratio)
        lists["of roof"].setdefault(race.main, []).append(found["of roof"])
    return {kind: {name: statistics.geometric_mean(v) for name, v in values.items()} for kind, values in lists.items()}


def verdict(rows: Mapping[str, Mapping[str, Any]], least: float) -> list[str]:
    """Returns a line for each contender of ours that failed, and each ratio to the best peer below `least`."""
    lines = []
    for layer, found in rows.items():
        lines += [f"{layer}: {name} {why['failed']}" for name, why in found["failed"].items() if name.startswith(OURS)]
        slow = {name: r for name, r in found["ratios"].items() if name.startswith("best peer") and r < least}
        lines += [f"{layer}: {name} is {ratio:.3f}, below {least}" for name, ratio in slow.items()]
    return lines


# The printed tables.


def header(result: Mapping[str, Any]) -> list[str]:
    host, peaks = result["machine"], result["peaks"]
    copies = ", ".join(f"{level['GB/s']:.0f} GB/s in {name}" for name, level in peaks["copy"].items())
    return [
        f"- machine: {host['cpu']}, {host['cores']} cores, {host['system']}, Python {host['python']}",
        "- versions: " + ", ".join(dict.fromkeys(result["versions"].values())),
        f"- peaks: float32 multiply-adds {peaks['fma_one']:.0f} GFLOP/s on one thread, {peaks['fma_all']:.0f} on "
        f"{peaks['threads']}; copies {copies} (bytes read and written)",
        f"- {result['race']}, {result['threads']} threads, milliseconds: the median of {result['rounds']} rounds",
        "",
    ]


def table_head(race: Race, names: Sequence[str]) -> list[str]:
    columns = ["layer", "shape", *names, *race.ratios, "GFLOP/s", "of roof"]
    return [f"| {' | '.join(columns)} |", "|---|---|" + "---:|" * (len(columns) - 2)]


def table_row(race: Race, names: Sequence[str], layer: str, found: Mapping[str, Any]) -> str:
    cells = [f"{found['ms'][name]:.3f}" if name in found["ms"] else found["failed"][name]["failed"] for name in names]
    cells += [f"{found['ratios'][name]:.2f}" if name in found["ratios"] else "–" for name in race.ratios]
    cells += [f"{found['GFLOP/s']:.0f}", f"{found['of roof']:.0%}"] if "of roof" in found else ["–", "–"]
    return f"| {layer} | {found['shape']} | {' | '.join(cells)} |"


def table_mean(race: Race, names: Sequence[str], mean: Mapping[str, Mapping[str, float]]) -> str:
    cells = [f"{mean['times'][name]:.2f}×" if name in mean["times"] else "–" for name in names]
    cells += [f"{mean['ratios'][name]:.2f}" if name in mean["ratios"] else "–" for name in race.ratios]
    cells += ["", " ".join(f"{share:.0%}" for share in mean["of roof"].values())]
    return f"| geometric mean | × {race.main} | {' | '.join(cells)} |"


def epilogue_table(race: Race, rows: Mapping[str, Mapping[str, Any]]) -> list[str]:
    lines = ["| what follows | " + " | ".join(f"{layer}, ms | relative" for layer in rows) + " |"]
    lines.append("|---|" + "---:|---:|" * len(rows))
    for name, (contender, _) in race.ratios.items():
        cells = []
        for found in rows.values():
            ms, ratio = found["ms"].get(contender), found["ratios"].get(name)
            cells += [f"{ms:.3f}" if ms else found["failed"][contender]["failed"], f"{ratio:.2f}" if ratio else "–"]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


# Networks.


def network_facts(
    told: Mapping[str, Mapping[str, Any]], failed: Mapping[str, Mapping[str, str]], seconds: float
) -> dict[str, Any]:
    """Returns all results of one network; `seconds` is the sound that a call makes or reads."""
    ms = {name: statistics.median(facts["seconds"]) * 1e3 for name, facts in told.items()}
    peers = {name: facts for name, facts in told.items() if not name.startswith(OURS) and "bf16" not in name}
    found: dict[str, Any] = {"ms": ms, "failed": dict(failed), "told": dict(told), "ratios": {}}
    if peers and OURS in ms:
        found["ratios"] = {"best peer / ours": min(ms[name] for name in peers) / ms[OURS]}
        found["memory"] = told[OURS]["bytes"] / min(facts["bytes"] for facts in peers.values())
        found["times real time"] = seconds * 1e3 / ms[OURS]
    return found


def network_head(names: Sequence[str]) -> list[str]:
    columns = ["network", *names, "best peer / ours", "times real time", "MB", "of the lowest peer's", "bf16 SNR, dB"]
    return [f"| {' | '.join(columns)} |", "|---|" + "---:|" * (len(columns) - 1)]


def network_row(key: str, names: Sequence[str], found: Mapping[str, Any]) -> str:
    cells = [f"{found['ms'][name]:.2f}" if name in found["ms"] else found["failed"][name]["failed"] for name in names]
    if found["ratios"]:
        cells += [f"{found['ratios']['best peer / ours']:.2f}", f"{found['times real time']:.0f}"]
        cells += [f"{found['told'][OURS]['bytes'] / 1e6:.0f}", f"{found['memory']:.2f}"]
    else:
        cells += ["–"] * 4
    half = found["told"].get(f"{OURS} bf16")
    cells.append(f"{half['decibels']:.0f}" if half else "–")
    return f"| {key} | {' | '.join(cells)} |"


def network_mean(names: Sequence[str], rows: Mapping[str, Mapping[str, Any]]) -> str:
    ratios = [found["ratios"]["best peer / ours"] for found in rows.values() if found["ratios"]]
    mean = f"{statistics.geometric_mean(ratios):.2f}" if ratios else "–"
    return f"| geometric mean |{' |' * len(names)} {mean} |" + " |" * 4


# The chart.

# Colours that colour-blind people can distinguish (Okabe and Ito), each with a different marker.
MARKS = (("#0072B2", "o"), ("#56B4E9", "s"), ("#D55E00", "^"), ("#009E73", "D"), ("#CC79A7", "v"), ("#E69F00", "P"))
LEFT, RIGHT = 0.5, 8.0
"""The ratios that the chart has room for; larger and smaller ones are drawn at its edge."""


def draw(result: Mapping[str, Any], race: Race, file: Path) -> None:
    """Draws each peer's time relative to ours, on a logarithmic scale, and next to it our share of the roof."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = {name: found for name, found in result["layers"].items() if race.main in found["ms"]}
    figure, (left, right) = pyplot.subplots(
        1, 2, sharey=True, figsize=(11, 1.9 + 0.27 * len(rows)), width_ratios=(3, 1), layout="constrained"
    )
    draw_ratios(left, race, rows, [name for name in result["versions"] if name != race.main])
    places, shares = range(len(rows)), [100 * found["of roof"] for found in rows.values()]
    right.barh(places, shares, height=0.6, color="#BBBBBB")
    for place, share in zip(places, shares, strict=True):
        right.text(share, place, f" {share:.0f}", va="center", fontsize=7)
    right.axvline(100, color="black", linewidth=0.8)
    right.set_xlim(0, 1.2 * max(shares, default=100))
    right.set_xlabel(f"share of the roof, % ({race.main})", fontsize=8)
    right.tick_params(axis="x", labelsize=8)
    right.spines[["top", "right"]].set_visible(False)
    host, peaks = result["machine"], result["peaks"]
    figure.suptitle(
        f"{host['cpu']}, {result['threads']} threads, {race.dtype}; "
        f"roof: {peaks['fma_all']:.0f} GFLOP/s of float32 multiply-adds, or the memory",
        fontsize=10,
    )
    figure.savefig(file, dpi=150)
    pyplot.close(figure)


def draw_ratios(axes: Any, race: Race, rows: Mapping[str, Mapping[str, Any]], names: Sequence[str]) -> None:
    """Marks the times of `names`, relative to the main contender's, with one row per layer."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    for number, name in enumerate(names):
        points = [(f["ms"][name] / f["ms"][race.main], y) for y, f in enumerate(rows.values()) if name in f["ms"]]
        colour, marker = ("black", "|") if name.startswith(OURS) else MARKS[number % len(MARKS)]
        xs = [min(max(x, LEFT), RIGHT) for x, _ in points]
        axes.scatter(xs, [y for _, y in points], s=70 if marker == "|" else 26, c=colour, marker=marker, label=name)
    axes.set_xscale("log")
    axes.set_xlim(LEFT * 0.95, RIGHT * 1.05)
    ticks = [0.5, 0.7, 0.8, 0.9, 1, 1.2, 1.5, 2, 3, 4, 6, 8]
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    edges = {LEFT: f"≤{LEFT:g}", RIGHT: f"≥{RIGHT:g}"}
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: edges.get(x, f"{x:g}")))
    axes.axvspan(LEFT * 0.95, 1, color="#F6E0D8", zorder=0)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_yticks(range(len(rows)), [f"{name}   {found['shape']}" for name, found in rows.items()], fontsize=7)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.grid(axis="y", linewidth=0.3)
    axes.tick_params(axis="x", labelsize=8)
    axes.set_xlabel(f"time / time of {race.main} (shaded: faster than it)", fontsize=8)
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=4, fontsize=8, frameon=False)
