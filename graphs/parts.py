"""Parts that several networks share: weights in a graph, activations, recurrent layers.

Data is NLC. Weights are native: filters SCF, filters of transposed convolutions SFC, everything else as in PyTorch.

A network is a module with `LAYERS`, a `Config` with `shapes()`, `load_weights`, `build` and `TASK`. `build` uses `Weights`:
`w.conv(x, "conv_pre", padding=3)` finds the filter and the bias by that name. Names are the published checkpoint's, after
`LAYERS` has renamed and folded. The graph is a `PackedGraph`, so weights that are derived from others (cast, folded,
transposed, packed) are made once, by `max_conv.compile` or `max_conv.registry`.

Norms and activations are arithmetic, which MAX fuses into the store of the convolution before it. So an activation that
several layers read is computed once, and a batch norm or a layer scale goes into the weights of a neighbouring layer.
MAX's sine needs 16 ms for 4 million values on two cores, PyTorch's 2.7 ms; `sine` and `snake` are polynomials after a range
reduction, and fuse. MAX's `tanh`, `exp`, GELU and ELU are as fast as PyTorch's or faster.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from max.driver import Buffer
from max.dtype import DType
from max.graph import DeviceRef, TensorType, TensorValue, Weight, ops

from max_conv import PackedGraph, conv1d, conv_transpose1d
from max_conv.conv import as_buffer, derived, lstm, signals
from max_conv.streaming import RaggedGraph
from max_conv.weights import LayerMap, read_native


class Weights:
    """A checkpoint's arrays as weights of the `PackedGraph` that is being built.

    `w["conv.weight"]` is a weight in the graph's dtype, `w / "encoder"` the weights whose names start with "encoder.".
    A weight that the graph needs in another form or dtype is made from the checkpoint's arrays when it is compiled.

    Args:
        arrays: float32, by name. Only names and shapes go into the graph.
        device: Where the graph runs.
        dtype: The dtype of the computation.
    """

    def __init__(self, arrays: Mapping[str, np.ndarray], device: DeviceRef, dtype: DType, prefix: str = "") -> None:
        self.arrays = arrays
        self.device = device
        self.dtype = dtype
        self.prefix = prefix
        self._sources: dict[str, Weight] = {}

    def __truediv__(self, name: object) -> "Weights":
        inner = Weights(self.arrays, self.device, self.dtype, f"{self.prefix}{name}.")
        inner._sources = self._sources
        return inner

    def __contains__(self, name: str) -> bool:
        return self.prefix + name in self.arrays

    def __getitem__(self, name: str) -> TensorValue:
        source = self._source(name)
        return source if source.dtype == self.dtype else self.make(name, lambda array: array, name)

    def shape(self, name: str) -> tuple[int, ...]:
        """Returns the shape of an array of the checkpoint."""
        return tuple(int(size) for size in self.arrays[self.prefix + name].shape)

    def make(self, name: str, function: Callable[..., np.ndarray], *sources: str) -> TensorValue:
        """Returns a weight that is made from others, once, by calling `function` with their arrays."""
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
        # A graph accepts one weight per name, which may be used several times.
        weight = Weight(self.prefix + name, DType.float32, self.shape(name), self.device)
        return self._sources.setdefault(weight.name, weight)

    def conv(self, x: TensorValue, name: str, *, after: TensorValue | None = None, **options: Any) -> TensorValue:
        """Convolves with the filter `name.weight` and the bias `name.bias`, if there is one; options are `conv1d`'s.

        `after`, (N, L, F), is computed first: branches run one after another, so that not all of their buffers are live.
        """
        bias = self._bias(name)
        if after is not None and bias is not None:
            bias = signals().run_after(bias, after)
        return conv1d(x, self[f"{name}.weight"], bias, **options)

    def conv_transpose(self, x: TensorValue, name: str, **options: Any) -> TensorValue:
        """Convolves with `conv_transpose1d`, otherwise like `conv`."""
        return conv_transpose1d(x, self[f"{name}.weight"], self._bias(name), **options)

    def linear(self, x: TensorValue, name: str) -> TensorValue:
        """Multiplies the channels with the matrix `name.weight`, (F, C), as a convolution of one tap."""
        matrix = f"{name}.weight"
        filter = self.make(matrix, lambda array: np.ascontiguousarray(array.T[None]), matrix)
        return conv1d(x, filter, self._bias(name))

    def transposed(self, name: str) -> TensorValue:
        """Returns the transpose of a matrix."""
        return self.make(name, lambda array: np.ascontiguousarray(array.T), name)

    def layer_norm(self, x: TensorValue, name: str, epsilon: float = 1e-5) -> TensorValue:
        """Normalises the channels."""
        return ops.layer_norm(x, self[f"{name}.weight"], self[f"{name}.bias"], epsilon)

    def lstm(self, x: TensorValue, layer: int = 0) -> TensorValue:
        """Runs layer `layer` of a `torch.nn.LSTM` over the whole sequence, from a memory of zeros."""
        return self.lstm_from(x, suffix=f"_l{layer}")[0]

    def lstm_from(
        self, x: TensorValue, hidden: TensorValue | None = None, cell: TensorValue | None = None, suffix: str = ""
    ) -> tuple[TensorValue, TensorValue, TensorValue]:
        """Runs an LSTM from a given memory; returns its outputs and its memory after the last step."""
        w_ih, w_hh = (self.transposed(f"{name}{suffix}") for name in ("weight_ih", "weight_hh"))
        bias = self.make(f"bias{suffix}", np.add, f"bias_ih{suffix}", f"bias_hh{suffix}")
        return lstm(x, w_ih, w_hh, bias, hidden, cell)

    def snake(self, x: TensorValue, name: str) -> TensorValue:
        """Applies `x + sin(alpha * x) ** 2 / alpha` with `name.alpha`, one value per channel."""
        alpha = f"{name}.alpha"
        rate = self.make(f"{name}.rate", lambda array: array.ravel() / np.float64(math.pi), alpha)
        gain = self.make(f"{name}.gain", lambda array: 1 / (array.ravel() + np.float32(1e-9)), alpha)
        return snake(x, rate, gain)

    def _bias(self, name: str) -> TensorValue | None:
        bias = f"{name}.bias"
        if bias not in self:
            return None
        return self[bias]


def load(
    reference: str | Path, layers: LayerMap, model: str, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, np.ndarray]:
    """Reads a model's checkpoint into native weights of these shapes."""
    weights = read_native(reference, layers, model)
    check_weights(model, weights, shapes)
    return weights


@dataclass(frozen=True)
class Ports:
    """The name of a network, which begins error messages, and of its inputs and outputs.

    Attributes:
        inputs: The shapes of its inputs, by name.
        outputs: The names of its outputs.
        given: The dtype of the inputs.
    """

    name: str
    inputs: Mapping[str, Sequence[str | int]]
    outputs: Sequence[str]
    given: DType = DType.float32


def begin(
    ports: Ports,
    shapes: Mapping[str, tuple[int, ...]],
    arrays: Mapping[str, np.ndarray],
    device: DeviceRef | None,
    dtype: DType,
    *,
    exact: bool = False,
    ragged: bool = False,
) -> tuple[PackedGraph, Weights]:
    """Returns a network's graph, still empty, and the weights in it.

    Args:
        ports: Its inputs and outputs.
        shapes: The shapes of the weights.
        arrays, device, dtype: As for `build`.
        exact, ragged: As for `build`.

    Raises:
        ValueError: If the arrays do not fit the shapes.
    """
    check_weights(ports.name, arrays, shapes)
    device = device or DeviceRef.CPU()
    types = [TensorType(ports.given, shape, device) for shape in ports.inputs.values()]
    graph = (RaggedGraph if ragged else PackedGraph)(ports.name, input_types=types, exact=exact)
    graph.input_names, graph.output_names = tuple(ports.inputs), tuple(ports.outputs)
    return graph, Weights(arrays, device, dtype)


def check_weights(model: str, arrays: Mapping[str, np.ndarray], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raises a ValueError if arrays lack a weight, hold an unknown one, or have another shape."""
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


def in_float32(function: Callable[..., TensorValue]) -> Callable[..., TensorValue]:
    """Has a function of tensors compute in float32 and round once, if its first tensor has 16 bits.

    Processors compute in 32 bits anyway: otherwise each operation would convert its values there and back.
    """

    @functools.wraps(function)
    def computed(x: TensorValue, *others: Any) -> TensorValue:
        if x.dtype.size_in_bytes > 2:
            return function(x, *others)
        wide = (ops.cast(value, DType.float32) if isinstance(value, TensorValue) else value for value in (x, *others))
        return ops.cast(function(*wide), x.dtype)

    return computed


gelu, silu, tanh = map(in_float32, (ops.gelu, ops.silu, ops.tanh))


@in_float32
def leaky_relu(x: TensorValue, slope: float) -> TensorValue:
    """`max(x, slope * x)`, for slopes below 1."""
    return ops.max(x, x * slope)


@in_float32
def inverse_leaky_relu(x: TensorValue, slope: float) -> TensorValue:
    """The value that `leaky_relu` maps to `x`, up to rounding."""
    return ops.min(x, x * (1 / slope))


@in_float32
def elu(x: TensorValue) -> TensorValue:
    """`x` if it is positive, otherwise `exp(x) - 1`."""
    return ops.max(x, 0.0) + (ops.exp(ops.min(x, 0.0)) - 1.0)


# sin(r) / r as a polynomial of r * r on [-pi/2, pi/2]: Taylor's, off by at most 6e-8.
_SINE = (1.0, -1 / 6, 1 / 120, -1 / 5040, 1 / 362880, -1 / 39916800)


def sine(x: TensorValue) -> TensorValue:
    """`sin(x)`, six times as fast as MAX's on a CPU; off by at most 2e-7 for |x| < 100."""
    wide = ops.cast(x, DType.float32)
    turns = ops.round(wide * (1 / math.pi))
    # Pi in two parts: the first has few bits, so that its product is exact.
    rest = (wide - turns * 3.140625) - turns * (math.pi - 3.140625)
    result = _series(_SINE, rest * rest) * rest
    odd = turns - ops.floor(turns * 0.5) * 2.0
    return ops.cast(result - 2.0 * odd * result, x.dtype)


# sin(pi * r) ** 2 / r ** 2 as a polynomial of r * r on [-1/2, 1/2], by least maximum; off by at most 2e-7 in float32.
_WAVE = (9.8696032, -32.4695816, 42.7253838, -30.0859528, 12.9907303, -3.2729459)


@in_float32
def snake(x: TensorValue, rate: TensorValue, gain: TensorValue) -> TensorValue:
    """`x + gain * sin(pi * rate * x) ** 2`: the square repeats every half turn.

    Args:
        x: (N, L, C).
        rate, gain: (C,). `Weights.snake` makes them from a checkpoint's `alpha`.

    Source: Ziyin and others, Neural Networks Fail to Learn Periodic Functions, 2020, https://arxiv.org/abs/2006.08195
    """
    turns = x * rate
    rest = turns - ops.round(turns)
    square = rest * rest
    return x + gain * (_series(_WAVE, square) * square)


def _series(factors: Sequence[float], x: TensorValue) -> TensorValue:
    """Returns the polynomial's value. The first factor is the constant."""
    result = x * factors[-1] + factors[-2]
    for factor in factors[-3::-1]:
        result = result * x + factor
    return result
