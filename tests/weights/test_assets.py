"""Files from wheels. The wheel is made here, so that pip finds it without a network."""

import hashlib
import os
import sys
import zipfile
from pathlib import Path

import pytest

from max_conv.weights import assets
from max_conv.weights.assets import resolve

FILES = {"parcel/data/weights.bin": b"\x01\x02", "parcel/data/notes.txt": b"words", "parcel/__init__.py": b""}
INFO = {
    "METADATA": b"Metadata-Version: 2.1\nName: parcel\nVersion: 1.5\n",
    "WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    "RECORD": b"",
}


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A wheel in a folder, which is all that pip can see, and an empty cache."""
    shelf = tmp_path / "shelf"
    shelf.mkdir()
    path = shelf / "parcel-1.5-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in {**FILES, **{f"parcel-1.5.dist-info/{name}": text for name, text in INFO.items()}}.items():
            archive.writestr(name, content)
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(shelf))
    monkeypatch.setenv("MAX_CONV_CACHE", str(tmp_path / "cache"))
    return path


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("pinned", [False, True])
def test_extracts_one_file_and_keeps_it(
    wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str, pinned: bool
) -> None:
    reference = f"pypi://parcel==1.5/{file}" + (f"#sha256={digest(wheel).upper()}" if pinned else "")
    path = resolve(reference)
    assert path.name == file.rsplit("/")[-1]
    assert path.read_bytes() == FILES[file]
    assert [found for found in (tmp_path / "cache").rglob("*") if found.is_file()] == [path]
    monkeypatch.setattr(assets.subprocess, "run", None)  # pip is not needed the second time
    assert resolve(reference) == path


def test_a_new_pin_is_not_served_from_the_cache(wheel: Path) -> None:
    resolve("pypi://parcel==1.5/parcel/data/weights.bin")
    with pytest.raises(ValueError, match="has the SHA-256"):
        resolve("pypi://parcel==1.5/parcel/data/weights.bin#sha256=" + "0" * 64)


def test_takes_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "weights.bin"
    file.touch()
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve(file) == resolve(str(file)) == resolve("~/weights.bin") == file


FILE = "parcel/data/weights.bin"
ERRORS = [
    ("nowhere.bin", FileNotFoundError, "assets: nowhere.bin does not exist; pass the path of a file, pypi://PACK"),
    ("/", FileNotFoundError, "assets: / is a folder, not a file; "),
    (
        "hub://parcel",
        ValueError,
        "assets: hub://parcel starts with hub://, but only paths and pypi://, hf:// are known.",
    ),
    ("hf://repo/file", ValueError, "assets: 'hf://repo/file' does not read hf://ORG/REPO/FILE or hf://ORG/REPO@REV"),
    ("hf://org/repo/../file", ValueError, "does not read hf://ORG/REPO/FILE"),
    ("hf://org/repo@/file", ValueError, "does not read hf://ORG/REPO/FILE"),
    ("pypi://parcel", ValueError, "assets: pypi://parcel does not read pypi://PACKAGE==VERSION/FILE"),
    ("pypi://--x==1/a", ValueError, "does not read pypi://PACKAGE==VERSION/FILE"),
    (f"pypi://parcel==1.5/{FILE}#sha256=12", ValueError, "or the same with #sha256=HEX."),
    ("pypi://parcel==1.5/../a", ValueError, "by its plain path, but names '../a'."),
    ("pypi://parcel==1.5//a", ValueError, "but names '/a'."),
    ("pypi://parcel==1.5/a/./b", ValueError, "but names 'a/./b'."),
    ("pypi://parcel==1.5/a\\b", ValueError, "but names 'a\\\\b'."),
    (
        f"pypi://parcel==1.5/{FILE}#sha256={'0' * 64}",
        ValueError,
        "assets: parcel-1.5-py3-none-any.whl has the SHA-256 ",
    ),
    (
        "pypi://parcel==1.5/parcel/data/weight.bin",
        FileNotFoundError,
        "assets: parcel-1.5-py3-none-any.whl has no file parcel/data/weight.bin "
        "(pypi://parcel==1.5/parcel/data/weight.bin); it has parcel/data/weights.bin",
    ),
    (
        f"pypi://parcel==1.6/{FILE}",
        OSError,
        f"assets: pypi://parcel==1.6/{FILE} cannot be downloaded; pip says: No matching distribution found for "
        "parcel==1.6.",
    ),
]


@pytest.mark.parametrize(("reference", "kind", "sentence"), ERRORS)
def test_errors_leave_nothing_behind(
    wheel: Path, tmp_path: Path, reference: str, kind: type[Exception], sentence: str
) -> None:
    with pytest.raises(kind) as caught:
        resolve(reference)
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not [found for found in (tmp_path / "cache").rglob("*") if found.is_file()]


def test_no_network(wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_FIND_LINKS")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "1")
    with pytest.raises(ConnectionError, match="because the package index does not answer; check the network"):
        resolve(f"pypi://parcel==1.5/{FILE}")


def test_no_pip(wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\necho '{python}: No module named pip' >&2\nexit 1\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    with pytest.raises(OSError, match=r"needs pip to be downloaded, but .*/python has none; run -m ensurepip\."):
        resolve(f"pypi://parcel==1.5/{FILE}")


class Hub:
    """Replaces huggingface_hub, which would need a network."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.asked: list[tuple[str, str, str | None]] = []

    def hf_hub_download(self, repo_id: str, filename: str, *, revision: str | None = None) -> str:
        self.asked.append((repo_id, filename, revision))
        if not (self.folder / filename).is_file():
            raise LookupError(f"404 Client Error: {filename} not found\nRequest ID: 1")
        return str(self.folder / filename)


def test_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/model.bin").touch()
    assert resolve("hf://org/repo/sub/model.bin") == resolve("hf://org/re.po@v1/sub/model.bin")
    assert hub.asked == [("org/repo", "sub/model.bin", None), ("org/re.po", "sub/model.bin", "v1")]
    with pytest.raises(
        OSError, match=r"^assets: hf://org/repo/gone cannot be .* says: 404 Client Error: gone not found\.$"
    ):
        resolve("hf://org/repo/gone")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match=r"^assets: hf://org/repo/a needs the package huggingface_hub; pip install "):
        resolve("hf://org/repo/a")
