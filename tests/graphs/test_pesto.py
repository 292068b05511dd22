"""PESTO on a real conversation, against the package's own transform and network."""

import importlib.util
import sys
import types
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from max_conv.graphs import pesto, silero_vad

import max_conv
from max_conv.cli.main import main
from max_conv.sound.audio import read_audio
from max_conv.weights.assets import resolve

FILES = {
    "pesto.utils.cached_conv": "utils/cached_conv.py",
    "pesto.utils.crop_cqt": "utils/crop_cqt.py",
    "pesto.utils.hcqt": "utils/hcqt.py",
    "pesto.utils.reduce_activations": "utils/reduce_activations.py",
    "pesto.data": "data.py",
    "pesto.model": "model.py",
}
SIZES = {"n_chan_layers": [40, 30, 30, 10, 3], "n_prefilt_layers": 3, "prefilt_kernel_size": 39, "residual": True}
SIZES |= {"n_bins_in": 219, "output_dim": 384, "a_lrelu": 0.3}
TRANSFORM = {"harmonics": [1], "fmin": 27.5, "bins_per_semitone": 3, "n_bins": 251, "center_bins": True, "gamma": 7}
"""The hyper-parameters in the checkpoint of mir-1k_g7."""


def hann(name: str, length: int, fftbins: bool) -> np.ndarray:
    """The functions that the package uses from SciPy."""
    assert name == "hann" and fftbins
    return torch.hann_window(length, dtype=torch.float64).numpy()


@pytest.fixture(scope="module")
def network() -> Iterator[Any]:
    """The package's network with its weights, made from the package's files."""
    names = ("pesto", "pesto.utils", "scipy", "scipy.signal")
    modules: dict[str, Any] = {name: types.ModuleType(name) for name in names}
    modules["scipy.signal"].get_window = hann
    with pytest.MonkeyPatch.context() as patch:
        for name, module in modules.items():
            patch.setitem(sys.modules, name, module)
        for name, file in FILES.items():
            path = resolve(pesto.WEIGHTS.replace("weights/mir-1k_g7.ckpt", file))
            spec = importlib.util.spec_from_file_location(name, path)
            assert spec and spec.loader
            module = importlib.util.module_from_spec(spec)
            patch.setitem(sys.modules, name, module)
            parent, _, own = name.rpartition(".")
            setattr(modules[parent], own, module)
            spec.loader.exec_module(module)
            for public in ("CropCQT", "HarmonicCQT", "reduce_activations"):
                if public in vars(module) and parent == "pesto.utils":
                    setattr(modules[parent], public, vars(module)[public])
        data, model = sys.modules["pesto.data"], sys.modules["pesto.model"]
        transform = data.Preprocessor(hop_size=10.0, sampling_rate=16000, **TRANSFORM)
        crop = {"min_steps": -16, "max_steps": 16}
        network = model.PESTO(model.Resnet1d(**SIZES), preprocessor=transform, crop_kwargs=crop, reduction="alwa")
        state = torch_state()
        missing = network.load_state_dict(state, strict=False)
        assert not missing.unexpected_keys and all("cqt_kernels" in name for name in missing.missing_keys)
        yield network.eval()


def torch_state() -> dict[str, Any]:
    """The checkpoint, loaded by PyTorch itself, which is allowed to load the classes that it names."""
    classes = (
        "dictconfig.DictConfig",
        "listconfig.ListConfig",
        "nodes.AnyNode",
        "base.ContainerMetadata",
        "base.Metadata",
    )
    known = [(type("Any", (), {}), f"omegaconf.{name}") for name in classes] + [(type("Any", (), {}), "typing.Any")]
    with torch.serialization.safe_globals([*known, defaultdict, dict, list, int]):
        return torch.load(resolve(pesto.WEIGHTS), weights_only=True)["state_dict"]


@pytest.fixture(scope="module")
def audio() -> np.ndarray:
    return read_audio(resolve(silero_vad.SAMPLE_AUDIO), 16000).mean(axis=0)[7 * 16000 : 10 * 16000]


def graphs() -> dict[str, tuple[Any, Any]]:
    weights = pesto.load_weights()
    return {"pesto": (pesto.build(pesto.Config(), weights), weights)}


@pytest.fixture(scope="module")
def model(models: dict[str, max_conv.Model]) -> max_conv.Model:
    return models["pesto"]


@pytest.fixture(scope="module")
def results(model: max_conv.Model, audio: np.ndarray) -> list[np.ndarray]:
    return [output[0] for output in model(audio[None])]


def test_the_transform_is_the_packages(network: Any) -> None:
    layer = network.preprocessor.hcqt_kernels.cqt_kernels[0]
    want = (layer.conv.weight[:, 0] * torch.cat([layer.sqrt_lengths] * 2)).numpy().T
    got = pesto.transform()[:, 0]
    start = len(want) // 2 - (len(got) + 1) // 2
    np.testing.assert_allclose(got, want[start : start + len(got)], rtol=0, atol=3e-8)
    assert not want[:start].any() and not want[start + len(got) :].any()


def test_agrees_with_the_package(network: Any, audio: np.ndarray, results: list[np.ndarray]) -> None:
    with torch.inference_mode():
        want = [value.numpy() for value in network(torch.from_numpy(audio), sr=16000, convert_to_freq=True)]
        exact = [value.numpy() for value in network.double()(torch.from_numpy(audio).double(), convert_to_freq=True)]
    network.float()
    bounds = (0, 5e-6), (5e-6, 0), (1e-6, 2e-6), (5e-4, 0)
    for got, theirs, float64, (absolute, relative) in zip(results, want, exact, bounds):
        assert got.shape == theirs.reshape(got.shape).shape
        np.testing.assert_allclose(got, theirs.reshape(got.shape), rtol=relative, atol=absolute)
        # Logarithms of faint bands magnify rounding; ours is no worse than theirs.
        ours, torchs = (np.abs(value.reshape(got.shape) - float64.reshape(got.shape)).max() for value in (got, theirs))
        assert ours <= 4 * torchs


def test_batch_is_each_signal(model: max_conv.Model, audio: np.ndarray) -> None:
    signals = np.stack([audio[:16000], audio[16000:32000]])
    track, activations = pesto.listen(model, signals)
    assert activations.shape == (2, 101, 384)
    for i, signal in enumerate(signals):
        alone, _ = pesto.listen(model, signal)
        np.testing.assert_allclose(track.pitch[i], alone.pitch, rtol=1e-5)
        np.testing.assert_allclose(track.periodicity[i], alone.periodicity, atol=1e-5)


@pytest.mark.parametrize("frequency", [110.0, 261.6, 880.0])
def test_hears_a_tone(model: max_conv.Model, frequency: float) -> None:
    times = np.arange(16000) / 16000
    tone = sum(np.sin(2 * np.pi * k * frequency * times) / k for k in (1, 2, 3)) * 0.2
    track, _ = pesto.listen(model, tone)
    inside = slice(10, -10)
    assert np.abs(1200 * np.log2(track.pitch[inside] / frequency)).max() < 20
    assert track.periodicity[inside].min() > 0.9


def test_takes_any_length(model: max_conv.Model) -> None:
    assert [pesto.listen(model, np.zeros(n))[1].shape for n in (1065, 16001)] == [(7, 384), (101, 384)]
    with pytest.raises(ValueError, match=r"^pesto: audio must have at least 1065 samples, but has 1064\.$"):
        pesto.listen(model, np.zeros(1064))


def test_other_checkpoints(tmp_path: Path) -> None:
    torch.save({"state_dict": {"shift": torch.zeros(())}}, tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match="pesto: no tensor is named like"):
        pesto.load_weights(tmp_path / "other.ckpt")
    (tmp_path / "rubbish.ckpt").write_text("rubbish")
    with pytest.raises(ValueError, match=r"rubbish\.ckpt is not a checkpoint of PESTO"):
        pesto.load_weights(tmp_path / "rubbish.ckpt")


def test_the_command(model: max_conv.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model.save(tmp_path / "pesto")
    result = CliRunner().invoke(main, ["run", "pitch", "--network", "pesto", "--model", "pesto"])
    assert result.exit_code == 0, result.stderr
    assert "Pitch in sample.wav" in result.stdout and "times real time" in result.stdout and "G3" in result.stdout
    assert len((tmp_path / "pesto.png").read_bytes()) > 20_000
