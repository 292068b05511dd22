"""Silero VAD on a real conversation, against Silero's own ONNX file."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from max.dtype import DType
from max_conv.graphs import silero_vad
from safetensors.numpy import load_file, save_file

import max_conv
from max_conv.sound.audio import read_audio
from max_conv.sound.speech import agreement, read_rttm, turns
from max_conv.streaming.describe import describe
from max_conv.weights.assets import resolve
from silero_wheel import in_samples, reference, theirs, timestamps, utilities

CONFIG = silero_vad.Config()
FLAT = reference("data/silero_vad_16k_op15.onnx")  # The same weights, all of them initializers of one graph.
TORCHSCRIPT = reference("data/silero_vad.jit")


@pytest.fixture(scope="module")
def audio() -> np.ndarray:
    return read_audio(resolve(silero_vad.SAMPLE_AUDIO), CONFIG.rate).mean(axis=0)


@pytest.fixture(scope="module")
def tensors() -> dict[str, np.ndarray]:
    """The tensors of the safetensors file."""
    return load_file(resolve(silero_vad.SAFETENSORS))


def graphs() -> dict[str, tuple[Any, Any]]:
    weights, other = silero_vad.load_weights(), silero_vad.load_weights(silero_vad.SAFETENSORS)
    return {
        "one": (silero_vad.build(CONFIG, weights), weights),
        "other": (silero_vad.build(CONFIG, other), other),
    }


@pytest.fixture(scope="module")
def model(models: dict[str, max_conv.Model]) -> max_conv.Model:
    return models["one"]


@pytest.fixture(scope="module")
def probabilities(model: max_conv.Model, audio: np.ndarray) -> np.ndarray:
    return silero_vad.detect(model, audio)


def onnx_tensors(network: onnx.ModelProto) -> dict[str, onnx.TensorProto]:
    """The initializers of an ONNX file, by their names."""
    return {tensor.name: tensor for tensor in network.graph.initializer}


def onnx_probabilities(network: onnx.ModelProto, audio: np.ndarray) -> np.ndarray:
    """Runs an ONNX file of Silero's over whole chunks, as its own wrapper does: one by one, after 64 samples of the last."""
    session = onnxruntime.InferenceSession(network.SerializeToString())
    state, context, answers = np.zeros((2, 1, 128), np.float32), np.zeros((1, 64), np.float32), []
    for chunk in np.pad(audio, (0, -len(audio) % 512)).reshape(-1, 1, 512):
        sound = np.concatenate([context, chunk], axis=1)
        answer, state = session.run(None, {"input": sound, "state": state, "sr": np.array(16000)})
        answers.append(answer[0, 0])
        context = chunk[:, -64:]
    return np.array(answers)


@pytest.fixture(scope="module")
def onnx_answers(audio: np.ndarray) -> np.ndarray:
    """The output of the file that `load_silero_vad(onnx=True)` loads."""
    return onnx_probabilities(onnx.load(resolve(reference("data/silero_vad.onnx"))), audio)


def test_every_chunk_agrees_with_onnx(probabilities: np.ndarray, onnx_answers: np.ndarray) -> None:
    assert probabilities.shape == onnx_answers.shape == (938,)
    assert np.abs(probabilities - onnx_answers).max() <= 1e-4


def test_the_safetensors_are_other_values(
    audio: np.ndarray,
    tensors: dict[str, np.ndarray],
    probabilities: np.ndarray,
    models: dict[str, max_conv.Model],
) -> None:
    network = onnx.load(resolve(FLAT))
    for name, tensor in onnx_tensors(network).items():
        own = tensors[silero_vad.LAYERS.renamed(name)]
        tensor.CopyFrom(onnx.numpy_helper.from_array(own.reshape(tuple(tensor.dims)), name))
    other = silero_vad.detect(models["other"], audio)
    assert np.abs(other - onnx_probabilities(network, audio)).max() <= 1e-4
    assert 0.36 < np.abs(other - probabilities).max() < 0.37  # as `load_weights` says


def test_the_package_runs_these_values() -> None:
    # `load_silero_vad()` loads the TorchScript file, with onnx=True the default ONNX file, with opset_version=15 another.
    weights = silero_vad.load_weights()
    state = torch.jit.load(resolve(TORCHSCRIPT)).state_dict()
    flat = {name: onnx.numpy_helper.to_array(tensor) for name, tensor in onnx_tensors(onnx.load(resolve(FLAT))).items()}
    for other in (
        silero_vad.native_weights({name: tensor.numpy() for name, tensor in state.items()}),
        silero_vad.native_weights(flat),
        silero_vad.load_weights(FLAT),
        silero_vad.load_weights(resolve(reference("data/silero_vad_op18_ifless.onnx"))),
    ):
        assert other.keys() == weights.keys()
        for name, array in weights.items():
            np.testing.assert_array_equal(other[name], array, name)
    filter = state["_model.encoder.1.reparam_conv.weight"].numpy()
    np.testing.assert_array_equal(weights["conv2.weight"], filter.transpose(2, 1, 0))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"threshold": 0.8},
        {"threshold": 0.2, "neg_threshold": 0.1},
        {"min_speech": 1.0},
        {"min_silence": 0.033},
        {"min_silence": 1.5, "max_speech": 4.0},
        {"speech_pad": 0.2},
        {"max_speech": 2.5},
    ],
)
def test_turns_are_those_of_the_package(
    audio: np.ndarray, probabilities: np.ndarray, onnx_answers: np.ndarray, options: dict[str, Any]
) -> None:
    found = in_samples(turns(probabilities, duration=len(audio) / CONFIG.rate, **options))
    assert found == theirs(onnx_answers, len(audio), **options) and len(found) > 2


def test_finds_the_labelled_speech(audio: np.ndarray, probabilities: np.ndarray) -> None:
    duration = len(audio) / CONFIG.rate
    found = turns(probabilities, hop=CONFIG.hop / CONFIG.rate, duration=duration)
    package = utilities().OnnxWrapper(str(resolve(silero_vad.WEIGHTS)), force_onnx_cpu=True)
    assert in_samples(found) == timestamps(audio, package)
    agreed = agreement(found, read_rttm(resolve(silero_vad.SAMPLE_LABELS)), duration)
    assert str(agreed) == ("98.8% of the time (precision 99.0%, recall 99.3%, 0.15 s missed, 0.22 s of false alarm)")


@pytest.mark.parametrize("step", [1, 100])
def test_live_chunks_are_the_whole_file(
    model: max_conv.Model, audio: np.ndarray, probabilities: np.ndarray, step: int
) -> None:
    chunks = np.pad(audio, (0, -len(audio) % CONFIG.hop)).reshape(1, -1, CONFIG.hop)
    state, answers = silero_vad.initial_state(1), []
    for first in range(0, chunks.shape[1], step):
        answer, state = model(chunks[:, first : first + step], state)
        answers.append(answer[0])
    np.testing.assert_allclose(np.concatenate(answers), probabilities, rtol=0, atol=1e-6)


def test_batch_is_each_signal(model: max_conv.Model, audio: np.ndarray) -> None:
    signals = np.stack([np.roll(audio, shift) for shift in (0, 1000, -77777)])
    together = silero_vad.detect(model, signals)
    assert together.shape == (3, 938)
    for i, signal in enumerate(signals):
        np.testing.assert_allclose(together[i], silero_vad.detect(model, signal), rtol=0, atol=1e-6)


def test_takes_any_length(model: max_conv.Model) -> None:
    assert [silero_vad.detect(model, np.zeros(n)).shape for n in (1, 512, 513)] == [(1,), (1,), (2,)]


def test_layer_by_layer_is_all_in_one(
    audio: np.ndarray, probabilities: np.ndarray, started: Callable[..., Any]
) -> None:
    # In float32 and 16 bits on a CPU the graph is one operation, otherwise one per layer.
    weights = silero_vad.load_weights()
    graph = silero_vad.build(CONFIG, weights, dtype=DType.float64)
    one = silero_vad.build(CONFIG, weights)
    sixteen = silero_vad.build(CONFIG, weights, dtype=DType.bfloat16)
    assert [layer.name for layer in sixteen.emitted[0]] == [layer.name for layer in one.emitted[0]]
    assert [len(layers) for layers in graph.emitted] == [1] * 8 and [len(layers) for layers in one.emitted] == [8]
    names = [layer.name.removesuffix(".float64") for (layer,) in graph.emitted]
    names[5:7] = ["lstm_cell.weight_ih", "lstm_cell.weight_hh"]  # which `lstm` reads as values
    assert names == [layer.name for layer in one.emitted[0]]
    alike = dataclasses.replace(describe(graph, *CONFIG.framing), layers=())
    assert alike == dataclasses.replace(describe(one, *CONFIG.framing), layers=())
    layered = silero_vad.detect(started(graph, weights), audio)
    np.testing.assert_allclose(layered, probabilities, rtol=0, atol=1e-5)


def test_a_spectrum_of_other_filters() -> None:
    # The single operation is for filters that are waves, of which it keeps a quarter.
    weights = silero_vad.load_weights()
    other = weights | {"stft_conv.weight": weights["stft_conv.weight"] + np.float32(0.01)}
    assert [len(layers) for layers in silero_vad.build(CONFIG, other).emitted] == [1] * 8
    graph = silero_vad.build(CONFIG, weights)
    with pytest.raises(ValueError, match=r"^silero_vad: stft_conv\.weight is no windowed transform; build the graph"):
        max_conv.compile(graph, weights=other)


def test_a_chunk_is_needed(model: max_conv.Model) -> None:
    with pytest.raises(ValueError, match=r"^silero_vad: chunks must hold at least one chunk of each signal\.$"):
        model(np.zeros((2, 0, 512), np.float32), silero_vad.initial_state(2))


def test_no_signals(model: max_conv.Model) -> None:
    probability, state = model(np.zeros((0, 3, 512), np.float32), silero_vad.initial_state(0))
    assert probability.shape == (0, 3) and state.shape == (0, 320)


def test_not_a_number_spoils_what_follows(model: max_conv.Model, audio: np.ndarray) -> None:
    sound = audio[: 20 * 512].copy()
    sound[5 * 512 + 100] = np.nan
    probability, _ = model(sound.reshape(1, -1, 512), silero_vad.initial_state(1))
    assert not np.isnan(probability[0, :5]).any() and np.isnan(probability[0, 5:]).all()


def test_graph_is_described(model: max_conv.Model) -> None:
    shapes = [port.shape for port in model.inputs]
    assert shapes == [("batch", "time", 512), ("batch", 320)]
    assert {port.dtype for port in (*model.inputs, *model.outputs)} == {"float32"}


@pytest.mark.parametrize(
    ("audio", "kind", "sentence"),
    [
        (
            np.zeros((1, 1, 512)),
            ValueError,
            "audio must have shape (samples,) or (batch, samples), but has (1, 1, 512).",
        ),
        (np.zeros(0), ValueError, "audio must have shape (samples,) or (batch, samples), but has (0,)."),
        (np.full(512, np.nan), ValueError, "audio must be finite, but holds an infinity or a NaN."),
        (np.zeros(512, np.int16), TypeError, "audio must be floating point, -1 to 1, but is int16."),
    ],
)
def test_wrong_audio(audio: np.ndarray, kind: type[Exception], sentence: str) -> None:
    with pytest.raises(kind) as caught:
        silero_vad.detect(lambda *_: None, audio)
    assert str(caught.value) == f"silero_vad: {sentence}"


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"conv2.bias": None}, "the weights lack conv2.bias; pass those that fit the config."),
        ({"lstm_cell.bias_hh": None}, "the weights lack lstm_cell.bias_hh; pass"),
        ({"conv5.bias": np.zeros((2, 2, 2, 2))}, "the weights hold the unknown conv5.bias; pass"),
        ({"conv2.bias": np.zeros(3)}, "conv2.bias of shape (3,) does not fit the 64 filters of conv2.weight"),
    ],
)
def test_wrong_weights(
    tmp_path: Path, tensors: dict[str, np.ndarray], change: dict[str, np.ndarray | None], sentence: str
) -> None:
    changed = {name: tensor for name, tensor in {**tensors, **change}.items() if tensor is not None}
    save_file(changed, tmp_path / "wrong.safetensors")
    with pytest.raises(ValueError) as caught:
        silero_vad.load_weights(tmp_path / "wrong.safetensors")
    assert str(caught.value).startswith(f"silero_vad: {sentence}") and "; pass" in str(caught.value)


def test_not_a_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "text.safetensors").write_text("no weights")
    with pytest.raises(ValueError, match=r"text\.safetensors is not a safetensors file"):
        silero_vad.load_weights(tmp_path / "text.safetensors")
