"""Several processes import `max.nn` for the first time. A small package replaces MAX and compiles in the same way."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
STAND_IN = """
import importlib.util, pathlib, shutil, sysconfig, time
import _json
folder = pathlib.Path(__file__).parent / "__mojocache__"
library = folder / "_json.hash-0.so"
if not library.is_file():
    folder.mkdir(exist_ok=True)
    whole = pathlib.Path(_json.__file__).read_bytes()
    with library.open("wb") as file:
        file.write(bytes(len(whole)))
        file.flush()
        time.sleep(1)
        file.seek(0)
        file.write(whole)
spec = importlib.util.spec_from_file_location("_json", library)
value = importlib.util.module_from_spec(spec).scanstring.__name__
"""


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    if "_json" in sys.builtin_module_names:
        pytest.skip("this Python has its C modules inside: no library to copy")
    (tmp_path / "max/nn").mkdir(parents=True)
    (tmp_path / "max/__init__.py").touch()
    (tmp_path / "max/nn/__init__.py").write_text(STAND_IN)
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    return os.environ | {"PYTHONPATH": path, "MAX_CONV_CACHE": str(tmp_path / "cache")}


@pytest.fixture
def library(tmp_path: Path) -> Path:
    return tmp_path / "max/nn/__mojocache__/_json.hash-0.so"


def start(environment: dict[str, str], name: str = "max_conv.conv.max_nn") -> subprocess.Popen[str]:
    code = f"import {name}, max; print(max.nn.value)"
    return subprocess.Popen(
        [sys.executable, "-c", code], env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def start_two(environment: dict[str, str], library: Path, name: str) -> list[subprocess.Popen[str]]:
    """Starts a process, and a second one when the first has written half of the library."""
    first = start(environment, name)
    while not library.is_file() and first.poll() is None:
        time.sleep(0.01)
    return [first, start(environment, name)]


def answers(processes: list[subprocess.Popen[str]]) -> list[tuple[str, str]]:
    return [process.communicate(timeout=60) for process in processes]


def test_the_second_of_two_processes_waits(environment: dict[str, str], library: Path) -> None:
    assert answers(start_two(environment, library, "max_conv.conv.max_nn")) == [("scanstring\n", "")] * 2


def test_without_the_lock_it_finds_half_a_library(environment: dict[str, str], library: Path) -> None:
    first, second = answers(start_two(environment, library, "max.nn"))
    assert first == ("scanstring\n", "") and "ImportError" in second[1]


def test_half_a_library_is_compiled_again(environment: dict[str, str], library: Path) -> None:
    library.parent.mkdir()
    library.write_bytes(bytes(10_000))
    assert answers([start(environment)]) == [("scanstring\n", "")]
    assert library.read_bytes().startswith(b"\x7fELF")


def test_other_errors_stay(environment: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "max/nn/__init__.py").write_text("import nothing_of_this_name")
    ((_, error),) = answers([start(environment)])
    assert "No module named 'nothing_of_this_name'" in error


def test_a_cache_that_cannot_be_written(environment: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "cache").touch()
    assert answers([start(environment)]) == [("scanstring\n", "")]
