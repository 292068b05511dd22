"""The console command `max-conv`."""

import importlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import click

from .cli_convert import convert
from .terminal import FORCE, JSON, Commands, new_file, step, table

# MAX, NumPy and rich take long to import: each command imports what it uses, so that --help answers at once.


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="max-conv")
def main() -> None:
    """1-D convolution for Modular MAX: right on every shape, complete, and fast."""


main.add_command(convert)


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
@click.argument("checkpoint")
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
    checkpoint: str, target: Path, layer: str, native: bool, padding: str, force: bool, as_json: bool, **options: Any
) -> None:
    """Compiles one convolution of a CHECKPOINT to TARGET, for `max_conv.load(TARGET)`."""
    from . import session
    from .checkpoint import read_layer

    new_file(target, force)
    with step(f"reading {checkpoint}"):
        weights, dtype = read_layer(checkpoint, layer, native)
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
