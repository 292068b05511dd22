"""`max.nn`, imported by one process at a time.

At its first import after an installation, MAX compiles a part of it, writes a library, and then reads that file. A second
process that imports it meanwhile finds half a library. A process that is killed meanwhile leaves half a library for good.
"""

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from ..cache import cache_dir


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Waits until no other process of this user is here. If the cache or the system has no locks, it does not wait."""
    number = -1
    with contextlib.suppress(OSError, ImportError):
        import fcntl

        cache_dir().mkdir(parents=True, exist_ok=True)
        number = os.open(cache_dir() / "import.lock", os.O_CREAT | os.O_RDWR, 0o666)
        fcntl.flock(number, fcntl.LOCK_EX)
    try:
        yield
    finally:
        if number >= 0:
            os.close(number)


if "max.nn" not in sys.modules:
    with alone():
        try:
            import max.nn
        except ImportError as error:
            library = Path(error.path or "")
            if library.parent.name != "__mojocache__":
                raise
            library.unlink(missing_ok=True)
            import max.nn  # noqa: F401

from max import nn  # noqa: E402

# Importing MAX exports this variable, which `os.environ` does not show: new processes would leave the virtual environment.
if "PYTHONEXECUTABLE" not in os.environ:
    os.unsetenv("PYTHONEXECUTABLE")

__all__ = ["nn"]
