"""The commands `max-conv run`: one for each kind of network, on real data."""

import json
import time
from pathlib import Path
from typing import Any

import click

from ..cache import whole_file
from .terminal import CONFIG, FORCE, JSON, WEIGHTS, config, new_file, step, table

# Importing MAX and NumPy is slow: each command imports what it uses, so that --help is fast.

FILE = click.Path(path_type=Path)
AUDIO = click.argument("audio", type=FILE, required=False)
SOURCE = click.argument("source", type=FILE)
TARGET = click.argument("target", type=FILE)
SAVED = click.option("--model", "saved", type=FILE, help="A file that `max-conv compile` wrote for this network.")
PICTURE = click.option("--picture", type=FILE, help="The picture to write. Default: NETWORK.png.")


@click.group()
def run() -> None:
    """Runs a network on real data."""


NETWORKS = {
    "speech": ["silero-vad"],
    "pitch": ["crepe", "pesto"],
    "vocoder": ["hifigan", "univnet", "vocos"],
    "codec": ["dac", "encodec"],
    "features": ["mamba", "tcn", "wav2vec2", "whisper"],
}
"""The networks of each kind, known without loading one. A test compares them with each file's TASK."""


def _networks(kind: str, default: str | None = None) -> Any:
    """Returns the option --network."""
    choice = click.Choice(NETWORKS[kind])
    return click.option("--network", "name", type=choice, default=default, required=not default, show_default=True)


def _sample(audio: Path | None) -> Path:
    """Returns the file; without one, the file of the conversation that the demo uses."""
    from ..serving import graph_file
    from ..weights import resolve

    if audio is not None:
        return audio
    with step("fetching the conversation"):
        return resolve(graph_file("silero-vad").SAMPLE_AUDIO)


@run.command()
@AUDIO
@_networks("speech", "silero-vad")
@click.option("--labels", type=FILE, help="Speech turns labelled by hand, an RTTM file, to compare with.")
@WEIGHTS
@SAVED
@click.option("--threshold", default=0.5, show_default=True, help="Probability from which a chunk is speech.")
@PICTURE
@JSON
def speech(
    audio: Path | None,
    name: str,
    labels: Path | None,
    threshold: float,
    picture: Path | None,
    as_json: bool,
    **source: Any,
) -> None:
    """Finds speech in AUDIO (WAV, FLAC, OGG or MP3).

    Without AUDIO it uses a 30 s conversation of two people, with labels made by hand.

    The weights are the ones that the package silero-vad runs. Its safetensors file has others:

    \b
    --weights pypi://silero-vad==6.2.3/silero_vad/data/silero_vad_16k.safetensors
    """
    from ..serving import graph_file, open_network
    from ..serving.batch import read_input, speech_facts
    from ..sound import agreement, draw_speech, read_rttm, turns
    from ..weights import resolve

    picture = new_file(picture or Path(f"{name}.png"), force=True)
    if audio is None:
        audio, labels = _sample(None), labels or resolve(graph_file("silero-vad").SAMPLE_LABELS)
    settings = config(name, None)
    rate, hop = settings.rate, settings.hop / settings.rate
    sound = read_input(name, graph_file(name).TASK, audio, settings)
    known = read_rttm(labels) if labels else None
    network = open_network(name, settings, **source, step=step)
    with step("listening"):
        start = time.perf_counter()
        probabilities = network.run(sound)
        taken = time.perf_counter() - start
    duration = len(sound) / rate
    found = turns(probabilities, hop=hop, duration=duration, threshold=threshold)
    agreed = None if known is None else agreement(found, known, duration)
    with step("drawing"):
        draw_speech(picture, sound, rate, probabilities, hop, found, known, threshold=threshold)

    if as_json:
        facts = speech_facts(found) | {"agreement": vars(agreed) if agreed else None}
        click.echo(json.dumps(_summary(audio, duration, taken, picture) | facts))
        return
    rows = [[str(i), f"{t.start:.2f}", f"{t.end:.2f}", f"{t.end - t.start:.2f}"] for i, t in enumerate(found, 1)]
    columns = dict.fromkeys(("turn", "start (s)", "end (s)", "length (s)"), "right")
    table(f"Speech in {audio.name}", columns, rows)
    if agreed:
        click.echo(f"agreement with the labels: {agreed}")
    _say(duration, taken, picture)


@run.command()
@AUDIO
@_networks("pitch", "crepe")
@click.option("--capacity", metavar="SIZE", help="CREPE's size: tiny, its default, or full.")
@click.option("--decoder", help="How CREPE decides: weighted, its default, argmax or viterbi.")
@click.option("--lowest", type=float, help="The lowest pitch of CREPE, in Hz. Default: 50.")
@click.option("--highest", type=float, help="The highest pitch of CREPE, in Hz. Default: 2006.")
@WEIGHTS
@SAVED
@click.option("--threshold", default=0.5, show_default=True, help="Periodicity from which a frame has a pitch.")
@PICTURE
@JSON
def pitch(
    audio: Path | None,
    name: str,
    capacity: str | None,
    threshold: float,
    picture: Path | None,
    as_json: bool,
    weights: str | None,
    saved: Path | None,
    **options: Any,
) -> None:
    """Follows the pitch of AUDIO (WAV, FLAC, OGG or MP3).

    Without AUDIO it uses a 30 s conversation of two people.
    """
    from ..serving import graph_file, open_network
    from ..serving.batch import pitch_facts, read_input
    from ..sound import draw_pitch, note, stretches

    picture = new_file(picture or Path(f"{name}.png"), force=True)
    audio = _sample(audio)
    settings = config(name, None, capacity=capacity)
    sound = read_input(name, graph_file(name).TASK, audio, settings)
    network = open_network(name, settings, weights=weights, saved=saved, step=step)
    with step("listening"):
        start = time.perf_counter()
        followed = network.run(sound, **{name: value for name, value in options.items() if value is not None})
        taken = time.perf_counter() - start
    found = stretches(followed.track, threshold=threshold)
    duration = len(sound) / settings.rate
    with step("drawing"):
        draw_pitch(picture, sound, settings.rate, followed, threshold=threshold)
    if as_json:
        click.echo(json.dumps(_summary(audio, duration, taken, picture) | pitch_facts(followed.track, found)))
        return
    columns = dict.fromkeys(("start (s)", "end (s)", "pitch (Hz)", "note", "range (Hz)", "periodicity"), "right")
    table(f"Pitch in {audio.name}", columns | {"note": "left"}, [_stretch(s, note(s.pitch)) for s in found])
    _say(duration, taken, picture)


def _stretch(s: Any, note: str) -> list[str]:
    between = f"{s.lowest:.0f} to {s.highest:.0f}"
    return [f"{s.start:.2f}", f"{s.end:.2f}", f"{s.pitch:.1f}", note, between, f"{s.periodicity:.2f}"]


def _summary(audio: Path, duration: float, taken: float, picture: Path) -> dict[str, Any]:
    """Returns the JSON fields that speech and pitch have in common."""
    return {
        "audio": str(audio),
        "seconds": duration,
        "seconds_taken": taken,
        "times_real_time": duration / taken,
        "picture": str(picture),
    }


def _speed(seconds: float, taken: float) -> str:
    return f"{seconds:.1f} s of sound in {taken * 1e3:.1f} ms: {seconds / taken:,.0f} times real time"


def _say(duration: float, taken: float, picture: Path) -> None:
    """Prints the last lines of speech and pitch."""
    click.echo(_speed(duration, taken))
    click.echo(f"picture: {picture}")


@run.command()
@SOURCE
@TARGET
@_networks("vocoder")
@WEIGHTS
@CONFIG
@SAVED
@FORCE
@JSON
def vocoder(source: Path, target: Path, as_json: bool, **options: Any) -> None:
    """Makes sound from the mel spectrogram SOURCE (.npy, (frames, mels)), and writes it to TARGET."""
    _make_sound(source, target, as_json, **options)


@run.command()
@SOURCE
@TARGET
@_networks("codec")
@WEIGHTS
@CONFIG
@SAVED
@FORCE
@JSON
def codec(source: Path, target: Path, as_json: bool, **options: Any) -> None:
    """Codes and decodes the sound SOURCE, channel by channel, and writes the decoded sound to TARGET."""
    _make_sound(source, target, as_json, **options)


def _make_sound(source: Path, target: Path, as_json: bool, force: bool, **options: Any) -> None:
    from ..sound import check_sound_file, write_audio

    new_file(check_sound_file(target), force)
    network, sound, taken = _run_on(source, **options)
    rate = network.config.rate
    write_audio(target, sound, rate)
    seconds = sound.shape[1] / rate
    if as_json:
        facts = {"source": str(source), "target": str(target), "seconds": seconds, "seconds_taken": taken}
        click.echo(json.dumps(facts | {"times_real_time": seconds / taken}))
    else:
        click.echo(f"{target}: {_speed(seconds, taken)}")


@run.command()
@SOURCE
@TARGET
@_networks("features")
@WEIGHTS
@CONFIG
@SAVED
@FORCE
@JSON
def features(source: Path, target: Path, as_json: bool, force: bool, **options: Any) -> None:
    """Makes vectors from SOURCE, a sound or an array (.npy, (length, values)), and writes them to TARGET (.npy)."""
    import numpy as np

    if target.suffix != ".npy":
        raise ValueError(f"run: {target} must end in .npy.")
    new_file(target, force)
    _, vectors, taken = _run_on(source, **options)
    with whole_file(target) as whole:
        np.save(whole, vectors)
    if as_json:
        facts = {"source": str(source), "target": str(target), "shape": list(vectors.shape), "seconds_taken": taken}
        click.echo(json.dumps(facts))
    else:
        click.echo(f"{target}: {vectors.dtype} of shape {vectors.shape} in {taken * 1e3:.1f} ms")


def _run_on(
    source: Path, name: str, weights: str | None, file: Path | None, saved: Path | None
) -> tuple[Any, Any, float]:
    """Returns the network, its output for a file, and the seconds that it took."""
    from ..serving import graph_file, open_network
    from ..serving.batch import read_input

    settings = config(name, file)
    given = read_input(name, graph_file(name).TASK, source, settings)
    network = open_network(name, settings, weights=weights, saved=saved, step=step)
    with step("running"):
        start = time.perf_counter()
        result = network.run(given)
        return network, result, time.perf_counter() - start
