"""A live signal through a WebSocket: raw samples go in, raw values come out."""

import asyncio
import math
from collections.abc import Mapping, MutableMapping
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from starlette.websockets import WebSocket, WebSocketDisconnect

from ..sound import to_pcm
from .protocol import Refused
from .served import Options, Served

IDLE = 4408
"""The close code of a connection that sends nothing."""
TOKEN = "token."
SCALE = 1 << 15
"""Full scale of 16-bit samples."""


class Talk:
    """An ASGI application that serves one signal per connection.

    A binary message holds the next positions of the input, any number, as little-endian values of its dtype, or 16-bit samples
    with `?in=s16`. Each is answered by one binary message: the output's positions that are ready, maybe none, as 16-bit samples
    with `?out=s16`. The text "end" ends the signal: the rest of the output comes, and the connection is closed. `?output=NAME`
    chooses another output than the first.

    Close codes: 1000 after "end"; 1003 for another text; 1007 for bytes that are not whole positions; 1008 for a model or an
    option that does not exist; 1013 if there are too many signals; 4408 if nothing came for the idle time.
    """

    def __init__(self, models: Mapping[str, Served], options: Options) -> None:
        self._models, self._options = models, options

    async def __call__(self, scope: MutableMapping[str, Any], receive: Any, send: Any) -> None:
        socket, name = WebSocket(scope, receive, send), scope["path_params"]["model"]
        origin = socket.headers.get("origin")
        if origin and not self._options.token and urlsplit(origin).netloc != socket.headers.get("host"):
            # Any page that somebody opens in a browser on this machine can reach a server on it.
            await socket.close(1008)  # before it is accepted, this is 403
            return
        offered = scope.get("subprotocols", [])
        await socket.accept(subprotocol=next((name for name in offered if name.startswith(TOKEN)), None))
        try:
            if name not in self._models:
                raise Refused(f"there is no model {name[:60]!r} here.", 404)
            signal = _Signal(self._models[name], socket.query_params)
        except Refused as error:
            await _close(socket, 1013 if error.status == 503 else 1008, str(error))
            return
        try:
            async with asyncio.timeout(self._options.idle) as limit:
                await self._serve(signal, receive, send, limit)
            await _close(socket, 1000, "the signal has ended.")
        except TimeoutError:
            await _close(socket, IDLE, f"nothing came for {self._options.idle:g} s.")
        except Refused as error:
            await _close(socket, {400: 1007, 415: 1003, 503: 1013}.get(error.status, 1011), str(error))
        except WebSocketDisconnect:
            pass
        finally:
            signal.model.close(signal.session)

    async def _serve(self, signal: "_Signal", receive: Any, send: Any, limit: asyncio.Timeout) -> None:
        """Answers messages until the signal ends. Every message passes through here, so it does not use Starlette."""
        loop, moved, idle = asyncio.get_running_loop(), 0.0, self._options.idle
        model, session = signal.model, signal.session
        while True:
            message = await receive()
            if (now := loop.time()) > moved + idle / 8:  # not at every message, because it costs time
                moved = now
                limit.reschedule(now + idle)
            if message["type"] == "websocket.disconnect":
                raise WebSocketDisconnect(message.get("code") or 1005)
            data, answer = message.get("bytes"), b""
            if end := data is None:
                if message.get("text") != "end":
                    raise Refused('the only text is "end"; send values as binary messages.', 415)
                data = b""
            if data or (end and session.begun and model.live):
                answer = signal.bytes(await model.push(session, signal.arrays(data), end, self._options.deadline))
            try:
                await send({"type": "websocket.send", "bytes": answer})
            except OSError:  # the client has disconnected
                raise WebSocketDisconnect(1006) from None
            model.metrics.answered(200, loop.time() - now)
            if end:
                return


async def _close(socket: WebSocket, code: int, reason: str) -> None:
    # A reason may have 123 bytes.
    await socket.close(code, reason.encode()[:120].decode(errors="ignore"))


class _Signal:
    """One signal: how the bytes of messages are the values of a model, and its session."""

    def __init__(self, model: Served, query: Any) -> None:
        self.model = model
        names = [name for name, spec in model.inputs.items() if spec.needed]
        if len(names) != 1:
            raise Refused(f"{model.name} has the inputs {', '.join(names)}; a connection carries one: use sequence_id.")
        self.input = names[0]
        self.spec = model.inputs[self.input]
        self.output = query.get("output", next(iter(model.outputs)))
        if self.output not in model.outputs:
            raise Refused(f"{model.name} has no output {self.output[:40]!r}.")
        self.reads_pcm, self.writes_pcm = (_pcm(query, side) for side in ("in", "out"))
        if (self.reads_pcm and self.spec.dtype != "float32") or (
            self.writes_pcm and model.outputs[self.output].dtype != "float32"
        ):
            raise Refused(f"{model.name} has no float32 samples; leave s16 out.")
        sizes = self.spec.shape[1:]
        self.dtype = np.dtype("<i2") if self.reads_pcm else self.spec.numpy
        self.unit = math.prod(size for size in sizes if isinstance(size, int)) * self.dtype.itemsize
        self.shape = [1, *(size if isinstance(size, int) else -1 for size in sizes)]
        self.session = model.open(1)

    def arrays(self, data: bytes) -> dict[str, np.ndarray]:
        """Returns the model's input of one signal."""
        if len(data) % self.unit:
            raise Refused(f"a message must hold whole positions of {self.unit} bytes, but has {len(data)} bytes.")
        values = np.frombuffer(data, self.dtype)
        if self.reads_pcm:
            values = values.astype(np.float32) / np.float32(SCALE)
        positions = len(data) // self.unit
        return {self.input: values.reshape([positions if size < 0 else size for size in self.shape])}

    def bytes(self, answer: dict[str, np.ndarray]) -> bytes:
        """Returns the output of one signal."""
        values = answer[self.output]
        return to_pcm(values.reshape(1, -1), "s16") if self.writes_pcm else values.tobytes()


def _pcm(query: Any, side: str) -> bool:
    if (kind := query.get(side, "f32")) not in ("f32", "s16"):
        raise Refused(f"?{side}= must be f32 or s16, but is {kind[:20]!r}.")
    return kind == "s16"
