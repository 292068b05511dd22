"""How a network is used live: what its outputs see, and how late they come."""

from .describe import describe
from .span import Span

__all__ = [
    "Span",
    "describe",
]
