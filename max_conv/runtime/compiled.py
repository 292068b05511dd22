"""Compiled graphs in the user's cache: a graph that this machine has compiled before is read, not compiled."""

import contextlib
import functools
import hashlib
import importlib.metadata
import io
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from max.driver import accelerator_architecture_name, accelerator_count
from max.engine import read
from max.graph import Graph
from max.mlir import ArrayAttr

from ..cache import cache_dir, cache_limit, whole_file
from ..conv.library import kernel_key, kernel_library
from ..conv.processor import cpu_features, cpu_target

PATHS = "_kernel_library_paths"
"""The attribute of a graph that holds the paths of its kernel libraries."""
version = functools.cache(importlib.metadata.version)  # reading a package's metadata takes milliseconds
FORMAT = "2"
"""The format of the files; part of every key."""
DIGEST = hashlib.sha256().digest_size


class Found(NamedTuple):
    """A compiled graph: MAX's result, the graph's number among the graphs that were compiled together, and all their keys.

    The number identifies the graph, not the name: MAX's own cache ignores the names of graphs.
    """

    compiled: Any
    number: int = 0
    keys: tuple[str, ...] = ()


def compiled(graph: Graph, compile: Callable[[], Any]) -> Found:
    """Returns a compiled graph: from the cache, or from `compile()`, which then goes into the cache.

    Weights are never in the cache: they are bound when a compiled graph becomes a model. A cache that cannot be read or
    written costs a compile and nothing else.
    """
    key = key_of(graph)
    if (found := find(key)) is not None:
        return found
    result = compile()
    keep(result, [key])
    return Found(result)


def find(key: str) -> Found | None:
    """Returns the compiled graph of a key, or None if there is none or it is damaged."""
    found = _read(_path(key))
    return found._replace(number=found.keys.index(key)) if found and key in found.keys else None


def keep(result: Any, keys: Sequence[str]) -> None:
    """Writes MAX's result, one graph or several, to the cache: one file with a name for each graph."""
    first, *others = map(_path, keys)
    with contextlib.suppress(OSError):
        _write(first, result, keys)
        for path in others:
            path.unlink(missing_ok=True)
            path.hardlink_to(first)
        _prune(first.parent)


def _path(key: str) -> Path:
    return cache_dir() / "graphs" / f"{key}.mef"


def key_of(graph: Graph) -> str:
    """Returns the name of a compiled graph: a digest of everything that its machine code depends on.

    Bytecode holds every constant bit by bit, and no place in a source file. The paths of kernel libraries are left out:
    for this package's library the digest has its sources, for any other library its content.
    """
    ours = kernel_library()
    libraries = [
        kernel_key() if path == ours else hashlib.sha256(path.read_bytes()).hexdigest()
        for path in graph.kernel_libraries_paths
    ]
    devices = [accelerator_architecture_name()] * accelerator_count() if accelerator_count() else []
    facts = [
        FORMAT,
        version("max"),
        version("mojo-compiler"),
        *libraries,
        *devices,
        cpu_target(),
        *sorted(cpu_features()),
    ]
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


def _read(path: Path) -> Found | None:
    """Returns the content of a file, with the number 0; None if there is no file or it is damaged."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    content, digest = content[:-DIGEST], content[-DIGEST:]
    if hashlib.sha256(content).digest() != digest:
        return None
    mef, _, keys = content.rpartition(b"\n")
    try:
        found = read(io.BytesIO(mef))
    except RuntimeError:
        return None
    with contextlib.suppress(OSError):
        os.utime(path)  # the least recently used go first
    return Found(found, 0, tuple(keys.decode().split()))


def _write(path: Path, result: Any, keys: Sequence[str]) -> None:
    """Writes MAX's file, a line with the keys of its graphs, and the digest of both."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as whole:
        result.export_mef(whole)
        digest = hashlib.sha256()
        with whole.open("r+b") as file:
            digest.update(file.read())
            line = f"\n{' '.join(keys)}".encode()
            digest.update(line)
            file.write(line + digest.digest())


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
