"""Whisper's encoder: from a log-mel spectrogram to the input of its decoder.

Two convolutions, of which the second halves the rate, then transformer layers that normalise their inputs. Attention is
written in the order of MAX's own Whisper, so that MAX makes one fused kernel of scores, softmax and sum: a layer takes 24 ms
instead of 50.
Source: Radford and others, Whisper, 2022, https://arxiv.org/abs/2212.04356, https://github.com/openai/whisper; names and
checkpoints: https://github.com/huggingface/transformers.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from max.dtype import DType
from max.graph import DeviceRef, Dim, TensorValue, ops

from max_conv import PackedGraph
from max_conv.serving import Task
from max_conv.weights import LayerMap

from .parts import Ports, Weights, begin, gelu, load

LAYERS = LayerMap(
    conv=("conv*.weight",),
    copy=("conv*.bias", "embed_positions.weight", "layers.*", "layer_norm.*"),
    ignore=("decoder.*", "model.decoder.*", "proj_out.*", "classifier.*", "projector.*", "layer_weights"),
    rename=((r"^(model\.)?encoder\.", ""),),
)


@dataclass(frozen=True)
class Config:
    """The network's sizes; the defaults are openai/whisper-tiny."""

    mels: int = 80
    rate: int = 100
    """Frames per second of the spectrogram."""
    hidden: int = 384
    heads: int = 6
    layers: int = 4
    inner: int = 1536
    """Width of the layer between a transformer layer's two matrices."""
    positions: int = 1500
    """The most vectors that the encoder returns: 30 s."""

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "Config":
        """Reads the config.json of transformers' WhisperModel.

        Raises:
            ValueError: If the model is one that this file does not know.
        """
        get = config.get
        if (activation := get("activation_function", "gelu")) != "gelu":
            raise ValueError(f"whisper: activation_function must be gelu, but the config has {activation!r}.")
        return cls(
            mels=get("num_mel_bins", 80),
            hidden=get("d_model", 384),
            heads=get("encoder_attention_heads", 6),
            layers=get("encoder_layers", 4),
            inner=get("encoder_ffn_dim", 1536),
            positions=get("max_source_positions", 1500),
        )

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Returns the native weights' shapes."""
        shapes: dict[str, tuple[int, ...]] = {"embed_positions.weight": (self.positions, self.hidden)}

        def layer(name: str, *weight: int, bias: int = self.hidden) -> None:
            shapes[f"{name}.weight"] = weight
            if bias:
                shapes[f"{name}.bias"] = (bias,)

        layer("conv1", 3, self.mels, self.hidden)
        layer("conv2", 3, self.hidden, self.hidden)
        layer("layer_norm", self.hidden)
        for i in range(self.layers):
            name = f"layers.{i}"
            for matrix in ("q", "k", "v", "out"):
                bias = 0 if matrix == "k" else self.hidden
                layer(f"{name}.self_attn.{matrix}_proj", self.hidden, self.hidden, bias=bias)
            layer(f"{name}.self_attn_layer_norm", self.hidden)
            layer(f"{name}.fc1", self.inner, self.hidden, bias=self.inner)
            layer(f"{name}.fc2", self.hidden, self.inner)
            layer(f"{name}.final_layer_norm", self.hidden)
        return shapes


def load_weights(reference: str | Path, config: Config = Config()) -> dict[str, np.ndarray]:
    """Reads a checkpoint of transformers, whose decoder is left out, into native weights."""
    return load(reference, LAYERS, "whisper", config.shapes())


def build(
    config: Config,
    weights: Mapping[str, np.ndarray],
    device: DeviceRef | None = None,
    dtype: DType = DType.float32,
    *,
    exact: bool = False,
    ragged: bool = False,
) -> PackedGraph:
    """Builds the graph: a log-mel spectrogram (batch, frames, mels) to (batch, (frames + 1) // 2, hidden).

    The spectrogram is NLC, the transpose of transformers' feature extractor's output. The model was trained on 30 s,
    3000 frames, and accepts no more; it runs on fewer, unlike transformers' model.

    Args:
        config: The sizes.
        weights: The result of `load_weights`; only its names and shapes go into the graph.
        device: Where the graph runs; None is the CPU.
        dtype: The dtype of the computation. Input and output are float32.
        exact: As in `max_conv.conv1d`.
        ragged: Whether signals differ in length: then the last input is `lengths`, (batch,) int64.

    Raises:
        ValueError: If the weights do not fit the config.
    """
    graph, w = begin(
        Ports("whisper", {"mels": ["batch", "frames", config.mels]}, ["vectors"]),
        config.shapes(),
        weights,
        device,
        dtype,
        exact=exact,
        ragged=ragged,
    )
    with graph:
        x = ops.cast(graph.inputs[0].tensor, dtype)
        x = gelu(w.conv(x, "conv1", padding=1))
        x = gelu(w.conv(x, "conv2", padding=1, stride=2))
        x = x + _positions(w, x.shape[1])
        for i in range(config.layers):
            x = _layer(config, w / "layers" / i, x)
        graph.output(ops.cast(w.layer_norm(x, "layer_norm"), DType.float32))
    return graph


def _positions(w: Weights, length: Dim) -> TensorValue:
    """Returns the embeddings of the first positions, (length, hidden)."""
    end = ops.squeeze(ops.shape_to_tensor([length]), 0)
    table = w["embed_positions.weight"]
    # All rows that exist, up to the length; both sizes are checked when the graph runs.
    rows = table[(slice(None, end), "positions"), :]
    return ops.rebind(
        rows,
        [length, table.shape[1]],
        "whisper: the spectrogram has more frames than there are positions; pass 30 s at most.",
    )


def _layer(config: Config, w: Weights, x: TensorValue) -> TensorValue:
    x = x + _attention(config, w / "self_attn", w.layer_norm(x, "self_attn_layer_norm"))
    y = gelu(w.linear(w.layer_norm(x, "final_layer_norm"), "fc1"))
    return x + w.linear(y, "fc2")


def _attention(config: Config, w: Weights, x: TensorValue) -> TensorValue:
    batch, length, _ = x.shape
    size = config.hidden // config.heads
    q, k, v = (
        ops.transpose(ops.reshape(w.linear(x, f"{name}_proj"), [batch, length, config.heads, size]), 1, 2)
        for name in "qkv"
    )
    # Scores times scale, in this order, is the pattern of the fused kernel.
    scores = (q @ ops.transpose(k, 2, 3)) * (1 / math.sqrt(size))
    y = ops.softmax(scores) @ v
    return w.linear(ops.reshape(ops.transpose(y, 1, 2), [batch, length, config.hidden]), "out_proj")


TASK = Task(kind="features", input="mels", output="vectors, (batch, (frames + 1) // 2, hidden)")
