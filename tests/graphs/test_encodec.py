"""EnCodec against transformers' implementation, with a checkpoint under the original's names."""

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from max_conv.graphs import encodec
from transformers import EncodecConfig, EncodecModel

import max_conv
from harness import shapes
from max_conv.weights.convert import to_native
from originals import arrays, compare
from originals import encodec as network

CONFIG = encodec.Config()
QUANTIZERS = CONFIG.quantizers
KBITS = 6.0


def original_names(model: EncodecModel) -> dict[str, torch.Tensor]:
    """The state dict as the original saves it: one more wrapper, and other names for transposed convolutions."""
    state = {}
    for name, value in model.state_dict().items():
        name = name.replace("parametrizations.weight.original0", "weight_g")
        name = name.replace("parametrizations.weight.original1", "weight_v")
        name = name.replace("quantizer.layers", "quantizer.vq.layers").replace(".codebook.", "._codebook.")
        half, _, rest = name.partition(".layers.")
        if half in ("encoder", "decoder"):
            transposed = half == "decoder" and rest.split(".conv.")[0] in ("3", "6", "9", "12")
            name = f"{half}.model.{rest.replace('.conv.', '.convtr.convtr.' if transposed else '.conv.conv.')}"
        state[name] = value
    return state


def noise(batch: int, samples: int) -> torch.Tensor:
    return torch.randn(batch, samples, generator=torch.Generator().manual_seed(samples))


def choices_free(model: Any, embeddings: torch.Tensor) -> np.ndarray:
    """Where two entries are equally near but for rounding, (batch, quantizers, frames), or were in an earlier one."""
    residual, free = embeddings.transpose(1, 2), []
    for layer in model.quantizer.layers[:QUANTIZERS]:
        book = layer.codebook
        near, far = torch.cdist(residual, book.embed[None]).topk(2, largest=False).values.unbind(-1)
        free.append(far - near < 1e-4)
        residual = residual - book.decode(book.encode(residual))
    return np.logical_or.accumulate(torch.stack(free, 1).numpy(), axis=1)


@pytest.fixture(scope="module")
def model() -> Any:
    return network(EncodecConfig())


@pytest.fixture(scope="module")
def weights(model: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    path = tmp_path_factory.mktemp("encodec") / "encodec_24khz-d7cc33bc.th"
    torch.save(original_names(model), path)
    return encodec.load_weights(path)


def test_encoder(model: Any, weights: dict[str, np.ndarray], started: Callable[..., Any]) -> None:
    encoder = started(encodec.build_encoder(CONFIG, weights), weights)
    for samples in (320 * 24, 320 * 30 + 77):
        sound = noise(2, samples)
        codes, found = encoder(sound.numpy())
        assert codes.shape == (2, QUANTIZERS, -(-samples // 320)) and len(np.unique(codes)) > 200
        check_codes(model, codes, found, sound)


def check_codes(model: Any, codes: np.ndarray, found: np.ndarray, sound: torch.Tensor) -> None:
    """Compares codes and embeddings with the original's."""
    with torch.inference_mode():
        embeddings = model.encoder(sound[:, None])
        expected = model.encode(sound[:, None], bandwidth=KBITS).audio_codes[0].numpy()
        free = choices_free(model, embeddings)
    compare(found, embeddings.transpose(1, 2))
    assert codes.shape == expected.shape and codes.dtype == np.int64
    assert free.mean() < 0.05
    np.testing.assert_array_equal(np.where(free, -1, codes), np.where(free, -1, expected))


def test_decoder(model: Any, weights: dict[str, np.ndarray], started: Callable[..., Any]) -> None:
    decoder = started(encodec.build_decoder(CONFIG, weights), weights)
    for frames in (7, 31):
        codes = torch.randint(0, 1024, (2, QUANTIZERS, frames), generator=torch.Generator().manual_seed(frames))
        with torch.inference_mode():
            expected = model.decode(codes[None], [None]).audio_values[:, 0]
        compare(decoder(codes.numpy()), expected)


def test_graphs_are_described(weights: dict[str, np.ndarray]) -> None:
    encoder, decoder = encodec.build_encoder(CONFIG, weights), encodec.build_decoder(CONFIG, weights)
    assert shapes(encoder.inputs) == [("batch", "samples")]
    codes, embeddings = shapes(encoder.output_types)
    assert codes[:2] == ("batch", QUANTIZERS) and embeddings[::2] == ("batch", 128)
    assert shapes(decoder.inputs) == [("batch", QUANTIZERS, "frames")]
    assert shapes(decoder.output_types) == [("batch", "frames * 320")]


SIZES: dict[str, Any] = {"num_filters": 16, "hidden_size": 32, "codebook_size": 32}


@functools.cache
def causal() -> tuple[Any, encodec.Config, dict[str, np.ndarray]]:
    """The published network with fewer channels and two stages, and half as many quantizers as codebooks."""
    model = network(EncodecConfig(upsampling_ratios=[4, 2], target_bandwidths=[60.0, 120.0], **SIZES))
    shape = {"channels": 16, "hidden": 32, "codebook_size": 32, "codebooks": 8, "quantizers": 4}
    config = replace(encodec.Config.from_dict(EncodecConfig().to_dict()), ratios=(4, 2), **shape)
    filters = (
        *("encoder.*conv.weight", "decoder.layers.[09].conv.weight"),
        *("decoder.*.block.*.conv.weight", "decoder.*.shortcut.conv.weight"),
    )
    transposed = ("decoder.layers.[36].conv.weight",)
    layers = replace(encodec.LAYERS, conv=filters, conv_transpose=transposed, optional=())
    return model, config, to_native(arrays(model), layers, "encodec")


@functools.cache
def one_stage() -> tuple[Any, encodec.Config, dict[str, np.ndarray]]:
    # As in MusicGen's 32 kHz model, with an odd ratio: padding on both sides, and a plain identity around a block.
    flags: dict[str, Any] = {"use_causal_conv": False, "use_conv_shortcut": False, "target_bandwidths": [96.0]}
    model = network(EncodecConfig(upsampling_ratios=[5], num_lstm_layers=1, **SIZES, **flags))
    small = {"channels": 16, "hidden": 32, "codebook_size": 32, "lstm_layers": 1, "codebooks": 4, "quantizers": 4}
    config = encodec.Config(ratios=(5,), causal=False, shortcut=False, **small)
    filters = ("encoder.*conv.weight", "decoder.layers.[06].conv.weight", "decoder.*.block.*.conv.weight")
    layers = replace(encodec.LAYERS, conv=filters, conv_transpose=("decoder.layers.3.conv.weight",), optional=())
    weights = to_native(arrays(model), layers, "encodec")
    return model, config, weights


def graphs() -> dict[str, tuple[Any, Any]]:
    _, config, weights = causal()
    return {"causal": (encodec.build(config, weights), weights)}


@pytest.mark.parametrize("samples", [4000, 4003])
def test_a_small_network(models: dict[str, max_conv.Model], samples: int) -> None:
    model, *_ = causal()
    sound = noise(2, samples)
    with torch.inference_mode():
        expected = model(sound[:, None], bandwidth=60.0).audio_values[:, 0]
    compare(models["causal"](sound.numpy()), expected)


def test_one_stage_that_sees_the_future(started: Callable[..., Any]) -> None:
    original, config, weights = one_stage()
    model = started(encodec.build(config, weights), weights)
    for samples in (4000, 4003):
        sound = noise(2, samples)
        with torch.inference_mode():
            expected = original(sound[:, None], bandwidth=96.0).audio_values[:, 0]
        compare(model(sound.numpy()), expected)


def test_published_configs() -> None:
    assert encodec.Config.from_dict(EncodecConfig().to_dict()) == CONFIG
    musicgen = {
        "sampling_rate": 32000,
        "num_filters": 64,
        "upsampling_ratios": [8, 5, 4, 4],
        "codebook_size": 2048,
        "target_bandwidths": [2.2],
        "use_causal_conv": False,
        "use_conv_shortcut": False,
    }
    config = encodec.Config.from_dict(musicgen)
    assert (config.codebooks, config.quantizers, config.hop, config.causal) == (4, 4, 640, False)


def test_both_names_are_the_same_weights(model: Any, weights: dict[str, np.ndarray]) -> None:
    own = to_native(arrays(model), encodec.LAYERS, "encodec")
    assert own.keys() == weights.keys()
    assert all(np.array_equal(own[name], weights[name]) for name in own)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            {"norm_type": "time_group_norm"},
            "norm_type must be 'weight_norm', but is 'time_group_norm'; use another model.",
        ),
        ({"upsampling_ratios": [8, 5, 4]}, "there must be 4 upsampling_ratios, but there are 3: (8, 5, 4)."),
    ],
)
def test_networks_that_are_not_built(change: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError) as caught:
        encodec.Config.from_dict(change)
    assert str(caught.value) == f"encodec: {sentence}"


def test_more_quantizers_than_codebooks(weights: dict[str, np.ndarray]) -> None:
    with pytest.raises(ValueError, match=r"^encodec: quantizers must be 1 to 32, but are 33\.$"):
        encodec.build(replace(CONFIG, quantizers=33), weights)
