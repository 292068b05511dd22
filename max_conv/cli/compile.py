"""The commands `max-conv compile`: a network of the gallery, or one convolution of a checkpoint, to a file."""

import importlib
import json
from pathlib import Path
from typing import Any

import click

from .terminal import CONFIG, EXACT, FORCE, JSON, KEY, WEIGHTS, config, new_file, step

TARGET = click.argument("target", type=click.Path(path_type=Path))


class Networks(click.Group):
    """One command for every network of the gallery, in addition to the commands that are defined below."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        from ..serving.networks import gallery

        return sorted([*super().list_commands(ctx), *(name.replace("_", "-") for name in gallery())])

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        from ..serving.networks import gallery

        if name.replace("-", "_") not in gallery():
            return super().get_command(ctx, name)

        @click.command(name, help=f"Compiles the network {name} to TARGET, for the option --model of `max-conv run`.")
        @TARGET
        @WEIGHTS
        @CONFIG
        @click.option("--capacity", metavar="SIZE", help="For a network that has several sizes: tiny or full.")
        @EXACT
        @click.option(
            "--live", is_flag=True, help="Takes its signal chunk by chunk: for `max-conv stream` and `serve`."
        )
        @click.option("--ragged", is_flag=True, help="Signals of different length share a call: for `max-conv serve`.")
        @FORCE
        @JSON
        def network(
            target: Path,
            weights: str | None,
            exact: bool,
            live: bool,
            ragged: bool,
            force: bool,
            as_json: bool,
            **sizes: Any,
        ) -> None:
            from ..serving import open_network

            new_file(target, force)
            settings = config(name, **sizes)
            opened = open_network(name, settings, weights=weights, exact=exact, live=live, ragged=ragged, step=step)
            _save(opened.model, target, as_json)

        return network


@click.group("compile", cls=Networks)
def compile_() -> None:
    """Compiles a network, or one layer, to a file that loads in milliseconds."""


@compile_.command("conv1d")
@click.argument("checkpoint")
@TARGET
@click.option("--layer", required=True, metavar="NAME", help="The layer: its weights are NAME.weight and NAME.bias.")
@KEY
@click.option("--native", is_flag=True, help="The filter is SCF and the data NLC; otherwise both are PyTorch's.")
@click.option("--stride", default=1, show_default=True)
@click.option("--padding", default="0", show_default=True, help='An int, "left,right", or same, valid, causal.')
@click.option("--dilation", default=1, show_default=True)
@click.option("--groups", default=1, show_default=True)
@click.option("--padding-mode", default="zeros", show_default=True)
@EXACT
@FORCE
@JSON
def conv1d(checkpoint: str, target: Path, layer: str, key: str | None, native: bool, **options: Any) -> None:
    """Compiles one convolution of a CHECKPOINT to TARGET, for `max_conv.load(TARGET)`."""
    from ..runtime import compile
    from ..weights import read_layer

    exact, force, as_json = (options.pop(name) for name in ("exact", "force", "as_json"))
    new_file(target, force)
    with step(f"reading {checkpoint}"):
        weights, dtype = read_layer(checkpoint, layer, native, key)
    graph = importlib.import_module("max_conv.graphs.conv1d")
    settings = graph.Config(**options | {"padding": _padding(options["padding"]), "permute": not native})
    with step("compiling"):
        model = compile(graph.build(settings, weights, dtype=dtype, exact=exact), ["x"], weights=weights)
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
