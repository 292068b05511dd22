"""Reads checkpoints of every kind, and converts them to the native layout and back. Never imports MAX."""

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
