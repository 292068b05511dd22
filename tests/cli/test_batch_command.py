"""The command `max-conv batch`: its output, its exit status, and its errors. The network is a plain function."""

import json
import socket
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from click.testing import CliRunner, Result

from max_conv.cli.batch import DEFAULTS
from max_conv.cli.main import main
from max_conv.cli.run import NETWORKS
from max_conv.serving import Network, graph_file
from max_conv.serving.batch import Batch


def call(*arguments: Any) -> Result:
    return CliRunner().invoke(main, ["batch", *map(str, arguments)])


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two sounds of a second and a broken one; a network that finds speech wherever the sound is loud."""

    def loud(model: Any, sound: np.ndarray, config: Any) -> np.ndarray:
        chunks = sound[: len(sound) // 512 * 512].reshape(-1, 512)
        return (np.abs(chunks).max(axis=1) > 0.1).astype(np.float32)

    module = graph_file("silero-vad")
    network = Network("silero-vad", replace(module.TASK, run=loud), module.Config(), None)  # type: ignore[arg-type]
    monkeypatch.setattr(Batch, "open", lambda self, step=None: network)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in").mkdir()
    silence = np.zeros(16000)
    soundfile.write("in/quiet.wav", silence, 16000)
    soundfile.write("in/loud.wav", np.concatenate([silence[:8000], silence[:8000] + 0.5]), 16000)
    Path("in/broken.wav").write_text("no sound")
    return tmp_path


def test_a_job(folder: Path) -> None:
    result = call("speech", "in", "out", "--json")
    assert result.exit_code == 1
    assert "max-conv: 1 of 3 files failed; out/*.error.json say why." in result.stderr.splitlines()
    facts = json.loads(result.stdout)
    counts = {
        "files": 3,
        "done_before": 0,
        "done": 2,
        "failed": 1,
        "seconds": 2.0,
        "network": "silero-vad",
        "out": "out",
    }
    assert facts.items() >= counts.items()
    assert facts["files_per_second"] == pytest.approx(3 / facts["seconds_taken"])
    assert facts["times_real_time"] == pytest.approx(2 / facts["seconds_taken"])
    assert json.loads(Path("out/loud.wav.json").read_text())["turns"] == [{"start": 0.45, "end": 1.0}]
    assert json.loads(Path("out/quiet.wav.json").read_text())["turns"] == []
    assert "holds no" not in result.stderr and "3/3" in result.stderr and "files/s, " in result.stderr


def test_again(folder: Path) -> None:
    call("speech", "in", "out")
    soundfile.write("in/broken.wav", np.zeros(16000), 16000)
    result = call("speech", "in", "out")
    assert result.exit_code == 0 and result.stdout.startswith("out: 1 new results, 2 were there (")
    assert sorted(path.name for path in Path("out").glob("[a-z]*")) == [
        "broken.wav.json",
        "loud.wav.json",
        "quiet.wav.json",
    ]
    result = call("speech", "in", "out", "--json")
    assert result.exit_code == 0 and json.loads(result.stdout)["done_before"] == 3


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["speech", "gone", "out"], "batch: there is no folder gone."),
        (["speech", "in", "in/out"], "batch: OUT (in/out) must not lie in in; choose another folder."),
        (["speech", ".", "in"], "batch: OUT (in) must not lie in .; choose another folder."),
        (["vocoder", "in", "out"], "batch: pass a network for vocoder, as --network: hifigan, univnet, vocos."),
        (["pitch", "in", "out", "--network", "dac"], "batch: pass a network for pitch, not dac: crepe, pesto."),
        (["speech", "in", "out", "--model", "m", "--weights", "w"], "batch: pass --model or --weights, but not both."),
        (["speech", "in", "out", "--model", "m"], "batch: --model m is not a file."),
        (["features", "in", "out", "--network", "tcn"], "batch: in holds no file that ends in .npy."),
        (["codec", "in", "out", "--network", "dac", "--config", "in/broken.wav"], "in/broken.wav is not JSON"),
    ],
)
def test_errors(arguments: list[str], sentence: str, folder: Path) -> None:
    result = call(*arguments)
    lines = [line for line in result.stderr.splitlines() if line.startswith("max-conv: ")]
    assert result.exit_code == 2 and len(lines) == 1 and lines[0].startswith(f"max-conv: {sentence}"), result.stderr
    assert not Path("out").exists()


@pytest.mark.parametrize(
    "arguments", [["noise", "in", "out"], ["speech", "in"], ["speech", "in", "out", "--workers", "0"]]
)
def test_usage(arguments: list[str], folder: Path) -> None:
    assert call(*arguments).exit_code == 2


def test_without_ray(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    result = call("speech", "in", "out", "--ray", "local")
    assert result.exit_code == 2
    assert "max-conv: batch: --ray needs Ray; run pip install 'max-conv[ray]'." in result.stderr.splitlines()


def test_no_cluster(folder: Path) -> None:
    """The user does not wait for Ray, which tries for minutes."""
    pytest.importorskip("ray", reason="jobs on a cluster need ray[data]")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    start = time.monotonic()
    result = call("speech", "in", "out", "--ray", address)
    assert result.exit_code == 2 and time.monotonic() - start < 60
    assert f"max-conv: batch: Ray does not answer at {address} ([Errno 111] Connection refused); is it" in result.stderr


def test_defaults_are_networks() -> None:
    assert all(name in NETWORKS[task] for task, name in DEFAULTS.items())
