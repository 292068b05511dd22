"""`max-conv stream` and Silero live: speech is found while the sound comes."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from max_conv.graphs import silero_vad

import max_conv
from max_conv.cli.main import main
from max_conv.serving import Network, open_network
from max_conv.sound import to_pcm

SAMPLES = 20_000


@pytest.fixture(scope="module")
def network() -> Network:
    return open_network("silero_vad", live=True)


@pytest.fixture(scope="module")
def saved(network: Network, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("stream") / "silero.maxconv"
    network.model.save(path)
    return path


@pytest.fixture(scope="module")
def sound() -> np.ndarray:
    noise = np.random.default_rng(0).standard_normal((1, SAMPLES), np.float32) * 0.1
    return np.round(noise * 32768) / np.float32(32768)


@pytest.fixture(scope="module")
def expected(sound: np.ndarray) -> np.ndarray:
    """The probabilities of the whole sound."""
    return open_network("silero_vad").run(sound)[0]


def call(*arguments: Any, given: bytes = b"") -> Result:
    return CliRunner().invoke(main, ["stream", *(str(argument) for argument in arguments)], input=given)


def values(text: str) -> list[float]:
    lines = [json.loads(line) for line in text.splitlines()]
    assert [line["position"] for line in lines] == list(range(len(lines)))
    return [line["value"] for line in lines]


def test_silero_in_chunks_is_silero(network: Network, sound: np.ndarray, expected: np.ndarray) -> None:
    stream = network.model.stream(2)
    both = np.concatenate([sound, sound[:, ::-1]])
    got = [stream.push(both[:, n : n + 777]) for n in range(0, SAMPLES, 777)] + [stream.flush()]
    found = np.concatenate(got, axis=1)
    assert found.shape == (2, 40)
    np.testing.assert_array_equal(found[0], expected)
    assert stream.timing.state == 1280


def test_a_stream_goes_on_in_another_process(
    saved: Path, sound: np.ndarray, expected: np.ndarray, tmp_path: Path
) -> None:
    stream = max_conv.load(saved).stream()
    before = stream.push(sound[:, :7000])
    state = stream.state()
    held = {f"held{i}": array for i, array in enumerate(state.pop("held")[0])}
    np.savez(tmp_path / "state.npz", sound=sound[:, 7000:], **state, **held)
    program = (
        "import sys, numpy as np, max_conv\n"
        "kept = dict(np.load(sys.argv[2]))\n"
        "kept['held'] = [[kept['held0']]]\n"
        "stream = max_conv.load(sys.argv[1]).stream(state=kept)\n"
        "print(np.concatenate([stream.push(kept['sound']), stream.flush()], axis=1)[0].tolist())\n"
    )
    command = [sys.executable, "-c", program, str(saved), str(tmp_path / "state.npz")]
    after = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    np.testing.assert_array_equal(np.concatenate([before[0], np.float32(after)]), expected)


def test_raw_samples_and_wav(saved: Path, sound: np.ndarray, expected: np.ndarray, tmp_path: Path) -> None:
    raw = to_pcm(sound, "s16")
    found = call("silero-vad", "--model", saved, given=raw)
    assert found.exit_code == 0, found.stderr
    np.testing.assert_allclose(values(found.stdout), expected, atol=1e-6)
    (tmp_path / "sound.f32").write_bytes(to_pcm(sound, "f32"))
    options = ("--model", saved, "--format", "f32", "--chunk", 333)
    found = call("silero-vad", tmp_path / "sound.f32", tmp_path / "lines.json", *options)
    assert found.exit_code == 0, found.stderr
    np.testing.assert_allclose(values((tmp_path / "lines.json").read_text()), expected, atol=1e-6)


def test_lines_come_while_the_sound_comes(saved: Path, sound: np.ndarray) -> None:
    command = [sys.executable, "-m", "max_conv.cli.main", "stream", "silero-vad", "--model", str(saved)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdin
        assert process.stdout
        process.stdin.write(to_pcm(sound[:, :2048], "s16"))
        process.stdin.flush()
        assert json.loads(process.stdout.readline())["position"] == 0  # the pipe is still open
        process.stdin.close()
        assert len(process.stdout.readlines()) == 3
    assert process.returncode == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nothing",), "there is no model 'nothing'"),
        (("silero-vad", "--chunk", 0), "stream: --channels and --chunk must be above 0."),
        (("silero-vad", "gone.wav"), "gone.wav: No such file or directory."),
        (("silero-vad", "-", "gone/lines.json"), "there is no folder gone; make it first."),
        (("wav2vec2", "--weights", "gone.safetensors"), "gone.safetensors"),
    ],
)
def test_errors(saved: Path, arguments: tuple[Any, ...], message: str) -> None:
    more = ("--model", saved) if arguments[0] == "silero-vad" else ()
    result = call(*arguments, *more)
    assert result.exit_code == 2
    assert message in result.stderr


def test_a_whole_model_is_no_live_one(tmp_path: Path, saved: Path) -> None:
    result = CliRunner().invoke(main, ["run", "speech", "--model", str(saved), "--picture", str(tmp_path / "p.png")])
    assert result.exit_code == 2
    assert "is a live model" in result.stderr
    model = open_network("silero_vad").model
    with pytest.raises(TypeError, match=r"^model: was not compiled from a live graph"):
        model.stream()
    model.save(tmp_path / "whole.maxconv")
    result = call("silero-vad", "--model", tmp_path / "whole.maxconv")
    assert result.exit_code == 2
    assert "is not a live model; compile it with --live" in result.stderr


def test_wav_of_another_rate_says_what_to_do(saved: Path, sound: np.ndarray, tmp_path: Path) -> None:
    import wave

    with wave.open(str(tmp_path / "fast.wav"), "wb") as file:
        file.setparams((1, 2, 44_100, 0, "NONE", ""))
        file.writeframes(to_pcm(sound, "s16"))
    result = call("silero-vad", tmp_path / "fast.wav", tmp_path / "lines.json", "--model", saved)
    assert result.exit_code == 2
    assert "resample it first, as with sox -r 16000" in result.stderr
    assert not (tmp_path / "lines.json").exists()


def test_silero_live_has_one_input() -> None:
    weights = {name: np.broadcast_to(np.float32(0), shape) for name, shape in silero_vad.Config().shapes().items()}
    graph = max_conv.streaming(silero_vad.build, silero_vad.Config(), weights)
    assert graph.input_names == ("sound", "ticks", "ends", "state")
    assert graph.output_names == ("probability", "state")
