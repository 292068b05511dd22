"""Speech turns: found in probabilities, read from label files, and how well two lists of turns agree."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np


@dataclass(frozen=True)
class Turn:
    """A section of speech, in seconds."""

    start: float
    end: float
    speaker: str | None = None

    @property
    def duration(self) -> float:
        """Seconds from start to end."""
        return self.end - self.start


@dataclass(frozen=True)
class Agreement:
    """How well detected turns agree with labelled ones. If nothing is labelled or detected, the share is 1.

    Attributes:
        accuracy: Share of all time in which both have speech, or both have none.
        precision: Share of the detected time that is labelled.
        recall: Share of the labelled time that is detected.
        missed: Labelled seconds that are not detected.
        false_alarm: Detected seconds that are not labelled.
    """

    accuracy: float
    precision: float
    recall: float
    missed: float
    false_alarm: float

    def __str__(self) -> str:
        return (
            f"{self.accuracy:.1%} of the time (precision {self.precision:.1%}, recall {self.recall:.1%}, "
            f"{self.missed:.2f} s missed, {self.false_alarm:.2f} s of false alarm)"
        )


def turns(
    probabilities: Sequence[float] | np.ndarray,
    *,
    hop: float = 0.032,
    duration: float | None = None,
    rate: int = 16000,
    threshold: float = 0.5,
    neg_threshold: float | None = None,
    min_speech: float = 0.25,
    min_silence: float = 0.1,
    speech_pad: float = 0.03,
    max_speech: float = math.inf,
) -> list[Turn]:
    """Finds speech turns in a sequence of speech probabilities, by the rules that Silero publishes for its network.

    A turn begins with the first probability of at least `threshold`. It ends where probabilities fall below
    `neg_threshold`, if none of at least `threshold` follows within `min_silence`. Turns of at most `min_speech` are
    dropped. The others are widened by `speech_pad` on both sides, or to the middle of the gap if the gap is shorter.

    Args:
        probabilities: One per hop, between 0 and 1.
        hop: Seconds from one probability to the next.
        duration: Seconds of the whole signal; by default the duration of all hops. No turn ends later.
        rate: Samples per second: turns begin and end on whole samples.
        threshold: The probability from which speech begins.
        neg_threshold: The probability below which it ends; by default 0.15 lower, but at least 0.01.
        min_speech: Seconds.
        min_silence: Seconds.
        speech_pad: Seconds.
        max_speech: Seconds after which a turn is cut: at its longest inner silence above 98 ms, otherwise right there.

    Returns:
        The turns, in order.

    Raises:
        ValueError: If the probabilities have more than one axis, or are not numbers from 0 to 1.

    >>> turns([0.0] * 10 + [0.9] * 20 + [0.0] * 10)
    [Turn(start=0.29, end=0.99, speaker=None)]

    Source: `get_speech_timestamps` of https://github.com/snakers4/silero-vad, whose results these are.
    """
    line = np.asarray(probabilities, np.float64)
    if line.ndim != 1:
        raise ValueError(f"turns: the probabilities must be one line, but have shape {line.shape}.")
    if (wrong := np.flatnonzero(~((line >= 0) & (line <= 1)))).size:
        raise ValueError(f"turns: probabilities must be from 0 to 1, but number {wrong[0]} is {line[wrong[0]]}.")
    step = round(hop * rate)
    end = len(line) * step if duration is None else round(duration * rate)

    def samples(seconds: float) -> float:
        # Silero counts milliseconds. With an unrounded product of seconds, turns of exactly 1.001 s would be kept.
        return round(seconds * rate, 6)

    pad = samples(speech_pad)
    finder = _Finder(
        threshold=threshold,
        neg_threshold=max(threshold - 0.15, 0.01) if neg_threshold is None else neg_threshold,
        min_speech=samples(min_speech),
        min_silence=samples(min_silence),
        max_speech=max_speech * rate - step - 2 * pad,
        min_cut=samples(0.098),
    )
    for i, probability in enumerate(line.tolist()):
        finder.push(probability, i * step)
    spans = _widen(finder.finish(end), pad, end)
    return [Turn(start / rate, stop / rate) for start, stop in spans]


@dataclass
class _Finder:
    """Goes through the probabilities in order. All times are in samples."""

    threshold: float
    neg_threshold: float
    min_speech: float
    min_silence: float
    max_speech: float
    min_cut: float

    def __post_init__(self) -> None:
        self.spans: list[tuple[int, int]] = []
        self.start: int | None = None  # the start of the open turn
        self.quiet: int | None = None  # the time at which it may have ended
        self.pauses: list[tuple[int, int]] = []  # (length, start) of its longer inner silences

    def push(self, probability: float, now: int) -> None:
        if self.start is None:
            if probability >= self.threshold:
                self.start = now
            return
        if probability >= self.threshold and self.quiet is not None:
            if now - self.quiet > self.min_cut:
                self.pauses.append((now - self.quiet, self.quiet))
            self.quiet = None
        if now - self.start > self.max_speech and not self._cut(now):
            return
        if probability < self.neg_threshold:
            if self.quiet is None:
                self.quiet = now
            if now - self.quiet >= self.min_silence:
                self._close(self.quiet)

    def finish(self, end: int) -> list[tuple[int, int]]:
        if self.start is not None:
            self._close(end)
        return self.spans

    def _close(self, end: int) -> None:
        assert self.start is not None
        if end - self.start > self.min_speech:
            self.spans.append((self.start, end))
        self._open(None)

    def _open(self, start: int | None) -> None:
        self.start, self.quiet, self.pauses = start, None, []

    def _cut(self, now: int) -> bool:
        """Cuts a turn that is too long; returns whether a new one is open after the cut."""
        assert self.start is not None
        # Of equally long silences, the first.
        length, pause = max(self.pauses, key=lambda pause: pause[0], default=(0, now))
        self.spans.append((self.start, pause))
        self._open(pause + length if length else None)
        return length > 0


def _widen(spans: list[tuple[int, int]], pad: float, end: int) -> list[tuple[int, int]]:
    """Moves every start and end outwards by `pad` samples, or by half of a gap that is shorter than two pads."""
    wide = [list(span) for span in spans]
    if wide:
        wide[0][0] = int(max(0, wide[0][0] - pad))
        wide[-1][1] = int(min(end, wide[-1][1] + pad))
    for left, right in pairwise(wide):
        gap = right[0] - left[1]
        room = gap // 2 if gap < 2 * pad else pad
        left[1] = int(min(end, left[1] + room))
        right[0] = int(max(0, right[0] - room))
    return [(start, stop) for start, stop in wide]


def read_rttm(path: str | Path) -> list[Turn]:
    """Reads the speaker turns of an RTTM file (Rich Transcription Time Marked), ordered by start.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If a SPEAKER line lacks start, duration or name; the message has the line's number.
    """
    labels = []
    for number, line in enumerate(Path(path).read_text().splitlines(), 1):
        fields = line.split()
        if not fields or fields[0] != "SPEAKER":
            continue
        try:
            start, duration, speaker = float(fields[3]), float(fields[4]), fields[7]
        except (IndexError, ValueError):
            raise ValueError(f"rttm: line {number} of {path} has no start, duration and speaker: {line!r}.") from None
        labels.append(Turn(start, start + duration, speaker))
    return sorted(labels, key=lambda turn: turn.start)


def agreement(found: Iterable[Turn], labels: Iterable[Turn], duration: float) -> Agreement:
    """Compares detected turns with labelled ones, exactly, over `duration` seconds. Speakers are not distinguished.

    >>> agreement([Turn(1, 3)], [Turn(2, 4), Turn(2.5, 3.5)], 10)
    Agreement(accuracy=0.8, precision=0.5, recall=0.5, missed=1, false_alarm=1)
    """
    ours, theirs = _union(found, duration), _union(labels, duration)
    both = sum(max(0, min(a.end, b.end) - max(a.start, b.start)) for a in ours for b in theirs)
    detected = sum(turn.duration for turn in ours)
    labelled = sum(turn.duration for turn in theirs)
    missed, false_alarm = max(0, labelled - both), max(0, detected - both)
    return Agreement(
        accuracy=1 - (missed + false_alarm) / duration if duration else 1.0,
        precision=both / detected if detected else 1.0,
        recall=both / labelled if labelled else 1.0,
        missed=missed,
        false_alarm=false_alarm,
    )


def _union(turns: Iterable[Turn], duration: float) -> list[Turn]:
    """Joins turns that touch or overlap, and clips them to `0 .. duration`."""
    joined: list[Turn] = []
    for turn in sorted(turns, key=lambda turn: turn.start):
        turn = Turn(max(0, turn.start), min(turn.end, duration))
        if turn.end <= turn.start:
            continue
        if joined and turn.start <= joined[-1].end:
            joined[-1] = replace(joined[-1], end=max(joined[-1].end, turn.end))
        else:
            joined.append(turn)
    return joined
