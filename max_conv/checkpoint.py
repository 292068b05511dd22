"""Checkpoints of other libraries: read, convert to the native filter layout, fold weight norm."""

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np

from .layouts import FilterLayout, check_filter_layout, permute

MARK = "max_conv.filters"
"""The metadata key of converted files: which tensors were permuted, to which layout."""

# safetensors' names for dtypes: in files, and when writing; the width in bytes tells how to carry the bits.
_DTYPES = {
    "F64": ("float64", 8),
    "F32": ("float32", 4),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "F8_E4M3": ("float8_e4m3fn", 1),
    "F8_E5M2": ("float8_e5m2", 1),
    "I64": ("int64", 8),
    "I32": ("int32", 4),
    "I16": ("int16", 2),
    "I8": ("int8", 1),
    "U64": ("uint64", 8),
    "U32": ("uint32", 4),
    "U16": ("uint16", 2),
    "U8": ("uint8", 1),
    "BOOL": ("bool", 1),
}


@dataclass(frozen=True)
class Tensor:
    """A tensor's bits: safetensors' name of its dtype, and an array of unsigned ints as wide as the dtype.

    Bits are moved, never values: conversion is lossless for dtypes that NumPy does not know, too.
    """

    dtype: str
    bits: np.ndarray


def convert(
    source: str | os.PathLike,
    target: str | os.PathLike,
    filters: Sequence[str],
    *,
    layout: FilterLayout = "FCS",
    to: FilterLayout = "SCF",
    force: bool = False,
) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
    """Copies a checkpoint to a safetensors file, with its Conv1d filters in another layout.

    Args:
        source: A `.safetensors` file, a sharded `.index.json`, or a PyTorch `.pt`, `.pth` or `.bin` file.
        target: The `.safetensors` file to write. It appears whole or not at all.
        filters: Shell patterns of the names of Conv1d filters, such as "encoder.conv*.weight". The layer decides
            which tensors are filters, never their sizes: what no pattern names is copied bit for bit.
        layout: The filters' axis order in `source`: "FCS" is PyTorch's.
        to: The axis order to write: "SCF" is the native one.
        force: Overwrites `target`.

    Returns:
        The permuted tensors by name: shape before, shape after.

    Raises:
        ValueError: A pattern that names nothing or something that is no filter, a damaged or converted file.
        FileExistsError: If `target` exists and `force` is not given.
    """
    check_filter_layout(layout)
    check_filter_layout(to)
    target = Path(target)
    if target.suffix != ".safetensors":
        raise ValueError(f"convert: the output must end in .safetensors, but is {target}.")
    if target.exists() and not force:
        raise FileExistsError(f"convert: {target} exists already; pass --force to overwrite it.")
    tensors, metadata = read_checkpoint(source)
    if MARK in metadata:
        raise ValueError(f"convert: {source} was converted already ({metadata[MARK]}); convert the original instead.")
    names = _match(tensors, filters)
    done = {}
    for name in names:
        tensor = tensors[name]
        if tensor.bits.ndim != 3:
            raise ValueError(
                f"convert: {name} has shape {tensor.bits.shape}, but a Conv1d filter has 3 axes; name only filters."
            )
        tensors[name] = Tensor(tensor.dtype, permute(tensor.bits, layout, to))
        done[name] = (tensor.bits.shape, tensors[name].bits.shape)
    write_safetensors(target, tensors, {**metadata, MARK: json.dumps({"layout": to, "names": sorted(names)})})
    return done


def _match(tensors: dict[str, Tensor], patterns: Sequence[str]) -> list[str]:
    if not patterns:
        raise ValueError("convert: name the Conv1d filters with --conv PATTERN; nothing is guessed from shapes.")
    names: dict[str, None] = {}
    for pattern in patterns:
        found = [name for name in tensors if fnmatchcase(name, pattern)]
        if not found:
            raise ValueError(f"convert: no tensor is named like {pattern!r}; the file has {_some(list(tensors))}.")
        names.update(dict.fromkeys(found))
    return list(names)


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def read_checkpoint(path: str | os.PathLike) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Reads every tensor of a checkpoint, and its metadata.

    Raises:
        FileNotFoundError: If there is no such file, or a shard is missing.
        ValueError: If the file is of another kind, damaged, or holds anything but tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint: there is no file {path}.")
    if path.name.endswith(".index.json"):
        return _read_sharded(path)
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    if path.suffix in (".pt", ".pth", ".bin"):
        return _read_torch(path), {}
    raise ValueError(f"checkpoint: {path} must end in .safetensors, .index.json, .pt, .pth or .bin.")


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    safetensors = _safetensors()
    try:
        entries = safetensors.deserialize(path.read_bytes())
        with safetensors.safe_open(path, "np") as file:
            metadata = file.metadata() or {}
    except safetensors.SafetensorError as error:
        raise ValueError(f"checkpoint: {path} is not a safetensors file, or is damaged ({error}).") from None
    tensors = {}
    for name, entry in entries:
        if entry["dtype"] not in _DTYPES:
            raise ValueError(f"checkpoint: {name} in {path} is {entry['dtype']}, which is not supported.")
        bits = np.frombuffer(entry["data"], f"u{_DTYPES[entry['dtype']][1]}").reshape(entry["shape"])
        tensors[name] = Tensor(entry["dtype"], bits)
    return tensors, metadata


def _read_sharded(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        places = json.loads(path.read_text())["weight_map"]
        shards = sorted(set(places.values()))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"checkpoint: {path} is not an index of shards: it has no weight_map.") from None
    tensors: dict[str, Tensor] = {}
    for shard in shards:
        if not isinstance(shard, str) or Path(shard).name != shard or shard.endswith(".json"):
            raise ValueError(f"checkpoint: {path} names the shard {shard!r}, but shards must lie beside it.")
        found = read_checkpoint(path.parent / shard)[0]
        wanted = [name for name, place in places.items() if place == shard]
        if missing := [name for name in wanted if name not in found]:
            raise ValueError(f"checkpoint: {shard} lacks {missing[0]}, which {path.name} says it holds.")
        tensors.update((name, found[name]) for name in wanted)
    return tensors, {}


def _read_torch(path: Path) -> dict[str, Tensor]:
    try:
        import torch
    except ImportError:
        raise ImportError(f"checkpoint: reading {path} needs PyTorch; install torch.") from None
    try:
        # weights_only refuses pickles that would run code.
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"checkpoint: {path} is not a PyTorch file of weights alone, or is damaged ({reason})."
        ) from None
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise ValueError(f"checkpoint: {path} holds more than a state dict; save module.state_dict() alone.")
    codes = {name: code for code, (name, _) in _DTYPES.items()}
    tensors = {}
    for name, value in state.items():
        dtype = str(value.dtype).removeprefix("torch.")
        if dtype not in codes:
            raise ValueError(f"checkpoint: {name} in {path} is {dtype}, which is not supported.")
        width = _DTYPES[codes[dtype]][1]
        flat = value.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
        tensors[name] = Tensor(codes[dtype], flat.view(f"u{width}").reshape(value.shape))
    return tensors


def write_safetensors(path: str | os.PathLike, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Writes tensors to a safetensors file, which appears whole or not at all."""
    safetensors = _safetensors()
    path = Path(path)
    kept = {name: np.ascontiguousarray(tensor.bits) for name, tensor in tensors.items()}
    specs = {
        name: safetensors.TensorSpec(
            dtype=_DTYPES[tensors[name].dtype][0],
            shape=tensors[name].bits.shape,
            data_ptr=bits.ctypes.data,
            data_len=bits.nbytes,
        )
        for name, bits in kept.items()
    }
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        whole = Path(folder) / "whole"
        safetensors.serialize_file(specs, whole, metadata)
        whole.replace(path)


def read_layer(path: str | os.PathLike, name: str) -> tuple[dict[str, Any], Any]:
    """Reads one layer of a checkpoint: its weights as MAX buffers, and their MAX dtype.

    Args:
        path: As for `read_checkpoint`.
        name: The layer: its tensors are `{name}.weight` and, where there is one, `{name}.bias`.

    Raises:
        ValueError: If the checkpoint has no such layer, or its weight and bias differ in dtype.
    """
    from max.driver import Buffer
    from max.dtype import DType

    tensors, _ = read_checkpoint(path)
    found = {key: tensors[f"{name}.{key}"] for key in ("weight", "bias") if f"{name}.{key}" in tensors}
    if "weight" not in found:
        raise ValueError(f"checkpoint: {path} has no tensor {name}.weight; it has {_some(list(tensors))}.")
    dtypes = {tensor.dtype for tensor in found.values()}
    if len(dtypes) > 1:
        raise ValueError(f"checkpoint: {name} in {path} mixes {' and '.join(sorted(dtypes))}; cast one to the other.")
    dtype = DType[_DTYPES[found["weight"].dtype][0]]
    return {
        key: Buffer.from_numpy(np.ascontiguousarray(tensor.bits)).view(dtype, list(tensor.bits.shape))
        for key, tensor in found.items()
    }, dtype


def _safetensors() -> Any:
    try:
        import safetensors
    except ImportError:
        raise ImportError(
            "checkpoint: safetensors files need the package safetensors; pip install 'max-conv[safetensors]'."
        ) from None
    return safetensors


def fold_weight_norm(g: np.ndarray, v: np.ndarray, dim: int | None = 0) -> np.ndarray:
    """Returns the filter that weight norm's magnitude `g` and direction `v` stand for: `g * v / |v|`, in float64.

    Args:
        g: Broadcasts against `v`: ones in every axis but `dim`.
        v: The direction, any shape.
        dim: The axis that keeps a norm of its own; None and -1 are one norm of the whole, as in PyTorch.

    >>> fold_weight_norm(np.array([[10.0]]), np.array([[3.0, 4.0]])).tolist()
    [[6.0, 8.0]]

    Source: Salimans and Kingma, Weight Normalization, 2016, https://arxiv.org/abs/1602.07868
    """
    v = np.asarray(v, np.float64)
    if dim is not None and dim < -1:
        dim += v.ndim  # -1 is PyTorch's other word for the whole
    axes = tuple(axis for axis in range(v.ndim) if axis != dim)
    return np.asarray(g, np.float64) * (v / np.sqrt(np.sum(v * v, axis=axes, keepdims=True)))


def weight_norm_names(state: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a state dict with weight norm's parts under their old names, `weight_g` and `weight_v`.

    >>> list(weight_norm_names({"up.parametrizations.weight.original0": 1, "up.bias": 2}))
    ['up.weight_g', 'up.bias']
    """
    parts = {"parametrizations.weight.original0": "weight_g", "parametrizations.weight.original1": "weight_v"}
    renamed = {}
    for name, value in state.items():
        for spelling, part in parts.items():
            if name == spelling or name.endswith(f".{spelling}"):
                name = name.removesuffix(spelling) + part
        renamed[name] = value
    return renamed
