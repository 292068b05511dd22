"""Signals that come chunk by chunk: live graphs, their latency, and the receptive field of any graph.

`max_conv.streaming(...)` calls this module: it is the function `streaming`.

`streaming(build, ...)` runs the network's own code with a `PackedGraph` that is a `StreamingGraph`. Its input comes in *ticks* of M
positions, M the common multiple of the strides, so every length in the graph is `per_tick * ticks`. `traced.py` looks at every
operation that is made: a value has a `Line` (`conv/lines.py`: positions per tick, delay, and its length as a function of the
input's length); an operation that is not on the white list of `positions.py` is refused; if values of different delay meet, the
earlier one gets a delay line, in place.

A layer reads a window that one operation lays out (`kernels/signals.mojo`): rows that the state holds, the new rows, and the padding
at each signal's own begin and end; the layer itself is then the same kernel without padding. All windows keep their rows in one
tensor of bytes, `state`. Each row of the batch has separate `ticks` (0 begins a new signal, with any state) and `ends`.
`Stream` holds all three on the host and commits them after a call has succeeded. Ragged batches (`lengths`, `conv/ragged.py`) are
the same windows without a state.
"""

import sys
from types import ModuleType
from typing import Any

from .describe import describe
from .graph import StreamingGraph, streaming
from .ragged import RaggedGraph
from .span import Span
from .stream import Stream
from .timing import Timing

__all__ = [
    "RaggedGraph",
    "Span",
    "Stream",
    "StreamingGraph",
    "Timing",
    "describe",
    "streaming",
]


class _Callable(ModuleType):
    """A module that can be called: it calls the function that has the module's name."""

    def __call__(self, *args: Any, **kwargs: Any) -> StreamingGraph:
        return streaming(*args, **kwargs)


_Callable.__call__.__doc__ = streaming.__doc__
sys.modules[__name__].__class__ = _Callable
