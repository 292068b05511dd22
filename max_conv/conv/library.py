"""The Mojo kernels, compiled once per machine."""

import functools
import hashlib
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path

from ..cache import cache_dir, cached_folder

SOURCES = Path(__file__).parent / "kernels"
FILE = "max_conv_kernels.mojoc"


def kernel_library() -> Path:
    """Returns the compiled kernels, a `.mojoc` file for `Graph(custom_extensions=[...])`.

    The first call on a machine compiles the Mojo sources in `kernels/`, next to this file, into the user's cache (about
    a second). The name of the cache folder depends on the sources and the Mojo version. Several processes may start at
    once.

    Raises:
        RuntimeError: If the kernels do not compile, with the compiler's message.
    """
    return cached_folder(library_path().parent, _compile) / FILE


def library_path() -> Path:
    """Returns the path of the compiled kernels, whether the file exists yet or not."""
    return cache_dir() / "kernels" / kernel_key() / FILE


@functools.cache
def kernel_key() -> str:
    """Returns the name of the compiled kernels: a digest of their sources, the Mojo version and the machine's type."""
    digest = hashlib.sha256(f"{version('mojo-compiler')} {platform.machine()}".encode())
    for source in sorted(SOURCES.rglob("*.mojo")):
        digest.update(source.relative_to(SOURCES).as_posix().encode() + b"\0" + source.read_bytes())
    return digest.hexdigest()[:16]


def _compile(folder: Path) -> None:
    from mojo.run import subprocess_run_mojo

    # The compiler stores the file's name in the file, so the final name has to be given here.
    command = ["precompile", str(SOURCES), "-o", str(folder / FILE)]
    try:
        subprocess_run_mojo(command, check=True, capture_output=True, text=True)
    except subprocess.CalledProcessError as error:
        raise RuntimeError(f"max_conv: the kernels in {SOURCES} do not compile.\n{error.stderr}") from None
