"""How long each kernel took for a layer on this machine: a table in the user's cache, which `choose` reads."""

import functools
import hashlib
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path

from ..cache import cache_dir, whole_file
from .library import kernel_key
from .processor import processor

Times = dict[str, dict[str, float]]
"""Microseconds by kernel, by the number of outputs: batch size times output length."""


def folder() -> Path:
    """Returns the folder of the tables."""
    return cache_dir() / "tuned"


def table_file() -> Path:
    """Returns the table of these kernels on this processor."""
    facts = f"{processor()} {os.cpu_count()} {kernel_key()}"
    return folder() / f"{hashlib.sha256(facts.encode()).hexdigest()[:16]}.json"


def times(key: str, batch: int | None, outputs: int | None) -> dict[str, float]:
    """Returns the microseconds of each kernel for a layer; empty if it was not timed.

    Args:
        key: `Layer.key`.
        batch, outputs: The batch size and the output length. If both are known, the times of the nearest number of outputs
            count; otherwise, for each kernel, the geometric mean of all.
    """
    if not folder().is_dir():
        return {}
    timed = _read(table_file()).get(key)
    if not timed:
        return {}
    if batch is None or outputs is None:
        kernels = set.intersection(*map(set, timed.values()))
        return {
            kernel: math.exp(sum(math.log(row[kernel]) for row in timed.values()) / len(timed)) for kernel in kernels
        }
    nearest = min(timed, key=lambda count: abs(math.log(int(count) / max(1, batch * outputs))))
    return timed[nearest]


def counts(key: str) -> set[int]:
    """Returns the numbers of outputs for which a layer was timed."""
    return set(map(int, _read(table_file()).get(key, {})))


def layers() -> int:
    """Returns how many layers were timed with these kernels on this processor."""
    return len(_read(table_file()))


def keep(found: Mapping[str, Times]) -> Path:
    """Adds times to this machine's table, which is written whole or not at all. Returns its file."""
    path = table_file()
    path.parent.mkdir(parents=True, exist_ok=True)
    _read.cache_clear()
    table = dict(_read(path))
    for key, timed in found.items():
        table[key] = table.get(key, {}) | timed
    with whole_file(path) as whole:
        whole.write_text(json.dumps(table, indent=1, sort_keys=True))
    _read.cache_clear()
    return path


@functools.cache
def _read(path: Path) -> Mapping[str, Times]:
    """Reads a table; one that is damaged counts as empty."""
    try:
        table = json.loads(path.read_text())
        return {key: _checked(timed) for key, timed in table.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def _checked(timed: Mapping[str, Mapping[str, float]]) -> Times:
    """Returns a layer's times, or raises an error if the values are not times."""
    checked = {str(int(count)): {kernel: float(time) for kernel, time in row.items()} for count, row in timed.items()}
    if not all(int(count) > 0 and row and min(row.values()) > 0 for count, row in checked.items()):
        raise ValueError("a time must be positive")
    return checked
