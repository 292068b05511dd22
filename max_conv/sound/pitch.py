"""Pitch tracks: the most likely path through probabilities, sections that have a pitch, and the names of notes."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

_NAMES = ("C", "C♯", "D", "D♯", "E", "F", "F♯", "G", "G♯", "A", "A♯", "B")


@dataclass(frozen=True)
class Track:
    """The pitch of each frame of a sound.

    Attributes:
        times: (T,), seconds from the start.
        pitch: (..., T), Hz.
        periodicity: (..., T), 0 to 1: how certain it is that there is a pitch.
    """

    times: np.ndarray
    pitch: np.ndarray
    periodicity: np.ndarray


class Pitch(NamedTuple):
    """The result of a pitch tracker.

    Attributes:
        track: The pitch of each frame.
        activations: (..., T, P), how likely each of P pitches is.
        lowest, highest: The first and the last of these pitches, in Hz.
    """

    track: Track
    activations: np.ndarray
    lowest: float
    highest: float


@dataclass(frozen=True)
class Stretch:
    """A section of sound that has a pitch, in seconds and Hz.

    Attributes:
        pitch: The median.
        lowest, highest: The range that holds 90 % of the frames.
        periodicity: The mean.
    """

    start: float
    end: float
    pitch: float
    lowest: float
    highest: float
    periodicity: float


def note(frequency: float) -> str:
    """Returns the nearest note of equal temperament, with A4 at 440 Hz, and the difference in cents.

    >>> note(440), note(263)
    ('A4', 'C4 +9')
    """
    semitones = 69 + 12 * np.log2(frequency / 440)
    nearest = round(semitones)
    cents = round(100 * (semitones - nearest))
    return f"{_NAMES[nearest % 12]}{nearest // 12 - 1}" + (f" {cents:+}" if cents else "")


def stretches(track: Track, *, threshold: float = 0.5, shortest: float = 0.05) -> list[Stretch]:
    """Finds the sections of sound in which every frame's periodicity is at least `threshold`.

    Args:
        track: The track of one sound.
        threshold: The periodicity from which a frame has a pitch.
        shortest: In seconds; shorter sections are left out.

    >>> track = Track(np.arange(4) * 0.1, np.array([100, 200, 220, 90]), np.array([0.1, 0.9, 0.7, 0.2]))
    >>> [(s.start, round(s.end, 2), s.pitch, s.periodicity) for s in stretches(track)]
    [(0.1, 0.3, 210.0, 0.8)]
    """
    if len(track.times) < 2:
        return []
    hop = float(track.times[1] - track.times[0])
    voiced = np.concatenate([[False], track.periodicity >= threshold, [False]])
    changes = np.flatnonzero(voiced[1:] != voiced[:-1])
    found = []
    for begin, end in changes.reshape(-1, 2).tolist():
        if (end - begin) * hop < shortest:
            continue
        low, middle, high = np.percentile(track.pitch[begin:end], (5, 50, 95))
        sure = float(track.periodicity[begin:end].mean())
        found.append(Stretch(begin * hop, end * hop, float(middle), float(low), float(high), sure))
    return found


def viterbi(chances: np.ndarray, steps: np.ndarray) -> np.ndarray:
    """Finds the most likely path of states; at the start all states are equally likely.

    Args:
        chances: (..., T, S), the probability of each state at each time, given the observation.
        steps: (2 * R + 1,), the probabilities of going from a state to the states from R below it to R above it; they
            are scaled to a sum of 1 for each state. Larger steps are nearly impossible: as in librosa, a probability
            of 0 is replaced by the smallest normal float32.

    Returns:
        (..., T), the state of each time.

    >>> viterbi(np.array([[0.9, 0, 0.1], [0.4, 0, 0.6], [0.9, 0, 0.1]]), np.array([0.1, 1, 0.1])).tolist()
    [0, 0, 0]

    Source: Forney, The Viterbi algorithm, 1973, https://doi.org/10.1109/PROC.1973.9030
    """
    least = float(np.finfo(np.float32).tiny)
    times, states = chances.shape[-2:]
    reach = len(steps) // 2
    before = np.arange(states)[:, None] + np.arange(-reach, reach + 1)  # (state, the states before it)
    inside = (before >= 0) & (before < states)
    # The probabilities of leaving a state sum to 1: the first and the last states have fewer neighbours.
    totals = np.array([steps[max(0, reach - s) : reach + states - s].sum() for s in range(states)])
    source = np.clip(before, 0, states - 1)
    moves = np.where(inside, np.log(steps[::-1] / totals[source] + least), -np.inf)
    seen = np.log(chances.reshape(-1, times, states) + least)
    best = seen[:, 0]
    came = np.empty((len(seen), times, states), np.int32)
    for t in range(1, times):
        ways = best[:, source] + moves
        choice = ways.argmax(axis=2)
        value = np.take_along_axis(ways, choice[..., None], axis=2)[..., 0]
        # A jump from any state; only the best state can be worth it.
        jump = best.argmax(axis=1)
        leap = best.max(axis=1)[:, None] + np.log(least)
        came[:, t] = np.where(leap > value, jump[:, None], source[np.arange(states), choice])
        best = np.maximum(value, leap) + seen[:, t]
    path = np.empty((len(seen), times), np.int64)
    path[:, -1] = best.argmax(axis=1)
    for t in range(times - 1, 0, -1):
        path[:, t - 1] = np.take_along_axis(came[:, t], path[:, t, None], axis=1)[:, 0]
    return path.reshape(chances.shape[:-1])
