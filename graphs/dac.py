"""DAC, a codec: from sound to a few codes per frame, and back.

Stages of three residual units of dilated convolutions, each between Snake activations, and a strided convolution; the
decoder mirrors the encoder. Between them a frame's vector is projected to few channels, replaced by the codebook entry of the
nearest direction, projected back and subtracted; the next codebook encodes the remainder. The defaults of `Config` are the
44.1 kHz model.
Source: Kumar and others, High-Fidelity Audio Compression with Improved RVQGAN, 2023, https://arxiv.org/abs/2306.06546,
https://github.com/descriptinc/descript-audio-codec.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from max.dtype import DType
from max.graph import DeviceRef, TensorValue, ops

from max_conv import PackedGraph, conv1d
from max_conv.serving import Task
from max_conv.weights import LayerMap

from .parts import Ports, Weights, begin, load, tanh

DILATIONS = (1, 3, 9)
"""Dilations of a stage's residual units."""

# The original numbers everything, transformers names it: stages from 0, and units from 1.
_STAGE = r"^(encoder|decoder)\.block\.{}\.block\."
_RENAME = (
    (r"^decoder\.model\.", "decoder.block."),
    (r"^(encoder|decoder)\.block\.0\.(?=weight|bias)", r"\1.conv1."),
    (r"^(encoder|decoder)\.block\.5\.(?=alpha)", r"\1.snake1."),
    (r"^(encoder|decoder)\.block\.6\.(?=weight|bias)", r"\1.conv2."),
    *((_STAGE.format(i), rf"\1.block.{i - 1}.inner.") for i in range(1, 5)),
    *((rf"^(encoder.*)\.inner\.{i}\.block\.", rf"\1.res_unit{i + 1}.") for i in range(3)),
    *((rf"^(decoder.*)\.inner\.{i}\.block\.", rf"\1.res_unit{i - 1}.") for i in range(2, 5)),
    *((rf"(res_unit\d)\.{i}\.", rf"\1.{name}.") for i, name in enumerate(("snake1", "conv1", "snake2", "conv2"))),
    (r"\.inner\.\d\.alpha$", ".snake1.alpha"),
    (r"^(encoder.*)\.inner\.4\.", r"\1.conv1."),
    (r"^(decoder.*)\.inner\.1\.", r"\1.conv_t1."),
)

LAYERS = LayerMap(
    conv=("*.conv1.weight", "*.conv2.weight", "*.in_proj.weight", "*.out_proj.weight"),
    conv_transpose=("*.conv_t1.weight",),
    copy=("*.bias", "*.alpha", "*.codebook.weight"),
    rename=_RENAME,
)


@dataclass(frozen=True)
class Config:
    """The network's sizes; the defaults are the published 44.1 kHz model."""

    channels: int = 64
    """Filters of the encoder's first layer; each stage doubles them."""
    ratios: tuple[int, ...] = (2, 4, 8, 8)
    """Strides of the encoder's stages."""
    decoder_channels: int = 1536
    """Filters of the decoder's first layer; each stage halves them."""
    codebooks: int = 9
    """Codebooks of the checkpoint."""
    codebook_size: int = 1024
    codebook_dim: int = 8
    quantizers: int = 9
    """Codebooks in use."""
    rate: int = 44100
    """Samples per second."""

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "Config":
        """Reads transformers' config.json."""
        codebooks = config.get("n_codebooks", 9)
        return cls(
            channels=config.get("encoder_hidden_size", 64),
            ratios=tuple(config.get("downsampling_ratios", (2, 4, 8, 8))),
            decoder_channels=config.get("decoder_hidden_size", 1536),
            codebooks=codebooks,
            codebook_size=config.get("codebook_size", 1024),
            codebook_dim=config.get("codebook_dim", 8),
            quantizers=codebooks,
            rate=config["sampling_rate"],
        )

    @property
    def hop(self) -> int:
        """Samples per frame."""
        return math.prod(self.ratios)

    @property
    def hidden(self) -> int:
        """Channels of a frame."""
        return self.channels << len(self.ratios)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Returns the native weights' shapes."""
        shapes: dict[str, tuple[int, ...]] = {}

        def layer(name: str, bias: int, *filter: int) -> None:
            shapes[f"{name}.weight"], shapes[f"{name}.bias"] = filter, (bias,)

        def snake(name: str, channels: int) -> None:
            shapes[f"{name}.alpha"] = (1, channels, 1)

        def units(name: str, channels: int) -> None:
            for i in range(1, len(DILATIONS) + 1):
                for j, taps in enumerate((7, 1), 1):
                    snake(f"{name}.res_unit{i}.snake{j}", channels)
                    layer(f"{name}.res_unit{i}.conv{j}", channels, taps, channels, channels)

        layer("encoder.conv1", self.channels, 7, 1, self.channels)
        layer("decoder.conv1", self.decoder_channels, 7, self.hidden, self.decoder_channels)
        wide, narrow = self.channels, self.decoder_channels
        for i, (down, up) in enumerate(zip(self.ratios, reversed(self.ratios), strict=True)):
            encoder, decoder = f"encoder.block.{i}", f"decoder.block.{i}"
            units(encoder, wide)
            snake(f"{encoder}.snake1", wide)
            layer(f"{encoder}.conv1", 2 * wide, 2 * down, wide, 2 * wide)
            snake(f"{decoder}.snake1", narrow)
            layer(f"{decoder}.conv_t1", narrow // 2, 2 * up, narrow // 2, narrow)
            units(decoder, narrow // 2)
            wide, narrow = 2 * wide, narrow // 2
        snake("encoder.snake1", wide)
        layer("encoder.conv2", self.hidden, 3, wide, self.hidden)
        snake("decoder.snake1", narrow)
        layer("decoder.conv2", 1, 7, narrow, 1)
        for i in range(self.codebooks):
            book = f"quantizer.quantizers.{i}"
            layer(f"{book}.in_proj", self.codebook_dim, 1, self.hidden, self.codebook_dim)
            layer(f"{book}.out_proj", self.hidden, 1, self.codebook_dim, self.hidden)
            shapes[f"{book}.codebook.weight"] = (self.codebook_size, self.codebook_dim)
        return shapes


def load_weights(reference: str | Path, config: Config = Config()) -> dict[str, np.ndarray]:
    """Reads a checkpoint, of transformers or of the original, into native weights."""
    return load(reference, LAYERS, "dac", config.shapes())


def build(
    config: Config,
    weights: Mapping[str, np.ndarray],
    device: DeviceRef | None = None,
    dtype: DType = DType.float32,
    *,
    exact: bool = False,
    ragged: bool = False,
) -> PackedGraph:
    """Builds the whole codec: sound (batch, samples) to decoded sound (batch, samples // hop * hop).

    This length holds for even ratios; an odd ratio loses a few samples more.

    Args:
        config: The sizes.
        weights: The result of `load_weights`; only names and shapes go into the graph.
        device: Where the graph runs; None is the CPU.
        dtype: The dtype of the computation. Sound is float32.
        exact: As in `max_conv.conv1d`.
        ragged: Whether signals differ in length: then the last input is `lengths`, (batch,) int64.

    Raises:
        ValueError: If the weights do not fit the config.
    """
    graph, w = _begin("dac", config, weights, device, dtype, exact, ragged)
    with graph:
        codes = _quantize(config, w, _encode(config, w, graph.inputs[0].tensor))
        graph.output(_decode(config, w, _entries(w, codes)))
    return graph


def build_encoder(
    config: Config,
    weights: Mapping[str, np.ndarray],
    device: DeviceRef | None = None,
    dtype: DType = DType.float32,
    *,
    exact: bool = False,
    ragged: bool = False,
) -> PackedGraph:
    """Builds the encoder: sound (batch, samples), -1 to 1, to codes and embeddings.

    Arguments and errors are as for `build`. Samples past the last whole frame hardly matter: pad them to a multiple of `hop`.

    Outputs:
        codes: (batch, quantizers, frames), int64.
        embeddings: (batch, frames, hidden), float32: the sum of the codes' entries.
    """
    graph, w = _begin("dac_encoder", config, weights, device, dtype, exact, ragged)
    with graph:
        embeddings = _encode(config, w, graph.inputs[0].tensor)
        codes = ops.stack(_quantize(config, w, embeddings), axis=1)
        graph.output(codes, ops.cast(embeddings, DType.float32))
    return graph


def build_decoder(
    config: Config,
    weights: Mapping[str, np.ndarray],
    device: DeviceRef | None = None,
    dtype: DType = DType.float32,
    *,
    exact: bool = False,
    ragged: bool = False,
) -> PackedGraph:
    """Builds the decoder: codes (batch, quantizers, frames), int64, to sound (batch, frames * hop), -1 to 1.

    Arguments and errors are as for `build`.
    """
    graph, w = _begin("dac_decoder", config, weights, device, dtype, exact, ragged)
    with graph:
        codes = graph.inputs[0].tensor
        graph.output(_decode(config, w, _entries(w, [codes[:, i] for i in range(config.quantizers)])))
    return graph


def _begin(
    name: str,
    config: Config,
    weights: Mapping[str, np.ndarray],
    device: DeviceRef | None,
    dtype: DType,
    exact: bool,
    ragged: bool,
) -> tuple[PackedGraph, Weights]:
    """Returns an empty graph, for the codec or for a half of it, and the weights in it."""
    if not 1 <= config.quantizers <= config.codebooks:
        raise ValueError(f"dac: quantizers must be 1 to {config.codebooks}, but are {config.quantizers}.")
    sound: dict[str, list[str | int]] = {"sound": ["batch", "samples"]}
    codes: dict[str, list[str | int]] = {"codes": ["batch", config.quantizers, "frames"]}
    inputs, given = (codes, DType.int64) if name == "dac_decoder" else (sound, DType.float32)
    outputs = ["codes", "embeddings"] if name == "dac_encoder" else ["sound"]
    return begin(
        Ports(name, inputs, outputs, given), config.shapes(), weights, device, dtype, exact=exact, ragged=ragged
    )


def _encode(config: Config, w: Weights, sound: TensorValue) -> TensorValue:
    """Returns one vector per frame, (batch, frames, hidden)."""
    w = w / "encoder"
    x = w.conv(ops.unsqueeze(ops.cast(sound, w.dtype), 2), "conv1", padding=3)
    for i, ratio in enumerate(config.ratios):
        stage = w / "block" / i
        x = stage.conv(_units(stage, x, "snake1"), "conv1", stride=ratio, padding=math.ceil(ratio / 2))
    return w.conv(w.snake(x, "snake1"), "conv2", padding=1)


def _decode(config: Config, w: Weights, x: TensorValue) -> TensorValue:
    """Returns sound (batch, frames * hop), float32."""
    w = w / "decoder"
    x = w.conv(x, "conv1", padding=3)
    for i, ratio in enumerate(reversed(config.ratios)):
        stage = w / "block" / i
        x = stage.conv_transpose(stage.snake(x, "snake1"), "conv_t1", stride=ratio, padding=math.ceil(ratio / 2))
        x = _units(stage, x)
    x = tanh(w.conv(w.snake(x, "snake1"), "conv2", padding=3))
    return ops.cast(ops.squeeze(x, 2), DType.float32)


def _units(w: Weights, x: TensorValue, last: str | None = None) -> TensorValue:
    """Runs a stage's residual units, and a last activation."""
    for i, dilation in enumerate(DILATIONS, 1):
        unit = w / f"res_unit{i}"
        y = unit.conv(unit.snake(x, "snake1"), "conv1", dilation=dilation, padding=3 * dilation)
        x = unit.conv(unit.snake(y, "snake2"), "conv2") + x
    return w.snake(x, last) if last else x


def _codebook(w: Weights, i: int) -> Weights:
    return w / "quantizer" / "quantizers" / i


def _quantize(config: Config, w: Weights, x: TensorValue) -> list[TensorValue]:
    """Returns each quantizer's codes, (batch, frames)."""
    codes: list[TensorValue] = []
    for i in range(config.quantizers):
        book = _codebook(w, i)
        if codes:
            before = _codebook(w, i - 1)
            x = x - before.conv(ops.gather(before["codebook.weight"], codes[-1], axis=0), "out_proj")
        # The entries have length 1, so the nearest direction has the greatest product.
        entries = book.make("directions", _directions, "codebook.weight")
        codes.append(ops.squeeze(ops.argmax(conv1d(book.conv(x, "in_proj"), entries), axis=-1), 2))
    return codes


def _directions(entries: np.ndarray) -> np.ndarray:
    """Returns the entries, scaled to length 1, as filters of one tap."""
    lengths = np.sqrt((entries * entries).sum(1, keepdims=True))
    return np.ascontiguousarray((entries / np.maximum(lengths, np.float32(1e-12))).T[None])


def _entries(w: Weights, codes: Sequence[TensorValue]) -> TensorValue:
    """Returns the sum of the codes' projected entries, (batch, frames, hidden): one convolution for all."""
    found = [ops.gather(_codebook(w, i)["codebook.weight"], code, axis=0) for i, code in enumerate(codes)]
    books = [f"quantizer.quantizers.{i}.out_proj" for i in range(len(codes))]
    filter = w.make(f"out_proj.{len(codes)}", lambda *all: np.concatenate(all, 1), *(f"{n}.weight" for n in books))
    bias = w.make(f"out_bias.{len(codes)}", lambda *all: np.sum(all, 0), *(f"{name}.bias" for name in books))
    return conv1d(ops.concat(found, axis=2), filter, bias)


TASK = Task(kind="codec", input="sound", output="the sound after coding, (batch, samples // hop * hop), -1 to 1")
