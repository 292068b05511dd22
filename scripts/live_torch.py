"""The networks of bench.py --streaming in PyTorch, with layers that get the whole signal, or chunk after chunk.

Data is NCL. A network is written once: `Whole` computes it at once, `Cached` keeps the last inputs of every layer and puts
them before a chunk with `torch.cat`, `Moshi` does the same with Moshi's own layers.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from originals import from_wheel

MOSHI = "pypi://moshi==0.2.13/{}#sha256=beeb3ebc1d769a800e22b26bf4ec0d25f9525d54ae77979b37c86a2f782f4e64"


class Whole:
    """Layers of the whole signal, by the names of their weights."""

    def __init__(self, weights: Mapping[str, np.ndarray]) -> None:
        self.tensors = {name: torch.from_numpy(array) for name, array in weights.items()}
        for name, value in self.tensors.items():
            if value.ndim == 3:  # native filters are SCF, and SFC of transposed convolutions
                self.tensors[name] = value.permute(2, 1, 0).contiguous()
        self.memories: dict[str, Any] = {}

    def begin(self) -> None:
        """Begins a new signal."""

    def layer(self, name: str) -> tuple[Any, Any]:
        return self.tensors[f"{name}.weight"], self.tensors[f"{name}.bias"]

    def conv(self, x: Any, name: str, dilation: int = 1, causal: bool = True, mirror: bool = False) -> Any:
        w, b = self.layer(name)
        reach = dilation * (w.shape[2] - 1)
        if not causal:
            return functional.conv1d(x, w, b, padding=reach // 2, dilation=dilation)
        if reach:
            x = functional.pad(x, (reach, 0), "reflect" if mirror else "constant")
        return functional.conv1d(x, w, b, dilation=dilation)

    def conv_transpose(self, x: Any, name: str, stride: int, causal: bool = True) -> Any:
        w, b = self.layer(name)
        more = w.shape[2] - stride
        if not causal:
            return functional.conv_transpose1d(x, w, b, stride, more // 2)
        return functional.conv_transpose1d(x, w, b, stride)[:, :, : x.shape[2] * stride]

    def lstm(self, x: Any, name: str) -> Any:
        return self.memory(name)(x.transpose(1, 2))[0].transpose(1, 2)

    def memory(self, name: str) -> Any:
        """Returns a `torch.nn.LSTM`, which is made when it is first needed."""
        if name not in self.memories:
            own = {key.removeprefix(f"{name}."): t for key, t in self.tensors.items() if key.startswith(f"{name}.")}
            units, count = own["weight_hh_l0"].shape[1], len(own) // 4
            made = torch.nn.LSTM(own["weight_ih_l0"].shape[1], units, count, batch_first=True)
            made.load_state_dict(own)
            self.memories[name] = made.requires_grad_(False)
        return self.memories[name]


class Cached(Whole):
    """Layers that keep the values that the next chunk needs: `state`, by name."""

    def __init__(self, weights: Mapping[str, np.ndarray]) -> None:
        super().__init__(weights)
        self.state: dict[str, Any] = {}

    def begin(self) -> None:
        self.state = {}

    def conv(self, x: Any, name: str, dilation: int = 1, causal: bool = True, mirror: bool = False) -> Any:
        w, b = self.layer(name)
        reach = dilation * (w.shape[2] - 1)
        assert causal, "only a causal layer can go on with its last inputs"
        if reach:
            before = self.state.get(name)
            if before is None:
                before = mirrored(x, reach) if mirror else x.new_zeros((*x.shape[:2], reach))
            x = torch.cat([before, x], 2)
            self.state[name] = x[:, :, -reach:]
        return functional.conv1d(x, w, b, dilation=dilation)

    def conv_transpose(self, x: Any, name: str, stride: int, causal: bool = True) -> Any:
        """As Moshi does: the incomplete outputs are kept without the bias, and added to the next chunk's outputs."""
        w, b = self.layer(name)
        more = w.shape[2] - stride
        assert causal and more <= stride
        y = functional.conv_transpose1d(x, w, b, stride)
        if name in self.state:
            y = torch.cat([y[:, :, :more] + self.state[name], y[:, :, more:]], 2)
        self.state[name] = y[:, :, -more:] - b[:, None]
        return y[:, :, :-more]

    def lstm(self, x: Any, name: str) -> Any:
        held = (self.state[f"{name}.hidden"], self.state[f"{name}.cell"]) if f"{name}.cell" in self.state else None
        y, (self.state[f"{name}.hidden"], self.state[f"{name}.cell"]) = self.memory(name)(x.transpose(1, 2), held)
        return y.transpose(1, 2)


class Moshi(Cached):
    """Moshi's StreamingConv1d and StreamingConvTranspose1d; where EnCodec mirrors the begin, their state is set to that."""

    def __init__(self, weights: Mapping[str, np.ndarray]) -> None:
        super().__init__(weights)
        *_, self.source = from_wheel(MOSHI, "moshi", ["utils.compile", "modules.streaming", "modules.conv"])
        self.layers: dict[str, Any] = {}
        self.fresh: set[str] = set()

    @torch.inference_mode()
    def begin(self) -> None:
        super().begin()
        for layer in self.layers.values():
            layer.reset_streaming()
        self.fresh = set(self.layers)

    def conv(self, x: Any, name: str, dilation: int = 1, causal: bool = True, mirror: bool = False) -> Any:
        if name not in self.layers:
            w, _ = self.layer(name)
            made = self.source.StreamingConv1d(w.shape[1], w.shape[0], w.shape[2], dilation=dilation, causal=causal)
            self.add(name, made, made.conv.conv)
        layer = self.layers[name]
        if name in self.fresh:
            self.fresh.remove(name)
            if mirror and (previous := layer._streaming_state.previous).shape[2]:
                previous[:] = mirrored(x, previous.shape[2])
        return layer(x)

    def conv_transpose(self, x: Any, name: str, stride: int, causal: bool = True) -> Any:
        if name not in self.layers:
            w, _ = self.layer(name)
            made = self.source.StreamingConvTranspose1d(w.shape[0], w.shape[1], w.shape[2], stride, causal=causal)
            self.add(name, made, made.convtr.convtr)
        return self.layers[name](x)

    def add(self, name: str, made: Any, inner: Any) -> None:
        """Keeps a layer that has just been made; `inner` is PyTorch's layer in it."""
        w, b = self.layer(name)
        inner.load_state_dict({"weight": w, "bias": b})
        made.requires_grad_(False).streaming_forever(1)
        self.layers[name] = made
        self.fresh.add(name)


def mirrored(x: Any, count: int) -> Any:
    """Returns the values before a signal whose begin is mirrored."""
    return x[:, :, 1 : count + 1].flip(2)


# The networks.


def hifigan(layers: Whole, x: Any, config: Any) -> Any:
    """(N, mels, frames) to (N, samples)."""
    x = layers.conv(x, "conv_pre", causal=False)
    count = len(config.kernel_sizes)
    for i, rate in enumerate(config.rates):
        x = layers.conv_transpose(functional.leaky_relu(x, config.slope), f"ups.{i}", rate, causal=False)
        total = None
        for j, dilations in enumerate(config.dilations):
            y = x
            for k, dilation in enumerate(dilations):
                z, name = functional.leaky_relu(y, config.slope), f"resblocks.{i * count + j}"
                z = layers.conv(z, f"{name}.convs1.{k}", dilation, causal=False)
                y = y + layers.conv(functional.leaky_relu(z, config.slope), f"{name}.convs2.{k}", causal=False)
            total = y if total is None else total + y
        assert total is not None, "a stage has blocks"
        x = total / count
    return torch.tanh(layers.conv(functional.leaky_relu(x, 0.01), "conv_post", causal=False))[:, 0]


def encodec(layers: Whole, codes: Any, config: Any) -> Any:
    """(N, quantizers, frames) to (N, samples)."""
    books = [layers.tensors[f"quantizer.layers.{i}.codebook.embed"] for i in range(config.quantizers)]
    x = sum(functional.embedding(codes[:, i], book) for i, book in enumerate(books)).transpose(1, 2)  # type: ignore[union-attr]
    x = layers.conv(x, "decoder.layers.0.conv", mirror=True)
    x = functional.elu(x + layers.lstm(x, "decoder.layers.1.lstm"))
    for i, ratio in enumerate(config.ratios):
        x = layers.conv_transpose(x, f"decoder.layers.{3 * i + 3}.conv", ratio)
        name = f"decoder.layers.{3 * i + 4}"
        y = functional.elu(layers.conv(functional.elu(x), f"{name}.block.1.conv", mirror=True))
        x = functional.elu(layers.conv(y, f"{name}.block.3.conv") + layers.conv(x, f"{name}.shortcut.conv"))
    return layers.conv(x, f"decoder.layers.{3 * len(config.ratios) + 3}.conv", mirror=True)[:, 0]


def tcn(layers: Whole, x: Any, config: Any) -> Any:
    """(N, inputs, positions) to (N, channels, positions)."""
    total: Any = None
    last = len(config.channels) - 1
    for i in range(len(config.channels)):
        name = f"network.{i}"
        y, gate = layers.conv(x, f"{name}.conv1", 2**i).chunk(2, 1)
        y = torch.relu(layers.conv(y * torch.sigmoid(gate), f"{name}.conv2", 2**i))
        if f"{name}.downsample.weight" in layers.tensors:
            x = layers.conv(x, f"{name}.downsample")
        x = torch.relu(x + y)
        skip = x if i == last else y
        total = skip if total is None else total + skip
    return torch.relu(total)


NETWORKS: dict[str, Callable[[Whole, Any, Any], Any]] = {"HiFi-GAN V1": hifigan, "EnCodec decoder": encodec, "TCN": tcn}


class Step(torch.nn.Module):
    """A network as a module for torch.onnx: its input and states to its output and states."""

    def __init__(self, name: str, config: Any, layers: Whole, states: tuple[str, ...] = ()) -> None:
        super().__init__()
        self.network, self.config, self.live, self.states = NETWORKS[name], config, layers, states

    def forward(self, x: Any, *states: Any) -> Any:
        if isinstance(self.live, Cached):
            self.live.state = dict(zip(self.states, states, strict=True))
        y = self.network(self.live, x, self.config)
        return (y, *(self.live.state[name] for name in self.states)) if isinstance(self.live, Cached) else y
