"""The command `max-conv convert`."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from .terminal import JSON, KEY, bar, table

DTYPES = {"f32": "F32", "f16": "F16", "bf16": "BF16"}
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


class Pair(click.ParamType):
    """Two texts with an = between them; if there are several, the last one separates."""

    def __init__(self, name: str) -> None:
        self.name = name

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, str]:
        old, equals, new = value.rpartition("=")
        if not equals or not old:
            self.fail(f"{value!r} does not read {self.name}.", param, ctx)
        return old, new


class Size(click.ParamType):
    """A number of bytes, such as 2GB or 500MiB."""

    name = "SIZE"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        match = re.fullmatch(r"(\d+(?:\.\d+)?) *([KMG]?I?B)?", str(value).upper())
        unit = _UNITS.get((match[2] or "").removesuffix("B") + "B" if match and match[2] not in (None, "B") else "")
        if match is None or unit is None or not (size := int(float(match[1]) * unit)):
            self.fail(f"{value!r} is no size such as 2GB or 500MiB.", param, ctx)
        return size


def _many(name: str, metavar: str, help: str, type: Any = str) -> Any:
    return click.option(name, multiple=True, metavar=metavar, help=help, type=type)


@click.command()
@click.argument("source")
@click.argument("target", type=click.Path(path_type=Path), required=False)
@click.option("--model", metavar="NAME", help="Use the layers of a model of the gallery, such as hifigan.")
@click.option("--map", "declared", metavar="FILE", help="Use the layers that a TOML file declares.")
@KEY
@click.option(
    "--source-layout",
    type=click.Choice(["torch", "mlx", "keras"]),
    default="torch",
    show_default=True,
    help="The library whose layout the filters of SOURCE have: FCS, FSC or SCF; transposed ones CFS, FSC or SFC.",
)
@_many("--conv", "PATTERN", "Names of Conv1d filters, as in 'enc.*.weight'.")
@_many("--conv-transpose", "PATTERN", "Names of ConvTranspose1d filters.")
@_many("--ignore", "PATTERN", "Names of tensors to leave out.")
@_many("--rename", "OLD=NEW", "A regular expression, and its replacement; in order.", Pair("OLD=NEW"))
@_many(
    "--fold-batchnorm",
    "CONV=BN",
    "Fold the batch norm BN into the layer CONV before it; see above for {i}.",
    Pair("CONV=BN"),
)
@click.option(
    "--batchnorm-eps", default=1e-5, show_default=True, help="The number that batch norms add to the variance."
)
@click.option("--dtype", type=click.Choice(list(DTYPES)), help="Round floating tensors to this type.")
@_many("--keep", "PATTERN", "Names of tensors that --dtype leaves alone.")
@click.option("--max-shard-size", type=Size(), help="Write several files and an index, as Hugging Face does.")
@click.option(
    "--to", type=click.Choice(["native", "torch"]), default="native", show_default=True, help="The layout of TARGET."
)
@click.option("--dry-run", is_flag=True, help="Show what would be written, and write nothing.")
@click.option("--verify", is_flag=True, help="Compare every layer's output with PyTorch's before TARGET appears.")
@click.option("--force", is_flag=True, help="Overwrite TARGET, and shards of its name.")
@JSON
def convert(source: str, target: Path | None, to: Any, dry_run: bool, as_json: bool, **options: Any) -> None:
    """Converts a checkpoint to TARGET (.safetensors): filters in the native layout, weight norm folded.

    SOURCE is a .safetensors file, a sharded .index.json, a .pt, .pth, .tar, .th, .bin or .ckpt file of weights, an .npz file,
    a directory that holds one of them, hf://ORG/REPO[@REVISION]/FILE, or pypi://PACKAGE==VERSION/FILE. Pickled code is
    never run. About one tensor is in memory at a time.

    What happens to a filter depends on the kind of its layer, never on its shape. --model and --map declare every
    tensor; with --conv and --conv-transpose, tensors that they do not name are copied and listed. A map is TOML: the
    keys conv, conv_transpose, copy, ignore and optional are lists of shell patterns, rename is a list of [OLD, NEW].
    Patterns are names after --rename and after folding: a layer with weight norm has one filter, NAME.weight. In
    patterns * is any text, ? one character, and [0] a class of characters, not a bracket: a name with brackets,
    conv[0].weight, is written 'conv[[]0].weight'.

    In --fold-batchnorm "blocks.*.conv=blocks.*.bn" each * is the same text on both sides. In an nn.Sequential,
    "net.{i}=net.{i+1}" folds every batch norm into the filter right before it. A norm before a layer is never folded.

    A file that is converted already is copied as it is. --to torch is the inverse, bit for bit and without patterns:
    PyTorch's layout and the original names. What was folded stays folded, as NAME.weight, which PyTorch loads.
    """
    from ..weights.convert import Options
    from ..weights.convert import convert as run

    if target is None and not dry_run:
        raise click.UsageError("Missing argument 'TARGET'.")
    layers, strict = _layers(options.pop("model"), options.pop("declared"), options)
    dtype = options.pop("dtype")
    settings = Options(
        strict=strict,
        dtype=dtype and DTYPES[dtype],
        batch_norms=options.pop("fold_batchnorm"),
        eps=options.pop("batchnorm_eps"),
        dry_run=dry_run,
        **options,
    )
    with bar() as tell:
        report = run(source, target or "none.safetensors", layers, to=to, options=settings, progress=tell)
    _show(source, to, dry_run, report, as_json)


def _layers(model: str | None, declared: str | None, options: dict[str, Any]) -> tuple[Any, bool]:
    """Returns the declaration, and whether it has to name every tensor."""
    from ..serving.networks import graph_file
    from ..weights import LayerMap

    conv, transposed, ignore, rename = (options.pop(name) for name in ("conv", "conv_transpose", "ignore", "rename"))
    if sum(map(bool, (model, declared, conv or transposed))) > 1:
        raise ValueError("convert: pass --model, --map, or --conv and --conv-transpose, but not more than one of them.")
    if not model and not declared:
        return LayerMap(conv=conv, conv_transpose=transposed, ignore=ignore, rename=rename), False
    layers = graph_file(model).LAYERS if model else LayerMap.read(str(declared))
    return replace(layers, ignore=layers.ignore + ignore, rename=rename + layers.rename), True


def _show(source: str, to: str, dry_run: bool, report: Any, as_json: bool) -> None:
    side = "native" if to == "native" else "PyTorch's"
    if as_json:
        facts = {"files": [str(path) for path in report.files], "already": report.already, "dry_run": dry_run}
        facts |= {"tensors": [row._asdict() for row in report.rows], "dropped": report.dropped}
        click.echo(json.dumps(facts | {"verified": report.verified, "notes": report.notes}))
        return
    copied = [row for row in report.rows if not row.declared]
    rows = report.rows if dry_run else [row for row in report.rows if row.layout]
    columns = dict.fromkeys(("old name", "new name"), "left") | dict.fromkeys(("shape", "dtype", "layout"), "right")
    title = "Tensors that would be written" if dry_run else f"Filters in {report.files[0]}"
    table(title, columns, [_cells(row) for row in rows])
    for note in report.notes:
        click.echo(note)
    if report.already:
        click.echo(f"{source} is {side} already; its tensors are copied as they are.")
    if copied and not dry_run:
        click.echo(f"copied unchanged, because no pattern names them: {', '.join(row.name for row in copied)}")
    if report.dropped:
        click.echo(f"left out: {', '.join(report.dropped)}")
    if report.verified:
        click.echo(f"layers that give PyTorch's output: {report.verified}")
    for path in report.files:
        click.echo(f"{path}: {path.stat().st_size / 1e6:.1f} MB")


def _cells(row: Any) -> list[str]:
    from ..weights.tensors import DTYPES as NAMES

    return [",\n".join(row.sources), row.name, str(row.shape), NAMES[row.dtype][0], row.layout or "copied"]
