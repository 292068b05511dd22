"""Signals that come chunk by chunk: live graphs, their latency, and the receptive field of any graph.

`max_conv.streaming(...)` calls this module: it is the function `streaming`.
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
    """A module that is called as the function of its name."""

    def __call__(self, *args: Any, **kwargs: Any) -> StreamingGraph:
        return streaming(*args, **kwargs)


_Callable.__call__.__doc__ = streaming.__doc__
sys.modules[__name__].__class__ = _Callable
