"""The server as an ASGI application: routes, the token, WebSockets. It runs under any server, and inside Ray Serve."""

import asyncio
import contextlib
import hmac
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, MutableMapping, Sequence
from functools import partial
from importlib import metadata, resources
from os import PathLike
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route, WebSocketRoute

from ..runtime import Model, load
from .limits import Bodies
from .live import LiveServed
from .metrics import Metrics
from .protocol import Refused, decode, encode
from .served import Options, Served, Whole
from .socket import TOKEN, Talk

HEADER = "inference-header-content-length"


def app(models: Mapping[str, Model | str | PathLike] | Sequence[str], **limits: Any) -> Callable[..., Awaitable[None]]:
    """Returns an ASGI application that serves models by the Open Inference Protocol, version 2.

    Args:
        models: Models, or files that `Model.save` wrote, by name; or a list of "NAME=FILE".
        limits: The fields of `Options`, such as `max_batch=8` or `token="..."`.

    Raises:
        ValueError: If a file is not a saved model, or a name comes twice.
        FileNotFoundError: If there is no such file.

    >>> import numpy as np
    >>> import max_conv
    >>> from max.dtype import DType
    >>> layer = max_conv.Conv1D(3, 1, 1, DType.float32, padding=1)
    >>> layer.load_state_dict({"weight": np.ones((3, 1, 1), np.float32)})
    >>> application = app({"sum": max_conv.compile(layer)}, max_batch=8)

    Source: https://github.com/kserve/open-inference-protocol
    """
    options = Options(**limits)
    server = Server(opened(models), options)
    base = "/v2/models/{model}"
    routes = [
        Route(base + "/infer", server.infer, methods=["POST"]),  # this route has to be fast, so it is looked at first
        WebSocketRoute(base + "/stream", Talk(server.models, server.options)),
        Route(base, server.metadata),
        Route(base + "/ready", server.ready),
        Route(base + "/versions/{version}", server.metadata),
        Route(base + "/versions/{version}/ready", server.ready),
        Route(base + "/versions/{version}/infer", server.infer, methods=["POST"]),
        Route("/", server.page),
        Route("/v2", server.about),
        Route("/v2/health/live", server.healthy),
        Route("/v2/health/ready", server.healthy),
        Route("/metrics", server.counted),
        Route("/v2/repository/index", server.index, methods=["POST"]),
    ]
    handlers: Any = {Refused: refused, ClientDisconnect: gone, HTTPException: unknown, Exception: failed}
    application = Starlette(routes=routes, lifespan=server.lifespan, exception_handlers=handlers)
    return Guarded(application, server.options.token) if server.options.token else application


def opened(models: Mapping[str, Any] | Sequence[str]) -> dict[str, Model]:
    """Returns the models by name; files are loaded."""
    if not isinstance(models, Mapping):
        pairs = [entry.partition("=")[::2] for entry in models]
        for name, path in pairs:
            if not name or not path or "/" in name:
                raise ValueError(f"serve: a model must be given as NAME=FILE, but is {name or path!r}.")
        if len({name for name, _ in pairs}) < len(pairs):
            raise ValueError("serve: a name of a model came twice; give each another one.")
        models = dict(pairs)
    return {name: load(model) if isinstance(model, str | PathLike) else model for name, model in models.items()}


class Server:
    """The models that are served, and the answer of each route."""

    def __init__(self, models: Mapping[str, Model], options: Options) -> None:
        self.options, self.metrics = options, Metrics()
        self._version = metadata.version("max-conv")  # reading it takes milliseconds
        self.models: dict[str, Served] = {}
        for name, model in models.items():
            kind = LiveServed if model.timing is not None else Whole
            self.models[name] = kind(name, model, options, self.metrics)
        self._bodies = Bodies(options)

    @contextlib.asynccontextmanager
    async def lifespan(self, application: Starlette) -> AsyncIterator[None]:
        for model in self.models.values():
            model.start()
        watch = asyncio.create_task(self._free_idle())
        yield
        watch.cancel()
        for model in self.models.values():
            model.stop()

    async def _free_idle(self) -> None:
        while True:
            await asyncio.sleep(min(1.0, self.options.idle / 4))
            for model in self.models.values():
                model.free_idle()

    def find(self, given: Mapping[str, Any]) -> Served:
        """Returns the model that a path names."""
        name, version = given["model"], given.get("version", "1")
        if name not in self.models:
            raise Refused(f"there is no model {name[:60]!r} here; there are {', '.join(self.models)}.", 404)
        if version != "1":
            raise Refused(f"model {name!r} has version 1 alone, not {version[:20]!r}.", 404)
        return self.models[name]

    async def infer(self, request: Request) -> Response:
        try:
            model = self.find(request.path_params)
        except Refused as error:
            error.closes = True  # its body is not read
            raise
        body = await self._bodies.read(request)
        began = time.perf_counter()
        try:
            asked, arrays = decode(body, request.headers.get(HEADER), model.inputs)
            results = await model.infer(asked, arrays, partial(_disconnected, request))
            content, headers = encode(model.name, asked, results)
        except Refused as error:
            model.metrics.answered(error.status)
            raise
        except Exception:
            model.metrics.answered(500)
            raise
        model.metrics.answered(200, time.perf_counter() - began)
        return Response(content, headers=headers)

    async def page(self, request: Request) -> Response:
        text = (resources.files(__package__) / "page.html").read_bytes()
        return Response(text, media_type="text/html")

    async def about(self, request: Request) -> Response:
        extensions = ["binary_tensor_data", "sequence", "model_repository"]
        return JSONResponse({"name": "max_conv", "version": self._version, "extensions": extensions})

    async def healthy(self, request: Request) -> Response:
        return Response()

    async def ready(self, request: Request) -> Response:
        self.find(request.path_params)
        return Response()

    async def metadata(self, request: Request) -> Response:
        return JSONResponse(self.find(request.path_params).metadata())

    async def index(self, request: Request) -> Response:
        return JSONResponse([{"name": name, "version": "1", "state": "READY", "reason": ""} for name in self.models])

    async def counted(self, request: Request) -> Response:
        text, kind = self.metrics.text()
        return Response(text, media_type=kind)


async def _disconnected(request: Request) -> None:
    """Returns when the client has gone. Its body has been read to the end."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def sentence(text: str, status: int, headers: Mapping[str, str] | None = None) -> JSONResponse:
    """Returns an error response: JSON with one sentence."""
    return JSONResponse({"error": text}, status, headers=headers)


async def refused(request: Request, error: Any) -> Response:
    headers = {"retry-after": "1"} if error.status == 503 else {}
    # The unread rest of a body would be read as the next request.
    return sentence(str(error), error.status, headers | ({"connection": "close"} if error.closes else {}))


async def gone(request: Request, error: Any) -> Response:
    return sentence("the client has gone.", 499)


async def unknown(request: Request, error: Any) -> Response:
    text = f"{request.method} {request.url.path[:80]} is not served here ({str(error.detail).lower()})."
    return sentence(text, error.status_code, error.headers)


async def failed(request: Request, error: Exception) -> Response:
    return sentence("the server failed; its log says more.", 500)


class Guarded:
    """Lets in clients that send the token. Health and the page, which is empty without the token, are for everybody."""

    def __init__(self, application: Any, token: str) -> None:
        self._application, self._token = application, token

    async def __call__(self, scope: MutableMapping[str, Any], receive: Any, send: Any) -> None:
        kind, path = scope["type"], scope.get("path", "")
        free = kind == "lifespan" or (kind == "http" and (path.startswith("/v2/health/") or path == "/"))
        if free or self._has_token(scope):
            await self._application(scope, receive, send)
        elif kind == "websocket":
            await send({"type": "websocket.close", "code": 1008})  # before it is accepted, this is 403
        else:
            text = "the token is missing or wrong; send the header Authorization: Bearer TOKEN."
            headers = {"www-authenticate": "Bearer", "connection": "close"}
            await sentence(text, 401, headers)(scope, receive, send)

    def _has_token(self, scope: MutableMapping[str, Any]) -> bool:
        headers = dict(scope.get("headers", ()))
        given = headers.get(b"authorization", b"")
        if scope["type"] == "websocket" and not given:
            # A browser's WebSocket cannot send headers: its subprotocol carries the token.
            given = b"Bearer " + headers.get(b"sec-websocket-protocol", b"").rpartition(TOKEN.encode())[2].strip()
        return hmac.compare_digest(given, f"Bearer {self._token}".encode())
