"""HiFi-GAN against transformers' implementation, under its names and the original's."""

from typing import Any

import numpy as np
import pytest
import torch
from max_conv.graphs import hifigan
from transformers import SpeechT5HifiGan, SpeechT5HifiGanConfig

import max_conv
from harness import compile_together
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


def spectrogram(batch: int, frames: int) -> torch.Tensor:
    return torch.randn(batch, frames, 80, generator=torch.Generator().manual_seed(frames))


@pytest.fixture(scope="module")
def networks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Any, max_conv.Model]]:
    """The networks in PyTorch and the compiled graphs: V1 from the checkpoint that the original would save, and others."""
    torch.manual_seed(0)
    sizes = {name: value for name, value in V1.items() if name not in ("resblock", "num_mels")}
    v1 = enliven(SpeechT5HifiGan(SpeechT5HifiGanConfig(**sizes, normalize_before=False)))
    path = tmp_path_factory.mktemp("v1") / "g_02500000.pth"
    torch.save({"generator": original_names(v1)}, path)
    config = SpeechT5HifiGanConfig()  # as published
    speecht5: Any = enliven(SpeechT5HifiGan(config))
    speecht5.mean.copy_(torch.linspace(-1, 1, 80))
    speecht5.scale.copy_(torch.linspace(0.5, 2, 80))
    read = hifigan.Config.from_dict(config.to_dict())
    assert read.normalised and read.hop == 256 and read.rate == 16000
    given = [
        (hifigan.Config(), hifigan.load_weights(path)),
        (read, to_native(arrays(speecht5), hifigan.LAYERS, "hifigan")),
        (hifigan.Config.from_dict(V3), v3_weights()),
    ]
    models = compile_together(*((hifigan.build(config, weights), weights) for config, weights in given))
    return {"v1": (v1, models[0]), "speecht5": (speecht5, models[1]), "v3": (given[2], models[2])}


@pytest.fixture(scope="module")
def v1(networks: dict[str, tuple[Any, max_conv.Model]]) -> tuple[Any, max_conv.Model]:
    return networks["v1"]


@pytest.mark.parametrize(("batch", "frames"), [(1, 50), (2, 7), (1, 1)])
def test_v1_is_the_original(v1: tuple[Any, max_conv.Model], batch: int, frames: int) -> None:
    network, model = v1
    mels = spectrogram(batch, frames)
    with torch.inference_mode():
        want = network(mels)
    compare(model(mels.numpy()), want)
    assert model(mels.numpy()).shape == (batch, frames * hifigan.Config().hop)


def test_signals_do_not_touch(v1: tuple[Any, max_conv.Model]) -> None:
    _, model = v1
    mels = spectrogram(2, 7).numpy()
    alone = model(mels[1:])
    mels[0] = np.nan
    np.testing.assert_array_equal(model(mels)[1:], alone)
    assert model(mels[:0]).shape == (0, 7 * 256)


def test_speecht5_is_the_original(networks: dict[str, tuple[Any, max_conv.Model]]) -> None:
    network, model = networks["speecht5"]
    mels = spectrogram(2, 9)
    with torch.inference_mode():
        want = network(mels)
    compare(model(mels.numpy()), want)


def v3_weights() -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    weights = {}
    for name, shape in hifigan.Config.from_dict(V3).shapes().items():
        # An output of a transposed filter is a sum over the taps of one phase, which are half of the taps here.
        terms = 2 * shape[2] if name.startswith("ups") and len(shape) == 3 else np.prod(shape[:2])
        weights[name] = (random.standard_normal(shape) / (np.sqrt(terms) if len(shape) == 3 else 10)).astype(np.float32)
    return weights


def test_v3_is_the_paper(networks: dict[str, tuple[Any, max_conv.Model]]) -> None:
    (config, weights), model = networks["v3"]
    mels = spectrogram(2, 6)
    compare(model(mels.numpy()), v3(config, weights, mels))


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
