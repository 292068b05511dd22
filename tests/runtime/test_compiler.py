"""Compiles in a separate process: when there is one, its result, what happens if it fails, and that it never stays."""

import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from max.dtype import DType
from max.graph import Graph, TensorType

from harness import HOST
from max_conv import PackedGraph
from max_conv.conv.library import kernel_library
from max_conv.runtime import compiler
from max_conv.runtime.devices import session_of

X = np.arange(6, dtype=np.float32).reshape(2, 3)


@pytest.fixture(scope="module")
def graph() -> Graph:
    """The graph of `test_session.two`, which is compiled in any case."""
    x = TensorType(DType.float32, ["n", 3], HOST)
    session_of()  # sets the processor to compile for
    return PackedGraph("two", lambda a, b: (a + b, a - b), input_types=[x, x])


def answers(result: Any) -> list[list[list[float]]]:
    (model,) = session_of().init_all(result).values()
    return [output.to_numpy().tolist() for output in model.execute(X, 2 * X)]


WANT = [(3 * X).tolist(), (-X).tolist()]


@pytest.mark.parametrize(
    ("cpus", "operations", "python", "want"),
    [
        (2, 2, "/bin/python3.11", True),
        (2, 1000, "/bin/python3.11", False),
        (1, 2, "/bin/python3.11", False),
        (8, 2, "/bin/python3.11", False),
        (2, 2, "/bin/uwsgi", False),
        (2, 2, None, False),
    ],
)
def test_when_there_is_one(
    graph: Graph, monkeypatch: pytest.MonkeyPatch, cpus: int, operations: int, python: str | None, want: bool
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cpus)))
    monkeypatch.setattr(sys, "executable", python)
    monkeypatch.setattr(compiler, "OPERATIONS", operations)
    monkeypatch.setattr(compiler, "with_one_thread", lambda *_: "theirs")
    monkeypatch.setattr(compiler, "session_of", lambda _: FakeSession())
    assert compiler.compile_graphs(graph) == ("theirs" if want else "ours")
    assert compiler.compile_graphs(graph.module, [kernel_library()]) == ("theirs" if want else "ours")
    assert compiler.compile_graphs(graph, devices=("gpu:0",)) == "ours"


class FakeSession:
    def compile(self, _: Any, custom_extensions: list[Path] | None) -> str:
        assert custom_extensions in (None, [kernel_library()])
        return "ours"


def test_its_result(graph: Graph) -> None:
    assert answers(compiler.with_one_thread(graph.module, [])) == WANT


@pytest.mark.parametrize(("script", "reason"), [("echo no memory >&2; exit 3", "no memory"), ("", "No such file")])
def test_a_process_that_fails(
    graph: Graph, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: Any, script: str, reason: str
) -> None:
    """The graph is compiled here instead."""
    caplog.set_level(logging.INFO, "max_conv")
    broken = tmp_path / "python3"
    if script:
        broken.write_text(f"#!/bin/sh\n{script}\n")
        broken.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(broken))
    monkeypatch.setattr(compiler, "_one_thread_is_faster", lambda _: True)
    assert compiler.with_one_thread(graph.module, []) is None
    assert answers(compiler.compile_graphs(graph.module)) == WANT
    assert len(caplog.records) == 2 and reason in caplog.text


KILLED = """
import subprocess, sys
process = subprocess.Popen([sys.executable, "-P", sys.argv[1], "nowhere", ""])
print(process.pid, flush=True)
process.wait()
"""


@pytest.mark.skipif(
    sys.platform != "linux", reason="only Linux has one thread and processes that end with their parent"
)
def test_it_ends_with_the_process_that_started_it() -> None:
    program = str(Path(compiler.__file__).with_name("one_thread.py"))
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", KILLED, program], **pipes) as parent:
        assert parent.stdout is not None
        child = Path("/proc", parent.stdout.readline().strip())
        while b"libmax" not in (child / "maps").read_bytes():  # the first thing it does is done
            time.sleep(0.01)
        parent.send_signal(signal.SIGKILL)
        deadline = time.monotonic() + 10
        while child.exists() and (child / "stat").read_text().rpartition(")")[2].split()[0] != "Z":
            assert time.monotonic() < deadline  # it waits for standard input, which is open
            time.sleep(0.01)
