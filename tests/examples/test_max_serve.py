"""The example architecture in a real `max serve`; needs max[serve], which no other test needs."""

import base64
import io
import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import wave
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from max_conv.graphs import hifigan

import max_conv

WHY = 'max serve is not installed: pip install "max[serve]==26.7.0"'
for package in ("fastapi", "sse_starlette", "transformers", "opentelemetry.sdk"):
    pytest.importorskip(package, reason=WHY)
numpy_file = pytest.importorskip("safetensors.numpy", reason="safetensors is not installed")

EXAMPLES = Path(__file__).parents[2] / "examples"
READY, ANSWER, STOP = 900, 120, 60
"""Seconds at most, on a busy machine: until the model is compiled, for one answer, and to stop."""

CONFIG = {
    "num_mels": 8,
    "upsample_initial_channel": 16,
    "upsample_rates": [4, 2],
    "upsample_kernel_sizes": [8, 4],
    "resblock_kernel_sizes": [3],
    "resblock_dilation_sizes": [[1, 3]],
    "resblock": "2",
    "sampling_rate": 16000,
}


def native_weights() -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    shapes = hifigan.Config.from_dict(CONFIG).shapes()
    return {name: random.normal(0, 0.1, shape).astype(np.float32) for name, shape in shapes.items()}


def torch_layout(name: str, value: np.ndarray) -> np.ndarray:
    """Returns a weight as PyTorch has it: (K, C, F) becomes (F, C, K), and a transposed (K, F, C) becomes (C, F, K)."""
    return np.ascontiguousarray(value.transpose(2, 1, 0)) if value.ndim == 3 else value


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model's folder, as the example describes it."""
    folder = tmp_path_factory.mktemp("hifigan")
    (folder / "vocoder").mkdir()
    index = {"_class_name": "MaxConvHifiGan", "vocoder": ["max_conv", "HifiGan"]}
    (folder / "model_index.json").write_text(json.dumps(index))
    (folder / "vocoder" / "config.json").write_text(json.dumps(CONFIG))
    weights = {name: torch_layout(name, value) for name, value in native_weights().items()}
    numpy_file.save_file(weights, folder / "vocoder" / "model.safetensors")
    return folder


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@pytest.fixture(scope="module")
def server(model: Path) -> Iterator[str]:
    """The address of a server that is ready. It is always stopped, by its process id."""
    port = free_port()
    # MAX sets variables on import that os.environ does not show; with them the server would leave this environment.
    env = dict(os.environ) | {
        "HF_HUB_OFFLINE": "1",
        "MAX_SERVE_HOST": "127.0.0.1",
        "MAX_SERVE_PORT": str(port),
        "MAX_SERVE_METRICS_ENDPOINT_PORT": str(free_port()),
        "MAX_SERVE_DISABLE_TELEMETRY": "1",
    }
    command = [str(Path(sys.executable).with_name("max")), "serve", "--model-path", str(model), "--devices", "cpu"]
    command += ["--custom-architectures", f"{EXAMPLES}:max_serve_hifigan"]
    log = model / "server.log"
    with log.open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=env)
        try:
            wait_until_ready(process, f"http://127.0.0.1:{port}/v1/health", log)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()
            try:
                process.wait(STOP)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def wait_until_ready(process: subprocess.Popen, address: str, log: Path) -> None:
    end = time.monotonic() + READY
    while time.monotonic() < end:
        if process.poll() is not None:
            pytest.fail(f"max serve ended with status {process.returncode}:\n{log.read_text()[-4000:]}")
        try:
            urllib.request.urlopen(address, timeout=5).close()
            return
        except OSError:
            time.sleep(1)
    pytest.fail(f"max serve was not ready after {READY} s:\n{log.read_text()[-4000:]}")


def ask(server: str, model: Path, sound: bytes, **more: Any) -> tuple[int, bytes]:
    """Returns the status and the body of the answer to a speech request."""
    body = {"model": str(model), "instructions": "-", "input": base64.b64encode(sound).decode(), **more}
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{server}/v1/audio/speech", json.dumps(body).encode(), headers)
    try:
        with urllib.request.urlopen(request, timeout=ANSWER) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def test_the_answer_is_the_model_s(server: str, model: Path) -> None:
    config, weights = hifigan.Config.from_dict(CONFIG), native_weights()
    ours = max_conv.compile(hifigan.build(config, weights), weights=weights)
    for frames in (1, 13):
        mel = np.random.default_rng(frames).normal(size=(frames, config.mels)).astype(np.float32)
        status, body = ask(server, model, mel.tobytes())
        assert status == 200, body
        with wave.open(io.BytesIO(body)) as file:
            assert (file.getframerate(), file.getnchannels(), file.getsampwidth()) == (16000, 1, 2)
            sound = np.frombuffer(file.readframes(file.getnframes()), "<i2") / 32767
        want = ours(mel[None])[0]
        assert sound.shape == want.shape == (frames * config.hop,)
        assert np.abs(want).max() > 0.01
        np.testing.assert_allclose(sound, want, atol=2**-15)


@pytest.mark.parametrize(
    ("sound", "more", "sentence"),
    [
        (b"", {"input": "not base64!"}, "input must be base64 of float32 values."),
        (b"123", {}, "input must be base64 of float32 values."),
        (bytes(4 * 9), {}, "input must hold frames of 8 values, but has 9 values."),
        (b"", {}, "input must hold frames of 8 values, but has 0 values."),
        (bytes(4 * 8), {"response_format": "mp3"}, "response_format 'mp3' is not supported"),
        (bytes(4 * 8), {"instructions": ""}, "'instructions' must describe the audio"),
    ],
    ids=["not base64", "not float32", "part of a frame", "nothing", "mp3", "no instructions"],
)
def test_wrong_requests_get_a_sentence(
    server: str, model: Path, sound: bytes, more: dict[str, Any], sentence: str
) -> None:
    status, body = ask(server, model, sound, **more)
    assert status == 400
    assert re.search(re.escape(sentence), body.decode())
