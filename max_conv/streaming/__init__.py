"""Signals that come chunk by chunk: live graphs, their latency, and the receptive field of any graph."""

from .describe import describe
from .graph import StreamingGraph, streaming
from .span import Span
from .stream import Stream
from .timing import Timing

__all__ = [
    "Span",
    "Stream",
    "StreamingGraph",
    "Timing",
    "describe",
    "streaming",
]
