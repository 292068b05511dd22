"""What matters when a network is used live: its receptive field and its latency."""

from .describe import describe
from .span import Span

__all__ = [
    "Span",
    "describe",
]
