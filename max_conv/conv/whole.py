"""The functions that a network's code calls on its signals, so that one code builds whole graphs and live graphs.

In a whole graph these are plain arithmetic, as written here. A live graph has a separate `Signals` class, which knows
the positions of every value; see `streaming/live.py`.
"""

from typing import Any

from max.graph import Dim, Graph, TensorValue, ops

from .geometry import Geometry, TransposedGeometry


class Signals:
    """The signals of a whole graph. Values are NLC: (N, L, C)."""

    live = False
    """Whether signals come chunk by chunk."""

    def layer_input(
        self, x: TensorValue, geometry: Geometry | TransposedGeometry, layout: str, outputs: Dim
    ) -> tuple[TensorValue, Geometry | TransposedGeometry, Dim]:
        """Returns the input that a layer reads instead of `x`, its geometry for that input, and its output's length."""
        return x, geometry, outputs

    def layer_output(self, y: TensorValue) -> None:
        """Records the output of the layer that called `layer_input` last."""

    def same_positions(self, value: TensorValue, x: TensorValue) -> TensorValue:
        """Returns a value that a custom operation has just made. Its positions are the positions of `x`."""
        return value

    def ones_like(self, x: TensorValue) -> TensorValue:
        """Returns a one for every position, (1, L, 1), or (N, L, 1) if signals differ in length."""
        return ops.broadcast_to(ops.constant(1, x.dtype, device=x.device), [1, x.shape[1], 1])

    def as_long_as(self, y: TensorValue, x: TensorValue) -> TensorValue:
        """Returns the first positions of `y`, as many as `x` has."""
        return y[:, : x.shape[1]]

    def inside(self, x: TensorValue) -> TensorValue:
        """Returns a value with zeros outside the positions of its signals."""
        return x

    def run_after(self, value: TensorValue, before: TensorValue) -> TensorValue:
        """Returns a value that MAX computes after another one.

        MAX interleaves independent branches, so the buffers of all are live at once.
        """
        # Nothing is larger than infinity: these are zeros, but MAX must compute `before` to know it.
        return value + ops.cast(before[0, 0, :] > float("inf"), value.dtype)

    def neighbours(self, x: TensorValue, before: int, after: int) -> list[TensorValue]:
        """Returns each position's neighbours, from `before` positions before to `after` after it; zeros outside."""
        padded = ops.pad(x, [0, 0, before, after, 0, 0])
        return [ops.rebind(padded[:, i : x.shape[1] + i], x.shape) for i in range(before + after + 1)]

    def in_frames(self, x: TensorValue, size: int, frames: TensorValue) -> TensorValue:
        """Returns a value in frames of `size` positions, (N, T, size, C), for `frames`, (N, T, ...)."""
        return ops.reshape(x, [x.shape[0], frames.shape[1], size, x.shape[2]])

    def overlapping(self, x: TensorValue, window: int, hop: int) -> TensorValue:
        """Returns the frames of (N, L), `window` positions every `hop`, (N, T, window)."""
        return cut_frames(x, (x.shape[1] - window) // hop + 1, window, hop)

    def each_frame(self, x: TensorValue) -> TensorValue:
        """Returns each frame of (N, T, ...) as a separate signal, (N * T, ...)."""
        return ops.reshape(x, [x.shape[0] * x.shape[1], *x.shape[2:]])

    def of_frames(self, y: TensorValue, frames: TensorValue) -> TensorValue:
        """Returns the results of the frames, (N * T, ...), as (N, T, ...), for `frames`, (N, T, ...)."""
        return ops.reshape(y, [*frames.shape[:2], *y.shape[1:]])

    def whole_frames(self, x: TensorValue, size: int) -> TensorValue:
        """Returns (N, L) in frames of `size` positions, (N, T, size); zeros fill up the last frame."""
        frames = (x.shape[1] + (size - 1)) // size
        padded = ops.pad(x, [0, 0, 0, size - 1])[:, : frames * size]
        return ops.reshape(padded, [x.shape[0], frames, size])

    def from_frames(self, x: TensorValue) -> TensorValue:
        """Returns the positions of all frames (N, T, size, C) as one sequence, (N, T * size, C)."""
        return ops.reshape(x, [x.shape[0], x.shape[1] * x.shape[2], x.shape[3]])

    def recall(self, x: TensorValue, size: int) -> tuple[TensorValue, Any]:
        """Returns a value of the call before, (N, size) in the dtype of `x`, zeros at first; and what `keep` needs."""
        return ops.broadcast_to(ops.constant(0, x.dtype, device=x.device), [x.shape[0], size]), None

    def keep(self, value: TensorValue, place: Any) -> None:
        """Keeps a value, (N, size), for the next call."""


def cut_frames(x: TensorValue, frames: Dim, window: int, hop: int) -> TensorValue:
    """Returns frames of (N, (frames - 1) * hop + window), or of more, side by side: (N, frames, window)."""
    # A frame is a row of blocks; only a part of the last block is used.
    parts = -(-window // hop)
    blocks = frames + (parts - 1)
    padded = ops.pad(x, [0, 0, 0, parts * hop - window])[:, : blocks * hop]
    rows = ops.reshape(padded, [x.shape[0], blocks, hop])
    side_by_side = [rows[:, i : frames + i] if i else rows[:, :frames] for i in range(parts)]
    side_by_side = [ops.rebind(part, [x.shape[0], frames, hop]) for part in side_by_side]
    side_by_side[-1] = side_by_side[-1][:, :, : window - (parts - 1) * hop]
    return ops.concat(side_by_side, axis=2)


def signals() -> Signals:
    """Returns the signals of the graph that is being built."""
    return getattr(Graph.current, "signals", _WHOLE)


_WHOLE = Signals()
