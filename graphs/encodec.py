"""EnCodec, a codec: from sound to a few codes per frame, and back.

The encoder shortens the output of a convolution several times, each time after a residual block, and ends in an LSTM; the
decoder mirrors it. Between them a vector is replaced by the nearest entry of a codebook, the remainder by the nearest entry of
the next codebook, and so on. The defaults of `Config` are the 24 kHz model; MusicGen's 32 kHz model differs only in sizes. The
48 kHz model, with group norms, is not supported.
Source: Défossez and others, High Fidelity Neural Audio Compression, 2022, https://arxiv.org/abs/2210.13438,
https://github.com/facebookresearch/encodec.
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
from max_conv.conv import signals
from max_conv.serving import Task
from max_conv.weights import LayerMap

from .parts import Ports, Weights, begin, elu, load

# In transformers' names only the layers' numbers show which are transposed. The original's names become transformers'.
LAYERS = LayerMap(
    conv=(
        "encoder.layers.*conv.weight",
        "decoder.layers.*.block.*.conv.weight",
        "decoder.layers.*.shortcut.conv.weight",
        "decoder.layers.0.conv.weight",
        "decoder.layers.15.conv.weight",
    ),
    conv_transpose=("decoder.layers.[369].conv.weight", "decoder.layers.12.conv.weight"),
    copy=("*.bias", "*.lstm.*", "quantizer.layers.*.codebook.embed"),
    ignore=("*.cluster_size", "*.embed_avg", "*.inited"),
    optional=("decoder.layers.*.shortcut.conv.weight",),
    rename=(
        (r"^(encoder|decoder)\.model\.", r"\1.layers."),
        (r"\.(?:conv\.conv|convtr\.convtr)\.", ".conv."),
        (r"^quantizer\.vq\.layers\.(\d+)\._codebook\.", r"quantizer.layers.\1.codebook."),
    ),
)

# The supported values of transformers' configuration.
_FIXED = {
    "audio_channels": 1,
    "norm_type": "weight_norm",
    "normalize": False,
    "num_residual_layers": 1,
    "pad_mode": "reflect",
    "trim_right_ratio": 1.0,
}


@dataclass(frozen=True)
class Config:
    """The network's sizes; the defaults are the published 24 kHz model, encoding to 6 kbit/s."""

    channels: int = 32
    """Filters of the first layer; each stage doubles them."""
    ratios: tuple[int, ...] = (8, 5, 4, 2)
    """Strides of the decoder's four stages."""
    hidden: int = 128
    """Channels of a frame."""
    kernel_size: int = 7
    last_kernel_size: int = 7
    residual_kernel_size: int = 3
    compress: int = 2
    lstm_layers: int = 2
    shortcut: bool = True
    """Whether the shortcut around a residual block has a convolution."""
    causal: bool = True
    codebooks: int = 32
    """Codebooks of the checkpoint."""
    codebook_size: int = 1024
    quantizers: int = 8
    """Codebooks in use: at 24 kHz 2, 4, 8, 16 or 32 for 1.5, 3, 6, 12 or 24 kbit/s."""
    rate: int = 24000
    """Samples per second."""

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "Config":
        """Reads transformers' config.json.

        Raises:
            ValueError: If it describes a network that is not built here.
        """
        get = config.get
        for name, value in _FIXED.items():
            if get(name, value) != value:
                raise ValueError(f"encodec: {name} must be {value!r}, but is {config[name]!r}; use another model.")
        ratios = tuple(get("upsampling_ratios", cls.ratios))
        if len(ratios) != 4:
            raise ValueError(f"encodec: there must be 4 upsampling_ratios, but there are {len(ratios)}: {ratios}.")
        size, rate = get("codebook_size", 1024), get("sampling_rate", 24000)
        bits = math.ceil(rate / math.prod(ratios)) * math.ceil(math.log2(size))
        codebooks = int(1000 * get("target_bandwidths", (24.0,))[-1] // bits)
        return cls(
            channels=get("num_filters", 32),
            ratios=ratios,
            hidden=get("hidden_size", 128),
            kernel_size=get("kernel_size", 7),
            last_kernel_size=get("last_kernel_size", 7),
            residual_kernel_size=get("residual_kernel_size", 3),
            compress=get("compress", 2),
            lstm_layers=get("num_lstm_layers", 2),
            shortcut=get("use_conv_shortcut", True),
            causal=get("use_causal_conv", True),
            codebooks=codebooks,
            codebook_size=size,
            quantizers=min(8, codebooks),
            rate=rate,
        )

    @property
    def hop(self) -> int:
        """Samples per frame."""
        return math.prod(self.ratios)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Returns the native weights' shapes."""
        shapes: dict[str, tuple[int, ...]] = {}

        def layer(name: str, bias: int, *filter: int) -> None:
            shapes[f"{name}.conv.weight"], shapes[f"{name}.conv.bias"] = filter, (bias,)

        def block(name: str, channels: int) -> None:
            inner = channels // self.compress
            layer(f"{name}.block.1", inner, self.residual_kernel_size, channels, inner)
            layer(f"{name}.block.3", channels, 1, inner, channels)
            if self.shortcut:
                layer(f"{name}.shortcut", channels, 1, channels, channels)

        def memory(name: str, units: int) -> None:
            for i in range(self.lstm_layers):
                for side in ("ih", "hh"):
                    shapes[f"{name}.lstm.weight_{side}_l{i}"] = (4 * units, units)
                    shapes[f"{name}.lstm.bias_{side}_l{i}"] = (4 * units,)

        stages, widest = len(self.ratios), self.channels << len(self.ratios)
        layer("encoder.layers.0", self.channels, self.kernel_size, 1, self.channels)
        layer("decoder.layers.0", widest, self.kernel_size, self.hidden, widest)
        for i, ratio in enumerate(self.ratios):
            encoder, decoder = 3 * (stages - i), 3 * i + 3
            wide = widest >> i
            block(f"encoder.layers.{encoder - 2}", wide // 2)
            layer(f"encoder.layers.{encoder}", wide, 2 * ratio, wide // 2, wide)
            layer(f"decoder.layers.{decoder}", wide // 2, 2 * ratio, wide // 2, wide)
            block(f"decoder.layers.{decoder + 1}", wide // 2)
        memory(f"encoder.layers.{3 * stages + 1}", widest)
        memory("decoder.layers.1", widest)
        layer(f"encoder.layers.{3 * stages + 3}", self.hidden, self.last_kernel_size, widest, self.hidden)
        layer(f"decoder.layers.{3 * stages + 3}", 1, self.last_kernel_size, self.channels, 1)
        for i in range(self.codebooks):
            shapes[f"quantizer.layers.{i}.codebook.embed"] = (self.codebook_size, self.hidden)
        return shapes


def load_weights(reference: str | Path, config: Config = Config()) -> dict[str, np.ndarray]:
    """Reads a checkpoint, of transformers or of the original, into native weights."""
    return load(reference, LAYERS, "encodec", config.shapes())


def build(
    config: Config,
    weights: Mapping[str, np.ndarray],
    device: DeviceRef | None = None,
    dtype: DType = DType.float32,
    *,
    exact: bool = False,
    ragged: bool = False,
) -> PackedGraph:
    """Builds the whole codec: sound (batch, samples) to decoded sound (batch, samples).

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
    graph, w = _begin("encodec", config, weights, device, dtype, exact, ragged)
    with graph:
        sound = graph.inputs[0].tensor
        codes = _quantize(config, w, _encode(config, w, sound))
        # The last frame may reach past the end.
        graph.output(signals().as_long_as(_decode(config, w, _entries(w, codes)), sound))
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

    Arguments and errors are as for `build`. There are `frames = ceil(samples / hop)`, and there must be at least 7: the last layer
    mirrors six.

    Outputs:
        codes: (batch, quantizers, frames), int64.
        embeddings: (batch, frames, hidden), float32: the sum of the codes' entries.
    """
    graph, w = _begin("encodec_encoder", config, weights, device, dtype, exact, ragged)
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
    """Builds the decoder: codes (batch, quantizers, frames), int64, to sound (batch, frames * hop).

    Arguments and errors are as for `build`. There must be at least 7 frames.
    """
    graph, w = _begin("encodec_decoder", config, weights, device, dtype, exact, ragged)
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
        raise ValueError(f"encodec: quantizers must be 1 to {config.codebooks}, but are {config.quantizers}.")
    sound: dict[str, list[str | int]] = {"sound": ["batch", "samples"]}
    codes: dict[str, list[str | int]] = {"codes": ["batch", config.quantizers, "frames"]}
    inputs, given = (codes, DType.int64) if name == "encodec_decoder" else (sound, DType.float32)
    outputs = ["codes", "embeddings"] if name == "encodec_encoder" else ["sound"]
    return begin(
        Ports(name, inputs, outputs, given), config.shapes(), weights, device, dtype, exact=exact, ragged=ragged
    )


def _padding(config: Config, taps: int, stride: int = 1) -> tuple[int, int]:
    """Returns a layer's padding, left and right: the inputs that an output reads beyond its own stride."""
    right = 0 if config.causal else (taps - stride) // 2
    return taps - stride - right, right


def _conv(config: Config, w: Weights, x: TensorValue, name: str, stride: int = 1) -> TensorValue:
    left, right = _padding(config, w.shape(f"{name}.weight")[0], stride)
    # The original's padding fills the last frame. More padding changes no output, so stride - 1 is always enough.
    return w.conv(x, name, stride=stride, padding=(left, right + stride - 1), padding_mode="reflect")


def _conv_transpose(config: Config, w: Weights, x: TensorValue, name: str, stride: int) -> TensorValue:
    left, right = _padding(config, w.shape(f"{name}.weight")[0], stride)
    return w.conv_transpose(x, name, stride=stride, padding="causal" if config.causal else (left, right))


def _encode(config: Config, w: Weights, sound: TensorValue) -> TensorValue:
    """Returns one vector per frame, (batch, frames, hidden)."""
    layers = w / "encoder" / "layers"
    sound = ops.unsqueeze(ops.cast(sound, w.dtype), 2)
    x = _conv(config, layers, sound, "0.conv")
    for i, ratio in enumerate(reversed(config.ratios)):
        around = _around_first(config, layers, sound) if i == 0 and config.shortcut else None
        x = _residual(config, layers / (3 * i + 1), x, around)
        x = _conv(config, layers, x, f"{3 * i + 3}.conv", stride=ratio)
    last = 3 * len(config.ratios)
    return _conv(config, layers, _remember(config, layers / (last + 1) / "lstm", x), f"{last + 3}.conv")


def _decode(config: Config, w: Weights, x: TensorValue) -> TensorValue:
    """Returns sound (batch, frames * hop), float32."""
    layers = w / "decoder" / "layers"
    x = _remember(config, layers / 1 / "lstm", _conv(config, layers, x, "0.conv"))
    for i, ratio in enumerate(config.ratios):
        x = _conv_transpose(config, layers, x, f"{3 * i + 3}.conv", ratio)
        x = _residual(config, layers / (3 * i + 4), x)
    x = _conv(config, layers, x, f"{3 * len(config.ratios) + 3}.conv")
    return ops.cast(ops.squeeze(x, 2), DType.float32)


def _residual(config: Config, w: Weights, x: TensorValue, around: TensorValue | None = None) -> TensorValue:
    """Returns the next layer's input: the ELU of a residual block's sum."""
    y = elu(_conv(config, w, elu(x), "block.1.conv"))
    if around is None:
        around = w.conv(x, "shortcut.conv") if config.shortcut else x
    return elu(w.conv(y, "block.3.conv") + around)


def _around_first(config: Config, w: Weights, sound: TensorValue) -> TensorValue:
    """Returns the first block's shortcut as one convolution of the sound, of seven taps.

    Then the first layer's output, the network's largest, is needed only after its ELU, which MAX fuses into that layer.
    """
    first, second = "0.conv", "1.shortcut.conv"
    filter = w.make("0.around.weight", lambda a, b: a @ b[0], f"{first}.weight", f"{second}.weight")
    biases = (f"{first}.bias", f"{second}.weight", f"{second}.bias")
    bias = w.make("0.around.bias", lambda a, b, c: a @ b[0] + c, *biases)
    padding = _padding(config, w.shape(f"{first}.weight")[0])
    return conv1d(sound, filter, bias, padding=padding, padding_mode="reflect")


def _remember(config: Config, w: Weights, x: TensorValue) -> TensorValue:
    """Returns the ELU of the sum of a sequence and the LSTM's output for it."""
    y = x
    for layer in range(config.lstm_layers):
        y = w.lstm(y, layer)
    return elu(x + y)


def _codebook(w: Weights, i: int) -> Weights:
    return w / "quantizer" / "layers" / i / "codebook"


def _quantize(config: Config, w: Weights, x: TensorValue) -> list[TensorValue]:
    """Returns each quantizer's codes, (batch, frames)."""
    codes: list[TensorValue] = []
    for i in range(config.quantizers):
        book = _codebook(w, i)
        if codes:
            x = x - ops.gather(_codebook(w, i - 1)["embed"], codes[-1], axis=0)
        # |x - e|^2 is least where x . e - |e|^2 / 2 is greatest.
        entries = book.make("across", lambda array: np.ascontiguousarray(array.T[None]), "embed")
        halves = book.make("halves", lambda array: -0.5 * (array * array).sum(1), "embed")
        codes.append(ops.squeeze(ops.argmax(conv1d(x, entries, halves), axis=-1), 2))
    return codes


def _entries(w: Weights, codes: Sequence[TensorValue]) -> TensorValue:
    """Returns the sum of the codes' entries, (batch, frames, hidden)."""
    total = None
    for i, code in enumerate(codes):
        entry = ops.gather(_codebook(w, i)["embed"], code, axis=0)
        total = entry if total is None else total + entry
    assert total is not None, "there is a quantizer"
    return total


TASK = Task(kind="codec", input="sound", output="the sound after coding, (batch, samples), -1 to 1")
