"""`max-conv serve` in a separate process, with Silero: an unmodified Triton client, WebSockets, kill and restart."""

import json
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.http as triton
import tritonclient.utils
import websockets.sync.client as websocket
from running import ENVIRONMENT, Process, request, wait_for

import max_conv
from max_conv.serving import open_network

SOUND = (0.1 * np.random.default_rng(0).standard_normal((2, 8 * 512))).astype(np.float32)
CHUNKS = SOUND.reshape(2, 8, 512)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    files = {"vad": folder / "vad.maxconv", "live": folder / "live.maxconv"}
    for name, path in files.items():
        open_network("silero_vad", live=name == "live").model.save(path)
    return files


@pytest.fixture(scope="module")
def arguments(models: dict[str, Path]) -> list[str]:
    return [f"{name}={path}" for name, path in models.items()]


@pytest.fixture(scope="module")
def server(arguments: list[str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    process = Process(*arguments, log=tmp_path_factory.mktemp("log") / "log")
    yield process
    assert process.end() == 0, process.text()


@pytest.fixture(scope="module")
def want(models: dict[str, Path]) -> list[np.ndarray]:
    """The probabilities and the state after the whole signal, of the model alone."""
    return list(max_conv.load(models["vad"])(CHUNKS, np.zeros((2, 320), np.float32)))


def given(name: str, values: np.ndarray, binary: bool = True) -> Any:
    tensor = triton.InferInput(name, values.shape, tritonclient.utils.np_to_triton_dtype(values.dtype))
    tensor.set_data_from_numpy(values, binary_data=binary)
    return tensor


def client(server: Process) -> Any:
    return triton.InferenceServerClient(f"127.0.0.1:{server.port}")


def test_a_triton_client(server: Process, want: list[np.ndarray]) -> None:
    talk = client(server)
    assert talk.is_server_live() and talk.is_server_ready() and talk.is_model_ready("vad")
    assert not talk.is_model_ready("other")
    assert [model["name"] for model in talk.get_model_repository_index()] == ["vad", "live"]
    assert talk.get_server_metadata()["name"] == "max_conv"
    told = talk.get_model_metadata("vad")
    assert told["inputs"][0] == {"name": "chunks", "datatype": "FP32", "shape": [-1, -1, 512]}
    facts = told["parameters"]
    assert (facts["network"], facts["kind"], facts["rate"]) == ("silero_vad", "speech", 16000)
    for binary in (True, False):
        outputs = [triton.InferRequestedOutput(name, binary_data=binary) for name in ("probability", "state")]
        for wanted in (outputs, outputs[:1], None):
            answer = talk.infer("vad", [given("chunks", CHUNKS, binary)], outputs=wanted, request_id="7")
            np.testing.assert_array_equal(answer.as_numpy("probability"), want[0])
            assert answer.get_response()["id"] == "7"
            if wanted is None or len(wanted) == 2:
                np.testing.assert_array_equal(answer.as_numpy("state"), want[1])
    with pytest.raises(tritonclient.utils.InferenceServerException, match="there is no model 'other' here"):
        talk.infer("other", [given("chunks", CHUNKS)])
    with pytest.raises(tritonclient.utils.InferenceServerException, match="must be FP32"):
        talk.infer("vad", [given("chunks", CHUNKS.astype(np.float64))])


def test_a_triton_client_s_sequence(server: Process, want: list[np.ndarray]) -> None:
    talk = client(server)
    for name, pieces in (("vad", np.split(CHUNKS, 8, axis=1)), ("live", np.array_split(SOUND, 11, axis=1))):
        feed = "chunks" if name == "vad" else "sound"
        got = []
        for n, piece in enumerate(pieces):
            place = {"sequence_start": n == 0, "sequence_end": n == len(pieces) - 1}
            answer = talk.infer(name, [given(feed, piece)], sequence_id=f"{name}-1", **place)
            got.append(answer.as_numpy("probability"))
        np.testing.assert_allclose(np.concatenate([g for g in got if g is not None], 1), want[0], atol=1e-6)


def test_a_socket(server: Process, want: list[np.ndarray]) -> None:
    """Sixteen-bit samples in pieces of any size, as floats of the same values."""
    pcm = np.rint(SOUND[0] * 32768).astype("<i2")
    talk = client(server)
    answer = talk.infer("live", [given("sound", pcm[None].astype(np.float32) / np.float32(32768))])
    for query, samples in (("?in=s16", pcm), ("", pcm.astype(np.float32) / np.float32(32768))):
        url = f"ws://127.0.0.1:{server.port}/v2/models/live/stream{query}"
        with websocket.connect(url) as live:
            got = b""
            for piece in np.array_split(samples, 13):
                live.send(piece.tobytes())
                got += bytes(live.recv(30))  # type: ignore[arg-type]
            live.send("end")
            got += bytes(live.recv(30))  # type: ignore[arg-type]
        np.testing.assert_array_equal(np.frombuffer(got, np.float32), answer.as_numpy("probability")[0])


def test_many_clients_get_what_they_would_get_alone(server: Process, models: dict[str, Path]) -> None:
    """To the bit: with rows of NaN and of 1e30 among them, and signals that go on."""
    alone = max_conv.load(models["vad"])
    wrong: list[str] = []

    def ask(n: int) -> None:
        random, talk, state = np.random.default_rng(n), client(server), np.zeros((1, 320), np.float32)
        for k in range(12):
            chunks = (0.1 * random.standard_normal((1, int(random.integers(1, 4)), 512))).astype(np.float32)
            chunks *= {5: np.nan, 8: 1e30}.get(k * (n % 3 == 0), 1)
            want = alone(chunks, state)
            answer = talk.infer("vad", [given("chunks", chunks), given("state", state)])
            got = [answer.as_numpy(name) for name in ("probability", "state")]
            if not all(np.array_equal(a, b, equal_nan=True) for a, b in zip(got, want)):
                wrong.append(f"client {n}, request {k}")
            state = np.zeros_like(state) if np.isnan(got[1]).any() else got[1]

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not wrong


def test_the_log_has_a_line_a_request_and_no_values(server: Process) -> None:
    request(server.port, "POST", "/v2/models/vad/infer?a=secret", b'{"inputs": [{"name": "hidden"}]}')
    request(server.port, "GET", "/v2%0aforged")
    wait_for(lambda: "forged" in server.text(), 10)
    lines = server.text().splitlines()
    assert any("POST '/v2/models/vad/infer' 400" in line for line in lines)
    assert not any("hidden" in line or "secret" in line or line.startswith("forged") for line in lines)


def test_a_file_knows_its_network(models: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match="is a model of silero_vad; pass one that `max-conv compile crepe` wrote"):
        open_network("crepe", saved=models["vad"])
    assert open_network("silero-vad", saved=models["vad"]).model.facts["kind"] == "speech"


def test_kill_and_restart(arguments: list[str], want: list[np.ndarray], tmp_path: Path) -> None:
    """A client that keeps its state goes on as if nothing had been; a sequence is refused and never answered wrongly."""
    first = Process(*arguments, log=tmp_path / "first")
    got = []
    talk = client(first)
    state = np.zeros((2, 320), np.float32)
    for n in range(4):
        answer = talk.infer("vad", [given("chunks", CHUNKS[:, n : n + 1]), given("state", state)])
        got.append(answer.as_numpy("probability"))
        state = answer.as_numpy("state")
    asked = [triton.InferRequestedOutput(name) for name in ("probability", "state")]
    live = talk.infer("live", [given("sound", SOUND[:, :1000])], outputs=asked)
    talk.infer("live", [given("sound", SOUND[:, :1000])], sequence_id=5, sequence_start=True)
    assert first.end(signal.SIGKILL) == -signal.SIGKILL
    second = Process(*arguments, "--log", "json", log=tmp_path / "second", port=first.port)
    talk = client(second)
    for n in range(4, 8):
        answer = talk.infer("vad", [given("chunks", CHUNKS[:, n : n + 1]), given("state", state)])
        got.append(answer.as_numpy("probability"))
        state = answer.as_numpy("state")
    np.testing.assert_array_equal(np.concatenate(got, 1), want[0])
    rest = [given("sound", SOUND[:, 1000:]), given("state", live.as_numpy("state"))]
    answer = talk.infer("live", rest, outputs=asked, sequence_end=True)
    both = np.concatenate([live.as_numpy("probability"), answer.as_numpy("probability")], 1)
    np.testing.assert_allclose(both, want[0], atol=1e-6)
    with pytest.raises(tritonclient.utils.InferenceServerException, match="is not known here"):
        talk.infer("live", [given("sound", SOUND[:, :1000])], sequence_id=5)
    assert second.end() == 0
    lines = [json.loads(line) for line in second.text().splitlines() if line.startswith("{")]
    assert {"POST", "GET"} >= {line["method"] for line in lines} and {200, 409} <= {line["status"] for line in lines}


def test_the_end_answers_what_has_come(arguments: list[str], tmp_path: Path) -> None:
    process = Process(*arguments, log=tmp_path / "log")
    long = np.zeros((16, 1000, 512), np.float32)
    answers: list[tuple[int, ...]] = []

    def ask() -> None:
        answer = client(process).infer("vad", [given("chunks", long)])
        answers.append(answer.as_numpy("probability").shape)

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    wait_for(lambda: b'max_conv_waiting{model="vad"} 0.0' not in request(process.port, "GET", "/metrics")[2], 30)
    assert process.end() == 0
    for thread in threads:
        thread.join(30)
    assert answers == [(16, 1000)] * 3


def fails(*arguments: str) -> str:
    """Returns the sentence of a command that cannot serve."""
    command = [sys.executable, "-m", "max_conv.cli.main", "serve", *arguments]
    run = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=120)
    assert run.returncode == 2 and "Traceback" not in run.stderr, run.stderr
    return run.stderr


def test_sentences(server: Process, arguments: list[str], tmp_path: Path) -> None:
    port = str(server.port)
    assert f"port {port} of 127.0.0.1 is taken by another program; pass --port" in fails(*arguments, "--port", port)
    assert "a model must be given as NAME=FILE, but is 'vad.maxconv'" in fails("vad.maxconv", "--port", "0")
    assert "No such file" in fails(f"a={tmp_path}/none.maxconv", "--port", "0")
    damaged = tmp_path / "damaged.maxconv"
    damaged.write_bytes(b"PK damaged")
    assert "is not a model that max_conv saved" in fails(f"a={damaged}", "--port", "0")
    assert "a name of a model came twice" in fails(arguments[0], arguments[0], "--port", "0")
    assert "cannot listen on 192.0.2.1" in fails(arguments[0], "--host", "192.0.2.1")
