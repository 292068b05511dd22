"""Pictures of results, drawn with matplotlib."""

import os
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

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
    """Draws a sound, its speech probability, and the detected and labelled speech turns, one above the other.

    Args:
        path: The picture to write; its suffix names the format. It appears whole or not at all.
        audio: (samples,).
        rate: Samples a second.
        probabilities: (T,), each of `hop_seconds`.
        turns: What was found.
        labels: What people marked; speakers have a colour each. Without labels there is no row for them.
        threshold: The probability where speech begins.

    Raises:
        ImportError: If matplotlib is not installed.
        OSError: If the folder cannot be written to.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError("picture: drawing needs matplotlib; run pip install 'max-conv[plot]'.") from None
    labels = labels or ()
    figure = Figure(figsize=(13, 6), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    sound, probability, bars = figure.subplots(3, 1, sharex=True, height_ratios=[3, 3, 2 if labels else 1])
    _draw_sound(sound, audio, rate)
    _draw_probabilities(probability, probabilities, hop_seconds, threshold)
    _draw_turns(bars, turns, labels)
    for axes in (sound, probability):
        for turn in turns:
            axes.axvspan(turn.start, turn.end, color=_FOUND, alpha=0.10, linewidth=0)
    for axes in (sound, probability, bars):
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(_INK)
        axes.tick_params(colors=_INK)
        axes.grid(axis="x", color="#d9dee3", linewidth=0.6)
        axes.set_axisbelow(True)
    bars.set_xlim(0, len(audio) / rate or 1)
    bars.set_xlabel("time, seconds")
    figure.align_ylabels()
    figure.legend(loc="outside upper left", ncols=8, frameon=False, labelcolor=_INK)
    _save(figure, Path(path))


def _draw_sound(axes: Any, audio: np.ndarray, rate: int) -> None:
    # One line from the lowest to the highest sample of each stretch, which is all that a pixel can show.
    step = max(1, len(audio) // 4000)
    stretches = audio[: len(audio) // step * step].reshape(-1, step)
    times = (np.arange(len(stretches)) + 0.5) * step / rate
    axes.fill_between(times, stretches.min(axis=1), stretches.max(axis=1), color=_SOUND, linewidth=0.3)
    peak = float(np.abs(audio).max(initial=0)) or 1.0
    axes.set_ylim(-1.08 * peak, 1.08 * peak)
    axes.set_ylabel("sound")


def _draw_probabilities(axes: Any, probabilities: np.ndarray, hop_seconds: float, threshold: float) -> None:
    edges = np.arange(len(probabilities) + 1) * hop_seconds
    axes.stairs(probabilities, edges, fill=True, color=_SPEECH, alpha=0.25, label="speech probability")
    axes.stairs(probabilities, edges, color=_SPEECH, linewidth=0.9, baseline=None)
    axes.axhline(threshold, color=_INK, linestyle="--", linewidth=1, label=f"threshold {threshold:g}")
    axes.set_ylim(0, 1.03)
    axes.set_ylabel("probability")


def _draw_turns(axes: Any, turns: Iterable[Turn], labels: Sequence[Turn]) -> None:
    rows = [("detected", [(turn, _FOUND) for turn in turns])]
    # None stands for labels that name no one.
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
        # A temporary file is private to its owner; the picture gets the usual rights.
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(staging, 0o666 & ~mask)
        os.replace(staging, path)
    finally:
        Path(staging).unlink(missing_ok=True)
