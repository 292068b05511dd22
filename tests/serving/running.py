"""Servers for the tests: an application in a thread of this process, or the command in a separate process."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import uvicorn

from max_conv.serving.server import configured, listen

ENVIRONMENT = dict(os.environ)
"""As it is before MAX is imported, which changes it."""


@contextlib.contextmanager
def in_thread(application: Any, max_connections: int = 100) -> Iterator[int]:
    """Serves an application as `max-conv serve` does; yields the port."""
    listener = listen("127.0.0.1", 0)
    server = uvicorn.Server(configured(application, max_connections))
    thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
    thread.start()
    wait_for(lambda: server.started, 20)
    try:
        yield listener.getsockname()[1]
    finally:
        server.should_exit = True
        thread.join(20)


def wait_for(true: Any, seconds: float) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, f"not so after {seconds} s"
        time.sleep(0.02)


class Process:
    """`max-conv serve` in a separate process."""

    def __init__(self, *arguments: str, log: Path, port: int = 0, **environment: str) -> None:
        self.log = log
        with log.open("wb") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "max_conv.cli.main", "serve", *arguments, "--port", str(port)],
                stderr=file,
                stdout=file,
                env={**ENVIRONMENT, **environment},
            )
        wait_for(lambda: self.process.poll() is not None or self._port(), 120)
        assert self._port(), self.text()
        self.port = int(self._port()[1])  # type: ignore[index]
        wait_for(self._answers, 20)

    def _port(self) -> re.Match[str] | None:
        return re.search(r"serving .* on http://127\.0\.0\.1:(\d+)", self.text())

    def _answers(self) -> bool:
        with contextlib.suppress(OSError):
            return request(self.port, "GET", "/v2/health/ready")[0] == 200
        return False

    def text(self) -> str:
        return self.log.read_text()

    def end(self, number: int = signal.SIGTERM) -> int:
        """Sends a signal and returns the exit status."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.process.wait(60)


def request(port: int, method: str, path: str, body: bytes = b"", **headers: str) -> tuple[int, dict[str, str], bytes]:
    """Sends one request on a separate connection; underscores in names of headers are hyphens."""
    lines = [f"{method} {path} HTTP/1.1", "Host: a", f"Content-Length: {len(body)}"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return raw(port, "\r\n".join(lines).encode() + b"\r\n\r\n" + body)


def raw(port: int, *pieces: bytes, seconds: float = 30) -> tuple[int, dict[str, str], bytes]:
    """Sends bytes and reads one response: status, headers in lower case, body."""
    with socket.create_connection(("127.0.0.1", port), timeout=seconds) as connection:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the answer may come before the end
            for piece in pieces:
                connection.sendall(piece)
        return response(connection)


def response(connection: socket.socket) -> tuple[int, dict[str, str], bytes]:
    """Reads one response; status 0 if the connection was closed without one."""
    data = b""
    with contextlib.suppress(ConnectionResetError):
        while b"\r\n\r\n" not in data and (piece := connection.recv(1 << 16)):
            data += piece
    if b"\r\n\r\n" not in data:
        return 0, {}, data
    head, _, body = data.partition(b"\r\n\r\n")
    first, *lines = head.decode().split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    while len(body) < int(headers.get("content-length", 0)) and (piece := connection.recv(1 << 16)):
        body += piece
    return int(first.split()[1]), headers, body


def closed(connection: socket.socket) -> bool:
    """Whether the other side has closed."""
    with contextlib.suppress(ConnectionResetError):
        return connection.recv(1) == b""
    return True
