"""HiFi-GAN against transformers' implementation, under its names and the original's."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from max_conv.graphs import hifigan
from transformers import SpeechT5HifiGan, SpeechT5HifiGanConfig

import max_conv
from max_conv.weights.convert import to_native
from originals import arrays, compare, enliven

V1: dict[str, Any] = {  # config_v1.json of the original, the part about the network
    "resblock": "1",
    "upsample_rates": [8, 8, 2, 2],
    "upsample_kernel_sizes": [16, 16, 4, 4],
    "upsample_initial_channel": 512,
    "resblock_kernel_sizes": [3, 7, 11],
    "resblock_dilation_sizes": [[1, 3, 5], [1, 3, 5], [1, 3, 5]],
    "num_mels": 80,
    "sampling_rate": 22050,
}
SMALL: dict[str, Any] = {
    "upsample_rates": [4, 2],
    "upsample_kernel_sizes": [8, 4],
    "upsample_initial_channel": 64,
    "resblock_kernel_sizes": [3, 7],
    "resblock_dilation_sizes": [[1, 3], [1, 5]],
    "num_mels": 20,
}
V3 = V1 | {
    "resblock": "2",
    "upsample_rates": [8, 8, 4],
    "upsample_kernel_sizes": [16, 16, 8],
    "upsample_initial_channel": 256,
    "resblock_kernel_sizes": [3, 5, 7],
    "resblock_dilation_sizes": [[1, 2], [2, 6], [3, 12]],
}


def original_names(network: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A generator's state dict as the original saves it: `ups`, and weight norm on every convolution."""
    state = {}
    for name, value in network.state_dict().items():
        name = name.replace("upsampler.", "ups.")
        if value.ndim == 3:
            state[f"{name}_g"] = value.norm(dim=(1, 2), keepdim=True)
            state[f"{name}_v"] = 3 * value
        elif name not in ("mean", "scale"):
            state[name] = value
    return state


def spectrogram(batch: int, frames: int, mels: int = 80) -> torch.Tensor:
    return torch.randn(batch, frames, mels, generator=torch.Generator().manual_seed(frames))


def original(sizes: dict[str, Any], **more: Any) -> Any:
    torch.manual_seed(0)
    given = {name.replace("num_mels", "model_in_dim"): value for name, value in sizes.items() if name != "resblock"}
    network: Any = enliven(SpeechT5HifiGan(SpeechT5HifiGanConfig(**given, **more)))
    network.mean.copy_(torch.linspace(-1, 1, len(network.mean)))
    network.scale.copy_(torch.linspace(0.5, 2, len(network.scale)))
    return network


@functools.cache
def small() -> Any:
    return original(SMALL)


def graphs() -> dict[str, tuple[Any, Any]]:
    config = hifigan.Config.from_dict(small().config.to_dict())
    weights = to_native(arrays(small()), hifigan.LAYERS, "hifigan")
    return {"small": (hifigan.build(config, weights), weights)}


def test_v1_is_the_original(started: Callable[..., Any], tmp_path: Path) -> None:
    """From the checkpoint that the original would save."""
    network = original(V1, normalize_before=False)
    torch.save({"generator": original_names(network)}, tmp_path / "g_02500000.pth")
    weights = hifigan.load_weights(tmp_path / "g_02500000.pth")
    model = started(hifigan.build(hifigan.Config(), weights), weights)
    for batch, frames in ((1, 50), (2, 7), (1, 1)):
        mels = spectrogram(batch, frames)
        with torch.inference_mode():
            want = network(mels).reshape(batch, -1)
        got = model(mels.numpy())
        compare(got, want)
        assert got.shape == (batch, frames * hifigan.Config().hop)


def test_speecht5_is_the_original(started: Callable[..., Any]) -> None:
    network = original({})  # as published
    config = hifigan.Config.from_dict(network.config.to_dict())
    assert config.normalised and config.hop == 256 and config.rate == 16000
    weights = to_native(arrays(network), hifigan.LAYERS, "hifigan")
    mels = spectrogram(2, 9)
    with torch.inference_mode():
        want = network(mels)
    compare(started(hifigan.build(config, weights), weights)(mels.numpy()), want)


@pytest.mark.parametrize(("batch", "frames"), [(1, 300), (2, 7), (1, 1)])
def test_a_small_network(models: dict[str, max_conv.Model], batch: int, frames: int) -> None:
    mels = spectrogram(batch, frames, 20)
    with torch.inference_mode():
        want = small()(mels).reshape(batch, -1)
    compare(models["small"](mels.numpy()), want)


def test_signals_do_not_touch(models: dict[str, max_conv.Model]) -> None:
    model = models["small"]
    mels = spectrogram(2, 7, 20).numpy()
    alone = model(mels[1:])
    mels[0] = np.nan
    np.testing.assert_array_equal(model(mels)[1:], alone)
    assert model(mels[:0]).shape == (0, 7 * 8)


def v3_weights() -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    weights = {}
    for name, shape in hifigan.Config.from_dict(V3).shapes().items():
        # An output of a transposed filter is a sum over the taps of one phase, which are half of the taps here.
        terms = 2 * shape[2] if name.startswith("ups") and len(shape) == 3 else np.prod(shape[:2])
        weights[name] = (random.standard_normal(shape) / (np.sqrt(terms) if len(shape) == 3 else 10)).astype(np.float32)
    return weights


def test_v3_is_the_paper(started: Callable[..., Any]) -> None:
    config, weights = hifigan.Config.from_dict(V3), v3_weights()
    mels = spectrogram(2, 6)
    compare(started(hifigan.build(config, weights), weights)(mels.numpy()), v3(config, weights, mels))


def v3(config: hifigan.Config, weights: dict[str, np.ndarray], mels: torch.Tensor) -> torch.Tensor:
    """The paper's generator with its second residual block, in PyTorch's functions."""
    f = torch.nn.functional
    state = {name: torch.from_numpy(array.T.copy()) for name, array in weights.items()}
    x = f.conv1d(mels.transpose(1, 2), state["conv_pre.weight"], state["conv_pre.bias"], padding=3)
    for i, (rate, taps) in enumerate(zip(config.rates, config.rate_kernel_sizes)):
        up = state[f"ups.{i}.weight"], state[f"ups.{i}.bias"]
        x = f.conv_transpose1d(f.leaky_relu(x, 0.1), *up, stride=rate, padding=(taps - rate) // 2)
        outputs = []
        for j, (taps, dilations) in enumerate(zip(config.kernel_sizes, config.dilations)):
            y = x
            for k, step in enumerate(dilations):
                name = f"resblocks.{3 * i + j}.convs.{k}"
                z = f.leaky_relu(y, 0.1)
                filter = state[f"{name}.weight"], state[f"{name}.bias"]
                y = y + f.conv1d(z, *filter, dilation=step, padding=step * (taps - 1) // 2)
            outputs.append(y)
        x = sum(outputs, torch.zeros(())) / len(outputs)
    x = f.conv1d(f.leaky_relu(x), state["conv_post.weight"], state["conv_post.bias"], padding=3)
    return torch.tanh(x).squeeze(1)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"conv_pre.bias": None}, "the weights lack conv_pre.bias; pass those that fit the config."),
        ({"conv_pre.bias": np.zeros(3)}, "the weight conv_pre.bias must have shape (512,), but has (3,)."),
        ({"a": np.zeros(3)}, "the weights hold the unknown a; pass those that fit the config."),
    ],
)
def test_wrong_weights(change: dict[str, np.ndarray | None], sentence: str) -> None:
    weights = {name: np.zeros(shape, np.float32) for name, shape in hifigan.Config().shapes().items()} | change
    with pytest.raises(ValueError) as caught:
        hifigan.build(hifigan.Config(), {name: value for name, value in weights.items() if value is not None})
    assert str(caught.value) == f"hifigan: {sentence}"


def test_reads_the_published_config() -> None:
    assert hifigan.Config.from_dict(V1) == hifigan.Config()
    assert hifigan.Config.from_dict(V3).block == 2
