"""wav2vec 2.0 and HuBERT against transformers' implementation."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from max_conv.graphs import silero_vad, wav2vec2
from safetensors.torch import save_file
from transformers import HubertConfig, HubertModel, Wav2Vec2Config, Wav2Vec2Model

import max_conv
from max_conv.sound.audio import read_audio
from max_conv.weights.assets import resolve
from max_conv.weights.convert import to_native
from originals import arrays, compare, enliven

POSITIONS = "encoder.pos_conv_embed.conv"
# The differences in config.json of facebook/hubert-large-ll60k and facebook/wav2vec2-large-lv60.
LARGE: dict[str, Any] = dict(
    conv_bias=True,
    do_stable_layer_norm=True,
    feat_extract_norm="layer",
    hidden_size=1024,
    num_attention_heads=16,
)
SMALL: dict[str, Any] = dict(
    conv_dim=(32, 48),
    conv_kernel=(8, 3),
    conv_stride=(3, 2),
    hidden_size=64,
    num_attention_heads=4,
    num_conv_pos_embeddings=15,
    num_conv_pos_embedding_groups=4,
)
NARROW: dict[str, Any] = dict(
    conv_dim=(32,) * 7,
    hidden_size=64,
    num_attention_heads=4,
    num_conv_pos_embeddings=16,
    num_conv_pos_embedding_groups=4,
)
"""The published kernels and strides with fewer channels."""


def original(kind: Any, config: Any) -> Any:
    """A model with one transformer layer, which is left out here; its signals neither vanish nor are all the same."""
    network: Any = enliven(kind(config))
    for module in network.modules():
        if isinstance(module, torch.nn.LayerNorm | torch.nn.GroupNorm):
            module.weight.data = torch.linspace(0.5, 1.5, len(module.weight))
    for layer in network.feature_extractor.conv_layers:
        layer.conv.weight.data *= 1.6  # GELU reduces it by as much
    return network


def transformer_input(network: Any, sound: torch.Tensor) -> torch.Tensor:
    """The input of the first transformer layer."""
    given = []
    hook = network.encoder.layers[0].register_forward_pre_hook(lambda _, values: given.append(values[0]))
    network(sound)
    hook.remove()
    return given[0]


@pytest.fixture(scope="module")
def base() -> Any:
    return original(Wav2Vec2Model, Wav2Vec2Config(num_hidden_layers=1))


@functools.cache
def narrow() -> Any:
    return original(Wav2Vec2Model, Wav2Vec2Config(num_hidden_layers=1, **NARROW))


@functools.cache
def stable() -> Any:
    return original(HubertModel, HubertConfig(num_hidden_layers=1, **LARGE | NARROW))


def network_of(original: Any, build: Callable[..., Any] = wav2vec2.build) -> tuple[Any, dict[str, np.ndarray]]:
    weights = to_native(arrays(original), wav2vec2.LAYERS, "wav2vec2")
    return build(wav2vec2.Config.from_dict(original.config.to_dict()), weights), weights


def graphs() -> dict[str, tuple[Any, Any]]:
    return {"features": network_of(narrow(), wav2vec2.build_features), "stable": network_of(stable())}


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(shape[-1]))


def check_features(network: Any, features: Callable[..., Any], sizes: list[tuple[int, int]]) -> None:
    for batch, samples in sizes:
        sound = noise(batch, samples) * torch.arange(1.0, batch + 1)[:, None]
        with torch.inference_mode():
            compare(features(sound.numpy()), network.feature_extractor(sound).transpose(1, 2))


def check_speech(network: Any, features: Callable[..., Any]) -> None:
    """Speech is loudest in the bass, and the offset is even louder: sums over time must not cancel."""
    audio = read_audio(resolve(silero_vad.SAMPLE_AUDIO), 16000).mean(axis=0)[16000 * 8 : 16000 * 12]
    for gain, offset in ((1, 0), (0.1, 0.5)):
        sound = torch.from_numpy(audio[None] / audio.std() * gain + offset).float()
        with torch.inference_mode():
            # In float32 the original itself is off by 1e-5.
            want = network.double().feature_extractor(sound.double()).transpose(1, 2).float()
        network.float()
        compare(features(sound.numpy()), want, 2e-5)


def check_positions(network: Any, model: Callable[..., Any]) -> None:
    for batch, frames in ((2, 149), (1, 1), (1, 70)):
        hidden = noise(batch, frames, network.config.hidden_size)
        with torch.inference_mode():
            compare(model(hidden.numpy()), network.encoder.pos_conv_embed(hidden))


def check_whole(network: Any, model: Callable[..., Any], sizes: list[tuple[int, int]]) -> None:
    for batch, samples in sizes:
        sound = noise(batch, samples)
        with torch.inference_mode():
            compare(model(sound.numpy()), transformer_input(network, sound))


SOUNDS = [(2, 16000), (3, 1234), (1, 400), (1, 719)]


def test_base_is_the_original(base: Any, started: Callable[..., Any]) -> None:
    features = started(*network_of(base, wav2vec2.build_features))
    check_features(base, features, SOUNDS)
    check_speech(base, features)
    check_positions(base, started(*network_of(base, wav2vec2.build_positional)))


def test_hubert_large_is_the_original(started: Callable[..., Any]) -> None:
    network = original(HubertModel, HubertConfig(num_hidden_layers=1, **LARGE))
    config = wav2vec2.Config.from_dict(network.config.to_dict())
    assert (config.norm, config.bias, config.stable, config.hidden) == ("layer", True, True, 1024)
    check_whole(network, started(*network_of(network)), [(2, 8000), (1, 719)])


def test_narrow_networks(models: dict[str, max_conv.Model]) -> None:
    check_features(narrow(), models["features"], SOUNDS)
    check_speech(narrow(), models["features"])
    check_whole(stable(), models["stable"], [(2, 8000), (1, 719)])


def test_small_is_the_original(started: Callable[..., Any]) -> None:
    """Another first layer and an odd positional one; the base model's norm before its transformer layers."""
    network = original(Wav2Vec2Model, Wav2Vec2Config(num_hidden_layers=1, **SMALL))
    check_whole(network, started(*network_of(network)), [(2, 500), (1, 18)])


@pytest.mark.parametrize("prefix", ["", "wav2vec2.", "hubert."])
def test_reads_a_checkpoint(base: Any, prefix: str, tmp_path: Path) -> None:
    """Weight norm as torch 2 saves it, and as the published files name it."""
    state = {prefix + name: value.contiguous() for name, value in base.state_dict().items()}
    if prefix:
        for part, number in (("weight_g", 0), ("weight_v", 1)):
            old = f"{prefix}{POSITIONS}.parametrizations.weight.original{number}"
            state[f"{prefix}{POSITIONS}.{part}"] = state.pop(old)
        state |= {"quantizer.codevectors": torch.zeros(1, 640, 128), "lm_head.bias": torch.zeros(32)}
    save_file(state, tmp_path / "model.safetensors")
    weights = wav2vec2.load_weights(tmp_path / "model.safetensors")
    assert {name: array.shape for name, array in weights.items()} == wav2vec2.Config().shapes()
    folded = base.encoder.pos_conv_embed.conv.weight.detach().numpy().T
    np.testing.assert_allclose(weights[f"{POSITIONS}.weight"], folded, rtol=0, atol=1e-6)


def test_reads_the_published_config() -> None:
    assert wav2vec2.Config.from_dict(Wav2Vec2Config().to_dict()) == wav2vec2.Config()
    assert wav2vec2.Config.from_dict(HubertConfig().to_dict()) == wav2vec2.Config()
    assert (wav2vec2.Config().hop, wav2vec2.Config().receptive) == (320, 400)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"feat_extract_activation": "relu"}, "feat_extract_activation must be gelu, but the config has 'relu'."),
        ({"feat_extract_norm": "batch"}, "feat_extract_norm must be group or layer, but the config has 'batch'."),
        ({"conv_pos_batch_norm": True}, "positions normalised over the batch (conv_pos_batch_norm) are not supported."),
    ],
)
def test_unknown_models(change: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError) as caught:
        wav2vec2.Config.from_dict(change)
    assert str(caught.value) == f"wav2vec2: {sentence}"
