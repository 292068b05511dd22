"""Temporary folders in which files are written before they appear, and the removal of folders that killed runs left."""

import contextlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

LOCK = ".max_conv.lock"
"""The file in each of these folders that is locked as long as the run is alive."""


@contextlib.contextmanager
def staging(target: Path) -> Iterator[Path]:
    """Yields an empty folder next to `target`, which is removed at the end. Also removes folders that killed runs left.

    The system frees a lock when its process ends, however it ends: a folder whose lock is free is not in use. On a
    system without such locks nothing is removed.
    """
    _remove_leftovers(target.parent)
    folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        new = folder / "lock"
        new.touch()
        with _locked(new):
            new.rename(folder / LOCK)  # It is locked before another process can find it.
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _remove_leftovers(folder: Path) -> None:
    for path in folder.iterdir():
        ours = re.fullmatch(r"\..+\.safetensors\.[a-z0-9_]{8}", path.name) and not path.is_symlink()
        if not ours or not (path / LOCK).is_file():
            continue
        with _locked(path / LOCK) as free:
            if free:
                shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[bool]:
    """Holds the lock of a file if it is free; yields whether it holds it."""
    fcntl: Any
    try:
        import fcntl
    except ImportError:
        yield False
        return
    held, number = False, -1
    try:
        with contextlib.suppress(OSError):  # another process holds it, it is not readable, or locks do not exist
            number = os.open(path, os.O_RDONLY)
            fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
            held = True
        yield held
    finally:
        if number >= 0:
            os.close(number)
