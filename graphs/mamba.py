"""Mamba's block up to its selective scan: norm, projection, and the short causal convolution with SiLU.

A block turns every vector into a value and a gate; the values go through a causal depthwise convolution of four taps. Value
and gate are the inputs of the scan; the scan itself is left out.
Source: Gu and Dao, Mamba, 2023, https://arxiv.org/abs/2312.00752; names and checkpoints:
https://github.com/huggingface/transformers.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from max.dtype import DType
from max.graph import DeviceRef, TensorValue, ops

from max_conv import PackedGraph, conv1d
from max_conv.serving import Task
from max_conv.weights import LayerMap

from .parts import Ports, Weights, begin, load, silu

LAYERS = LayerMap(
    conv=("layers.*.mixer.conv1d.weight",),
    copy=("layers.*.norm.weight", "layers.*.mixer.in_proj.*", "layers.*.mixer.conv1d.bias"),
    optional=("layers.*.mixer.conv1d.bias",),
    ignore=(
        "layers.*.mixer.A_log",
        "layers.*.mixer.D",
        "layers.*.mixer.x_proj.*",
        "layers.*.mixer.dt_proj.*",
        "layers.*.mixer.out_proj.*",
        "embeddings.*",
        "embedding.*",
        "norm_f.*",
        "lm_head.*",
    ),
    rename=((r"^backbone\.", ""),),
)


@dataclass(frozen=True)
class Config:
    """The network's sizes; the defaults are state-spaces/mamba-130m-hf."""

    hidden: int = 768
    intermediate: int = 1536
    taps: int = 4
    conv_bias: bool = True
    bias: bool = False
    """Whether the projection has a bias."""
    layers: int = 24
    epsilon: float = 1e-5
    layer: int = 0
    """The layer whose block is built."""

    def __post_init__(self) -> None:
        if self.layer not in range(self.layers):
            raise ValueError(f"mamba: layer must be one of {self.layers}, counted from 0, but is {self.layer}.")

    @classmethod
    def from_dict(cls, config: Mapping[str, Any], layer: int = 0) -> "Config":
        """Reads the config.json of transformers' MambaModel.

        Raises:
            ValueError: If the model is one that this file does not know, or has no such layer.
        """
        get = config.get
        if (activation := get("hidden_act", "silu")) != "silu":
            raise ValueError(f"mamba: hidden_act must be silu, but the config has {activation!r}.")
        hidden = config["hidden_size"]
        return cls(
            hidden=hidden,
            intermediate=get("intermediate_size", int(get("expand", 2) * hidden)),
            taps=get("conv_kernel", 4),
            conv_bias=get("use_conv_bias", True),
            bias=get("use_bias", False),
            layers=get("num_hidden_layers", 32),
            epsilon=get("layer_norm_epsilon", 1e-5),
            layer=layer,
        )

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Returns the native weights' shapes, of all layers."""
        shapes: dict[str, tuple[int, ...]] = {}
        for i in range(self.layers):
            mixer = f"layers.{i}.mixer"
            shapes[f"layers.{i}.norm.weight"] = (self.hidden,)
            shapes[f"{mixer}.in_proj.weight"] = (2 * self.intermediate, self.hidden)
            if self.bias:
                shapes[f"{mixer}.in_proj.bias"] = (2 * self.intermediate,)
            shapes[f"{mixer}.conv1d.weight"] = (self.taps, 1, self.intermediate)
            if self.conv_bias:
                shapes[f"{mixer}.conv1d.bias"] = (self.intermediate,)
        return shapes


def load_weights(reference: str | Path, config: Config = Config()) -> dict[str, np.ndarray]:
    """Reads a checkpoint of transformers, with or without its head, into native weights."""
    return load(reference, LAYERS, "mamba", config.shapes())


def build(
    config: Config,
    weights: Mapping[str, np.ndarray],
    device: DeviceRef | None = None,
    dtype: DType = DType.float32,
    *,
    exact: bool = False,
    ragged: bool = False,
) -> PackedGraph:
    """Builds the graph of one layer: hidden states (batch, length, hidden) to the inputs of its scan.

    Outputs, in order, both (batch, length, intermediate):
        value: `silu(conv1d(...))`.
        gate: The factor of the scan's result, before its SiLU.

    Args:
        config: The sizes, and the layer.
        weights: The result of `load_weights`; only its names and shapes go into the graph.
        device: Where the graph runs; None is the CPU.
        dtype: The dtype of the computation. Input and outputs are float32.
        exact: As in `max_conv.conv1d`.
        ragged: Whether signals differ in length: then the last input is `lengths`, (batch,) int64.

    Raises:
        ValueError: If the weights do not fit the config.
    """
    graph, w = begin(
        Ports("mamba", {"hidden": ["batch", "length", config.hidden]}, ["value", "gate"]),
        config.shapes(),
        weights,
        device,
        dtype,
        exact=exact,
        ragged=ragged,
    )
    w = w / "layers" / config.layer
    with graph:
        x = graph.inputs[0].tensor
        # The norm's weight is multiplied into the matrix, and its scale of each vector into the product, at no cost.
        scale = ops.cast(ops.rsqrt(ops.mean(x * x, 2) + config.epsilon), dtype)
        x = ops.cast(x, dtype)
        value, gate = (
            _projected(config, w, x, scale, half)
            for half in (slice(config.intermediate), slice(config.intermediate, None))
        )
        value = w.conv(value, "mixer.conv1d", padding="causal", groups=config.intermediate)
        graph.output(*(ops.cast(y, DType.float32) for y in (silu(value), gate)))
    return graph


def _projected(config: Config, w: Weights, x: TensorValue, scale: TensorValue, half: slice) -> TensorValue:
    """Returns half of the projection. The halves are separate, because the convolution reads whole rows."""

    def matrix(norm: np.ndarray, weight: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray((weight[half] * norm).T[None])

    name = "value" if half.start is None else "gate"
    filter = w.make(f"mixer.in_proj.{name}", matrix, "norm.weight", "mixer.in_proj.weight")
    y = conv1d(x, filter) * scale
    if config.bias:
        y = y + w.make(f"mixer.in_proj.{name}_bias", lambda bias: bias[half], "mixer.in_proj.bias")
    return y


def project(model: Callable[..., Any], x: np.ndarray, config: Config = Config()) -> np.ndarray:
    """Returns value and gate of every position in one array, (batch, length, 2 * intermediate)."""
    return np.concatenate(model(x), axis=2)


TASK = Task(kind="features", input="hidden", output="values and gates, (batch, length, 2 * intermediate)", run=project)
