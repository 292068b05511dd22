"""The parts of Silero's own package that the tests use: its files, and its rules for speech turns."""

import functools
import importlib.util
from typing import Any

import numpy as np
import torch
from max_conv.graphs import silero_vad

from max_conv.sound.speech import Turn
from max_conv.weights.assets import resolve

RATE = 16000


def reference(name: str) -> str:
    """Returns the reference of a file of the pinned wheel, such as "data/silero_vad.jit"."""
    return silero_vad.WEIGHTS.replace("data/silero_vad.onnx", name)


@functools.cache
def utilities() -> Any:
    """Imports Silero's module, from the pinned wheel, that finds turns in probabilities."""
    spec = importlib.util.spec_from_file_location("silero_utils_vad", resolve(reference("utils_vad.py")))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Track:
    """A model like Silero's, which returns a given probability for each chunk."""

    def __init__(self, probabilities: Any) -> None:
        self.probabilities = probabilities

    def reset_states(self) -> None:
        self.left = iter(self.probabilities)

    def __call__(self, chunk: torch.Tensor, rate: int) -> torch.Tensor:
        return torch.tensor(next(self.left), dtype=torch.float64)


def timestamps(audio: Any, model: Any, **options: Any) -> list[tuple[int, int]]:
    """Returns the turns that Silero's own `get_speech_timestamps` finds, in samples."""
    found = utilities().get_speech_timestamps(torch.as_tensor(audio), model, **options)
    return [(turn["start"], turn["end"]) for turn in found]


def theirs(probabilities: Any, samples: int | None = None, rate: int = RATE, **options: Any) -> list[tuple[int, int]]:
    """Returns Silero's turns for a sequence of probabilities; `options` as for `max_conv.sound.speech.turns`."""
    hop = 512 * rate // RATE
    names = {
        "min_speech": "min_speech_duration_ms",
        "min_silence": "min_silence_duration_ms",
        "speech_pad": "speech_pad_ms",
    }
    given = {names[key]: round(value * 1000, 6) for key, value in options.items() if key in names}
    given |= {"max_speech_duration_s": options["max_speech"]} if "max_speech" in options else {}
    given |= {key: value for key, value in options.items() if key in ("threshold", "neg_threshold")}
    audio = np.zeros(len(probabilities) * hop if samples is None else samples, np.float32)
    return timestamps(audio, Track(probabilities), sampling_rate=rate, **given)


def in_samples(turns: list[Turn], rate: int = RATE) -> list[tuple[int, int]]:
    """Returns turns in samples, and checks that they begin and end on whole ones."""
    found = [(round(turn.start * rate), round(turn.end * rate)) for turn in turns]
    assert [(turn.start, turn.end) for turn in turns] == [(start / rate, end / rate) for start, end in found]
    return found
