"""The console command `max-conv`."""

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import click

from .batch import batch
from .check import check
from .compile import compile_
from .convert import convert
from .run import run
from .serve import serve
from .stream import stream
from .terminal import JSON, Commands, step, table
from .tune import tune

# Importing MAX, NumPy and rich is slow: each command imports what it uses, so that --help is fast.


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="max-conv")
def main() -> None:
    """1-D convolution for Modular MAX: right on every shape, complete, and fast."""


for command in (batch, check, compile_, convert, run, serve, stream, tune):
    main.add_command(command)


@main.command()
@click.argument("model", required=False)
@JSON
def info(model: str | None, as_json: bool) -> None:
    """Shows versions, devices, kernels and the cache; for a MODEL, as in `info hifigan`, layers, cost and latency."""
    facts = _network_facts(model, as_json) if model else _machine_facts()
    if as_json:
        click.echo(json.dumps(facts))
        return
    width = max(map(len, facts)) + 2
    for name, fact in facts.items():
        click.echo(f"{name:{width}}{fact}")


def _machine_facts() -> dict[str, Any]:
    import platform
    from importlib.metadata import version

    from ..cache import cache_dir
    from ..conv.library import library_path
    from ..conv.tuned import layers

    with step("asking MAX for its devices"):
        from max.driver import accelerator_architecture_name, accelerator_count

        accelerators = [accelerator_architecture_name()] * accelerator_count() if accelerator_count() else []
    compiled = library_path()
    files = _sizes(cache_dir())
    graphs = cache_dir() / "graphs"
    return {
        "max_conv": version("max-conv"),
        "max": version("max"),
        "mojo": version("mojo-compiler"),
        "python": platform.python_version(),
        "cpu": f"{platform.machine()}, {os.cpu_count()} cores",
        "accelerators": ", ".join(accelerators) or "none",
        "kernels": str(compiled) if compiled.is_file() else "not compiled yet",
        "check": _last_check(),
        "timed": f"{layers() or 'no'} layers; `max-conv tune NETWORK` finds the fastest kernel of each",
        "graphs": f"{len(list(graphs.glob('*.mef')))} compiled, {sum(_sizes(graphs)) / 1e6:.1f} MB",
        "cache": f"{cache_dir()} ({len(files)} files, {sum(files) / 1e6:.1f} MB)",
    }


def _last_check() -> str:
    """Returns the last result of `max-conv check` on this machine."""
    from ..runtime import last_check

    rows = last_check()
    if rows is None:
        return "never; run `max-conv check`"
    wrong = sum(not row.right for row in rows)
    return f"{len(rows)} rows, {f'{wrong} WRONG' if wrong else 'all right'}"


def _sizes(folder: Path) -> list[int]:
    """Returns the bytes of every file in a folder; one with several names, as graphs that were compiled together, counts once."""
    facts = [path.stat() for path in folder.rglob("*") if path.is_file()]
    return list({(fact.st_dev, fact.st_ino): fact.st_size for fact in facts}.values())


@main.command()
@click.argument("networks", nargs=-1)
@click.option("--live", is_flag=True, help="The networks take their signals chunk by chunk.")
@click.option("--ragged", is_flag=True, help="Signals of different length share a call of the networks.")
def warm(networks: tuple[str, ...], live: bool, ragged: bool) -> None:
    """Compiles what is needed later, so that it starts in milliseconds: for images and CI.

    These are NETWORKS of the published sizes, as in `warm hifigan`; without any, the common kinds of layers that stand alone.
    """
    from ..cache import cache_dir

    for name in networks:
        with step(f"compiling {name}"):
            from ..serving import warm_network

            warm_network(name, live=live, ragged=ragged)
        click.echo(f"{cache_dir()}: {name} is compiled")
    if networks:
        return
    if live or ragged:
        raise ValueError("warm: --live and --ragged are for networks; name them.")
    with step("compiling the common kinds of layers"):
        from ..runtime.kinds import common, ready

        kinds = common()
        ready(*kinds)
    click.echo(f"{cache_dir()}: {len(kinds)} kinds of layers are compiled")


@main.group()
def cache() -> None:
    """Manages what this machine has compiled."""


@cache.command()
def clear() -> None:
    """Removes compiled graphs, kernels and their times; downloaded files stay. What is needed again is compiled again."""
    from ..cache import cache_dir

    folders = [cache_dir() / name for name in ("graphs", "kernels", "tuned")]
    sizes = [size for folder in folders for size in _sizes(folder)]
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)
    click.echo(f"{cache_dir()}: removed {len(sizes)} files, {sum(sizes) / 1e6:.1f} MB")


def _network_facts(model: str, as_json: bool) -> dict[str, Any]:
    """Returns the facts about a network of the published size, and prints its layers as a table."""
    with step(f"building {model}"):
        import numpy as np

        from ..serving import graph_file
        from ..streaming import describe

        module = graph_file(model)
        config = module.Config()
        # Only names and shapes go into a graph.
        weights = {name: np.broadcast_to(np.float32(0), shape) for name, shape in config.shapes().items()}
        told = describe(module.build(config, weights), *getattr(config, "framing", ()))
        live = _live_facts(module, config, weights)
    facts: dict[str, Any] = {"model": model} | told.summary(getattr(config, "rate", None)) | live
    if as_json:
        layers = [
            {"name": layer.name, "kind": layer.kind, "sizes": layer.sizes, "kernel": layer.kernel}
            | {"flops": float(layer.flops), "share": float(layer.flops / told.flops)}
            for layer in told.layers
        ]
        return facts | {"layers": layers}
    rows = [
        [layer.name, layer.kind, layer.sizes, layer.kernel, f"{float(layer.flops / told.flops):.1%}"]
        for layer in told.layers
    ]
    columns = dict.fromkeys(("layer", "kind", "sizes", "kernel"), "left") | {"share of the work": "right"}
    table(f"Layers of {model}: channels, filters, kernel size, stride, dilation, groups", columns, rows)
    return facts


def _live_facts(module: Any, config: Any, weights: Any) -> dict[str, str]:
    """Returns the facts about a live network: its tick, latency and state; or why it cannot run live."""
    from ..conv.geometry import counted
    from ..streaming import streaming

    try:
        timing = streaming(module.build, config, weights).timing
    except ValueError as error:
        return {"live": f"no ({error})"}
    after = "" if timing.milliseconds is None else f" ({timing.milliseconds:.4g} ms)"
    return {
        "live tick": counted(timing.tick, "input position"),
        "live latency": counted(timing.latency, "input position") + after,
        "live state": f"{timing.state:,} bytes a signal",
    }


if __name__ == "__main__":
    sys.exit(main())
