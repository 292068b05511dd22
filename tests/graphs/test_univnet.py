"""UnivNet against transformers' implementation, under its names and the original's."""

import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from max_conv.graphs import univnet
from transformers import UnivNetConfig, UnivNetModel

import max_conv
from max_conv.streaming.describe import describe
from max_conv.weights.convert import to_native
from originals import arrays, compare, enliven

SMALL: dict[str, Any] = dict(
    model_in_channels=16,
    model_hidden_channels=16,
    num_mel_bins=20,
    resblock_kernel_sizes=[3],
    resblock_stride_sizes=[4],
    resblock_dilation_sizes=[[1, 3]],
    kernel_predictor_num_blocks=1,
    kernel_predictor_hidden_channels=16,
)


def network(config: UnivNetConfig) -> Any:
    """A network with predicted filters for which the gates do not saturate."""
    torch.manual_seed(0)
    network = enliven(UnivNetModel(config))
    for name, value in network.named_parameters():
        if name.endswith("kernel_conv.weight"):
            value.data *= 0.1
    return network


@functools.cache
def small() -> Any:
    return network(UnivNetConfig(**SMALL))


def graphs() -> dict[str, tuple[Any, Any]]:
    weights = to_native(arrays(small()), univnet.LAYERS, "univnet")
    return {"small": (univnet.build(univnet.Config.from_dict(small().config.to_dict()), weights), weights)}


@pytest.fixture(scope="module")
def original() -> Any:
    return network(UnivNetConfig())  # as published


@pytest.fixture(scope="module")
def weights(original: Any) -> dict[str, np.ndarray]:
    return to_native(arrays(original), univnet.LAYERS, "univnet")


def check(network: Any, model: Callable[..., Any], *inputs: int) -> None:
    for batch, frames in ((1, 31), (3, 4)):
        random = torch.Generator().manual_seed(frames)
        mels, noise = (torch.randn(batch, frames, size, generator=random) for size in inputs)
        with torch.inference_mode():
            want = network(mels, noise).waveforms.reshape(batch, -1)
        compare(model(mels.numpy(), noise.numpy()), want)


def test_is_the_original(original: Any, weights: dict[str, np.ndarray], started: Callable[..., Any]) -> None:
    check(original, started(univnet.build(univnet.Config(), weights), weights), 100, 64)


def test_a_small_network(models: dict[str, max_conv.Model]) -> None:
    check(small(), models["small"], 20, 16)


def test_reads_what_the_original_saves(original: Any, weights: dict[str, np.ndarray], tmp_path: Path) -> None:
    state = {}
    for name, value in original.state_dict().items():
        name = re.sub(r"^resblocks\.", "res_stack.", name)
        name = re.sub(r"(kernel_predictor\.)resblocks\.(\d)\.conv1\.", r"\1residual_convs.\2.1.", name)
        name = re.sub(r"(kernel_predictor\.)resblocks\.(\d)\.conv2\.", r"\1residual_convs.\2.3.", name)
        name = re.sub(r"\.resblocks\.(\d)\.conv\.", r".conv_blocks.\1.1.", name)
        name = name.replace("convt_pre.", "convt_pre.1.").replace("input_conv.", "input_conv.0.")
        name = name.replace("conv_post.", "conv_post.1.")
        if value.ndim == 3:
            state[f"{name}_g"] = value.norm(dim=(1, 2), keepdim=True)
            state[f"{name}_v"] = 3 * value
        else:
            state[name] = value
    assert "res_stack.2.kernel_predictor.residual_convs.0.3.weight_g" in state
    path = tmp_path / "univ_c32_0288.pt"
    torch.save({"model_g": state, "hp_str": "model: gen"}, path)
    loaded = univnet.load_weights(path)
    assert loaded.keys() == weights.keys()
    for name, array in loaded.items():
        np.testing.assert_allclose(array, weights[name], rtol=1e-5, atol=1e-8)


def test_reads_the_published_config() -> None:
    assert univnet.Config.from_dict(UnivNetConfig().to_dict()) == univnet.Config()


def test_is_described(weights: dict[str, np.ndarray]) -> None:
    span = describe(univnet.build(univnet.Config(), weights)).span
    assert 1 / span.step == univnet.Config().hop
    # Frames on each side: the predictor's 2 + 3 * 2 + 1, and after its first filters dilations of 3, 9 and 27 eighths.
    assert span.left is not None and span.right is not None
    assert 14 < span.left < 15 and 14 < span.right < 15


def test_wrong_weights(weights: dict[str, np.ndarray]) -> None:
    with pytest.raises(
        ValueError, match=r"^univnet: the weights lack conv_pre\.bias; pass those that fit the config\.$"
    ):
        univnet.build(univnet.Config(), {name: array for name, array in weights.items() if name != "conv_pre.bias"})
