"""Which operations of MAX keep the positions of a live signal apart, and how all other operations are refused."""

from collections.abc import Sequence
from math import prod
from typing import Any

from max.graph import Dim, StaticDim, TensorType, TensorValue

ELEMENTWISE = {
    *("mo.cast", "rmo.add", "rmo.sub", "rmo.mul", "rmo.div", "rmo.max", "rmo.min", "rmo.pow", "rmo.mod"),
    *("rmo.and", "rmo.or", "rmo.xor", "rmo.equal", "rmo.not_equal", "rmo.greater", "rmo.greater_equal", "rmo.select"),
    *("rmo.mo.abs", "rmo.mo.atanh", "rmo.mo.cos", "rmo.mo.erf", "rmo.mo.exp", "rmo.mo.floor", "rmo.mo.gelu"),
    *("rmo.mo.is_inf", "rmo.mo.is_nan", "rmo.mo.log", "rmo.mo.log1p", "rmo.mo.negative", "rmo.mo.not", "rmo.mo.relu"),
    *("rmo.mo.round", "rmo.mo.rsqrt", "rmo.mo.sigmoid", "rmo.mo.silu", "rmo.mo.sin", "rmo.mo.sqrt", "rmo.mo.tanh"),
    *("rmo.mo.trunc", "rmo.mo.gelu_tanh", "rmo.mo.gelu_quick"),
}
OTHER_AXES = {
    *("rmo.slice", "mo.split", "rmo.concat", "rmo.broadcast_to", "rmo.mo.pad.constant", "rmo.rebind_tensor_shape"),
    *("rmo.mo.transpose", "rmo.mo.reduce.add", "rmo.mo.reduce.mul", "rmo.mo.reduce.mean", "rmo.mo.reduce.max"),
    *("rmo.mo.reduce.min", "rmo.mo.reduce.arg_max", "rmo.mo.reduce.arg_min"),
}
"""Operations that keep positions apart if they work on another axis: then the result still has all positions."""
ALONG = {"rmo.mo.reduce.softmax", "rmo.mo.reduce.logsoftmax", "rmo.mo.cumsum"}
"""Operations whose result has all positions in any case; their attribute `axis` is the axis they work on."""
OVER_CHANNELS = {"mo.reduce.layer_norm", "mo.reduce.rms_norm"}
"""Norms over the last axis."""
ONE_SIGNAL = {"rmo.matmul", "rmo.mo.gather"}
"""Operations that keep positions apart if only one operand has positions."""
WORDS = {
    "mo.reduce.group_norm": "group_norm",
    "rmo.matmul": "a product of two values with positions, such as attention,",
    "rmo.mo.pad.constant": "pad",
    "rmo.mo.reduce.add": "sum",
}


def where(value: TensorValue, size: Dim) -> list[int]:
    """Returns the axes of a value that have this size."""
    return [axis for axis, dim in enumerate(value.shape) if dim == size]


def input_axis(op: str, number: int, type_: TensorType) -> int:
    """Returns the axis of the positions of an input.

    Raises:
        ValueError: If it is not clear which axis it is.
    """
    axes = [axis for axis, size in enumerate(type_.shape) if axis and not isinstance(size, StaticDim)]
    if len(axes) != 1:
        raise ValueError(
            f"{op}: input {number} must have a batch axis and one other axis of symbolic size, its positions, but has shape "
            f"({', '.join(map(str, type_.shape))})."
        )
    return axes[0]


def check(
    op: str, operation: Any, seen: Sequence[tuple[int, TensorValue]], results: Sequence[TensorValue], size: Dim
) -> None:
    """Raises ValueError unless an operation keeps positions apart.

    Args:
        op: Error messages begin with it.
        operation: The MLIR operation.
        seen: Its operands that have positions: the number of each, and the operand.
        results: Its results.
        size: How many positions the operands have.
    """
    name = str(operation.name)
    word = WORDS.get(name, name.split(".")[-1])
    axes = [where(value, size) for _, value in seen]
    if any(len(found) != 1 for found in axes):
        raise ValueError(f"{op}: {word} gets a value whose positions are not along one axis; it cannot be computed so.")
    known = ELEMENTWISE | OTHER_AXES | ALONG | OVER_CHANNELS | ONE_SIGNAL | {"rmo.reshape"}
    if name not in known:
        raise ValueError(
            f"{op}: {word} is not known to keep positions apart; compute it on the whole signal, outside the graph."
        )
    (axis, *_), value = axes[0], seen[0][1]
    apart = all(len(where(result, size)) == 1 for result in results)
    if name in ALONG:
        apart &= int(operation.attributes["axis"]) != axis
    elif name in OVER_CHANNELS:
        apart &= seen[0][0] == 0 and axis != len(value.shape) - 1
    elif name in ONE_SIGNAL:
        # In a product of matrices, each position can also be a separate matrix.
        own = name == "rmo.matmul" and all(found == [axis] for found in axes) and axis < len(value.shape) - 2
        apart &= len(seen) == 1 or own
    elif name == "rmo.reshape":
        apart &= all(_before(value, axis) == _before(result, where(result, size)[0]) for result in results if apart)
    if not apart:
        raise ValueError(f"{op}: {word} goes over positions; it needs the whole signal.")


def _before(value: TensorValue, axis: int) -> tuple[int, list[str]]:
    """Returns the product of the sizes before an axis, as a number and names. A reshape must keep it."""
    sizes = value.shape[:axis]
    known = prod(int(size) for size in sizes if isinstance(size, StaticDim))
    return known, sorted(str(size) for size in sizes if not isinstance(size, StaticDim))
