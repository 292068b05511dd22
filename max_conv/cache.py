"""The user's cache folder, and files that appear in it whole or not at all."""

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path


def cache_dir() -> Path:
    """Returns the folder that holds compiled kernels and downloaded files.

    `MAX_CONV_CACHE` names it; otherwise it is `max_conv` in `XDG_CACHE_HOME` or `~/.cache`.
    """
    if folder := os.environ.get("MAX_CONV_CACHE"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "max_conv"


def cached_folder(folder: Path, fill: Callable[[Path], None]) -> Path:
    """Returns `folder`; if it does not exist yet, `fill(temporary folder)` makes it.

    Several processes may ask at once: each fills a separate folder, and the first to finish renames it into place.
    """
    if folder.is_dir() and any(folder.iterdir()):
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        fill(staging)
        staging.chmod(0o755)  # others may share the cache
        try:
            staging.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return folder
