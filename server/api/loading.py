"""Answers requests while the model loads: liveness, the progress of the load, and 503 for everything else.

`guanaco serve` opens the port with `answering_while_loading` before anything slow happens. A separate thread answers,
since the main thread loads. When the model is loaded, the server of `server.py` takes over the same socket, so no
connection is refused in between. Knows no model and no engine.
"""

import asyncio
import contextlib
import html
import socket
import threading
from collections.abc import Iterator

import uvicorn
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from guanaco.models.error_codes import ErrorCode
from guanaco.server.api.generation.state import json_response
from guanaco.server.api.http.cors import ClientCors
from guanaco.server.api.http.errors import ApiError
from guanaco.server.api.http.guard import ConnectionLimits, guarded
from guanaco.server.api.page import accepts_html
from guanaco.server.api.server import BACKLOG, listen
from guanaco.server.config import Settings
from guanaco.server.page.files import START

RETRY_SECONDS = 5.0  # Retry-After of the refusals
_PAGE_SECONDS = 2  # between two reloads of the page
_LAST_ANSWERS_SECONDS = 0.5  # how long connections that are open when the load ends may take to send their request
_END_SECONDS = 5.0  # how long the answering thread may take to end
_MAX_CONNECTIONS = 256  # each has one short answer; the limit of open files has not been raised yet


class LoadingProgress:
    """The progress of the load. Written by the thread that loads, read by the thread that answers."""

    def __init__(self) -> None:
        self._now: tuple[str, int | None] = ("start", None)

    def report(self, stage: str, done: int, total: int) -> None:
        """Record the progress. stage: its name for people. done, total: in one unit, of any kind; total is 0 if it is
        not known."""
        self._now = (stage, min(100, 100 * done // total) if total > 0 else None)

    @property
    def stage(self) -> str:
        return self._now[0]

    @property
    def percent(self) -> int | None:
        """How much of this stage is finished, 0 to 100; None: not known."""
        return self._now[1]

    def __str__(self) -> str:
        stage, percent = self._now
        return f"loading ({stage})" if percent is None else f"loading {percent} % ({stage})"


class LoadingApp:
    """The ASGI application of a server without a model. Needs no key: it answers with nothing but its progress."""

    def __init__(self, progress: LoadingProgress, *, has_page: bool) -> None:
        self.progress = progress
        self.has_page = has_page

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1013})
            return
        response = self._answer(scope)
        if response.status_code == 503:
            response.headers["Retry-After"] = str(_PAGE_SECONDS if _is_page(response) else int(RETRY_SECONDS))
        response.headers["Cache-Control"] = "no-store"
        response.headers["Connection"] = "close"  # the next request is for the server that takes over
        await response(scope, receive, send)

    def _answer(self, scope: Scope) -> Response:
        path: str = scope["path"]
        if path == "/health/live":
            return json_response({"status": "live"})
        if path == "/health/ready":
            now = self.progress
            told = {"status": "loading", "stage": now.stage, "percent": now.percent, "message": str(now)}
            return json_response(told, 503)
        if path == "/health":
            return Response(status_code=503)
        if path == START and self.has_page and accepts_html(scope):
            return _page(self.progress)
        text = f"the server is {self.progress}: try again in some seconds; GET /health/ready tells how far it is"
        error = ApiError(503, ErrorCode.SERVER_LOADING, text)
        status, body = error.on_path(path, None)
        return Response(body, status, media_type="application/json")


def _is_page(response: Response) -> bool:
    return response.media_type == "text/html"


def _page(progress: LoadingProgress) -> Response:
    """A page with the progress. It reloads itself until the model is loaded."""
    value = "" if progress.percent is None else f' value="{progress.percent}"'
    text = (
        '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f'<meta http-equiv="refresh" content="{_PAGE_SECONDS}"><title>Guanaco is loading</title>'
        "<h1>Guanaco is loading</h1>"
        f'<p role="status">{html.escape(str(progress)).capitalize()}</p>'
        f'<progress max="100"{value}></progress></html>'
    )
    return Response(text, 503, {"Content-Security-Policy": "default-src 'none'"}, "text/html")


class _LoadingServer(uvicorn.Server):
    """uvicorn's server. Before it ends, it answers the connections that it has accepted."""

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        for server in self.servers:
            server.close()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_LAST_ANSWERS_SECONDS):
                while self.server_state.connections:
                    await asyncio.sleep(0.01)
        await super().shutdown(sockets=sockets)


@contextlib.contextmanager
def answering_while_loading(settings: Settings, sock: socket.socket) -> Iterator[LoadingProgress]:
    """Listen on `sock` and answer there until the block ends. The socket stays open and goes on listening, so new
    connections wait for the server that takes over.

    Raises SettingsError if another server has the port.
    """
    listen(sock)
    progress = LoadingProgress()
    app: ASGIApp = LoadingApp(progress, has_page=settings.page)
    if settings.allow_origin:
        app = ClientCors(app, origins=settings.allow_origin)
    limits = ConnectionLimits(
        header_seconds=settings.header_timeout,
        body_seconds=settings.body_timeout,
        keep_alive_seconds=settings.keep_alive_timeout,
        max_connections=min(settings.max_connections, _MAX_CONNECTIONS),
    )
    config = uvicorn.Config(
        app,
        http=guarded(limits, lambda: None, lambda _code: None),
        ws="none",
        lifespan="off",
        backlog=BACKLOG,
        timeout_graceful_shutdown=1,
        server_header=False,
        proxy_headers=False,
        access_log=False,
        log_config=None,
    )
    server = _LoadingServer(config)
    with sock.dup() as ours:  # closed by uvicorn; the socket itself must stay open
        thread = threading.Thread(target=server.run, args=([ours],), name="guanaco-loading", daemon=True)
        thread.start()
        try:
            yield progress
        finally:
            server.should_exit = True
            thread.join(_END_SECONDS)
