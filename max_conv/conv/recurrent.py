"""`lstm`: a long short-term memory over a whole sequence."""

from typing import Any

from max.dtype import DType
from max.graph import StaticDim, TensorType, TensorValue, ops

from .checks import DTYPES
from .graph import Emitted, custom_op, record, weight_name
from .ops import conv1d
from .whole import signals

_GATES = 4


def lstm(
    x: TensorValue,
    w_ih: TensorValue,
    w_hh: TensorValue,
    bias: TensorValue,
    hidden: TensorValue | None = None,
    cell: TensorValue | None = None,
) -> tuple[TensorValue, TensorValue, TensorValue]:
    """Runs an NLC sequence through an LSTM, in one operation after one projection of the whole sequence.

    `i, f, g, o = split(x[t] @ w_ih + h @ w_hh + bias);  c = sigmoid(f) * c + sigmoid(i) * tanh(g);
    h = sigmoid(o) * tanh(c)`

    Args:
        x: (N, T, C). N and T may be symbolic, T may be 0.
        w_ih: (C, 4H): the transpose of PyTorch's `weight_ih`. The gates are in the order i, f, g, o, as in PyTorch.
        w_hh: (H, 4H): the transpose of PyTorch's `weight_hh`.
        bias: (4H,): the sum of PyTorch's `bias_ih` and `bias_hh`.
        hidden: (N, H), before the first step; None means zeros, and in a live graph the state after the call before.
        cell: The same.

    Returns:
        The hidden state after every step, (N, T, H), and the hidden and the cell state after the last, (N, H), in the
        dtype of `x`. Sixteen-bit types are computed in float32.

    Raises:
        TypeError, ValueError: Before anything is emitted, in one sentence.

    >>> from max.graph import DeviceRef, Graph
    >>> shapes = (["batch", "time", 3], [3, 20], [5, 20], [20], ["batch", 5], ["batch", 5])
    >>> types = [TensorType(DType.float32, shape, DeviceRef.CPU()) for shape in shapes]
    >>> with Graph("memory", input_types=types) as graph:
    ...     outputs, hidden, cell = lstm(*(value.tensor for value in graph.inputs))
    >>> outputs.shape[2], hidden.shape[1]
    (Dim(5), Dim(5))

    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.LSTM.html
    """
    names = ("x", "w_ih", "w_hh", "bias", "hidden", "cell")
    now = signals()
    if now.live and hidden is not None:
        raise ValueError("streaming: an LSTM with hidden= and cell= starts anew in every call; leave them out.")
    places = []
    if hidden is None or cell is None:
        x, w_hh = TensorValue(x), TensorValue(w_hh)
        (hidden, place), (cell, other) = (now.recall(x, int(w_hh.shape[0])) for _ in range(2))
        places = [place, other]
    operands = [TensorValue(value) for value in (x, w_ih, w_hh, bias, hidden, cell)]
    given = x = operands[0]
    units = _check(dict(zip(names, operands, strict=True)))
    dtype = x.dtype
    if dtype.size_in_bytes < 4:
        operands = [ops.cast(value, DType.float32) for value in operands]
    x, w_ih, w_hh, bias, hidden, cell = operands
    # A row of padding at the end allows an empty sequence, which a convolution would not accept; no live one is empty.
    gates = conv1d(x, ops.unsqueeze(w_ih, 0), bias, padding=(0, 0 if now.live else 1))
    # Zero gates keep a memory of zeros until a live signal begins.
    gates = now.inside(gates)
    batch, steps, _ = x.shape
    state = TensorType(x.dtype, [batch, units], x.device)
    record(Emitted(weight_name(w_hh), units=units))
    results = custom_op(
        "max_conv.lstm",
        x.device,
        [gates, w_hh, hidden, cell],
        [TensorType(x.dtype, [batch, steps, units], x.device), state, state],
    )
    now.same_positions(results[0], given)
    outputs, hidden, cell = (ops.cast(value, dtype) for value in results)
    for value, place in zip((hidden, cell), places, strict=False):
        now.keep(value, place)
    return outputs, hidden, cell


def _check(values: dict[str, TensorValue]) -> int:
    """Checks dtypes, devices and shapes; returns the hidden units."""
    x = values["x"]
    if x.dtype not in DTYPES:
        raise TypeError(
            f"lstm: x must be one of {', '.join(d.name for d in DTYPES)}, but is {x.dtype.name}; cast it first."
        )
    for name, value in values.items():
        if value.dtype != x.dtype:
            raise TypeError(f"lstm: x is {x.dtype.name} but {name} is {value.dtype.name}; cast one to the other.")
        if value.device != x.device:
            raise ValueError(f"lstm: x is on {x.device} but {name} is on {value.device}; move one to the other.")
    if x.rank != 3 or not isinstance(x.shape[2], StaticDim):
        raise ValueError(f"lstm: x must have shape (batch, time, channels), channels known, but has {_shape(x)}.")
    w_hh = values["w_hh"]
    if w_hh.rank != 2 or not isinstance(w_hh.shape[0], StaticDim) or int(w_hh.shape[0]) < 1:
        raise ValueError(f"lstm: w_hh must have shape (H, 4H), known when the graph is built, but has {_shape(w_hh)}.")
    units = int(w_hh.shape[0])
    wanted: dict[str, list[Any]] = {
        "w_ih": [x.shape[2], _GATES * units],
        "w_hh": [units, _GATES * units],
        "bias": [_GATES * units],
        "hidden": [x.shape[0], units],
        "cell": [x.shape[0], units],
    }
    for name, shape in wanted.items():
        if list(values[name].shape) != shape:
            expected = ", ".join(str(dim) for dim in shape)
            raise ValueError(
                f"lstm: {name} must have shape ({expected}) for x of shape {_shape(x)} and {units} hidden units, "
                f"but has {_shape(values[name])}."
            )
    return units


def _shape(value: TensorValue) -> str:
    return f"({', '.join(str(dim) for dim in value.shape)})"
