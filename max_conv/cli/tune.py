"""The command `max-conv tune`: which kernel is the fastest for each layer of a network, on this machine."""

import json
from dataclasses import asdict

import click

from .terminal import JSON, table

# Importing MAX is slow: the command imports what it uses, so that --help is fast.


@click.command()
@click.argument("model")
@click.option("--length", "lengths", type=click.IntRange(1), multiple=True, help="Of the input; may be repeated.")
@click.option("--batch", type=click.IntRange(1), default=1, show_default=True, help="The batch size.")
@JSON
def tune(model: str, lengths: tuple[int, ...], batch: int, as_json: bool) -> None:
    """Times every kernel for each layer of a network, as in `tune hifigan`; later compiles use the fastest.

    The length counts samples, or positions of a spectrogram; by default it is 10 s of sound, or 1,000 positions. The times are
    kept in the user's cache for this processor, until `max-conv cache clear`. Models that are compiled already stay as they are.
    """
    import numpy as np

    from ..conv.tuned import table_file
    from ..runtime import tune as time_kernels
    from ..serving import graph_file
    from ..serving.task import SOUND

    module = graph_file(model)
    config = module.Config()
    if not lengths:
        lengths = (10 * config.rate if module.TASK.input == SOUND else 1000,)
    # Only names and shapes go into a graph.
    weights = {name: np.broadcast_to(np.float32(0), shape) for name, shape in config.shapes().items()}
    graph = module.build(config, weights)
    rows = time_kernels(graph, lengths, batch=batch, step=lambda text: click.echo(f"{text} …", err=True))
    if as_json:
        click.echo(json.dumps([asdict(row) | {"fastest": row.fastest} for row in rows]))
        return
    columns = dict.fromkeys(("layer", "outputs", "usual", "us", "fastest", "us "), "right") | {"layer": "left"}
    cells = [
        [
            row.layer,
            f"{row.batch * row.outputs:,}",
            row.usual,
            f"{row.times[row.usual]:,.0f}",
            row.fastest,
            f"{row.times[row.fastest]:,.0f}",
        ]
        for row in rows
    ]
    table(f"Kernels for the layers of {model}, and their microseconds", columns, cells)
    others = sum(row.fastest != row.usual for row in rows)
    click.echo(f"{table_file()}: another kernel than usual is faster in {others} of {len(rows)} rows")
