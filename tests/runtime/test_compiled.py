"""The cache of compiled graphs: which graphs are read, which are compiled again, and the cost of a broken cache."""

import io
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from max.dtype import DType
from max.graph import Graph, TensorType, ops

import max_conv
from harness import HOST
from max_conv import cache
from max_conv.conv import library
from max_conv.runtime import compiled


class Compiled:
    """Replaces a compiled graph; its file holds a number."""

    made = 0

    def __init__(self) -> None:
        Compiled.made += 1
        self.content = str(Compiled.made)

    def export_mef(self, path: Path) -> None:
        path.write_text(self.content)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and numbers instead of compiled graphs."""
    monkeypatch.setattr(compiled, "cache_dir", lambda: tmp_path)
    monkeypatch.setattr(compiled, "read", lambda file: file.read().decode())
    monkeypatch.setattr(Compiled, "made", 0)
    return tmp_path / "graphs"


def graph(
    size: Any = "n", value: float = 1.0, dtype: DType = DType.float32, name: str = "g", kernel: str = "dense"
) -> Graph:
    with max_conv.PackedGraph(name, input_types=[TensorType(dtype, [1, size, 4], HOST)], exact=True) as made:
        x = made.inputs[0].tensor
        w = ops.constant(np.full((3, 4, 8), value, dtype.to_numpy()), dtype, device=HOST)
        made.output(max_conv.conv1d(x, w, padding=1, stride=2 if kernel == "strided" else 1))
    return made


def ask(made: Graph) -> str:
    """Returns the number of a graph: the number of the compile that made it."""
    found = compiled.compiled(made, Compiled).compiled
    return found if isinstance(found, str) else found.content


def test_the_same_graph_is_read(folder: Path) -> None:
    assert [ask(graph()) for _ in range(3)] == ["1", "1", "1"]
    assert [path.suffix for path in folder.iterdir()] == [".mef"]


CHANGES: dict[str, Callable[[pytest.MonkeyPatch], Graph]] = {
    "size": lambda patch: graph(size=9),
    "a constant's last bit": lambda patch: graph(value=float(np.nextafter(np.float32(1), np.float32(2)))),
    "dtype": lambda patch: graph(dtype=DType.float64),
    "stride": lambda patch: graph(kernel="strided"),
    "kernels": lambda patch: patch.setattr(compiled, "kernel_key", lambda: "others") or graph(),
    "version": lambda patch: patch.setattr(compiled, "version", lambda name: "99") or graph(),
    "processor": lambda patch: patch.setattr(compiled, "cpu_features", lambda: frozenset(["sve"])) or graph(),
    "target": lambda patch: patch.setattr(compiled, "cpu_target", lambda: "haswell") or graph(),
    "accelerator": lambda patch: (
        patch.setattr(compiled, "accelerator_count", lambda: 1)
        or patch.setattr(compiled, "accelerator_architecture_name", lambda: "sm_90a")
        or graph()
    ),
}


@pytest.mark.parametrize("change", list(CHANGES))
def test_another_graph_or_machine_is_compiled(change: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert ask(graph()) == "1"
    assert ask(CHANGES[change](monkeypatch)) == "2"
    monkeypatch.undo()


def test_the_place_of_the_cache_is_not_in_the_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys, found = [], library.kernel_library().parent
    for name in ("a", "b"):
        shutil.copytree(found, tmp_path / name / "kernels" / found.name)  # which are not compiled again
        monkeypatch.setenv("MAX_CONV_CACHE", str(tmp_path / name))
        keys.append(compiled.key_of(graph()))
    assert keys[0] == keys[1] and library.kernel_library().parent.parent == tmp_path / "b" / "kernels"


def test_another_library_counts_by_its_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, other = graph(), tmp_path / "other.mojoc"
    keys = []
    for content in ("one", "two", "one"):
        other.write_text(content)
        monkeypatch.setattr(type(made), "kernel_libraries_paths", [library.kernel_library(), other])
        keys.append(compiled.key_of(made))
    assert keys[0] == keys[2] != keys[1]


def test_the_graph_is_as_before(folder: Path) -> None:
    made = graph()
    before = str(made)
    compiled.key_of(made)
    assert str(made) == before and "max_conv_kernels.mojoc" in before


def test_graphs_that_were_compiled_together(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One file with a name for each graph; a graph is found by its key, and all are removed together."""
    keys = [compiled.key_of(graph(size=size)) for size in (3, 4, 5)]
    compiled.keep(Compiled(), keys)
    assert [compiled.find(key) for key in keys] == [("1", number, tuple(keys)) for number in range(3)]
    assert len({path.stat().st_ino for path in folder.iterdir()}) == 1
    (folder / f"{keys[2]}.mef").replace(folder / "other.mef")
    assert compiled.find("other") is None
    monkeypatch.setenv("MAX_CONV_CACHE_LIMIT", "0")
    compiled._prune(folder)
    assert not list(folder.iterdir())


@pytest.mark.parametrize(
    "damage", [lambda c: c[:-1], lambda c: b"", lambda c: bytes([c[0] ^ 1]) + c[1:], lambda c: c + b"x"]
)
def test_a_damaged_file_is_made_again(damage: Callable[[bytes], bytes], folder: Path) -> None:
    ask(graph())
    (path,) = folder.iterdir()
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    assert ask(graph()) == "2" and ask(graph()) == "2"


def test_a_file_that_max_cannot_read_is_made_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(file: io.BytesIO) -> None:
        raise RuntimeError("not a MEF")

    ask(graph())
    monkeypatch.setattr(compiled, "read", refuse)
    assert ask(graph()) == "2"


def test_no_room_costs_a_compile(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Compiled, path: Path) -> None:
        path.write_text("half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Compiled, "export_mef", full)
    assert [ask(graph()) for _ in range(2)] == ["1", "2"] and not list(folder.iterdir())


def test_a_cache_that_is_no_folder_costs_a_compile(folder: Path) -> None:
    folder.write_text("")
    assert [ask(graph()) for _ in range(2)] == ["1", "2"]


def test_the_least_recently_used_go_first(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for size in (3, 4, 5):
        ask(graph(size=size))
    for age, path in enumerate(sorted(folder.iterdir(), key=lambda path: path.stat().st_mtime_ns)):
        os.utime(path, (age, age))
    ask(graph(size=3))  # the oldest is used again
    size = max(path.stat().st_size for path in folder.iterdir())
    monkeypatch.setenv("MAX_CONV_CACHE_LIMIT", str(3.5 * size / 1e9))
    ask(graph(size=6))
    assert len(list(folder.iterdir())) == 3
    assert [ask(graph(size=size)) for size in (3, 5, 6)] == ["1", "3", "4"]


def test_a_limit_that_is_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAX_CONV_CACHE_LIMIT", "2GB")
    with pytest.raises(ValueError, match=r"^max_conv: MAX_CONV_CACHE_LIMIT must be a number of GB, but is '2GB'\.$"):
        cache.cache_limit()


REAL = """
import sys, numpy as np, max_conv
from max.dtype import DType
from max.graph import TensorType, DeviceRef
from max.engine import InferenceSession
real = InferenceSession.compile
def counted(self, graph, **options):
    print("compiled")
    return real(self, graph, **options)
InferenceSession.compile = counted
x = TensorType(DType.float32, ["n"], DeviceRef.CPU())
print(max_conv.compile(lambda x: x, [x])(np.arange(3, dtype=np.float32)).tolist())
"""


def test_processes_share_it(tmp_path: Path) -> None:
    """Two at once, each of which may compile; a third reads. Without a cache no file is left."""
    folder = tmp_path / "cache"

    def start(cache: str) -> subprocess.Popen[str]:
        environment = {**os.environ, "MAX_CONV_CACHE": cache, "TMPDIR": str(tmp_path)}
        return subprocess.Popen([sys.executable, "-c", REAL], stdout=subprocess.PIPE, text=True, env=environment)

    said = [process.communicate()[0].splitlines() for process in [start(str(folder)) for _ in range(2)]]
    assert {lines[-1] for lines in said} == {"[0.0, 1.0, 2.0]"} and ["compiled", "[0.0, 1.0, 2.0]"] in said
    assert start(str(folder)).communicate()[0].splitlines() == ["[0.0, 1.0, 2.0]"]
    assert [path.suffix for path in (folder / "graphs").iterdir()] == [".mef"]
    assert start("off").communicate()[0].splitlines() == ["compiled", "[0.0, 1.0, 2.0]"]
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]
