"""The command `max-conv check`: whether this machine's kernels are right."""

import json
from dataclasses import asdict
from typing import Any

import click

from .terminal import JSON, table

# Importing MAX is slow: the command imports what it uses, so that --help is fast.


@click.command()
@click.option("--device", type=click.Choice(["cpu", "gpu"]), default="cpu", show_default=True, help="Whose kernels.")
@click.option("--time", "timed", is_flag=True, help="Times the longest layer of each kernel of the CPU, too.")
@JSON
def check(device: str, timed: bool, as_json: bool) -> None:
    """Compares every kernel of this machine's CPU or GPU with a reference in float64.

    Random layers in all layouts and dtypes, padding modes, strides, dilations and groups, also transposed, live and ragged.
    The first check compiles the kernels, for a minute or two. The exit status is 1 if a kernel is wrong here.
    """
    from ..runtime import check as compare

    rows = compare(device=device, timed=timed, step=lambda text: click.echo(f"{text} …", err=True))
    wrong = [row for row in rows if not row.right]
    if as_json:
        click.echo(json.dumps([asdict(row) | {"right": row.right} for row in rows]))
    else:
        columns = {"kernel": "left", "layout": "left", "dtype": "left", "layers": "right", "error": "right"}
        columns |= {"GFLOP/s": "right"} if timed else {}
        table("The largest error of each kernel, as a part of what is allowed", columns, [_cells(row) for row in rows])
    if wrong:
        worst = max(wrong, key=lambda row: row.error)
        click.echo(
            f"max-conv: {len(wrong)} of {len(rows)} rows are wrong on this machine; the worst is {worst.kernel} "
            f"{worst.layout} {worst.dtype}: {worst.worst}. Please report it.",
            err=True,
        )
        raise click.exceptions.Exit(1)
    if not as_json:
        click.echo(f"{len(rows)} rows, {sum(row.layers for row in rows)} layers: all right")


def _cells(row: Any) -> list[str]:
    """Returns a row of the table."""
    error = f"{row.error:.3f}" + ("" if row.right else " WRONG")
    speed = [] if row.gflops is None else [f"{row.gflops:.1f}"]
    return [row.kernel, row.layout, row.dtype, str(row.layers), error, *speed]
