"""The console command: its output, its files, its errors."""

import importlib.metadata
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from click.testing import CliRunner, Result
from max_conv.graphs import dac, hifigan
from safetensors.numpy import save_file

import max_conv
from max_conv.cli.main import main


def call(*arguments: Any) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def good(*arguments: Any) -> str:
    result = call(*arguments)
    assert result.exit_code == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A PyTorch checkpoint, a file that is not a checkpoint, a second of noise, and Silero compiled."""
    path = tmp_path_factory.mktemp("cli")
    torch.manual_seed(0)
    layer = torch.nn.Conv1d(4, 8, 3)
    torch.save({f"enc.{name}": value for name, value in layer.state_dict().items()}, path / "m.pt")
    for suffix in ("safetensors", "onnx"):
        (path / f"rubbish.{suffix}").write_text("rubbish")
    noise = np.random.default_rng(0).standard_normal((22_050, 2)) * 0.01
    soundfile.write(path / "noise.flac", noise, 22_050)
    good("compile", "silero-vad", path / "silero")
    return path


@pytest.mark.parametrize(
    ("model", "lines"),
    [
        ("hifigan", ["receptive field             27 input positions (313.5 ms)", "layers                      78"]),
        ("silero-vad", ["hop                         512 input positions (32 ms)", "without end"]),
        (
            "crepe",
            ["receptive field             1024 input positions (64 ms)", "latency                     160 input"],
        ),
        ("tcn", ["receptive field           1531 input positions", "hop                       1 input position\n"]),
    ],
)
def test_info_of_a_network(model: str, lines: list[str]) -> None:
    text = good("info", model)
    assert all(line in text for line in lines), text
    facts = json.loads(good("info", model, "--json"))
    assert facts["parameters"] > 1e5 and sum(layer["share"] for layer in facts["layers"]) == pytest.approx(1)


def test_the_demo(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = good("run", "speech", "--model", folder / "silero")
    assert "Speech in sample.wav" in text and "times real time" in text
    # With the values that the package silero-vad runs; its safetensors file gives 98.4%.
    assert "agreement with the labels: 98.8% of the time (precision 99.0%, recall 99.3%" in text
    picture = (tmp_path / "silero-vad.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) > 20_000


def test_run_as_json_on_any_file(folder: Path, tmp_path: Path) -> None:
    arguments = [folder / "noise.flac", "--model", folder / "silero", "--picture", tmp_path / "p.png", "--json"]
    facts = json.loads(good("run", "speech", *arguments))
    assert facts["seconds"] == pytest.approx(1.0, abs=0.01) and facts["turns"] == [] and facts["agreement"] is None
    assert facts["times_real_time"] == pytest.approx(facts["seconds"] / facts["seconds_taken"])


def test_convert(folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "native.safetensors"
    assert "enc.weight" in good("convert", folder / "m.pt", target, "--conv", "*.weight")
    facts = json.loads(good("convert", folder / "m.pt", target, "--conv", "*.weight", "--force", "--json"))
    assert facts["files"] == [str(target)] and not facts["already"]
    weight = {"sources": ["enc.weight"], "name": "enc.weight", "shape": [3, 4, 8], "dtype": "F32"}
    assert facts["tensors"][0] == {**weight, "layout": "FCS -> SCF", "declared": True}


def test_compile_one_layer(folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "layer"
    facts = json.loads(
        good(
            "compile", "conv1d", folder / "m.pt", target, "--layer", "enc", "--padding", "2,0", "--stride", 2, "--json"
        )
    )
    assert facts["bytes"] == target.stat().st_size
    state = torch.load(folder / "m.pt")
    x = torch.randn(1, 4, 11)
    want = torch.nn.functional.conv1d(torch.nn.functional.pad(x, (2, 0)), state["enc.weight"], state["enc.bias"], 2)
    np.testing.assert_allclose(max_conv.load(target)(x=x.numpy()), want.numpy(), atol=1e-5)


def test_info() -> None:
    facts = json.loads(good("info", "--json"))
    assert facts["max_conv"] == max_conv.__version__ and "cores" in facts["cpu"]
    assert "kernels" in good("info")


def test_warm_compiles_the_common_kinds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from max_conv.runtime import kinds

    asked: list[Any] = []
    monkeypatch.setattr(kinds, "ready", lambda *wanted: asked.extend(wanted))
    monkeypatch.setenv("MAX_CONV_CACHE", str(tmp_path))
    assert good("warm") == f"{tmp_path}: {len(kinds.common())} kinds of layers are compiled\n"
    assert asked == kinds.common()


def test_clear_keeps_downloads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAX_CONV_CACHE", str(tmp_path))
    for name in ("graphs/a.mef", "kernels/b/c.mojoc", "assets/d/e.wav"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_bytes(bytes(500_000))
    (tmp_path / "graphs/b.mef").hardlink_to(tmp_path / "graphs/a.mef")  # two graphs that were compiled together
    assert json.loads(good("info", "--json"))["graphs"] == "2 compiled, 0.5 MB"
    assert good("cache", "clear") == f"{tmp_path}: removed 2 files, 1.0 MB\n"
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["e.wav"]
    assert good("cache", "clear") == f"{tmp_path}: removed 0 files, 0.0 MB\n"


REFUSED: dict[str, tuple[list[str], str]] = {
    "no audio": (["run", "speech", "gone.wav", "--model", "silero"], r"gone\.wav"),
    "no labels": (["run", "speech", "noise.flac", "--labels", "gone.rttm", "--model", "silero"], r"gone\.rttm"),
    "not audio": (["run", "speech", "m.pt", "--model", "silero"], r"m\.pt"),
    "no model": (["run", "speech", "noise.flac", "--model", "m.pt"], r"m\.pt is not a model that max_conv saved"),
    "bad weights": (["run", "speech", "noise.flac", "--weights", "rubbish.safetensors"], r"rubbish\.safetensors"),
    "damaged ONNX": (
        ["run", "speech", "noise.flac", "--weights", "rubbish.onnx"],
        r"rubbish\.onnx is not an ONNX file, or is damaged",
    ),
    "no ONNX": (["run", "speech", "noise.flac", "--weights", "gone.onnx"], r"gone\.onnx does not exist"),
    "bad reference": (["run", "speech", "noise.flac", "--weights", "pypi://silero"], r"pypi://silero"),
    "no folder for the picture": (
        ["run", "speech", "noise.flac", "--picture", "no/p.png", "--model", "silero"],
        r"there is no folder no; make it first",
    ),
    "not safetensors": (["convert", "m.pt", "x.bin", "--conv", "*"], r"the output must end in \.safetensors"),
    "no pattern": (["convert", "m.pt", "x.safetensors"], r"name the filters with --conv PATTERN"),
    "no source": (["convert", "gone.pt", "x.safetensors", "--conv", "*"], r"there is no file .*gone\.pt"),
    "damaged": (["convert", "rubbish.safetensors", "x.safetensors", "--conv", "*"], r"is not a safetensors file"),
    "exists": (["convert", "m.pt", "rubbish.safetensors", "--conv", "*"], r"exists already; pass --force"),
    "no folder": (["convert", "m.pt", "no/x.safetensors", "--conv", "*"], r"there is no folder"),
    "no layer": (["compile", "conv1d", "m.pt", "x", "--layer", "dec"], r"has no tensor dec\.weight"),
    "no key": (
        ["compile", "conv1d", "m.pt", "x", "--layer", "enc", "--key", "net"],
        r"nothing at the key 'net'; it has",
    ),
    "bad padding": (
        ["compile", "conv1d", "m.pt", "x", "--layer", "enc", "--padding", "some"],
        r"padding must be an int",
    ),
    "no stride": (
        ["compile", "conv1d", "m.pt", "x", "--layer", "enc", "--stride", "0"],
        r"stride must be at least 1",
    ),
}


@pytest.mark.parametrize("case", list(REFUSED))
def test_refuses_in_one_sentence(case: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    before = sorted(folder.iterdir())
    arguments, sentence = REFUSED[case]
    result = call(*arguments)
    lines = [line for line in result.stderr.splitlines() if line.startswith("max-conv: ")]
    assert result.exit_code == 2 and len(lines) == 1, result.stderr
    assert re.search(sentence, lines[0]), lines[0]
    assert sorted(folder.iterdir()) == before


@pytest.mark.parametrize(
    "command", [[], ["batch"], ["check"], ["convert"], ["run", "speech"], ["compile", "conv1d"], ["info"], ["serve"]]
)
def test_help_answers_at_once(command: list[str]) -> None:
    """It loads only click: importing MAX needs more than a second, NumPy a tenth of a second."""
    python = Path(sys.executable)
    environment = {**os.environ, "PYTHONPROFILEIMPORTTIME": "1"}

    def run(*arguments: str) -> tuple[str, set[str]]:
        """Returns what a command prints, and the top-level modules that it loads."""
        done = subprocess.run([python, *arguments], capture_output=True, text=True, check=True, env=environment)
        return done.stdout, set(re.findall(r"^import time:.*\| +(\w+)[\w.]*$", done.stderr, re.MULTILINE))

    text, loaded = run(str(python.parent / "max-conv"), *command, "--help")
    by_python = run("-c", "pass")[1]
    assert (loaded - by_python) & importlib.metadata.packages_distributions().keys() == {"click", "max_conv"}
    assert all(name in text for name in command[-1:] or ("run", "convert", "compile", "info"))


def test_makes_sound_of_a_spectrogram_and_of_sound(tmp_path: Path) -> None:
    random = np.random.default_rng(0)

    def prepare(module: Any, config: Any) -> Path:
        path = tmp_path / f"{module.__name__.rpartition('.')[2]}.safetensors"
        state = {name: random.standard_normal(shape).astype(np.float32) / 8 for name, shape in config.shapes().items()}
        for name in state:
            if state[name].ndim == 3:
                state[name] = np.ascontiguousarray(state[name].T)  # PyTorch's order is the native one reversed
        save_file(state, path)
        return path

    sizes = {"upsample_rates": [8], "upsample_kernel_sizes": [16], "upsample_initial_channel": 32}
    sizes |= {"resblock_kernel_sizes": [3], "resblock_dilation_sizes": [[1]], "sampling_rate": 8000, "num_mels": 10}
    (tmp_path / "config.json").write_text(json.dumps(sizes))
    weights = prepare(hifigan, hifigan.Config.from_dict(sizes))
    np.save(tmp_path / "mels.npy", random.standard_normal((50, 10)))
    options = ["--weights", weights, "--config", tmp_path / "config.json"]
    hifi = ["--network", "hifigan", *options]
    told = json.loads(good("run", "vocoder", tmp_path / "mels.npy", tmp_path / "out.wav", *hifi, "--json"))
    sound, rate = soundfile.read(tmp_path / "out.wav")
    assert rate == 8000 and sound.shape == (400,) and told["seconds"] == 0.05 and np.abs(sound).max() > 0.01
    result = call("run", "vocoder", tmp_path / "mels.npy", tmp_path / "out.wav", *hifi)
    assert result.exit_code == 2 and "exists already" in result.stderr
    np.save(tmp_path / "wrong.npy", np.zeros((10, 50)))
    result = call("run", "vocoder", tmp_path / "wrong.npy", tmp_path / "b.wav", *hifi)
    assert (
        "must hold floating point of shape (length, 10), or (batch, ...) of that, but holds float64 of shape (10, 50)."
        in result.stderr
    )
    (tmp_path / "text.npy").write_text("no array")
    result = call("run", "vocoder", tmp_path / "text.npy", tmp_path / "b.wav", *hifi)
    assert "must be a .npy file of an array." in result.stderr
    result = call("run", "vocoder", tmp_path / "mels.npy", tmp_path / "out.txt", *hifi)
    assert "must end in .wav, .flac, .ogg or .mp3." in result.stderr and not (tmp_path / "out.txt").exists()

    sizes = {"encoder_hidden_size": 8, "decoder_hidden_size": 16, "downsampling_ratios": [2], "sampling_rate": 8000}
    sizes |= {"n_codebooks": 2, "codebook_size": 32, "codebook_dim": 4}
    (tmp_path / "config.json").write_text(json.dumps(sizes))
    weights = prepare(dac, dac.Config.from_dict(sizes))
    soundfile.write(tmp_path / "in.flac", random.standard_normal((5000, 2)) * 0.1, 8000)
    codec = ["--network", "dac", "--weights", weights, *options[2:]]
    good("run", "codec", tmp_path / "in.flac", tmp_path / "out.flac", *codec)
    assert soundfile.read(tmp_path / "out.flac")[0].shape == (5000, 2)
