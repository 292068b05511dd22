"""DAC against transformers' implementation, with a checkpoint under the original's names."""

import functools
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from max_conv.graphs import dac
from transformers import DacConfig, DacModel

import max_conv
from harness import shapes
from max_conv.weights.convert import to_native
from originals import arrays, compare
from originals import dac as network

CONFIG = dac.Config()

# The original's names of transformers' modules: stages count from 1 there, units from 0 in the encoder, 2 in the decoder.
UNIT = {"snake1": 0, "conv1": 1, "snake2": 2, "conv2": 3}
ENDS = {"conv1": 0, "snake1": 5, "conv2": 6}
STAGE = {"encoder": {"snake1": 3, "conv1": 4}, "decoder": {"snake1": 0, "conv_t1": 1}}


def original_name(name: str) -> str:
    half, *rest = name.split(".")
    if half == "quantizer":
        return name
    first, numbers = ("encoder.block", -1) if half == "encoder" else ("decoder.model", 1)
    if rest[0] != "block":
        return f"{first}.{ENDS[rest[0]]}.{rest[1]}"
    stage = f"{first}.{int(rest[1]) + 1}.block"
    if unit := re.fullmatch(r"res_unit(\d)", rest[2]):
        return f"{stage}.{int(unit[1]) + numbers}.block.{UNIT[rest[3]]}.{rest[4]}"
    return f"{stage}.{STAGE[half][rest[2]]}.{rest[3]}"


def original_names(model: DacModel) -> dict[str, torch.Tensor]:
    """The state dict as the original saves it, with weight norm."""
    state = {}
    for name, value in model.state_dict().items():
        name = original_name(name)
        if value.ndim == 3 and name.endswith("weight"):
            state[f"{name}_g"] = value.norm(dim=(1, 2), keepdim=True)
            state[f"{name}_v"] = 3 * value
        else:
            state[name] = value
    return state


def noise(batch: int, samples: int) -> torch.Tensor:
    return torch.randn(batch, samples, generator=torch.Generator().manual_seed(samples))


def choices_free(model: Any, embeddings: torch.Tensor) -> np.ndarray:
    """Where two entries are equally near except for rounding, (batch, codebooks, frames), or were in an earlier one."""
    residual, free = embeddings, []
    for layer in model.quantizer.quantizers:
        projected = torch.nn.functional.normalize(layer.in_proj(residual)).transpose(1, 2)
        cosines = projected @ torch.nn.functional.normalize(layer.codebook.weight).T
        near, far = cosines.topk(2).values.unbind(-1)
        free.append(near - far < 1e-5)
        residual = residual - layer(residual)[0]
    return np.logical_or.accumulate(torch.stack(free, 1).numpy(), axis=1)


@pytest.fixture(scope="module")
def model() -> Any:
    return network(DacConfig(sampling_rate=44100))


@pytest.fixture(scope="module")
def weights(model: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    path = tmp_path_factory.mktemp("dac") / "weights_44khz_8kbps_0.0.1.pth"
    torch.save({"state_dict": original_names(model), "metadata": {"kwargs": {"sample_rate": 44100}}}, path)
    return dac.load_weights(path)


def test_encoder(model: Any, weights: dict[str, np.ndarray], started: Callable[..., Any]) -> None:
    encoder = started(dac.build_encoder(CONFIG, weights), weights)
    for samples in (512 * 20, 512 * 15 + 300):
        sound = noise(2, samples)
        codes, found = encoder(sound.numpy())
        assert codes.shape == (2, 9, samples // 512)
        check_codes(model, codes, found, sound)


def check_codes(model: Any, codes: np.ndarray, found: np.ndarray, sound: torch.Tensor) -> None:
    """Compares codes and embeddings with the original's."""
    with torch.inference_mode():
        embeddings = model.encoder(sound[:, None])
        expected = model.encode(sound[:, None]).audio_codes.numpy()
        free = choices_free(model, embeddings)
    compare(found, embeddings.transpose(1, 2))
    assert codes.shape == expected.shape and codes.dtype == np.int64
    assert free.mean() < 0.1 and len(np.unique(codes)) > 100
    np.testing.assert_array_equal(np.where(free, -1, codes), np.where(free, -1, expected))


def test_decoder(model: Any, weights: dict[str, np.ndarray], started: Callable[..., Any]) -> None:
    decoder = started(dac.build_decoder(CONFIG, weights), weights)
    for frames in (1, 16):
        codes = torch.randint(0, 1024, (2, 9, frames), generator=torch.Generator().manual_seed(frames))
        with torch.inference_mode():
            expected = model.decode(audio_codes=codes).audio_values
        compare(decoder(codes.numpy()), expected)


def test_graphs_are_described(weights: dict[str, np.ndarray]) -> None:
    encoder, decoder = dac.build_encoder(CONFIG, weights), dac.build_decoder(CONFIG, weights)
    assert shapes(encoder.inputs) == [("batch", "samples")]
    codes, embeddings = shapes(encoder.output_types)
    assert codes[:2] == ("batch", 9) and embeddings[::2] == ("batch", 1024)
    assert shapes(decoder.inputs) == [("batch", 9, "frames")]
    assert shapes(decoder.output_types) == [("batch", "frames * 512")]


@functools.cache
def small() -> tuple[Any, dac.Config, dict[str, np.ndarray]]:
    # An odd ratio, as in the 24 kHz model: its sound is shorter.
    sizes: dict[str, Any] = {
        "encoder_hidden_size": 16,
        "decoder_hidden_size": 64,
        "downsampling_ratios": [2, 5],
        "n_codebooks": 3,
    }
    original = DacConfig(**sizes, codebook_size=32, codebook_dim=4)
    model = network(original)
    weights = to_native(arrays(model), dac.LAYERS, "dac")
    config = dac.Config.from_dict(original.to_dict())
    return model, config, weights


def graphs() -> dict[str, tuple[Any, Any]]:
    _, config, weights = small()
    return {"small": (dac.build(config, weights), weights)}


@pytest.mark.parametrize("samples", [4000, 4003])
def test_a_small_network(models: dict[str, max_conv.Model], samples: int) -> None:
    model, *_ = small()
    sound = noise(2, samples)
    with torch.inference_mode():
        expected = model(sound[:, None]).audio_values
    compare(models["small"](sound.numpy()), expected)


def test_published_config() -> None:
    assert dac.Config.from_dict(DacConfig(sampling_rate=44100).to_dict()) == CONFIG


def test_both_names_are_the_same_weights(model: Any, weights: dict[str, np.ndarray]) -> None:
    own = to_native(arrays(model), dac.LAYERS, "dac")
    assert own.keys() == weights.keys()
    assert all(np.allclose(own[name], weights[name], rtol=1e-6, atol=0) for name in own)


def test_more_quantizers_than_codebooks(weights: dict[str, np.ndarray]) -> None:
    with pytest.raises(ValueError, match=r"^dac: quantizers must be 1 to 9, but are 10\.$"):
        dac.build(replace(CONFIG, quantizers=10), weights)
