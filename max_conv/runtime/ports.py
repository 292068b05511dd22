"""Inputs and outputs of a model: their types, and the check of sizes before MAX allocates memory."""

import ast
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..streaming.timing import Chunk

LARGEST = 1 << 31
"""The largest size that the search for the least valid size tries."""


@dataclass(frozen=True)
class Port:
    """One input or output: its name, dtype and shape. A string in the shape is a symbolic dimension."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]
    device: str = "cpu"

    def __str__(self) -> str:
        return f"({', '.join(str(size) for size in self.shape)})"


def live_array(port: Port, axis: int, tick: int = 1) -> Chunk:
    """Returns the facts that a stream needs about an input or output; its shape lacks the axis that counts ticks."""
    shape: list[Any] = [None if isinstance(size, str) else size for size in port.shape]
    if tick > 1:
        del shape[axis]
    shape[0] = shape[axis] = None
    return Chunk(port.name, port.dtype, tuple(shape), axis)


def check_inputs(inputs: Sequence[Port], outputs: Sequence[Port], given: Sequence[tuple[Any, Sequence[int]]]) -> None:
    """Checks the dtypes and shapes of a model's inputs: each one, all against each other, and against the outputs.

    Args:
        inputs, outputs: The model's inputs and outputs.
        given: The dtype (MAX's) and the shape of every array that was passed.

    Raises:
        TypeError, ValueError: One sentence that names the input.
    """
    sizes: dict[str, tuple[int, str]] = {}
    for port, (dtype, given_shape) in zip(inputs, given, strict=True):
        if dtype.name != port.dtype:
            raise TypeError(f"model: input {port.name!r} must be {port.dtype}, but is {dtype.name}; cast it first.")
        shape = tuple(given_shape)
        if len(shape) != len(port.shape) or any(
            isinstance(want, int) and want != size for want, size in zip(port.shape, shape, strict=True)
        ):
            raise ValueError(f"model: input {port.name!r} must have shape {port}, but has {shape}.")
        for want, size in zip(port.shape, shape, strict=True):
            if isinstance(want, int):
                continue
            known, where = sizes.setdefault(want, (size, port.name))
            if known != size:
                raise ValueError(
                    f"model: dimension {want!r} is {known} in input {where!r} but {size} in input "
                    f"{port.name!r}; pass the same."
                )
    if found := too_short([port.shape for port in outputs], {name: size for name, (size, _) in sizes.items()}):
        name, least = found
        size, where = sizes[name]
        rule = f"must be at least {least}" if least else "gives an output of negative length at any size"
        raise ValueError(f"model: input {where!r} is too short: its dimension {name!r} {rule}, but is {size}.")


def too_short(shapes: Iterable[Iterable[int | str]], sizes: Mapping[str, int]) -> tuple[str, int | None] | None:
    """Finds a symbolic dimension whose size would make an output's size negative.

    Args:
        shapes: The outputs' shapes. A size is an int, a symbolic dimension, or an expression of both with +, *, // and
            brackets. Any other size is assumed to be right.
        sizes: The sizes of the symbolic dimensions.

    Returns:
        None if all sizes are right. Otherwise the dimension, and the least size with which no output is negative or
        empty, or None in its place if there is no such size.

    >>> too_short([("batch", "((length + 1) // 2) + -4")], {"batch": 1, "length": 3})
    ('length', 9)
    """
    texts = [size for shape in shapes for size in shape if isinstance(size, str)]
    for text in texts:
        size = size_of(text, sizes)
        if size is not None and size < 0:
            for name in sizes:
                if re.search(rf"\b{re.escape(name)}\b", text):
                    return name, _least(texts, sizes, name)
    return None


def _least(texts: list[str], sizes: Mapping[str, int], name: str) -> int | None:
    """Returns the least size of a dimension with which no output is negative or empty: outputs grow with it."""

    def works(size: int) -> bool:
        values = [size_of(text, {**sizes, name: size}) for text in texts if re.search(rf"\b{re.escape(name)}\b", text)]
        return all(value is None or value > 0 for value in values)

    low, high = sizes[name], LARGEST
    if not works(high):
        return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if works(middle) else (middle, high)
    return high


def size_of(text: str, sizes: Mapping[str, int]) -> int | None:
    """Returns the value of an expression, or None if it contains anything but sums, products and divisions."""
    try:
        return _evaluate(ast.parse(text, mode="eval").body, sizes)
    except (SyntaxError, KeyError, TypeError, ZeroDivisionError, RecursionError, MemoryError, ValueError):
        return None


def _evaluate(node: ast.expr, sizes: Mapping[str, int]) -> int:
    match node:
        case ast.Constant(value=int(value)):
            return value
        case ast.Name(id=name):
            return sizes[name]
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_evaluate(operand, sizes)
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return _evaluate(left, sizes) + _evaluate(right, sizes)
        case ast.BinOp(left=left, op=ast.Mult(), right=right):
            return _evaluate(left, sizes) * _evaluate(right, sizes)
        case ast.BinOp(left=left, op=ast.FloorDiv(), right=right):
            return _evaluate(left, sizes) // _evaluate(right, sizes)
    raise ValueError(ast.dump(node))
