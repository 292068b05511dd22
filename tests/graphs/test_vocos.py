"""Vocos against its own package."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from max_conv.graphs import vocos

import max_conv
from max_conv.weights.convert import to_native
from originals import arrays, compare, enliven, from_wheel

WHEEL = "pypi://vocos==0.1.0/{}#sha256=0ac13eaef68596074301e912d781399b3defa4b4ca60b6bc52c8a4b9209ca235"
PUBLISHED: dict[str, Any] = {  # config.yaml of charactr/vocos-mel-24khz
    "feature_extractor": {"init_args": {"sample_rate": 24000, "n_fft": 1024, "hop_length": 256, "n_mels": 100}},
    "backbone": {"init_args": {"input_channels": 100, "dim": 512, "intermediate_dim": 1536, "num_layers": 8}},
    "head": {"init_args": {"dim": 512, "n_fft": 1024, "hop_length": 256, "padding": "center"}},
}


SMALL: dict[str, Any] = {
    "feature_extractor": {"init_args": {"sample_rate": 24000, "n_fft": 64, "hop_length": 16, "n_mels": 20}},
    "backbone": {"init_args": {"input_channels": 20, "dim": 32, "intermediate_dim": 96, "num_layers": 2}},
    "head": {"init_args": {"dim": 32, "n_fft": 64, "hop_length": 16, "padding": "center"}},
}


@functools.cache
def original(small: bool) -> Any:
    # torchaudio's mel scale and the other heads are not used.
    absent = ["torchaudio", "torchaudio.functional", "torchaudio.functional.functional", "scipy"]
    *_, models, heads = from_wheel(WHEEL, "vocos", ["spectral_ops", "modules", "models", "heads"], absent)
    sizes = SMALL if small else PUBLISHED
    torch.manual_seed(0)
    backbone = models.VocosBackbone(**sizes["backbone"]["init_args"])
    head = heads.ISTFTHead(**sizes["head"]["init_args"])
    return enliven(torch.nn.ModuleDict({"backbone": backbone, "head": head}))


def graphs() -> dict[str, tuple[Any, Any]]:
    weights = to_native(arrays(original(True)), vocos.LAYERS, "vocos")
    return {"small": (vocos.build(vocos.Config.from_dict(SMALL), weights), weights)}


def check(network: Any, model: Callable[..., Any], bins: int) -> None:
    for batch, frames in ((1, 94), (3, 17), (1, 2)):
        mels = torch.randn(batch, bins, frames, generator=torch.Generator().manual_seed(frames))
        with torch.inference_mode():
            want = network["head"](network["backbone"](mels))
        compare(model(mels.transpose(1, 2).numpy()), want)


def test_is_the_original(started: Callable[..., Any]) -> None:
    weights = to_native(arrays(original(False)), vocos.LAYERS, "vocos")
    check(original(False), started(vocos.build(vocos.Config(), weights), weights), 100)


def test_a_small_network(models: dict[str, max_conv.Model]) -> None:
    check(original(True), models["small"], 20)


def test_reads_the_published_config() -> None:
    assert vocos.Config.from_dict(PUBLISHED) == vocos.Config()
    conditional = {**PUBLISHED, "backbone": {"init_args": {"adanorm_num_embeddings": 4}}}
    with pytest.raises(ValueError, match="vocos: backbones with adanorm_num_embeddings are not supported"):
        vocos.Config.from_dict(conditional)


def test_reads_a_checkpoint(tmp_path: Path) -> None:
    state = dict(original(False).state_dict()) | {"feature_extractor.mel_spec.mel_scale.fb": torch.zeros(513, 100)}
    torch.save(state, tmp_path / "pytorch_model.bin")
    weights = vocos.load_weights(tmp_path / "pytorch_model.bin")
    assert {name: array.shape for name, array in weights.items()} == vocos.Config().shapes()
    np.testing.assert_array_equal(weights["backbone.embed.weight"], state["backbone.embed.weight"].numpy().T)
