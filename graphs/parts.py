"""What several networks are made of: their weights in a graph, activations, recurrent layers.

Data is NLC. Weights are native: filters SCF, those of transposed convolutions SFC, everything else as PyTorch has it.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from max.driver import Buffer
from max.dtype import DType
from max.graph import DeviceRef, TensorValue, Weight, ops

from max_conv import conv1d, conv_transpose1d
from max_conv.arrays import as_buffer
from max_conv.packing import derived
from max_conv.recurrent import lstm


class Weights:
    """A checkpoint's arrays as weights of the `PackedGraph` that is being built.

    `w["conv.weight"]` is a weight in the graph's dtype, `w / "encoder"` the weights whose names start with "encoder.".
    What the graph needs in another form, or in another dtype, is made of the checkpoint's arrays when it is compiled.

    Args:
        arrays: float32, by name. Only names and shapes go into the graph.
        device: Where the graph runs.
        dtype: What it computes in.
    """

    def __init__(self, arrays: Mapping[str, np.ndarray], device: DeviceRef, dtype: DType, prefix: str = "") -> None:
        self.arrays = arrays
        self.device = device
        self.dtype = dtype
        self.prefix = prefix

    def __truediv__(self, name: object) -> "Weights":
        return Weights(self.arrays, self.device, self.dtype, f"{self.prefix}{name}.")

    def __contains__(self, name: str) -> bool:
        return self.prefix + name in self.arrays

    def __getitem__(self, name: str) -> TensorValue:
        source = self._source(name)
        return source if source.dtype == self.dtype else self.make(name, lambda array: array, name)

    def shape(self, name: str) -> tuple[int, ...]:
        """Returns the shape of an array of the checkpoint."""
        return tuple(int(size) for size in self.arrays[self.prefix + name].shape)

    def make(self, name: str, function: Callable[..., np.ndarray], *sources: str) -> TensorValue:
        """Returns a weight that is made of others, once: `function` takes their arrays."""
        weights = tuple(self._source(source) for source in sources)
        # Broadcast zeros have the shapes, and no memory.
        shape = function(*(np.broadcast_to(np.float32(0), self.shape(source)) for source in sources)).shape

        def made(*buffers: Buffer) -> Buffer:
            return as_buffer(function(*(buffer.to_numpy() for buffer in buffers)), self.dtype)

        weight = Weight(f"{self.prefix}{name}.{self.dtype.name}", self.dtype, shape, self.device)
        result = derived(weight, weights, made)
        assert result is not None, "a network is built in a PackedGraph"
        return result

    def _source(self, name: str) -> Weight:
        return Weight(self.prefix + name, DType.float32, self.shape(name), self.device)

    def conv(self, x: TensorValue, name: str, **options: Any) -> TensorValue:
        """Convolves with the filter `name.weight` and the bias `name.bias`, if there is one; options are `conv1d`'s."""
        return conv1d(x, self[f"{name}.weight"], self._bias(name), **options)

    def conv_transpose(self, x: TensorValue, name: str, **options: Any) -> TensorValue:
        """The same with `conv_transpose1d`."""
        return conv_transpose1d(x, self[f"{name}.weight"], self._bias(name), **options)

    def linear(self, x: TensorValue, name: str) -> TensorValue:
        """Multiplies the channels with the matrix `name.weight`, (F, C), as a convolution of one tap."""
        matrix = f"{name}.weight"
        filter = self.make(matrix, lambda array: np.ascontiguousarray(array.T[None]), matrix)
        return conv1d(x, filter, self._bias(name))

    def layer_norm(self, x: TensorValue, name: str, epsilon: float = 1e-5) -> TensorValue:
        """Normalises the channels."""
        return ops.layer_norm(x, self[f"{name}.weight"], self[f"{name}.bias"], epsilon)

    def lstm(self, x: TensorValue, layer: int = 0) -> TensorValue:
        """Runs layer `layer` of a `torch.nn.LSTM` over the whole sequence, from a memory of zeros."""
        matrices = [
            self.make(f"{name}_l{layer}", lambda array: np.ascontiguousarray(array.T), f"{name}_l{layer}")
            for name in ("weight_ih", "weight_hh")
        ]
        biases = [f"{name}_l{layer}" for name in ("bias_ih", "bias_hh")]
        bias = self.make(f"bias_l{layer}", np.add, *biases)
        units = self.shape(biases[0])[0] // 4
        nothing = ops.broadcast_to(ops.constant(0, x.dtype, device=x.device), [x.shape[0], units])
        return lstm(x, *matrices, bias, nothing, nothing)[0]

    def _bias(self, name: str) -> TensorValue | None:
        bias = f"{name}.bias"
        if bias not in self:
            return None
        return self[bias]


def check_weights(model: str, arrays: Mapping[str, np.ndarray], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raises a ValueError where arrays lack a weight, hold an unknown one, or have another shape."""
    for names, fault in (
        (shapes.keys() - arrays.keys(), "lack"),
        (arrays.keys() - shapes.keys(), "hold the unknown"),
    ):
        if names:
            few = sorted(names)[:3]
            more = f" and {len(names) - len(few)} more" if len(names) > len(few) else ""
            raise ValueError(f"{model}: the weights {fault} {', '.join(few)}{more}; pass those that fit the config.")
    for name, shape in shapes.items():
        if tuple(arrays[name].shape) != shape:
            raise ValueError(f"{model}: the weight {name} must have shape {shape}, but has {arrays[name].shape}.")


def leaky_relu(x: TensorValue, slope: float) -> TensorValue:
    """`max(x, slope * x)`, for slopes below 1."""
    return ops.max(x, x * slope)


def elu(x: TensorValue) -> TensorValue:
    """`x` where it is positive, elsewhere `exp(x) - 1`."""
    return ops.max(x, 0.0) + (ops.exp(ops.min(x, 0.0)) - 1.0)


# sin(r) / r as a polynomial of r * r on [-pi/2, pi/2]: Chebyshev's, rounded to float32; largest error 6e-9.
_SINE = (1.0, -1 / 6, 1 / 120, -1 / 5040, 1 / 362880, -1 / 39916800)


def _reduced(x: TensorValue) -> tuple[TensorValue, TensorValue]:
    """Returns how many half turns are nearest to `x`, and the sine of the rest, in float32."""
    x = ops.cast(x, DType.float32)
    turns = ops.round(x * (1 / math.pi))
    # Pi in two parts: the first has few bits, so that its product is exact.
    rest = (x - turns * 3.140625) - turns * (math.pi - 3.140625)
    square = rest * rest
    series = square * _SINE[-1] + _SINE[-2]
    for factor in _SINE[-3::-1]:
        series = series * square + factor
    return turns, series * rest


def sine(x: TensorValue) -> TensorValue:
    """`sin(x)`, six times as fast as MAX's on a CPU; off by at most 2e-7 for |x| < 100."""
    turns, result = _reduced(x)
    odd = turns - ops.floor(turns * 0.5) * 2.0
    return ops.cast(result - 2.0 * odd * result, x.dtype)


def snake(x: TensorValue, alpha: TensorValue) -> TensorValue:
    """`x + sin(alpha * x) ** 2 / alpha`; the sine's square needs no sign.

    Args:
        x: (N, L, C).
        alpha: (C,).

    Source: Ziyin and others, Neural Networks Fail to Learn Periodic Functions, 2020, https://arxiv.org/abs/2006.08195
    """
    _, wave = _reduced(alpha * x)
    return x + ops.cast(wave * wave, x.dtype) / (alpha + 1e-9)
