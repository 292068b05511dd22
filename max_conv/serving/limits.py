"""Limits for clients: headers and bodies must not be too large or too slow, connections must not be too many.

uvicorn and httptools have no such limits: https://github.com/encode/uvicorn/issues/157
"""

import asyncio
from typing import Any

import msgspec
from starlette.requests import Request
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from .protocol import Refused
from .served import Options

HEADERS = 32 << 10
"""Bytes of a request's headers."""
SECONDS = 10.0
"""Seconds in which a request's headers must come."""


class Bodies:
    """Reads the bodies of requests within the limits of the options."""

    def __init__(self, options: Options) -> None:
        self._options, self._bytes = options, 0

    async def read(self, request: Request) -> bytes:
        """Returns a whole body. Its declared length counts before the bytes are read.

        Raises:
            Refused: 400 for a compressed body, 413 if it is too large, 408 if it is too slow, 503 if the bodies of all requests
                are too large together.
        """
        most = self._options.max_body
        claim = request.headers.get("content-length", "")
        size = int(claim) if claim.isascii() and claim.isdigit() and len(claim) < 19 else most
        if size > most:
            raise Refused(f"the body has {size} bytes, but {most} are allowed.", 413, closes=True)
        if request.headers.get("content-encoding", "identity").lower() != "identity":
            raise Refused("compressed bodies are not taken; send it as it is.", closes=True)
        if self._bytes + size > self._options.max_memory:
            raise Refused("the bodies of other requests fill the memory; try again later.", 503, closes=True)
        self._bytes += size
        try:
            async with asyncio.timeout(self._options.body_timeout):
                return await self._all(request, most)
        except TimeoutError:
            seconds = self._options.body_timeout
            raise Refused(f"the body did not come within {seconds:g} s.", 408, closes=True) from None
        finally:
            self._bytes -= size

    async def _all(self, request: Request, most: int) -> bytes:
        parts, total = [], 0
        async for part in request.stream():
            total += len(part)
            if total > most:
                raise Refused(f"the body has more than the {most} bytes that are allowed.", 413, closes=True)
            parts.append(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)


class Limited(HttpToolsProtocol):
    """uvicorn's protocol. It closes connections whose headers are too large or too late, and surplus connections."""

    most = Options.max_connections
    """Connections at a time."""

    def connection_made(self, transport: Any) -> None:
        self._timer: asyncio.TimerHandle | None = None
        self._seen, self._begun, self._in_headers, self._in_body = 0, 0, False, False
        super().connection_made(transport)
        if len(self.connections) > self.most:
            self._close(
                b"503 Service Unavailable", f"{self.most} connections are open, as many as may; try again later."
            )
        self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        self._begun, in_body = 0, self._in_body
        super().data_received(data)
        # Bytes that also hold the end of another request are not counted: there are few of them.
        if self._in_headers and not in_body and self._begun <= 1:
            self._seen += len(data)
        if self._in_headers and self._seen > HEADERS and not self.transport.is_closing():
            self._close(b"431 Request Header Fields Too Large", f"the headers have more than {HEADERS} bytes.")

    def on_message_begin(self) -> None:
        self._wait()
        self._seen, self._in_headers = 0, True
        self._begun += 1
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._stop()
        self._in_headers, self._in_body = False, True
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self._in_body = False
        super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        self._close(b"400 Bad Request", "this is not HTTP as it has to be.")

    def _wait(self) -> None:
        self._stop()
        self._timer = self.loop.call_later(SECONDS, self._late)

    def _stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _late(self) -> None:
        self._close(b"408 Request Timeout", f"the headers did not come within {SECONDS:g} s.")

    def _close(self, status: bytes, text: str) -> None:
        """Answers with an error and closes the connection."""
        body = msgspec.json.encode({"error": text})
        retry = b"retry-after: 1\r\n" if status.startswith(b"503") else b""
        head = b"HTTP/1.1 %s\r\ncontent-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n%s\r\n"
        self.transport.write(head % (status, len(body), retry) + body)
        self.transport.close()
