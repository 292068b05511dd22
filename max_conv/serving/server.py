"""The server itself: uvicorn with limits, one log line per request, and an end that loses no request."""

import contextlib
import errno
import logging
import signal
import socket
import sys
import time
from collections.abc import Iterator, MutableMapping
from typing import Any

import msgspec
import uvicorn

from .limits import Limited

MESSAGE = 4 << 20
"""Bytes of a WebSocket message, at most."""
GRACE = 30
"""Seconds for requests that are being answered when the server is asked to end."""

log = logging.getLogger("max_conv.serve")


def listen(host: str, port: int) -> socket.socket:
    """Returns a socket that is bound, before anything slow is done.

    Raises:
        OSError: If the port is taken, or the host is not this machine's: one sentence.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(2048)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise OSError(f"serve: port {port} of {host} is taken by another program; pass --port.") from None
        raise OSError(
            f"serve: cannot listen on {host} port {port} ({error.strerror}); pass --host or --port."
        ) from None
    return listener


def run(application: Any, listener: socket.socket, max_connections: int, logs: str = "text") -> None:
    """Serves until SIGTERM or SIGINT; then answers the requests that have come, and returns.

    Args:
        application: An ASGI application.
        listener: The socket that `listen` returned.
        max_connections: Connections, at most.
        logs: "text" or "json" for one line per request on stderr; or "off".
    """
    if logs != "off":
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(message)s" if logs == "json" else "%(asctime)s %(message)s"))
        log.addHandler(handler)
        log.setLevel(logging.INFO)
        application = Logged(application, logs == "json")
    _Server(configured(application, max_connections)).run([listener])


def configured(application: Any, max_connections: int) -> uvicorn.Config:
    """Returns uvicorn's settings for an application."""
    return uvicorn.Config(
        application,
        http=type("Limited", (Limited,), {"most": max_connections}),
        loop="uvloop",
        ws="websockets-sansio",
        ws_max_size=MESSAGE,
        ws_per_message_deflate=False,
        log_config=None,
        access_log=False,
        server_header=False,
        date_header=False,
        proxy_headers=False,
        timeout_keep_alive=60,
        timeout_graceful_shutdown=GRACE,
    )


class _Server(uvicorn.Server):
    """uvicorn's server, which returns after SIGTERM and SIGINT instead of raising the signal again: the exit status is 0."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        handlers = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)


class Logged:
    """An application whose requests are logged: method, path without its query, status, milliseconds. Never their content."""

    def __init__(self, application: Any, as_json: bool) -> None:
        self._application, self._json = application, as_json

    async def __call__(self, scope: MutableMapping[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await self._application(scope, receive, send)
            return
        began, status = time.perf_counter(), 0

        async def seen(message: MutableMapping[str, Any]) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            elif message["type"] == "websocket.close":
                status = message.get("code", 1000)
            await send(message)

        try:
            await self._application(scope, receive, seen)
        finally:
            took = 1e3 * (time.perf_counter() - began)
            method = "WS" if scope["type"] == "websocket" else scope["method"]
            path, client = scope["path"][:200], (scope.get("client") or ["-"])[0]
            if self._json:
                facts = {"time": time.time(), "client": client, "method": method, "path": path, "status": status}
                log.info(msgspec.json.encode(facts | {"ms": round(took, 3)}).decode())
            else:
                log.info(f"{client} {method} {path!a} {status} {took:.2f} ms")
