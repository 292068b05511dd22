"""How a convolution is computed: geometry, layouts, the choice of a kernel, and the operations and layers of a graph.

`max_conv` itself has the functions that every user needs. The rest, for graphs of networks, is here.
"""

from typing import TYPE_CHECKING

from .. import lazily

if TYPE_CHECKING:
    from .arrays import as_buffer
    from .dispatch import BYTES, PANEL, Layer
    from .geometry import Geometry, Padding, TransposedGeometry
    from .graph import Emitted, custom_op, derived, is_live, record
    from .layouts import FilterLayout, Layout, TransposedFilterLayout, permute
    from .recurrent import lstm
    from .reference import conv1d_ref, conv_transpose1d_ref
    from .whole import signals

__all__ = [
    "BYTES",
    "PANEL",
    "Emitted",
    "FilterLayout",
    "Geometry",
    "Layer",
    "Layout",
    "Padding",
    "TransposedFilterLayout",
    "TransposedGeometry",
    "as_buffer",
    "conv1d_ref",
    "conv_transpose1d_ref",
    "custom_op",
    "derived",
    "is_live",
    "lstm",
    "permute",
    "record",
    "signals",
]
__getattr__ = lazily(
    __name__,
    {
        "BYTES": "dispatch",
        "PANEL": "dispatch",
        "Emitted": "graph",
        "FilterLayout": "layouts",
        "Geometry": "geometry",
        "Layer": "dispatch",
        "Layout": "layouts",
        "Padding": "geometry",
        "TransposedFilterLayout": "layouts",
        "TransposedGeometry": "geometry",
        "as_buffer": "arrays",
        "conv1d_ref": "reference",
        "conv_transpose1d_ref": "reference",
        "custom_op": "graph",
        "derived": "graph",
        "is_live": "graph",
        "lstm": "recurrent",
        "permute": "layouts",
        "record": "graph",
        "signals": "whole",
    },
)
