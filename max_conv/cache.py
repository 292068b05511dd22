"""The user's cache folder, and files and folders that appear whole or not at all."""

import atexit
import contextlib
import functools
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path


def cache_dir() -> Path:
    """Returns the folder that holds compiled kernels and downloaded files.

    `MAX_CONV_CACHE` names it; otherwise it is `max_conv` in `XDG_CACHE_HOME` or `~/.cache`. With `MAX_CONV_CACHE=off` it is
    a folder of this process, which is removed when the process ends.
    """
    folder = os.environ.get("MAX_CONV_CACHE")
    if folder == "off":
        return _of_this_process()
    if folder:
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "max_conv"


@functools.cache
def _of_this_process() -> Path:
    folder = tempfile.mkdtemp(prefix="max_conv.")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


def cache_limit() -> float:
    """Returns the most bytes of compiled graphs that are kept: `MAX_CONV_CACHE_LIMIT`, in GB, by default 2.

    Raises:
        ValueError: If the variable holds no number.
    """
    text = os.environ.get("MAX_CONV_CACHE_LIMIT", "2")
    try:
        return float(text) * 1e9
    except ValueError:
        raise ValueError(f"max_conv: MAX_CONV_CACHE_LIMIT must be a number of GB, but is {text!r}.") from None


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


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yields a path in a temporary folder next to `path`; the file there is renamed to `path` if nothing is raised."""
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        whole = Path(folder) / path.name
        yield whole
        whole.replace(path)
