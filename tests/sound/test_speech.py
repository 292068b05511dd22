"""Speech turns, their labels, their picture, and the sound that they are found in."""

import builtins
import math
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from max_conv.sound.audio import read_audio
from max_conv.sound.picture import draw_speech
from max_conv.sound.speech import Agreement, Turn, agreement, read_rttm, turns
from silero_wheel import RATE, in_samples, theirs

HOP = 0.032


def line(*runs: tuple[float, int]) -> list[float]:
    """Probabilities from (value, count) runs."""
    return [value for value, count in runs for _ in range(count)]


# Probabilities, options, and how many turns there are: a chunk is 512 samples, a turn lasts more than 4000, is widened by 480.
RULES = {
    "nothing": ([], {}, 0),
    "silence": (line((0.1, 50)), {}, 0),
    "one turn": (line((0, 10), (0.9, 20), (0, 10)), {}, 1),
    "threshold is speech": (line((0, 10), (0.5, 20), (0, 10)), {}, 1),
    "padding stays inside": (line((0.9, 40)), {}, 1),
    "the signal ends early": (line((0, 10), (0.9, 20)), {"samples": 15000}, 1),
    "hysteresis holds a turn": (line((0.9, 10), (0.36, 20), (0.9, 10)), {}, 1),
    "hysteresis off": (line((0.9, 10), (0.36, 20), (0.9, 10)), {"neg_threshold": 0.4}, 2),
    "neg_threshold above the threshold": (line((0.9, 10), (0.6, 20), (0.9, 10)), {"neg_threshold": 0.7}, 1),
    "neg_threshold is at least 0.01": (line((0.9, 20), (0.005, 20)), {"threshold": 0.1}, 1),
    "exactly the shortest": (line((0.9, 8), (0, 10)), {"min_speech": 0.256}, 0),
    "just above the shortest": (line((0.9, 8), (0, 10)), {}, 1),
    "short silence": (line((0.9, 10), (0, 4), (0.9, 10)), {}, 1),
    "long silence": (line((0.9, 10), (0, 5), (0.9, 10)), {}, 2),
    "silence lasts below the threshold": (line((0.9, 10), (0, 1), (0.4, 4), (0, 1), (0.9, 10)), {}, 2),
    "close turns share the gap": (line((0.9, 10), (0, 5), (0.9, 10)), {"speech_pad": 0.1}, 2),
    "milliseconds that no float holds": (line((0.9, 32)), {"samples": 16016, "min_speech": 1.001}, 0),
    "cut on the spot": (line((0.9, 100)), {"max_speech": 1.0}, 4),
    "cut at once": (line((0.9, 20)), {"max_speech": 0.05}, 10),
    "cut at the longest pause": (
        line((0.9, 10), (0, 4), (0.9, 5), (0, 6), (0.9, 20)),
        {"max_speech": 1.0, "min_silence": 1.0},
        2,
    ),
    "cut at the first of equal pauses": (
        line((0.9, 6), (0, 4), (0.9, 6), (0, 4), (0.9, 20)),
        {"max_speech": 1.0, "min_silence": 1.0},
        2,
    ),
}


def ours(
    probabilities: list[float], samples: int | None = None, rate: int = RATE, **options: float
) -> list[tuple[int, int]]:
    """Our turns, in samples."""
    hop = 512 * rate // RATE
    duration = None if samples is None else samples / rate
    return in_samples(turns(probabilities, hop=hop / rate, duration=duration, rate=rate, **options), rate)


@pytest.mark.parametrize("rate", [8000, 16000])
@pytest.mark.parametrize(("probabilities", "options", "count"), RULES.values(), ids=RULES)
def test_rules_are_those_of_silero(probabilities: list[float], options: dict[str, Any], count: int, rate: int) -> None:
    if "samples" in options:
        options = options | {"samples": options["samples"] * rate // RATE}
    expected = theirs(probabilities, rate=rate, **options)
    assert ours(probabilities, rate=rate, **options) == expected and len(expected) == count


def random_track(random: np.random.Generator) -> list[float]:
    """Runs of probabilities, some exactly on a threshold, some noisy."""
    probabilities = []
    for _ in range(random.integers(0, 30)):
        level = random.choice([0, 0.1, 0.34, 0.35, 0.36, 0.5, 0.75, 1, random.random()])
        noise = random.choice([0, 0, 0.1]) * random.standard_normal(random.integers(1, 12))
        probabilities += np.clip(level + noise, 0, 1).tolist()
    return probabilities


def random_options(random: np.random.Generator) -> dict[str, Any]:
    """Options of `turns`, in whole milliseconds."""
    options = {
        "threshold": random.choice([0.05, 0.3, 0.5, 0.9]),
        "neg_threshold": random.random(),
        "min_speech": random.integers(0, 1200) / 1000,
        "min_silence": random.integers(0, 1200) / 1000,
        "speech_pad": random.integers(0, 400) / 1000,
        "max_speech": random.choice([0.5, 1, 2.3, round(random.random() * 5, 2)]),
    }
    return {name: float(value) for name, value in options.items() if random.random() < 0.6}


@pytest.mark.parametrize("rate", [8000, 16000])
def test_random_turns_are_those_of_silero(rate: int) -> None:
    random = np.random.default_rng(rate)
    counts = []
    for _ in range(500):
        probabilities, options = random_track(random), random_options(random)
        chunks = len(probabilities) * 512 * rate // RATE
        options["samples"] = max(0, chunks - int(random.integers(0, 512 * rate // RATE)))
        expected = theirs(probabilities, rate=rate, **options)
        assert ours(probabilities, rate=rate, **options) == expected, (probabilities, options)
        counts.append(len(expected))
    assert 0 in counts and max(counts) >= 6 and np.mean(counts) > 1


@pytest.mark.parametrize(
    ("probabilities", "sentence"),
    [
        ([[0.5]], "turns: the probabilities must be one line, but have shape (1, 1)."),
        ([0.5, math.nan], "turns: probabilities must be from 0 to 1, but number 1 is nan."),
        ([1.5], "turns: probabilities must be from 0 to 1, but number 0 is 1.5."),
    ],
)
def test_wrong_probabilities(probabilities: list[float], sentence: str) -> None:
    with pytest.raises(ValueError) as caught:
        turns(probabilities)
    assert str(caught.value) == sentence


# Found, labelled, accuracy, precision, recall, missed, false alarm, of 10 s.
AGREEMENTS = [
    ([], [], 1, 1, 1, 0, 0),
    ([(0, 10)], [], 0, 0, 1, 0, 10),
    ([], [(0, 10)], 0, 1, 0, 10, 0),
    ([(1, 3)], [(2, 4)], 0.8, 0.5, 0.5, 1, 1),
    ([(1, 3), (3, 5)], [(1, 2), (1.5, 5)], 1, 1, 1, 0, 0),
    ([(0, 4)], [(1, 2), (3, 20)], 0.2, 0.5, 0.25, 6, 2),
]


@pytest.mark.parametrize(("found", "labels", "accuracy", "precision", "recall", "missed", "false_alarm"), AGREEMENTS)
def test_agreement(
    found: list[tuple[float, float]],
    labels: list[tuple[float, float]],
    accuracy: float,
    precision: float,
    recall: float,
    missed: float,
    false_alarm: float,
) -> None:
    got = agreement([Turn(*span) for span in found], [Turn(*span) for span in labels], 10)
    expected = Agreement(accuracy, precision, recall, missed, false_alarm)
    assert asdict(got) == pytest.approx(asdict(expected))


def test_agreement_reads_as_a_sentence() -> None:
    assert str(agreement([Turn(1, 3)], [Turn(2, 4)], 10)) == (
        "80.0% of the time (precision 50.0%, recall 50.0%, 1.00 s missed, 1.00 s of false alarm)"
    )


def test_rttm(tmp_path: Path) -> None:
    file = tmp_path / "labels.rttm"
    file.write_text(
        ";; a comment\nSPEAKER a 1 2.5 0.5 <NA> <NA> Ann <NA> <NA>\n\nSPEAKER a 1 1 1 <NA> <NA> Bob <NA> <NA>\n"
    )
    assert read_rttm(file) == [Turn(1, 2, "Bob"), Turn(2.5, 3, "Ann")]
    file.write_text("SPEAKER a 1 one 1 <NA> <NA> Bob\n")
    with pytest.raises(ValueError, match=r"^rttm: line 1 of .* has no start, duration and speaker: 'SPEAKER a 1 one"):
        read_rttm(file)


@pytest.mark.parametrize("suffix", ["wav", "flac", "ogg", "mp3"])
@pytest.mark.parametrize(("rate", "channels"), [(16000, 1), (44100, 2)])
def test_reads_sound(tmp_path: Path, suffix: str, rate: int, channels: int) -> None:
    seconds = np.arange(2 * rate) / rate
    tone = 0.5 * np.sin(2 * np.pi * 440 * seconds)
    soundfile.write(tmp_path / f"tone.{suffix}", np.stack([tone] * channels, 1), rate)
    sound = read_audio(tmp_path / f"tone.{suffix}", 16000)
    assert sound.dtype == np.float32 and sound.flags.c_contiguous
    assert sound.shape == (channels, 32000)
    expected = 0.5 * np.sin(2 * np.pi * 440 * np.arange(32000) / 16000)
    middle = slice(4000, 28000)
    assert np.abs(sound[:, middle] - expected[middle]).max() < 0.02


def test_wrong_sound(tmp_path: Path) -> None:
    text = tmp_path / "text.wav"
    text.write_text("no sound")
    empty, broken = tmp_path / "empty.wav", tmp_path / "broken.wav"
    soundfile.write(empty, np.zeros((0, 1)), 16000)
    soundfile.write(broken, np.array([0.0] * 8000 + [np.inf]), 16000, subtype="FLOAT")
    for path, kind, sentence in [
        (tmp_path / "none.wav", FileNotFoundError, "none.wav is not a file."),
        (tmp_path, FileNotFoundError, " is not a file."),
        (text, ValueError, "text.wav cannot be read as a sound file ("),
        (empty, ValueError, "empty.wav holds no samples."),
        (broken, ValueError, "broken.wav holds a sample that is not a finite number, 0.500 s from its start."),
    ]:
        with pytest.raises(kind) as caught:
            read_audio(path, 16000)
        assert str(caught.value).startswith("audio: ") and sentence in str(caught.value)
    with pytest.raises(ValueError, match="the rate must be at least 1 sample a second, but is 0"):
        read_audio(empty, 0)


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Makes a module appear not to be installed."""

    def remove(missing: str) -> None:
        real = builtins.__import__

        def guarded(name: str, *args: Any, **kwargs: Any) -> Any:
            if name.split(".")[0] == missing:
                raise ModuleNotFoundError(f"No module named {missing!r}", name=missing)
            return real(name, *args, **kwargs)

        monkeypatch.setattr(builtins, "__import__", guarded)

    return remove


def test_missing_extras_are_named(tmp_path: Path, without: Callable[[str], None]) -> None:
    without("soxr")
    with pytest.raises(ImportError, match=r"^audio: reading sound needs soxr; run pip install 'max-conv\[audio\]'\.$"):
        read_audio(tmp_path, 16000)
    without("matplotlib")
    with pytest.raises(ImportError, match=r"run pip install 'max-conv\[plot\]'"):
        draw_speech(tmp_path / "a.png", np.zeros(1), 16000, np.zeros(1), HOP, [])


@pytest.mark.parametrize("labels", [None, [Turn(0, 1, "Ann"), Turn(0.5, 1.5, "Bob")], [Turn(0, 1)]])
@pytest.mark.parametrize("samples", [32000, 100, 0])
def test_draws(tmp_path: Path, labels: list[Turn] | None, samples: int) -> None:
    sound = np.random.default_rng(0).standard_normal(samples).astype(np.float32)
    path = tmp_path / "speech.png"
    draw_speech(path, sound, 16000, np.full(-(-samples // 512), 0.7), HOP, [Turn(0.2, 0.8)], labels)
    assert path.read_bytes().startswith(b"\x89PNG")
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_picture_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError):
        draw_speech(tmp_path / "speech.unknown", np.zeros(100), 16000, np.zeros(1), HOP, [])
    assert not list(tmp_path.iterdir())
