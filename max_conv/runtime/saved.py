"""Compiled models in one file: a zip of MAX's export, the weights, and the machine that it was made for."""

import io
import json
import os
import platform
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from max.driver import Buffer, accelerator_architecture_name, accelerator_count
from max.dtype import DType
from max.engine import read as read_mef

from ..cache import whole_file
from ..conv.arrays import bytes_of
from ..conv.packing import aligned
from ..conv.processor import cpu_features
from ..streaming.timing import Timing
from .kinds import Alone, from_json, to_json
from .ports import Port

FORMAT = 4
PIECE = 1 << 20
"""Bytes of a saved model that are read at a time."""


class Parts(NamedTuple):
    """The parts of a `Model`, in the order of its arguments."""

    compiled: Any
    weights: Mapping[str, Buffer]
    inputs: Sequence[Port]
    outputs: Sequence[Port]
    alone: Alone | None
    number: int
    timing: Timing | None
    facts: Mapping[str, Any]


def write(path: str | os.PathLike, model: Parts) -> None:
    """Writes a compiled model with its weights to one file: first to a temporary file next to `path`, then renamed."""
    path = Path(path)
    on_gpu = any(port.device != "cpu" for port in (*model.inputs, *model.outputs))
    meta = {
        "format": FORMAT,
        "max": version("max"),
        "machine": platform.machine(),
        "cpu": sorted(cpu_features()),
        "accelerator": accelerator_architecture_name() if on_gpu else None,
        "inputs": [asdict(port) for port in model.inputs],
        "outputs": [asdict(port) for port in model.outputs],
        "alone": model.alone and to_json(model.alone),
        "graph": model.number,
        "timing": model.timing and model.timing.to_json(),
        "facts": dict(model.facts),
        "weights": [{"name": n, "dtype": w.dtype.name, "shape": list(w.shape)} for n, w in model.weights.items()],
    }
    with whole_file(path) as whole:
        mef = whole.with_name(f"{path.name}.mef")
        model.compiled.export_mef(mef)
        with zipfile.ZipFile(whole, "w") as file:
            file.writestr("meta.json", json.dumps(meta, indent=1))
            file.write(mef, "model.mef")
            for number, weight in enumerate(model.weights.values()):
                file.writestr(f"weights/{number}", bytes_of(weight).tobytes())


def read(path: str | os.PathLike) -> Parts:
    """Reads a file that `write` wrote: returns the same parts.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is not a saved model, or was made for another MAX version, CPU or device.
    """
    try:
        with zipfile.ZipFile(path) as file:
            meta = json.loads(file.read("meta.json"))
            if meta["format"] != FORMAT:
                raise ValueError(
                    f"load: {path} has format {meta['format']}, but this max_conv reads {FORMAT}; save it again."
                )
            _check_machine(path, meta)
            weights = {}
            for number, entry in enumerate(meta["weights"]):
                info = file.getinfo(f"weights/{number}")
                with file.open(info) as values:
                    weights[entry["name"]] = _values(values, info.file_size, entry)
            inputs, outputs = [
                [Port(**(entry | {"shape": tuple(entry["shape"])})) for entry in meta[key]]
                for key in ("inputs", "outputs")
            ]
            alone, number = meta["alone"] and from_json(meta["alone"]), meta["graph"]
            timing = meta["timing"] and Timing.from_json(meta["timing"])
            facts = dict(meta["facts"])
            compiled = read_mef(io.BytesIO(file.read("model.mef")))
    except (zipfile.BadZipFile, KeyError, TypeError, json.JSONDecodeError, RuntimeError) as error:
        raise ValueError(f"load: {path} is not a model that max_conv saved, or is damaged ({error}).") from None
    return Parts(compiled, weights, inputs, outputs, alone, number, timing, facts)


def _check_machine(path: Any, meta: Mapping[str, Any]) -> None:
    if meta["max"] != version("max"):
        raise ValueError(
            f"load: {path} was compiled by MAX {meta['max']}, but this is {version('max')}; compile it again."
        )
    if meta["machine"] != platform.machine():
        raise ValueError(
            f"load: {path} was compiled for {meta['machine']}, but this is {platform.machine()}; compile it again."
        )
    if meta["accelerator"] not in (None, accelerator_architecture_name() if accelerator_count() else None):
        raise ValueError(
            f"load: {path} was compiled for the accelerator {meta['accelerator']}, which is not here; compile it again."
        )
    if missing := sorted(set(meta["cpu"]) - cpu_features()):
        raise ValueError(
            f"load: {path} was compiled for a CPU with {', '.join(missing)}, which this one lacks; compile it again."
        )


def _values(file: IO[bytes], size: int, entry: Mapping[str, Any]) -> Buffer:
    """Returns the values in a file. They are never in memory twice."""
    room = aligned((size,), np.uint8)
    for start in range(0, size, PIECE):
        piece = file.read(min(PIECE, size - start))
        room[start : start + len(piece)] = np.frombuffer(piece, np.uint8)
    return Buffer.from_numpy(room).view(DType[entry["dtype"]], entry["shape"])
