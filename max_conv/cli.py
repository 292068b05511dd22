"""The console command `max-conv`."""

import contextlib
import importlib
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

# MAX, NumPy and rich take long to import: each command imports what it uses, so that --help answers at once.


class Sentence(click.ClickException):
    """An error for the person at the terminal: one sentence on stderr, exit code 2."""

    exit_code = 2

    def show(self, file: Any = None) -> None:
        click.echo(f"max-conv: {self.message}", err=True)


class Commands(click.Group):
    """Shows the errors that people cause as sentences instead of tracebacks."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit, click.Abort, BrokenPipeError):
            raise
        except (ValueError, TypeError, OSError, ImportError, RuntimeError) as error:
            if os.environ.get("MAX_CONV_TRACEBACK"):
                raise
            raise Sentence(sentence(error)) from error


def sentence(error: Exception) -> str:
    """Returns what an error says, without an operating system's number."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}." if error.filename else f"{error.strerror}."
    return str(error) or type(error).__name__


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="max-conv")
def main() -> None:
    """1-D convolution for Modular MAX: right on every shape, complete, and fast."""


JSON = click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of a table.")
FORCE = click.option("--force", is_flag=True, help="Overwrite the output file.")


@contextlib.contextmanager
def step(what: str) -> Iterator[None]:
    """Shows what goes on while it goes on, and how long it took if that was over a second."""
    from rich.console import Console

    console = Console(stderr=True)
    start = time.perf_counter()
    with console.status(f"{what} …"):
        yield
    if (seconds := time.perf_counter() - start) > 1:
        console.print(f"{what}: {seconds:.1f} s", style="dim", highlight=False)


def table(title: str, columns: dict[str, str], rows: list[list[str]]) -> None:
    """Prints a table on stdout. `columns` tells how each one is justified."""
    from rich.console import Console
    from rich.table import Table

    grid = Table(title=title, title_justify="left")
    for column, justify in columns.items():
        grid.add_column(column, justify=justify)  # type: ignore[arg-type]
    for row in rows:
        grid.add_row(*row)
    Console().print(grid)


def new_file(path: Path, force: bool) -> Path:
    """Returns `path`, or raises where it would overwrite a file without `force`, or where its folder is missing."""
    if path.exists() and not force:
        raise FileExistsError(f"{path} exists already; pass --force to overwrite it.")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {path.parent}; make it first.")
    return path


@main.group()
def run() -> None:
    """Runs a model on real data."""


@run.command("silero-vad")
@click.argument("audio", type=click.Path(path_type=Path), required=False)
@click.option("--labels", type=click.Path(path_type=Path), help="Speech turns by hand, an RTTM file, to compare with.")
@click.option("--weights", help="A safetensors file or pypi://PACKAGE==VERSION/FILE; default: Silero's own.")
@click.option(
    "--model", "saved", type=click.Path(path_type=Path), help="A file that `max-conv compile silero-vad` wrote."
)
@click.option("--threshold", default=0.5, show_default=True, help="Probability from which a chunk is speech.")
@click.option(
    "--picture",
    type=click.Path(path_type=Path),
    default="silero-vad.png",
    show_default=True,
    help="The picture to write.",
)
@JSON
def run_silero_vad(
    audio: Path | None,
    labels: Path | None,
    weights: str | None,
    saved: Path | None,
    threshold: float,
    picture: Path,
    as_json: bool,
) -> None:
    """Finds speech in AUDIO (WAV, FLAC, OGG or MP3) with Silero's trained network.

    Without AUDIO it takes a 30 s conversation of two people that comes with labels made by hand.
    """
    from .assets import resolve
    from .audio import read_audio
    from .picture import draw_speech
    from .speech import agreement, read_rttm, turns

    silero = importlib.import_module("max_conv.graphs.silero_vad")
    new_file(picture, force=True)
    if audio is None:
        with step("fetching the conversation"):
            audio, labels = resolve(silero.SAMPLE_AUDIO), labels or resolve(silero.SAMPLE_LABELS)
    rate = silero.Config().rate
    sound = read_audio(audio, rate).mean(axis=0)
    known = read_rttm(labels) if labels else None
    model = _silero_model(saved, weights)
    with step("listening"):
        start = time.perf_counter()
        probabilities = silero.detect(model, sound)
        taken = time.perf_counter() - start
    duration = len(sound) / rate
    hop = silero.Config().hop / rate
    found = turns(probabilities, hop=hop, duration=duration, threshold=threshold)
    agreed = None if known is None else agreement(found, known, duration)
    with step("drawing"):
        draw_speech(picture, sound, rate, probabilities, hop, found, known, threshold=threshold)

    if as_json:
        click.echo(
            json.dumps(
                {
                    "audio": str(audio),
                    "seconds": duration,
                    "seconds_taken": taken,
                    "times_real_time": duration / taken,
                    "turns": [{"start": turn.start, "end": turn.end} for turn in found],
                    "agreement": vars(agreed) if agreed else None,
                    "picture": str(picture),
                }
            )
        )
        return
    rows = [[str(i), f"{t.start:.2f}", f"{t.end:.2f}", f"{t.end - t.start:.2f}"] for i, t in enumerate(found, 1)]
    columns = dict.fromkeys(("turn", "start (s)", "end (s)", "length (s)"), "right")
    table(f"Speech in {audio.name}", columns, rows)
    if agreed:
        click.echo(f"agreement with the labels: {agreed}")
    click.echo(f"{duration:.1f} s of sound in {taken * 1e3:.1f} ms: {duration / taken:,.0f} times real time")
    click.echo(f"picture: {picture}")


def _silero_model(saved: Path | None, weights: str | None) -> Any:
    from . import session

    if saved:
        with step(f"loading {saved}"):
            return session.load(saved)
    silero = importlib.import_module("max_conv.graphs.silero_vad")
    with step("fetching the weights"):
        state = silero.load_weights(weights or silero.WEIGHTS)
    with step("compiling"):
        return session.compile(silero.build(silero.Config(), state), weights=state)


@main.command()
@click.argument("source", type=click.Path(path_type=Path))
@click.argument("target", type=click.Path(path_type=Path))
@click.option(
    "--conv", "patterns", multiple=True, metavar="PATTERN", help="Names of Conv1d filters, as in 'enc.*.weight'."
)
@click.option(
    "--from", "layout", default="FCS", show_default=True, help="The filters' layout in SOURCE; FCS is PyTorch's."
)
@click.option("--to", default="SCF", show_default=True, help="The filters' layout in TARGET; SCF is native.")
@FORCE
@JSON
def convert(
    source: Path, target: Path, patterns: tuple[str, ...], layout: str, to: str, force: bool, as_json: bool
) -> None:
    """Copies a checkpoint to TARGET (.safetensors) with its Conv1d filters in the native layout.

    SOURCE is a .safetensors file, a sharded .index.json, or a .pt, .pth or .bin file of weights. Filters are what
    --conv names, never guessed from shapes; all other tensors are copied bit for bit.
    """
    from . import checkpoint

    with step(f"converting {source}"):
        done = checkpoint.convert(source, new_file(target, force=True), patterns, layout=layout, to=to, force=force)  # type: ignore[arg-type]
    if as_json:
        click.echo(
            json.dumps({"target": str(target), "filters": {name: list(shapes) for name, shapes in done.items()}})
        )
        return
    rows = [[name, str(before), str(after)] for name, (before, after) in done.items()]
    table(f"Filters in {target}", {"name": "left", layout: "right", to: "right"}, rows)


@main.group("compile")
def compile_() -> None:
    """Compiles a model to a file that loads in milliseconds."""


@compile_.command("silero-vad")
@click.argument("target", type=click.Path(path_type=Path))
@click.option("--weights", help="A safetensors file or pypi://PACKAGE==VERSION/FILE; default: Silero's own.")
@FORCE
@JSON
def compile_silero_vad(target: Path, weights: str | None, force: bool, as_json: bool) -> None:
    """Compiles Silero's voice activity detection to TARGET, for `max-conv run silero-vad --model TARGET`."""
    new_file(target, force)
    _save(_silero_model(None, weights), target, as_json)


@compile_.command("conv1d")
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.argument("target", type=click.Path(path_type=Path))
@click.option("--layer", required=True, metavar="NAME", help="The layer: its weights are NAME.weight and NAME.bias.")
@click.option("--native", is_flag=True, help="The filter is SCF and the data NLC; without it both are PyTorch's.")
@click.option("--stride", default=1, show_default=True)
@click.option("--padding", default="0", show_default=True, help='An int, "left,right", or same, valid, causal.')
@click.option("--dilation", default=1, show_default=True)
@click.option("--groups", default=1, show_default=True)
@click.option("--padding-mode", default="zeros", show_default=True)
@FORCE
@JSON
def compile_conv1d(
    checkpoint: Path, target: Path, layer: str, native: bool, padding: str, force: bool, as_json: bool, **options: Any
) -> None:
    """Compiles one convolution of a CHECKPOINT to TARGET, for `max_conv.load(TARGET)`."""
    from . import session
    from .checkpoint import read_layer

    new_file(target, force)
    with step(f"reading {checkpoint}"):
        weights, dtype = read_layer(checkpoint, layer)
    builder = importlib.import_module("max_conv.graphs.conv1d")
    config = builder.Config(**options, padding=_padding(padding), permute=not native)
    with step("compiling"):
        model = session.compile(builder.build(config, weights, dtype=dtype), ["x"], weights=weights)
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
@JSON
def info(as_json: bool) -> None:
    """Shows versions, devices, kernels and the cache."""
    import platform
    from importlib.metadata import version

    from .cache import cache_dir
    from .kernel_library import library_path

    with step("asking MAX for its devices"):
        from max.driver import accelerator_architecture_name, accelerator_count

        accelerators = [accelerator_architecture_name()] * accelerator_count() if accelerator_count() else []
    compiled = library_path()
    files = [path.stat().st_size for path in cache_dir().rglob("*") if path.is_file()]
    facts = {
        "max_conv": version("max-conv"),
        "max": version("max"),
        "mojo": version("mojo-compiler"),
        "python": platform.python_version(),
        "cpu": f"{platform.machine()}, {os.cpu_count()} cores",
        "accelerators": ", ".join(accelerators) or "none",
        "kernels": str(compiled) if compiled.is_file() else "not compiled yet",
        "cache": f"{cache_dir()} ({len(files)} files, {sum(files) / 1e6:.1f} MB)",
    }
    if as_json:
        click.echo(json.dumps(facts))
        return
    for name, fact in facts.items():
        click.echo(f"{name:13}{fact}")


if __name__ == "__main__":
    sys.exit(main())
