"""The kernels are compiled once, by the first process that needs them, and are then found."""

import multiprocessing
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from max_conv import cache
from max_conv.conv import library


def ask(folder: str) -> tuple[str, float]:
    os.environ["MAX_CONV_CACHE"] = folder
    path = library.kernel_library()
    return str(path), path.stat().st_mtime


def test_several_processes_at_once(tmp_path: Path) -> None:
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        found = set(pool.map(ask, [str(tmp_path)] * 3))
    assert len(found) == 1
    folders = list((tmp_path / "kernels").iterdir())
    assert [folder.name for folder in folders] == [library.kernel_key()]
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert set(pool.map(ask, [str(tmp_path)])) == found  # found, not compiled again


def test_the_key_follows_the_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(library.SOURCES, tmp_path, dirs_exist_ok=True)
    key = library.kernel_key.__wrapped__
    before = key()
    monkeypatch.setattr(library, "SOURCES", tmp_path)
    assert key() == before
    for name in ("dense.mojo", "recurrent/lstm.mojo"):
        source = (tmp_path / name).read_bytes()
        (tmp_path / name).write_text("# another")
        assert key() != before
        (tmp_path / name).write_bytes(source)
    assert key() == before


def test_no_kernel_knows_a_model() -> None:
    folder = library.SOURCES
    others = [path for path in folder.rglob("*.mojo") if folder / "models" not in path.parents]
    assert (folder / "models").is_dir() and len(others) > 15
    assert [path.name for path in others if re.search(r"^\s*(from|import)\b.*\bmodels\b", path.read_text(), re.M)] == []


def test_kernels_that_do_not_compile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sources = tmp_path / "sources"
    sources.mkdir()
    (sources / "__init__.mojo").write_text("this is no Mojo")
    monkeypatch.setattr(library, "SOURCES", sources)
    monkeypatch.setenv("MAX_CONV_CACHE", str(tmp_path / "cache"))
    with pytest.raises(RuntimeError, match=r"max_conv: the kernels in .*sources do not compile\.(?s:.*)__init__\.mojo"):
        library.kernel_library()
    assert list((tmp_path / "cache").rglob("*")) == [tmp_path / "cache" / "kernels"]


@pytest.mark.parametrize(
    ("environment", "want"),
    [
        ({"MAX_CONV_CACHE": "/a", "XDG_CACHE_HOME": "/b"}, "/a"),
        ({"XDG_CACHE_HOME": "/b"}, "/b/max_conv"),
        ({"HOME": "/c"}, "/c/.cache/max_conv"),
    ],
)
def test_cache_dir(environment: dict[str, str], want: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MAX_CONV_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert cache.cache_dir() == Path(want)


def test_a_deleted_or_emptied_cache_is_filled_again(tmp_path: Path) -> None:
    def fill(folder: Path) -> None:
        (folder / "whole").write_text("")

    folder = tmp_path / "a"
    for _ in range(2):
        assert list(cache.cached_folder(folder, fill).iterdir()) == [folder / "whole"]
        (folder / "whole").unlink()
    assert folder.stat().st_mode & 0o777 == 0o755


def test_a_failed_fill_leaves_nothing(tmp_path: Path) -> None:
    def fill(folder: Path) -> None:
        (folder / "half").write_text("")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        cache.cached_folder(tmp_path / "a" / "b", fill)
    assert list((tmp_path / "a").iterdir()) == []


def test_importing_max_conv_imports_neither_max_nor_torch() -> None:
    code = "import max_conv, max_conv.cli.main, sys; print([m for m in ('max', 'torch', 'numpy', 'rich') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=dict(os.environ))
    assert done.stdout == "[]\n", done.stderr
