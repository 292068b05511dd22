"""Pictures of results, drawn with matplotlib."""

import os
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .pitch import Pitch, note
from .speech import Turn

_INK = "#1f2933"
_SOUND = "#52616b"
_SPEECH = "#1f77b4"
_FOUND = "#2a9d5c"
_SPEAKERS = ("#e07b39", "#8e5bb5", "#c94f6d", "#6b8e23", "#3b8ea5", "#a6761d")


def draw_speech(
    path: str | Path,
    audio: np.ndarray,
    rate: int,
    probabilities: np.ndarray,
    hop_seconds: float,
    turns: Sequence[Turn],
    labels: Sequence[Turn] | None = None,
    *,
    threshold: float = 0.5,
) -> None:
    """Draws a sound, its speech probability, and the detected and labelled speech turns, below each other.

    Args:
        path: The picture to write; its suffix names the format. It appears whole or not at all.
        audio: (samples,).
        rate: Samples per second.
        probabilities: (T,), each for `hop_seconds` of sound.
        turns: The detected turns.
        labels: The turns that people marked; each speaker has a colour. Without labels there is no row for them.
        threshold: The probability from which sound is speech.

    Raises:
        ImportError: If matplotlib is not installed.
        OSError: If the folder cannot be written to.
    """
    labels = labels or ()
    figure = _figure()
    sound, probability, bars = figure.subplots(3, 1, sharex=True, height_ratios=[3, 3, 2 if labels else 1])
    _draw_sound(sound, audio, rate)
    _draw_probabilities(probability, probabilities, hop_seconds, threshold)
    _draw_turns(bars, turns, labels)
    for axes in (sound, probability):
        for turn in turns:
            axes.axvspan(turn.start, turn.end, color=_FOUND, alpha=0.10, linewidth=0)
    _finish(figure, (sound, probability, bars), len(audio) / rate, path)


def draw_pitch(
    path: str | Path,
    audio: np.ndarray,
    rate: int,
    pitch: Pitch,
    *,
    threshold: float = 0.5,
) -> None:
    """Draws a sound, the probability of each pitch with the detected pitch, and the periodicity.

    Args:
        path: The picture to write; its suffix names the format. It appears whole or not at all.
        audio: (samples,).
        rate: Samples per second.
        pitch: The result for one sound; frames whose periodicity is below `threshold` have no pitch.
        threshold: The periodicity from which a frame has a pitch.

    Raises:
        ImportError: If matplotlib is not installed.
        OSError: If the folder cannot be written to.
    """
    figure = _figure()
    sound, pitches, periodicity = figure.subplots(3, 1, sharex=True, height_ratios=[2, 5, 2])
    _draw_sound(sound, audio, rate)
    times = pitch.track.times
    hop = float(times[1] - times[0]) if len(times) > 1 else len(audio) / rate
    _draw_pitches(pitches, pitch, hop, threshold)
    _draw_probabilities(periodicity, pitch.track.periodicity, hop, threshold, "periodicity")
    _finish(figure, (sound, pitches, periodicity), len(audio) / rate, path)


def _figure() -> Any:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError("picture: drawing needs matplotlib; run pip install 'max-conv[plot]'.") from None
    figure = Figure(figsize=(13, 6), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _finish(figure: Any, rows: Sequence[Any], seconds: float, path: str | Path) -> None:
    for axes in rows:
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(_INK)
        axes.tick_params(colors=_INK)
        axes.grid(axis="x", color="#d9dee3", linewidth=0.6)
        axes.set_axisbelow(True)
    rows[-1].set_xlim(0, seconds or 1)
    rows[-1].set_xlabel("time, seconds")
    figure.align_ylabels()
    figure.legend(loc="outside upper left", ncols=8, frameon=False, labelcolor=_INK)
    _save(figure, Path(path))


def _draw_pitches(axes: Any, pitch: Pitch, hop: float, threshold: float) -> None:
    track, activations = pitch.track, pitch.activations
    # In octaves above 1 Hz, pitches are evenly spaced.
    low, high = np.log2([pitch.lowest, pitch.highest])
    half = (high - low) / (activations.shape[1] - 1) / 2
    # A frame's time is its middle.
    extent = (-hop / 2, (len(activations) - 0.5) * hop, low - half, high + half)
    axes.imshow(activations.T, origin="lower", aspect="auto", extent=extent, cmap="Greys", vmin=0, interpolation="none")
    voiced = np.where(track.periodicity >= threshold, np.log2(track.pitch), np.nan)
    axes.plot(track.times, voiced, color=_FOUND, linewidth=1.8, label="pitch")
    heard = voiced[np.isfinite(voiced)]
    bottom, top = (heard.min() - 0.5, heard.max() + 0.5) if len(heard) else (low, high)
    axes.set_ylim(max(low, bottom), min(high, top))
    notes = [octave * 12 + step for octave in range(-1, 10) for step in ((0, 4, 7) if top - bottom < 3 else (0,))]
    shown = [n for n in notes if bottom < np.log2(_hertz(n)) < top]
    axes.set_yticks([np.log2(_hertz(n)) for n in shown], [f"{note(_hertz(n))}  {_hertz(n):.0f} Hz" for n in shown])
    axes.set_ylabel("pitch")


def _hertz(semitone: int) -> float:
    """Returns the frequency of a MIDI note number; 69 is A4."""
    return 440 * 2 ** ((semitone - 69) / 12)


def _draw_sound(axes: Any, audio: np.ndarray, rate: int) -> None:
    # One line from the lowest to the highest sample of each section: a pixel cannot show more.
    step = max(1, len(audio) // 4000)
    stretches = audio[: len(audio) // step * step].reshape(-1, step)
    times = (np.arange(len(stretches)) + 0.5) * step / rate
    axes.fill_between(times, stretches.min(axis=1), stretches.max(axis=1), color=_SOUND, linewidth=0.3)
    peak = float(np.abs(audio).max(initial=0)) or 1.0
    axes.set_ylim(-1.08 * peak, 1.08 * peak)
    axes.set_ylabel("sound")


def _draw_probabilities(
    axes: Any, probabilities: np.ndarray, hop_seconds: float, threshold: float, name: str = "probability"
) -> None:
    edges = np.arange(len(probabilities) + 1) * hop_seconds
    axes.stairs(
        probabilities,
        edges,
        fill=True,
        color=_SPEECH,
        alpha=0.25,
        label="speech probability" if name == "probability" else name,
    )
    axes.stairs(probabilities, edges, color=_SPEECH, linewidth=0.9, baseline=None)
    axes.axhline(threshold, color=_INK, linestyle="--", linewidth=1, label=f"threshold {threshold:g}")
    axes.set_ylim(0, 1.03)
    axes.set_ylabel(name)


def _draw_turns(axes: Any, turns: Iterable[Turn], labels: Sequence[Turn]) -> None:
    rows = [("detected", [(turn, _FOUND) for turn in turns])]
    # The speaker None means labels without a name.
    speakers = sorted({turn.speaker for turn in labels}, key=lambda name: name or "")
    for i, speaker in enumerate(speakers):
        colour = _SPEAKERS[i % len(_SPEAKERS)]
        rows.append((speaker or "labelled", [(turn, colour) for turn in labels if turn.speaker == speaker]))
    for row, (name, bars) in enumerate(rows):
        spans = [(turn.start, turn.duration) for turn, _ in bars]
        title = "detected" if row == 0 else f"labelled: {name}" if speakers[row - 1] else name
        axes.broken_barh(spans, (row - 0.36, 0.72), facecolors=[colour for _, colour in bars], label=title)
    axes.set_yticks(range(len(rows)), [name for name, _ in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)


def _save(figure: Any, path: Path) -> None:
    handle, staging = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}.", suffix=path.suffix or ".png")
    os.close(handle)
    try:
        figure.savefig(staging)
        # Only its owner may read a temporary file; the picture gets the usual permissions.
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(staging, 0o666 & ~mask)
        os.replace(staging, path)
    finally:
        Path(staging).unlink(missing_ok=True)
