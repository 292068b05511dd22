"""Batch jobs by Ray Data: on this machine, with killed processes, and on a cluster of two nodes with a token."""

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_batch import (  # noqa: F401, fixtures
    FILES,
    LIMIT,
    alive,
    bounded,
    check_whole,
    children,
    saved,
    sounds,
    start,
    until,
    wait_for_results,
    want,
)

pytest.importorskip("ray", reason="jobs on a cluster need ray[data]")
pytestmark = pytest.mark.nightly
FAILED = f"3 of {FILES + 3} files failed"


@pytest.fixture(autouse=True)
def token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A token of this test alone, so that Ray does not make one in the home folder."""
    path = tmp_path / "token"
    path.write_text(secrets.token_hex(32))
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(path))
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    return path


def below(pid: int) -> list[int]:
    """Returns the processes that a process has started, and the processes that these have started."""
    try:
        direct = children(pid)
    except FileNotFoundError:
        return []
    return [*direct, *(far for child in direct for far in below(child))]


def actors(pid: int) -> list[int]:
    """Returns the processes below one that run files."""

    def runs(child: int) -> bool:
        try:
            return Path(f"/proc/{child}/cmdline").read_bytes().startswith(b"ray::MapWorker")
        except OSError:
            return False

    return [child for child in below(pid) if runs(child)]


def end(pids: list[int]) -> None:
    for pid in pids:
        if alive(pid):
            os.kill(pid, signal.SIGKILL)


def local(sounds: Path, out: Path, saved: Path) -> subprocess.Popen:  # noqa: F811
    """Starts a job with a separate Ray; starts it again if a busy machine was too slow for Ray."""
    for _ in range(3):
        job = start(sounds, out, saved, "--workers", 2, "--ray", "local")
        until(lambda job=job: job.poll() is not None or any(out.glob("[0-9]*.json")), "the first result")  # type: ignore[misc]
        if job.poll() in (None, 0, 1):
            return job
    raise AssertionError(Path(f"{out}.log").read_text())


def test_here(sounds: Path, saved: Path, want: dict[str, bytes], tmp_path: Path) -> None:  # noqa: F811
    out = tmp_path / "out"
    job = local(sounds, out, saved)
    try:
        processes = below(job.pid)
        assert job.wait(LIMIT) == 1 and FAILED in Path(f"{out}.log").read_text()
    finally:
        job.kill()
    check_whole(out, want, complete=True)
    until(lambda: not any(map(alive, processes)), "Ray ends")


def test_a_killed_actor(sounds: Path, saved: Path, want: dict[str, bytes], tmp_path: Path) -> None:  # noqa: F811
    out = tmp_path / "out"
    job = local(sounds, out, saved)
    try:
        wait_for_results(out, 10)
        os.kill(actors(job.pid)[0], signal.SIGKILL)
        assert job.wait(LIMIT) == 1, Path(f"{out}.log").read_text()
    finally:
        job.kill()
    check_whole(out, want, complete=True)


def test_a_killed_driver(sounds: Path, saved: Path, want: dict[str, bytes], tmp_path: Path) -> None:  # noqa: F811
    """No result is half written, and a job without Ray does the missing files."""
    out = tmp_path / "out"
    job = local(sounds, out, saved)
    wait_for_results(out, 10)
    processes = below(job.pid)
    job.kill()
    job.wait()
    try:
        assert len(list(out.glob("[0-9]*.json"))) < FILES
        check_whole(out, want, complete=False)
        # Ray's processes may still write: they and the next job do not disturb each other.
        again = start(sounds, out, saved)
        assert again.wait(LIMIT) == 1, Path(f"{out}.log").read_text()
    finally:
        end(processes)
    assert start(sounds, out, saved).wait(LIMIT) == 1
    check_whole(out, want, complete=True)


def test_a_broken_model(sounds: Path, tmp_path: Path) -> None:  # noqa: F811
    """The sentence of the actor reaches the user."""
    (tmp_path / "bad.maxconv").write_text("no model")
    job = start(sounds, tmp_path / "out", tmp_path / "bad.maxconv", "--ray", "local")
    assert job.wait(LIMIT) == 2
    lines = Path(f"{tmp_path}/out.log").read_text().splitlines()
    assert any(line.startswith("max-conv: batch: the job ended with an error in Ray (load: ") for line in lines), lines


@pytest.fixture
def cluster(token: Path, tmp_path: Path) -> Iterator[tuple[str, list[subprocess.Popen]]]:
    """Two nodes on this machine, each with one CPU. Yields the address and the processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ray = Path(sys.executable).parent / "ray"
    nodes: list[subprocess.Popen] = []

    def node(*options: str) -> None:
        line = [str(ray), "start", "--block", "--num-cpus=1", "--node-ip-address=127.0.0.1", *options]
        with open(tmp_path / "nodes.log", "a") as log:
            nodes.append(subprocess.Popen(line, stdout=log, stderr=log, env=dict(os.environ)))

    def reached() -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", port)) == 0

    try:
        node("--head", f"--port={port}", "--include-dashboard=false", "--disable-usage-stats")
        until(reached, "the head node")
        time.sleep(5)
        node(f"--address=127.0.0.1:{port}")
        time.sleep(10)
        yield f"127.0.0.1:{port}", nodes
    finally:
        every = [pid for one in nodes for pid in [*below(one.pid), one.pid]]
        for one in nodes:
            one.terminate()
        for one in nodes:
            one.wait(60)
        end(every)


def test_a_cluster_with_a_token(
    cluster: tuple[str, list[subprocess.Popen]],
    sounds: Path,  # noqa: F811
    saved: Path,  # noqa: F811
    want: dict[str, bytes],  # noqa: F811
    token: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Both nodes work; who has another token is refused."""
    address, nodes = cluster
    out = tmp_path / "out"
    job = start(sounds, out, saved, "--workers", 2, "--ray", address, "--json")
    try:
        until(lambda: all(actors(node.pid) for node in nodes) or job.poll() is not None, "an actor on each node")
        assert job.poll() is None, Path(f"{out}.log").read_text() + (tmp_path / "nodes.log").read_text()
        assert job.wait(LIMIT) == 1
    finally:
        job.kill()
    check_whole(out, want, complete=True)
    facts = next(line for line in Path(f"{out}.log").read_text().splitlines() if line.startswith("{"))
    assert json.loads(facts)["done"] == FILES and all(node.poll() is None for node in nodes)

    (tmp_path / "other").write_text(secrets.token_hex(32))
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "other"))
    refused = start(sounds, tmp_path / "none", saved, "--ray", address)
    assert refused.wait(LIMIT) == 2
    assert f"max-conv: batch: Ray does not answer at {address} (" in Path(f"{tmp_path}/none.log").read_text()
    assert not list((tmp_path / "none").glob("[0-9]*"))
