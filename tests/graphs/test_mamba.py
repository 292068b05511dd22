"""Mamba's block up to the scan, against transformers' implementation."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from max_conv.graphs import mamba
from transformers import MambaConfig, MambaModel

import max_conv
from max_conv.weights.convert import to_native
from originals import arrays, compare, enliven

# From config.json of state-spaces/mamba-130m-hf; all its layers are the same.
PUBLISHED: dict[str, Any] = dict(hidden_size=768, num_hidden_layers=24)
SMALL = dict(hidden_size=48, expand=3, conv_kernel=3, use_conv_bias=False, use_bias=True, vocab_size=10)


def original(**config: Any) -> Any:
    network: Any = enliven(MambaModel(MambaConfig(**config)))
    for layer in network.layers:
        layer.norm.weight.data = torch.linspace(0.5, 1.5, len(layer.norm.weight))
    return network


def want(network: Any, layer: int, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The input that `MambaMixer.slow_forward` passes to its scan."""
    block = network.layers[layer]
    value, gate = block.mixer.in_proj(block.norm(x)).transpose(1, 2).chunk(2, dim=1)
    value = block.mixer.act(block.mixer.conv1d(value)[..., : x.shape[1]])
    return value.transpose(1, 2), gate.transpose(1, 2)


@functools.cache
def small() -> tuple[Any, mamba.Config]:
    network = original(num_hidden_layers=1, **SMALL)
    return network, mamba.Config.from_dict(network.config.to_dict())


def graphs() -> dict[str, tuple[Any, Any]]:
    network, config = small()
    weights = to_native(arrays(network), mamba.LAYERS, "mamba")
    return {"small": (mamba.build(config, weights), weights)}


def check(model: Callable[..., Any], network: Any, layer: int, sizes: list[tuple[int, int]]) -> None:
    for batch, length in sizes:
        x = torch.randn(batch, length, network.config.hidden_size, generator=torch.Generator().manual_seed(length))
        with torch.inference_mode():
            for got, expected in zip(model(3 * x.numpy()), want(network, layer, 3 * x), strict=True):
                compare(got, expected)


def test_block_is_the_original(started: Callable[..., Any]) -> None:
    """The published model's second block."""
    network = original(**PUBLISHED | {"num_hidden_layers": 2, "vocab_size": 10})
    weights = to_native(arrays(network), mamba.LAYERS, "mamba")
    check(
        started(mamba.build(mamba.Config(layers=2, layer=1), weights), weights), network, 1, [(2, 300), (1, 1), (3, 17)]
    )


def test_small_block_is_the_original(models: dict[str, max_conv.Model]) -> None:
    """With a bias where the published model has none, and without one where it has one."""
    network, config = small()
    assert (config.intermediate, config.bias, config.conv_bias) == (144, True, False)
    check(models["small"], network, 0, [(2, 30), (1, 1), (3, 300)])


@pytest.mark.parametrize("prefix", ["", "backbone."])
def test_reads_a_checkpoint(prefix: str, tmp_path: Path) -> None:
    network = original(hidden_size=48, num_hidden_layers=2, vocab_size=10)
    state = {prefix + name: value for name, value in network.state_dict().items()}
    if prefix:
        state["lm_head.weight"] = torch.zeros(10, 48)
    torch.save(state, tmp_path / "pytorch_model.bin")
    config = mamba.Config(hidden=48, intermediate=96, layers=2)
    weights = mamba.load_weights(tmp_path / "pytorch_model.bin", config)
    assert {name: array.shape for name, array in weights.items()} == config.shapes()


def test_reads_the_published_config() -> None:
    published = MambaConfig(**PUBLISHED).to_dict()
    assert mamba.Config.from_dict(published) == mamba.Config()
    assert mamba.Config.from_dict(published, layer=5).layer == 5


def test_refuses() -> None:
    with pytest.raises(ValueError) as caught:
        mamba.Config.from_dict(PUBLISHED | {"hidden_act": "relu"})
    assert str(caught.value) == "mamba: hidden_act must be silu, but the config has 'relu'."
    with pytest.raises(ValueError) as caught:
        mamba.Config(layer=24)
    assert str(caught.value) == "mamba: layer must be one of 24, counted from 0, but is 24."
