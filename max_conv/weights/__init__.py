"""Reads checkpoints of every kind, and converts them to the native layout and back. Never imports MAX.

A checkpoint is opened without being loaded: a safetensors header is checked before any data is read, pickles load with
`weights_only`. A `LayerMap` says by name which tensors are filters; sizes never decide. `plan` decides from names what becomes of
each tensor, `build` makes them one at a time, `convert` streams them to a folder next to the target and renames it. A marker in
the metadata keeps the layout and the original names. So conversion is idempotent, converting back needs no patterns, and loading
a file of the wrong layout is an error.
"""

from .assets import resolve
from .checkpoint import open_checkpoint, read_layer
from .convert import Options, convert, read_native, to_native
from .layer_map import LayerMap
from .onnx_file import read_onnx
from .tensors import as_array

__all__ = [
    "LayerMap",
    "Options",
    "as_array",
    "convert",
    "open_checkpoint",
    "read_layer",
    "read_native",
    "read_onnx",
    "resolve",
    "to_native",
]
