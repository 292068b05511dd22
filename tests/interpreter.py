"""Runs graphs with NumPy, operation by operation, so that hundreds of networks can be tried without a compile."""

import re
from collections.abc import Callable, Mapping
from math import erf
from typing import Any

import numpy as np
from max.driver import Buffer

from max_conv import PackedGraph
from max_conv.conv.geometry import PADDING_MODES
from max_conv.conv.reference import conv1d_ref, conv_transpose1d_ref

ERF = np.vectorize(erf, otypes=[np.float64])
ARITHMETIC: dict[str, Callable[..., Any]] = {
    "rmo.add": np.add,
    "rmo.sub": np.subtract,
    "rmo.mul": np.multiply,
    "rmo.div": np.divide,
    "rmo.max": np.maximum,
    "rmo.min": np.minimum,
    "rmo.greater": np.greater,
    "rmo.select": np.where,
    "rmo.matmul": np.matmul,
    "mo.cast": lambda x: x,
    "rmo.mo.abs": np.abs,
    "rmo.mo.exp": np.exp,
    "rmo.mo.floor": np.floor,
    "rmo.mo.gelu": lambda x: x * (1 + ERF(x / np.sqrt(2))) / 2,
    "rmo.mo.log": np.log,
    "rmo.mo.not": np.logical_not,
    "rmo.mo.range": lambda start, end, step: np.arange(start, end, step),
    "rmo.mo.relu": lambda x: np.maximum(x, 0),
    "rmo.mo.round": np.round,
    "rmo.mo.rsqrt": lambda x: 1 / np.sqrt(x),
    "rmo.mo.sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "rmo.mo.silu": lambda x: x / (1 + np.exp(-x)),
    "rmo.mo.sqrt": np.sqrt,
    "rmo.mo.tanh": np.tanh,
}
ALONG: dict[str, Callable[..., Any]] = {
    "rmo.mo.reduce.add": lambda x, axis: x.sum(axis, keepdims=True),
    "rmo.mo.reduce.mean": lambda x, axis: x.mean(axis, keepdims=True),
    "rmo.mo.reduce.arg_max": lambda x, axis: x.argmax(axis, keepdims=True),
    "rmo.mo.reduce.softmax": lambda x, axis: (
        np.exp(x - x.max(axis, keepdims=True)) / np.exp(x - x.max(axis, keepdims=True)).sum(axis, keepdims=True)
    ),
}
NOTHING = ("mo.chain.create", "mo.buffer.create")
DTYPES = {"f32": np.float32, "f64": np.float64, "si64": np.int64, "bool": np.bool_, "ui8": np.uint8}
SIZES: dict[str, Callable[[int, int], int]] = {
    "add": lambda a, b: a + b,
    "mul": lambda a, b: a * b,
    "mul_no_wrap": lambda a, b: a * b,
    "div": lambda a, b: a // b,
}


class Interpreter:
    """A graph of the gallery, live or whole, or of random layers, in float32.

    Args:
        graph: The finished graph.
        weights: The documented weights by name; filters are SCF and SFC.
    """

    def __init__(self, graph: PackedGraph, weights: Mapping[str, np.ndarray]) -> None:
        block = graph._mlir_op.regions[0].blocks[0]
        self._arguments, operations = list(block.arguments), list(block.operations)
        # Prints the graph once, a line for each operation: to print one operation, MLIR numbers all the others first.
        lines = str(graph._mlir_op).splitlines()[1 : len(operations) + 1]
        self._operations = [
            (operation_name(o), line, list(o.operands), list(o.results))
            for o, line in zip(operations, lines, strict=True)
        ]
        self._layers = [emitted[0].name for emitted in graph.emitted]
        self._derived, self._weights = graph.derived, dict(weights)

    def __call__(self, *arrays: np.ndarray) -> list[np.ndarray]:
        """Runs the graph; returns its outputs."""
        values: dict[Any, Any] = dict(zip(self._arguments, arrays, strict=True))
        known: dict[str, Any] = {}
        for argument, array in values.items():
            known |= dict(zip(dims(str(argument.type)), array.shape, strict=True))
        layers = iter(self._layers)
        for name, text, operands, results in self._operations:
            if name == "mo.constant.external":
                values[results[0]] = re.search(r'name = "([^"]*)"', text)[1]  # type: ignore[index]
                continue
            inputs = [values.get(operand) for operand in operands]
            if name == "mo.output":
                return inputs  # type: ignore[return-value]
            if name == "rmo.mo.mutable.store":
                values[operands[0]] = inputs[1].copy()  # type: ignore[union-attr]
            elif name == "rmo.mo.mutable.load":
                values[results[0]] = inputs[0]
            elif name not in NOTHING:
                if new := re.search(r" rmo\.mo\.slice<\(\) -> (\w+)>", text):
                    axis = dims(str(results[0].type)).index(new[1])
                    rows = size(dims(str(operands[0].type))[axis], known)
                    known[new[1]] = min(int(inputs[2][axis]), rows) - int(inputs[1][axis])  # type: ignore[index]
                shape = [size(text, known) for text in dims(str(results[0].type))]
                made = self._run(name, text, inputs, shape, layers, known)
                for result, value in zip(results, made if isinstance(made, tuple) else (made,), strict=False):
                    dtype = DTYPES[re.search(r"(\w+)>$", str(result.type).split(",")[-1])[1]]  # type: ignore[index]
                    values[result] = np.asarray(value, dtype)
        raise AssertionError("a finished graph has outputs")

    def _weight(self, name: str) -> np.ndarray:
        """Returns a documented weight, or one that is made from others."""
        if name not in self._weights:
            entry = self._derived[name]
            sources = (Buffer.from_numpy(np.array(self._weight(source.name))) for source in entry.sources)
            self._weights[name] = entry.make(*sources).to_numpy()
        return self._weights[name]

    def _run(self, name: str, text: str, inputs: list[Any], shape: list[int], layers: Any, known: Any) -> Any:
        if name == "mo.custom" and "max_conv.window" in text:
            state, x, ticks, ends, plan, *_ = inputs
            return window(state, x, ticks, ends, plan, "NCL" in text, shape)
        if name == "mo.custom" and "max_conv.lstm" in text:
            next(layers)
            w_hh = self._weight(inputs[1]) if isinstance(inputs[1], str) else inputs[1]
            return lstm(inputs[0], w_hh, inputs[2], inputs[3], shape[1])
        if name == "mo.custom":
            own, bias = next(layers), inputs[2]
            filter = inputs[1] if own == "computed" else self._weight(own)
            bias = self._weight(bias) if isinstance(bias, str) else bias
            return layer(text, inputs[0], filter, bias, inputs[3].tolist(), shape)
        given = [self._weight(value) if isinstance(value, str) else value for value in inputs]
        if name in ALONG:
            return ALONG[name](given[0], int(re.search(r"axis = (\d+)", text)[1]))  # type: ignore[index]
        return moved(name, text, given, shape, known) if name in MOVES else ARITHMETIC[name](*given)


MOVES = {
    "mo.constant",
    "mo.reduce.layer_norm",
    "mo.split",
    "rmo.broadcast_to",
    "rmo.concat",
    "rmo.mo.gather",
    "rmo.mo.pad.constant",
    "rmo.mo.slice",
    "rmo.mo.transpose",
    "rmo.rebind_tensor_shape",
    "rmo.reshape",
    "rmo.shape_to_tensor",
    "rmo.slice",
}


def moved(name: str, text: str, given: list[Any], shape: list[int], known: Mapping[str, int]) -> Any:
    """Runs an operation that is no arithmetic."""
    if name == "mo.constant":
        return constant(text)
    if name in ("rmo.reshape", "rmo.rebind_tensor_shape"):
        return given[0].reshape(shape)
    if name == "rmo.broadcast_to":
        return np.broadcast_to(given[0], shape)
    if name == "mo.reduce.layer_norm":
        x, weight, bias, epsilon = (np.asarray(value, np.float64) for value in given)
        centred = x - x.mean(-1, keepdims=True)
        return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + epsilon) * weight + bias
    if name == "rmo.mo.pad.constant":
        return np.pad(given[0], given[1].reshape(-1, 2))
    if name == "rmo.shape_to_tensor":
        sizes = re.search(r"#mosh<ape(\[.*?\])>", text)[1]  # type: ignore[index]
        return np.array([size(text, known) for text in dims(sizes)])
    if name == "rmo.mo.transpose":
        return given[0].transpose(given[1])
    axis = int((re.search(r"axis = (\d+)", text) or [0, 0])[1])
    if name == "rmo.concat":
        return np.concatenate(given, axis)
    if name == "mo.split":
        return tuple(np.split(given[0], np.cumsum(given[1])[:-1], axis))
    if name == "rmo.mo.gather":
        return np.take(given[0], given[1], axis)
    if name == "rmo.mo.slice":
        begins = [int(begin) for begin in given[1]]
    else:
        starts = re.search(r"starts = #mosh<ape\[(.*?)\]>", text)[1]  # type: ignore[index]
        begins = [size(start, known) for start in dims(f"[{starts}]")]
    begins = [begin % max(1, n) for begin, n in zip(begins, given[0].shape, strict=True)]  # the last ones are negative
    return given[0][tuple(slice(begin, begin + count) for begin, count in zip(begins, shape, strict=True))]


def operation_name(operation: Any) -> str:
    """Returns an operation's name; the attribute of that name hides it in weights."""
    return str(operation.operation.name)


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
    found = re.search(r"dense_array<(.*?)> : tensor<((?:\d+x)*)(\w+)>", text)
    assert found, text[:200]
    dtype = np.dtype(DTYPES[found[3]])
    values = [value.strip() for value in found[1].split(",") if value.strip()]
    if values and values[0].startswith("0x"):  # infinities and NaN are printed as bits
        array = np.array([int(value, 16) for value in values], f"u{dtype.itemsize}").view(dtype)
    else:
        array = np.array([int(value) if dtype.kind in "iu" else float(value) for value in values]).astype(dtype)
    return array.reshape([int(count) for count in found[2].split("x") if count])


def layer(
    text: str, x: np.ndarray, filter: np.ndarray, bias: np.ndarray, numbers: list[int], shape: list[int]
) -> np.ndarray:
    """Returns a convolution's output, from the reference."""
    stride, dilation, left, right, mode, groups, _ = numbers
    ncl = 'layout = "NCL"' in text
    x = x.transpose(0, 2, 1) if ncl else x
    given = x.astype(np.float64), filter.astype(np.float64)
    options: dict[str, Any] = {"stride": stride, "dilation": dilation, "groups": groups}
    if "conv_transpose1d" in text:
        # The output padding follows from the output's length. It may exceed the limit of the arguments.
        made = conv_transpose1d_ref(*given, **options)
        length = shape[2 if ncl else 1]
        made = np.pad(made, ((0, 0), (0, max(0, left + length - made.shape[1])), (0, 0)))[:, left : left + length]
    else:
        made = conv1d_ref(*given, padding=(left, right), padding_mode=PADDING_MODES[mode], **options)
    made = made + bias if len(bias) else made
    return made.transpose(0, 2, 1) if ncl else made


def lstm(gates: np.ndarray, w_hh: np.ndarray, hidden: np.ndarray, cell: np.ndarray, steps: int) -> tuple[Any, ...]:
    """Returns the outputs of an LSTM, and its memory after the last step."""
    found = []
    for step in range(steps):
        i, f, g, o = np.split(gates[:, step].astype(np.float64) + hidden @ w_hh, 4, axis=1)
        i, f, o = (1 / (1 + np.exp(-gate)) for gate in (i, f, o))
        cell = f * cell + i * np.tanh(g)
        hidden = o * np.tanh(cell)
        found.append(hidden)
    return np.stack(found, axis=1), hidden, cell


def window(
    state: np.ndarray,
    x: np.ndarray,
    ticks: np.ndarray,
    ends: np.ndarray,
    plan: np.ndarray,
    ncl: bool,
    shape: list[int],
) -> np.ndarray:
    """Lays out windows, and writes the state, as `kernels/signals.mojo` does."""
    x = np.ascontiguousarray(x.transpose(0, 2, 1)) if ncl else x
    rows, channels = shape[2 if ncl else 1], x.shape[2]
    offset, kept, before, per_tick, delay, mode, _, _, _, count = plan[:10].tolist()
    own = slice(offset, offset + kept * channels * x.itemsize)
    both = np.concatenate([state[:, own].view(x.dtype).reshape(len(x), kept, channels), x], axis=1)
    result = np.zeros((len(x), rows, channels), x.dtype)
    for n in range(len(x)):
        start, length = int(ticks[n]) * per_tick - delay, int(ends[n])
        for factor, summand, divisor in plan[10:].reshape(count, 3).tolist():
            length = (length * factor + summand) // divisor
        source = np.arange(start - before, start - before + rows)
        if PADDING_MODES[mode] == "replicate":
            source = np.clip(source, 0, length - 1)
        elif PADDING_MODES[mode] == "reflect":
            source = np.abs(source)
            source = np.where(source >= length, 2 * (length - 1) - source, source)
        at = source - start + kept
        there = (source >= 0) & (source < length) & (at >= 0) & (at < both.shape[1])
        result[n, there] = both[n, at[there]]
    if kept:
        newest = np.ascontiguousarray(both[:, both.shape[1] - kept :])
        state[:, own] = newest.view(np.uint8).reshape(len(x), -1)
    return result.transpose(0, 2, 1) if ncl else result
