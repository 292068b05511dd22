#!/usr/bin/env python3
"""Races max_conv against PyTorch, ONNX Runtime, OpenVINO, JAX and MAX's own layer.

    python scripts/bench.py [--layers NAME ...] [--contenders NAME ...] [--rounds 7] [--json FILE] [--chart FILE]
    python scripts/bench.py --networks [--layers NAME ...] | --streaming [--layers NAME ...] [--chunks MS ...] | --compile

Each contender runs in a separate process. They run alternately, so that other load on the machine affects all of them
equally. Every output is compared with float64 before anything is timed. A round is the median of calls that fill 50 ms;
a contender's time is the median of its rounds. Absolute times drift from run to run, ratios within one run are stable.
In all processes the allocator keeps large blocks of memory; otherwise page faults would be timed.

`pip install 'max-conv[bench]'` brings all contenders; one that is not installed is left out. MAX compiles a layer in 10
to 25 s and caches it: the first run over all layers takes half an hour longer than others.
"""

import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np

import compiles
import live_contenders
import streams
from contest import Racer, Sentence, note, prepare, start
from layers import LAYERS, Layer
from network_racers import CONTENDERS
from networks import NETWORKS
from racers import RACES
from report import (
    LEAST,
    draw,
    epilogue_table,
    header,
    means,
    network_facts,
    network_head,
    network_mean,
    network_row,
    row,
    table_head,
    table_mean,
    table_row,
    verdict,
)

HERE = Path(__file__).resolve().parent
TRIES = 4  # runs of peaks.mojo, a second each. The best one counts: other load can occupy a core for a second
EPILOGUE_LAYERS = ("whisper conv1", "HiFi-GAN res")
BATCHES = (1, 8)
"""The batch sizes of the networks' race."""


# The machine.


def machine() -> dict[str, Any]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    cpu = (models or [platform.processor() or platform.machine()])[0]
    return {"cpu": cpu, "cores": os.cpu_count(), "system": platform.system(), "python": platform.python_version()}


def caches() -> dict[str, int]:
    """Returns the bytes of all level 2 caches and of the last level's cache; usual sizes if the system has no entry."""
    found = {"L2": (os.cpu_count() or 1) << 20, "L3": 32 << 20}
    for folder in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*"):
        try:
            level, size = (folder / "level").read_text().strip(), (folder / "size").read_text().strip()
            if level in "23" and size.endswith("K"):
                found[f"L{level}"] = (int(size[:-1]) << 10) * ((os.cpu_count() or 1) if level == "2" else 1)
        except OSError:
            continue
    return found


def measure_peaks(folder: Path) -> dict[str, Any]:
    """Compiles and runs peaks.mojo: GFLOP/s of float32 multiply-adds, GB/s of copies in each level of memory."""
    from mojo.run import subprocess_run_mojo

    sizes = caches()
    program = folder / "peaks"
    # A copy that fills half a cache stays in it; a copy of 512 MB fits into no cache.
    works = [sizes["L2"] // 2, sizes["L3"] // 2, 512 << 20]
    try:
        command = ["build", str(HERE / "peaks.mojo"), "-o", str(program)]
        subprocess_run_mojo(command, check=True, capture_output=True, text=True)
        tries = [
            json.loads(subprocess.run([program, *map(str, works)], check=True, capture_output=True, text=True).stdout)
            for _ in range(TRIES)
        ]
    except subprocess.CalledProcessError as error:
        raise Sentence(f"scripts/peaks.mojo does not run: {error.stderr.strip()}") from None
    peaks = {name: max(told[name] for told in tries) for name in ("threads", "fma_one", "fma_all")}
    copies = [max(rates) for rates in zip(*(told["copy"] for told in tries), strict=True)]
    limits = (sizes["L2"], sizes["L3"], None)
    levels = zip(("L2", "L3", "DRAM"), limits, copies, strict=True)
    return peaks | {"copy": {name: {"fits": limit, "GB/s": rate} for name, limit, rate in levels}}


# The race.


def missing(contenders: Mapping[str, Any], name: str) -> str | None:
    """Returns why a contender cannot take part, or None."""
    for package in contenders[name].packages:
        try:
            importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return f"the package {package} is not installed (pip install 'max-conv[bench]' brings it)"
    if name == "torch.compile" and not any(shutil.which(c) for c in (os.environ.get("CXX", "g++"), "clang++")):
        return "there is no C++ compiler (g++)"
    return None


def write_reference(layer: Layer, dtype: str, file: Path) -> None:
    """Writes the float64 output, (N, F, L), which is computed once for all contenders."""
    from max_conv.conv import conv1d_ref, conv_transpose1d_ref

    stride, padding, dilation, groups = layer.options
    options: dict[str, Any] = {"groups": groups, "layout": "NCL", "stride": stride, "padding": padding}
    options |= {"dilation": dilation, "filter_layout": "CFS" if layer.transposed else "FCS"}
    convolve = conv_transpose1d_ref if layer.transposed else conv1d_ref
    np.save(file, convolve(*layer.data(dtype), **options))


def run_layer(
    name: str, dtype: str, racers: Mapping[str, Racer], rounds: int, folder: Path
) -> tuple[dict[str, list[float]], dict[str, dict[str, str]]]:
    """Returns the seconds of each contender's rounds; for contenders that failed, how and why."""
    reference = folder / "reference.npy"
    write_reference(LAYERS[name], dtype, reference)
    seconds: dict[str, list[float]] = {contender: [] for contender in racers}
    failed: dict[str, dict[str, str]] = {}
    for turn in range(rounds + 1):
        for contender in list(seconds):
            answer = racers[contender].ask({"layer": name, "reference": str(reference)})
            if "failed" in answer:
                failed[contender] = answer
                del seconds[contender]
                note(f"{contender}: {answer['failed']} on {name}: {answer['why']}")
            elif turn:  # the first one warms up
                seconds[contender].append(answer["seconds"])
    reference.unlink()
    return seconds, failed


def run_network(
    name: str, batch: int, contenders: Sequence[str], result: Mapping[str, Any], folder: Path
) -> tuple[dict[str, Any], dict[str, dict[str, str]]]:
    """Returns the results of each contender on a network; for contenders that failed, how and why."""
    said = prepare(name, [str(HERE / "networks.py"), name, str(batch), str(folder)])
    note(f"{name}, batch {batch}: {said}")
    script = [str(HERE / "network_racers.py")]
    racers = start(script, contenders, result["threads"], folder, [str(folder)])
    told: dict[str, Any] = {}
    failed: dict[str, dict[str, str]] = {}
    try:
        for turn in range(result["rounds"] + 1):
            for contender in [name for name in racers if name not in failed]:
                answer = racers[contender].ask({"network": name, "batch": batch})
                if "failed" in answer:
                    failed[contender] = answer
                    note(f"{contender}: {answer['failed']} on {name}: {answer['why']}")
                    racers[contender].stop()
                elif not turn:  # the first one gets ready
                    told[contender] = {"ready": answer["ready"], "decibels": answer["decibels"], "seconds": []}
                else:
                    told[contender]["seconds"].append(answer["seconds"])
                    told[contender] |= {"bytes": answer["bytes"], "process": answer["process"]}
    finally:
        for racer in racers.values():
            racer.stop()
    return {name: facts for name, facts in told.items() if name not in failed}, failed


def compete_networks(names: Sequence[str], result: dict[str, Any], folder: Path) -> None:
    """Races network by network, in batches of 1 and 8, prints the results and adds them to `result`."""
    result["peaks"] = measure_peaks(folder)
    contenders = list(result["versions"])
    print("\n".join(header(result) + network_head(contenders)), flush=True)
    for name in names:
        for batch in BATCHES:
            place = folder / "network"
            place.mkdir()
            told, failed = run_network(name, batch, contenders, result, place)
            shutil.rmtree(place)
            key = f"{name}, batch {batch}"
            found = result["layers"][key] = network_facts(told, failed, NETWORKS[name].seconds * batch)
            print(network_row(key, contenders, found), flush=True)
    print(network_mean(contenders, result["layers"]))


# The command.


def chosen(what: str, given: Sequence[str], known: Sequence[str]) -> list[str]:
    for name in given:
        if name not in known:
            raise Sentence(f"there is no {what} {name!r}; the {what}s are {', '.join(known)}.")
    return [name for name in known if name in given] or list(known)


def check_files(*files: Path | None) -> None:
    """Raises an error before the race if a file could not be written after it."""
    for file in files:
        if file and not file.resolve().parent.is_dir():
            raise Sentence(f"{file} cannot be written: there is no folder {file.resolve().parent}.")


def taking_part(known: Mapping[str, Any], contenders: Sequence[str]) -> dict[str, str]:
    """Returns the versions of the contenders that take part, by name, and prints the others."""
    versions = {}
    for name in chosen("contender", contenders, list(known)):
        if reason := missing(known, name):
            note(f"{name} is left out: {reason}.")
        else:
            package = known[name].packages[0]
            versions[name] = f"{package} {importlib.metadata.version(package)}"
    if not versions:
        raise Sentence("nobody is left to race; install a contender or ask for another one.")
    return versions


def compete(kind: str, layers: Sequence[str], result: dict[str, Any], folder: Path) -> None:
    """Races layer by layer, prints the results and adds them to `result`."""
    race, names = RACES[kind], list(result["versions"])
    result["peaks"] = measure_peaks(folder)
    racers = start([str(HERE / "racers.py"), kind], names, result["threads"], folder)
    with_table = kind != "epilogues"
    try:
        print("\n".join(header(result) + (table_head(race, names) if with_table else [])), flush=True)
        for layer in layers:
            seconds, failed = run_layer(layer, race.dtype, racers, result["rounds"], folder)
            found = result["layers"][layer] = row(race, LAYERS[layer], seconds, failed, result["peaks"])
            if with_table:
                print(table_row(race, names, layer, found), flush=True)
    finally:
        for racer in racers.values():
            racer.stop()
    result["geometric means"] = means(race, result["layers"])
    last = (
        [table_mean(race, names, result["geometric means"])] if with_table else epilogue_table(race, result["layers"])
    )
    print("\n".join(last))


@click.command()
@click.option("--layers", multiple=True, metavar="NAME", help="Race this layer, or network, only (may be repeated).")
@click.option("--contenders", multiple=True, metavar="NAME", help="Let this contender race only (may be repeated).")
@click.option("--rounds", default=7, show_default=True, type=click.IntRange(1))
@click.option("--threads", default=os.cpu_count(), show_default=True, help="Threads of the peers; MAX uses all cores.")
@click.option("--dtype", default="float32", show_default=True, type=click.Choice(["float32", "bfloat16"]))
@click.option("--epilogues", is_flag=True, help="Instead, time ours alone and with an operation after it.")
@click.option("--networks", is_flag=True, help="Race whole networks, in batches of 1 and 8, instead of layers.")
@streams.option
@streams.chunks_option
@compiles.option
@click.option("--json", "file", type=click.Path(path_type=Path), help="Write everything there, too.")
@click.option("--chart", type=click.Path(path_type=Path), help="Draw a chart there, .png or .svg.")
@click.option("--check", is_flag=True, help=f"Exit with 1 if the best peer needs less than {LEAST} of our time.")
def main(
    layers: tuple[str, ...],
    contenders: tuple[str, ...],
    rounds: int,
    threads: int,
    dtype: str,
    epilogues: bool,
    networks: bool,
    streaming: bool,
    chunks: tuple[float, ...],
    file: Path | None,
    chart: Path | None,
    check: bool,
) -> None:
    """Races max_conv against PyTorch, ONNX Runtime, OpenVINO, JAX and MAX's own layer."""
    if epilogues and (chart or check or networks or dtype != "float32"):
        raise Sentence(
            "--epilogues races in float32 against nobody; leave out --chart, --check, --networks and --dtype."
        )
    if networks and (chart or dtype != "float32"):
        raise Sentence("--networks races in float32 and bfloat16, and draws no chart; leave out the rest.")
    if chunks and not streaming:
        raise Sentence("--chunks are those of --streaming; add it, or leave them out.")
    if streaming and (chart or epilogues or networks or dtype != "float32"):
        raise Sentence("--streaming races in float32 and draws no chart; leave out the rest.")
    kind = "epilogues" if epilogues else dtype
    race = RACES[kind]
    if networks or streaming:
        where = chosen("network", layers, list(streams.NETWORKS if streaming else NETWORKS))
    else:
        where = chosen("layer", layers or (EPILOGUE_LAYERS if epilogues else ()), list(LAYERS))
    check_files(file, chart)
    if chart and chart.suffix not in (".png", ".svg"):
        raise Sentence(f"{chart} cannot be drawn: name a file that ends in .png or .svg.")
    if chart and not importlib.util.find_spec("matplotlib"):
        raise Sentence("--chart needs matplotlib; pip install 'max-conv[plot]' brings it.")
    known = live_contenders.CONTENDERS if streaming else CONTENDERS if networks else race.contenders
    versions = taking_part(known, contenders)
    result: dict[str, Any] = {"machine": machine(), "versions": versions, "race": kind, "dtype": race.dtype}
    result |= {"threads": threads, "rounds": rounds, "layers": {}}
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # or paused racers would stay for ever
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        if networks:
            compete_networks(where, result, Path(folder))
        elif streaming:
            result["peaks"] = measure_peaks(Path(folder))
            streams.compete(where, chunks or streams.CHUNKS, result, Path(folder))
        else:
            compete(kind, where, result, Path(folder))
    if file:
        file.write_text(json.dumps(result, indent=1))
    if chart:
        draw(result, race, chart)
    lines = verdict(result["layers"], LEAST if check else 0)
    for line in lines:
        note(line)
    sys.exit(1 if lines else 0)


if __name__ == "__main__":
    main()
