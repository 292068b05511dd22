"""What a network's code says so that its graph can also be built live, chunk by chunk. In other graphs it is plain arithmetic."""

from max.graph import TensorValue, ops

from .graph import graph_class, packed_graph


def is_live() -> bool:
    """Returns whether the graph that is being built, or the next one, is live."""
    graph = packed_graph()
    return graph.live if graph is not None else graph_class.get() is not None


def ones_like(x: TensorValue) -> TensorValue:
    """Returns a one for every position of an NLC value, (1, L, 1), or (N, L, 1) in a live graph."""
    graph = packed_graph()
    live = graph is not None and graph.live
    ones = ops.broadcast_to(ops.constant(1, x.dtype, device=x.device), [x.shape[0] if live else 1, x.shape[1], 1])
    if graph is not None:
        graph.same_positions(ones, x)
    return ones


def as_long_as(y: TensorValue, x: TensorValue) -> TensorValue:
    """Returns the first positions of `y`, (N, L, ...), as many as `x` has."""
    cut = y[:, : x.shape[1]]
    if graph := packed_graph():
        graph.same_length(cut, y, x)
    return cut


def run_after(value: TensorValue, before: TensorValue) -> TensorValue:
    """Returns a value that MAX computes after another one, (N, L, F).

    MAX interleaves independent branches, so the buffers of all are live at once.
    """
    if is_live():
        return value  # chunks are small
    # Nothing is larger than infinity: these are zeros, but MAX must compute `before` to know it.
    return value + ops.cast(before[0, 0, :] > float("inf"), value.dtype)
