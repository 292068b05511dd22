"""Compiled graphs in the user's cache: a graph that this machine has compiled before is read, not compiled."""

import contextlib
import hashlib
import io
import os
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from max.driver import accelerator_architecture_name, accelerator_count
from max.engine import read
from max.graph import Graph
from max.mlir import ArrayAttr

from ..cache import cache_dir, cache_limit, whole_file
from ..conv.library import kernel_key, kernel_library
from ..conv.packing import cpu_features

PATHS = "_kernel_library_paths"
"""The attribute of a graph that holds the paths of its kernel libraries."""
DIGEST = hashlib.sha256().digest_size


def compiled(graph: Graph, compile: Callable[[], Any]) -> Any:
    """Returns a compiled graph: from the cache, or from `compile()`, which then goes into the cache.

    Weights are never in the cache: they are bound when a compiled graph becomes a model. A cache that cannot be read or
    written costs a compile and nothing else.
    """
    key = key_of(graph)
    if (found := find(key)) is not None:
        return found
    result = compile()
    keep(result, [key])
    return result


def find(key: str) -> Any:
    """Returns the compiled graph of a key, or None where there is none or it is damaged."""
    return _read(_path(key))


def keep(result: Any, keys: Sequence[str]) -> None:
    """Writes what was compiled, one graph or several, to the cache: one file with a name for each graph."""
    first, *others = map(_path, keys)
    with contextlib.suppress(OSError):
        _write(first, result)
        for path in others:
            path.unlink(missing_ok=True)
            path.hardlink_to(first)
        _prune(first.parent)


def _path(key: str) -> Path:
    return cache_dir() / "graphs" / f"{key}.mef"


def key_of(graph: Graph) -> str:
    """Returns the name of a compiled graph: a digest of all that its machine code depends on.

    Bytecode holds every constant bit by bit, and no place in a source file. The paths of kernel libraries are left out:
    this package's library counts by its sources, any other by its content.
    """
    ours = kernel_library()
    libraries = [
        kernel_key() if path == ours else hashlib.sha256(path.read_bytes()).hexdigest()
        for path in graph.kernel_libraries_paths
    ]
    devices = [accelerator_architecture_name()] * accelerator_count() if accelerator_count() else []
    facts = [version("max"), version("mojo-compiler"), *libraries, *devices, *sorted(cpu_features())]
    digest = hashlib.sha256("\n".join(facts).encode() + b"\0")
    attributes = graph._mlir_op.attributes
    paths = attributes[PATHS]
    attributes[PATHS] = ArrayAttr.get([])
    try:
        text = io.BytesIO()
        graph._mlir_op.write_bytecode(text)
    finally:
        attributes[PATHS] = paths
    digest.update(text.getvalue())
    return digest.hexdigest()[:32]


def _read(path: Path) -> Any:
    """Returns the compiled graph in a file, or None where there is none or it is damaged."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    mef, digest = content[:-DIGEST], content[-DIGEST:]
    if hashlib.sha256(mef).digest() != digest:
        return None
    try:
        found = read(io.BytesIO(mef))
    except RuntimeError:
        return None
    with contextlib.suppress(OSError):
        os.utime(path)  # the least recently used go first
    return found


def _write(path: Path, result: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as mef:
        result.export_mef(mef)
        digest = hashlib.sha256(mef.read_bytes()).digest()
        with mef.open("ab") as file:
            file.write(digest)


def _prune(folder: Path) -> None:
    """Removes the compiled graphs that were used least recently, until the rest fits the limit."""
    files: dict[int, tuple[float, int, list[Path]]] = {}
    for path in folder.glob("*.mef"):
        with contextlib.suppress(OSError):  # another process removed it
            facts = path.stat()
            files.setdefault(facts.st_ino, (facts.st_mtime, facts.st_size, []))[2].append(path)
    left, limit = sum(size for _, size, _ in files.values()), cache_limit()
    for _, size, paths in sorted(files.values()):
        if left <= limit:
            return
        for path in paths:
            path.unlink(missing_ok=True)
        left -= size
