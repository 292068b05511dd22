"""Runs graphs with NumPy, operation by operation, so that hundreds of networks can be tried without a compile."""

import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from max_conv import PackedGraph
from max_conv.conv.geometry import PADDING_MODES, Geometry
from max_conv.conv.reference import conv1d_ref, conv_transpose1d_ref

ARITHMETIC: dict[str, Callable[..., np.ndarray]] = {"rmo.add": np.add, "rmo.mul": np.multiply, "rmo.mo.tanh": np.tanh}
NOTHING = ("mo.chain.create", "mo.buffer.create", "mo.constant.external")
SIZES: dict[str, Callable[[int, int], int]] = {
    "add": lambda a, b: a + b,
    "mul": lambda a, b: a * b,
    "mul_no_wrap": lambda a, b: a * b,
    "div": lambda a, b: a // b,
}


class Interpreter:
    """A graph, live or whole, of convolutions, sums, products, tanh, concatenations and slices of float32.

    Args:
        graph: The finished graph.
        weights: SCF and SFC filters by name.
    """

    def __init__(self, graph: PackedGraph, weights: Mapping[str, np.ndarray]) -> None:
        block = graph._mlir_op.regions[0].blocks[0]
        self._arguments = list(block.arguments)
        self._operations = [(o, str(o.operation.name), str(o), list(o.operands)) for o in block.operations]
        self._layers = [emitted[0].name for emitted in graph.emitted]
        self._weights = weights

    def __call__(self, *arrays: np.ndarray) -> list[np.ndarray]:
        """Runs the graph; returns its outputs."""
        values: dict[Any, Any] = dict(zip(self._arguments, arrays, strict=True))
        known: dict[str, Any] = {}
        for argument, array in values.items():
            known |= dict(zip(dims(str(argument.type)), array.shape, strict=True))
        layers = iter(self._layers)
        for operation, name, text, operands in self._operations:
            inputs = [values.get(operand) for operand in operands]
            if name == "mo.output":
                return inputs  # type: ignore[return-value]
            if name == "rmo.mo.mutable.store":
                values[operands[0]] = inputs[1].copy()  # type: ignore[union-attr]
            elif name == "rmo.mo.mutable.load":
                values[operation.results[0]] = inputs[0]
            elif name not in NOTHING:
                shape = [size(text, known) for text in dims(str(operation.results[0].type))]
                values[operation.results[0]] = self._run(name, text, inputs, shape, layers)
        raise AssertionError("a finished graph has outputs")

    def _run(self, name: str, text: str, inputs: list[Any], shape: list[int], layers: Any) -> np.ndarray:
        if name == "mo.constant":
            return constant(text)
        if name == "mo.custom" and "max_conv.window" in text:
            state, x, ticks, ends, plan, *_ = inputs
            return window(state, x, ticks, ends, plan, shape[1])
        if name == "mo.custom":
            return layer(text, inputs[0], self._weights[next(layers)], inputs[3].tolist(), shape)
        if name in ("rmo.reshape", "rmo.rebind_tensor_shape"):
            return inputs[0].reshape(shape)
        if name == "rmo.concat":
            return np.concatenate(inputs, axis=2)
        if name == "rmo.slice":
            assert "starts = #mosh<ape[0, 0, 0]>" in text
            return inputs[0][tuple(slice(count) for count in shape)]
        return ARITHMETIC[name](*inputs).astype(np.float32)


def dims(type_: str) -> list[str]:
    """Returns the sizes in a tensor's type, as text."""
    text = type_[type_.index("[") + 1 : type_.rindex("]")]
    # Commas outside of brackets separate sizes.
    found, depth, begin = [], 0, 0
    for i, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if letter == "," and not depth:
            found.append(text[begin:i].strip())
            begin = i + 1
    return [*found, text[begin:].strip()] if text else []


def size(text: str, known: Mapping[str, int]) -> int:
    """Returns a size's value."""
    return int(eval(text, {"__builtins__": {}}, {**known, **SIZES}))


def constant(text: str) -> np.ndarray:
    """Returns the values in the text of a constant."""
    found = re.search(r"dense_array<(.*?)> : tensor<(\d+x)?(f32|si64)>", text)
    assert found, text
    values = np.array([float(value) for value in found[1].split(",") if value.strip()])
    array = values.astype(np.float32 if found[3] == "f32" else np.int64)
    return array if found[2] else array.reshape(())


def layer(text: str, x: np.ndarray, filter: np.ndarray, numbers: list[int], shape: list[int]) -> np.ndarray:
    """Returns a convolution's output, from the reference."""
    stride, dilation, left, right, mode, groups, _ = numbers
    given = x.astype(np.float64), filter.astype(np.float64)
    options: dict[str, Any] = {"stride": stride, "dilation": dilation, "groups": groups}
    if "conv_transpose1d" in text:
        # The output's length tells the output padding, which may exceed what the arguments allow.
        made = conv_transpose1d_ref(*given, **options)
        made = np.pad(made, ((0, 0), (0, max(0, left + shape[1] - made.shape[1])), (0, 0)))
        return made[:, left : left + shape[1]].astype(np.float32)
    return conv1d_ref(*given, padding=(left, right), padding_mode=PADDING_MODES[mode], **options).astype(np.float32)


def window(
    state: np.ndarray, x: np.ndarray, ticks: np.ndarray, ends: np.ndarray, plan: np.ndarray, rows: int
) -> np.ndarray:
    """Lays out the windows of NLC data, and writes the state; what `kernels/signals.mojo` says, value by value."""
    offset, kept, before, per_tick, delay, mode, _, _, _, count = plan[:10].tolist()
    held = state[:, offset : offset + kept * x.shape[2] * 4].view(np.float32).reshape(len(x), kept, x.shape[2])
    both = np.concatenate([held, x], axis=1)
    result = np.zeros((len(x), rows, x.shape[2]), np.float32)
    halo = Geometry.of(1, padding_mode=PADDING_MODES[mode])
    for n in range(len(x)):
        start, length = int(ticks[n]) * per_tick - delay, int(ends[n])
        for factor, summand, divisor in plan[10:].reshape(count, 3).tolist():
            length = (length * factor + summand) // divisor
        for r in range(rows):
            source = halo.source(start - before + r, length)
            if source is not None and 0 <= source < length and 0 <= (at := source - start + kept) < both.shape[1]:
                result[n, r] = both[n, at]
    if kept:
        state[:, offset : offset + kept * x.shape[2] * 4] = (
            np.ascontiguousarray(both[:, both.shape[1] - kept :]).view(np.uint8).reshape(len(x), -1)
        )
    return result
