"""The command `max-conv stream`: a network that runs live on data from a pipe."""

import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import click

from ..cache import whole_file
from .terminal import CONFIG, FORCE, WEIGHTS, config, new_file, step

# Importing MAX and NumPy is slow: the command imports what it uses, so that --help is fast.


@click.command()
@click.argument("network")
@click.argument("source", default="-")
@click.argument("target", default="-")
@WEIGHTS
@CONFIG
@click.option(
    "--model", "saved", type=click.Path(path_type=Path), help="A file that `max-conv compile NETWORK --live` wrote."
)
@click.option("--format", "pcm", type=click.Choice(["s16", "f32"]), default="s16", help="Of raw samples. Default: s16.")
@click.option("--channels", default=1, show_default=True, help="Of raw samples; each runs on its own.")
@click.option("--chunk", default=20.0, show_default=True, help="Milliseconds of sound that are waited for.")
@FORCE
def stream(
    network: str,
    source: str,
    target: str,
    file: Path | None,
    pcm: str,
    channels: int,
    chunk: float,
    force: bool,
    **given: Any,
) -> None:
    """Runs NETWORK live: reads SOURCE as it comes, and writes what is ready to TARGET. Both are a file, or - for a pipe.

    Sound comes in as WAV or as raw samples, and goes out as raw samples, or as WAV if TARGET ends in .wav. Spectrograms come
    in as raw 32-bit floats, frame by frame. Probabilities and vectors go out as lines of JSON.

    \b
    arecord -t raw -f S16_LE -r 16000 | max-conv stream silero-vad
    sox in.wav -t raw -r 24000 -e signed -b 16 -c 1 - | max-conv stream encodec --weights ... - out.wav
    """
    import numpy as np

    from ..serving import graph_file, open_network

    task = graph_file(network).TASK
    makes_sound = task.kind in ("vocoder", "codec")
    if target != "-":
        new_file(Path(target), force)
    if channels < 1 or chunk <= 0:
        raise ValueError("stream: --channels and --chunk must be above 0.")
    settings = config(network, file)
    opened = open_network(network, settings, **given, live=True, step=step)
    with _reader(source) as read, _writer(target, settings, makes_sound) as write:
        pieces = _pieces(read, task.input, settings, pcm, channels, chunk)
        live, position, random = None, 0, np.random.default_rng(0)
        for piece in pieces:
            live = live or opened.model.stream(len(piece))
            position = write(live.push(*task.inputs(piece, settings, random)), position, pcm)
        if live is not None:
            write(live.flush(), position, pcm)


@contextlib.contextmanager
def _reader(source: str) -> Iterator[IO[bytes]]:
    if source == "-":
        yield sys.stdin.buffer
    else:
        with open(source, "rb") as file:
            yield file


def _pieces(file: IO[bytes], kind: str, settings: Any, pcm: str, channels: int, chunk: float) -> Iterator[Any]:
    """Yields the network's input as it comes: (channels, samples) of sound, or (1, frames, values)."""
    import numpy as np

    from ..sound import read_pcm

    if kind == "sound":
        samples = max(1, round(chunk / 1e3 * settings.rate))
        yield from read_pcm(file, settings.rate, pcm, channels, samples)
        return
    values = getattr(settings, kind)
    waiting = b""
    while data := file.read1() if hasattr(file, "read1") else file.read(1 << 16):
        waiting += data
        count = len(waiting) // (4 * values)
        if count:
            frames = np.frombuffer(waiting[: count * 4 * values], "<f4").astype(np.float32)
            waiting = waiting[count * 4 * values :]
            yield frames.reshape(1, count, values)
    if waiting:
        raise ValueError(
            f"stream: the input ends within a frame of {values} values; the last {len(waiting)} bytes are left."
        )


@contextlib.contextmanager
def _writer(target: str, settings: Any, makes_sound: bool) -> Iterator[Any]:
    """Yields a function that writes the result of a stream: `write(result, first position, format)`."""
    import wave

    from ..sound import to_pcm

    with contextlib.ExitStack() as stack:
        if target == "-":
            out: Any = sys.stdout.buffer
        else:
            whole = stack.enter_context(whole_file(Path(target)))
            out = stack.enter_context(open(whole, "wb"))
        wav: Any = None

        def write(result: Any, position: int, pcm: str) -> int:
            nonlocal wav
            result = result if isinstance(result, tuple) else (result,)
            count = int(result[0].shape[1])
            if not makes_sound:
                for line in _lines(result, position):
                    out.write(line.encode() + b"\n")
            elif target.endswith(".wav"):
                if wav is None:
                    wav = stack.enter_context(wave.open(out, "wb"))
                    wav.setparams((len(result[0]), 2, settings.rate, 0, "NONE", ""))
                wav.writeframes(to_pcm(result[0], "s16"))
            else:
                out.write(to_pcm(result[0], pcm))
            out.flush()
            return position + count

        yield write


def _lines(result: tuple[Any, ...], position: int) -> Iterator[str]:
    """Yields a line of JSON for each position of each row."""
    for i in range(result[0].shape[1]):
        for row in range(result[0].shape[0]):
            values = [array[row, i] for array in result]
            told = [round(float(v), 6) if v.ndim == 0 else [round(float(x), 6) for x in v.ravel()] for v in values]
            yield json.dumps({"position": position + i, "row": row, "value": told[0] if len(told) == 1 else told})
