"""Whisper's encoder against transformers' implementation."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from max_conv.graphs import whisper
from transformers import WhisperConfig
from transformers.models.whisper.modeling_whisper import WhisperEncoder

import max_conv
from max_conv.weights.convert import to_native
from originals import arrays, compare, enliven

TINY: dict[str, Any] = dict(  # config.json of openai/whisper-tiny
    num_mel_bins=80,
    d_model=384,
    encoder_attention_heads=6,
    encoder_layers=4,
    encoder_ffn_dim=1536,
    max_source_positions=1500,
    activation_function="gelu",
)
LARGE = TINY | dict(  # the differences in the config of openai/whisper-large-v3
    num_mel_bins=128, d_model=1280, encoder_attention_heads=20, encoder_layers=32, encoder_ffn_dim=5120
)


SMALL: dict[str, Any] = dict(
    num_mel_bins=20,
    d_model=48,
    encoder_attention_heads=3,
    encoder_layers=1,
    encoder_ffn_dim=96,
    max_source_positions=200,
)


def original(sizes: dict[str, Any]) -> Any:
    network: Any = enliven(WhisperEncoder(WhisperConfig(**sizes)))
    for module in network.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.weight.data = torch.linspace(0.5, 1.5, len(module.weight))
    network.embed_positions.weight.data.mul_(10)  # as large as the rest
    return network


@pytest.fixture(scope="module")
def network() -> Any:
    return original(TINY)


@functools.cache
def small() -> Any:
    return original(TINY | SMALL)


def graphs() -> dict[str, tuple[Any, Any]]:
    config = whisper.Config.from_dict(WhisperConfig(**TINY | SMALL).to_dict())
    weights = to_native(arrays(small()), whisper.LAYERS, "whisper")
    return {"small": (whisper.build(config, weights), weights)}


def checkpoint(network: Any, prefix: str, decoder: list[str]) -> dict[str, torch.Tensor]:
    state = {prefix + name: value for name, value in network.state_dict().items()}
    return state | {name: torch.zeros(2) for name in decoder}


def spectrogram(batch: int, frames: int, mels: int = 80) -> torch.Tensor:
    return torch.randn(batch, frames, mels, generator=torch.Generator().manual_seed(frames))


def test_is_the_original(network: Any, started: Callable[..., Any], tmp_path: Path) -> None:
    decoder = ["model.decoder.layers.0.fc1.bias", "model.decoder.layer_norm.bias", "proj_out.weight"]
    torch.save(checkpoint(network, "model.encoder.", decoder), tmp_path / "pytorch_model.bin")
    weights = whisper.load_weights(tmp_path / "pytorch_model.bin")
    model = started(whisper.build(whisper.Config(), weights), weights)
    for batch in (1, 2):
        mels = spectrogram(batch, 3000)
        with torch.inference_mode():
            want = network(mels.transpose(1, 2)).last_hidden_state
        compare(model(mels.numpy()), want)


@pytest.mark.parametrize(("batch", "frames"), [(2, 400), (2, 302), (1, 2), (1, 64)])
def test_takes_fewer_frames(models: dict[str, max_conv.Model], batch: int, frames: int) -> None:
    """The original accepts only as many frames as there are positions, so a copy with a shorter table is compared."""
    short = WhisperEncoder(WhisperConfig(**TINY | SMALL | {"max_source_positions": frames // 2})).eval()
    table = small().embed_positions.weight[: frames // 2]
    short.load_state_dict(dict(small().state_dict()) | {"embed_positions.weight": table})
    mels = spectrogram(batch, frames, 20)
    with torch.inference_mode():
        want = short(mels.transpose(1, 2)).last_hidden_state
    compare(models["small"](mels.numpy()), want)
    assert models["small"](mels[:, 1:].numpy()).shape == want.shape


def test_refuses_more_frames(models: dict[str, max_conv.Model]) -> None:
    with pytest.raises(ValueError, match="whisper: the spectrogram has more frames than there are positions"):
        models["small"](spectrogram(1, 401, 20).numpy())


@pytest.mark.parametrize(("prefix", "decoder"), [("", []), ("encoder.", ["decoder.layer_norm.bias"])])
def test_reads_a_checkpoint(network: Any, prefix: str, decoder: list[str], tmp_path: Path) -> None:
    torch.save(checkpoint(network, prefix, decoder), tmp_path / "pytorch_model.bin")
    weights = whisper.load_weights(tmp_path / "pytorch_model.bin")
    assert {name: array.shape for name, array in weights.items()} == whisper.Config().shapes()


def test_reads_the_published_config() -> None:
    assert whisper.Config.from_dict(WhisperConfig(**TINY).to_dict()) == whisper.Config()
    large = whisper.Config.from_dict(WhisperConfig(**LARGE).to_dict())
    assert (large.mels, large.hidden, large.heads, large.layers, large.inner) == (128, 1280, 20, 32, 5120)
    with pytest.raises(ValueError) as caught:
        whisper.Config.from_dict({"activation_function": "relu"})
    assert str(caught.value) == "whisper: activation_function must be gelu, but the config has 'relu'."
