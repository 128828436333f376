"""The server process: one listening socket, uvicorn with our connection class, and an orderly end.

SIGTERM, SIGINT or SIGHUP drains the server. Its readiness check fails at once. New work is still taken for
`drain_delay`, then refused. Running requests may finish until `drain_timeout`. The exit code is 0. A second signal ends
running requests, with an error event in each stream; only a second SIGHUP is ignored, since a closing terminal sends
several. If the engine dies or is stuck, its requests get errors, and the process ends with another exit code. Called by
`guanaco serve`.
"""

import asyncio
import contextlib
import gc
import logging
import os
import resource
import signal
import socket
import threading
from collections.abc import Callable
from types import FrameType

import uvicorn

from guanaco.server.api.app import create_app
from guanaco.server.api.generation.state import ApiState
from guanaco.server.api.http.guard import ConnectionLimits, guarded
from guanaco.server.api.training.upload import MAX_FORM_BYTES, UPLOAD_PATH
from guanaco.server.config import Settings, SettingsError

logger = logging.getLogger("guanaco.server")

EXIT_ENGINE_FAILED = 70  # sysexits.h: EX_SOFTWARE
EXIT_BY_SIGNAL = 128  # plus the signal's number, as shells report it

# How long the last bytes of ended requests may take to be written before the connections are cut.
_FLUSH_SECONDS = 5.0
# After a second signal: the limit for each of three steps, which are error events, closing, and the application's stop.
_LAST_WORDS_SECONDS = 1.0
BACKLOG = 2048
_STDERR = 2
_OTHER_FILES = 256  # besides connections: models, adapters, logs, spare connections
# A body over the limit is answered with 413, and then read and thrown away up to this many times the limit: closing
# earlier would reset the connection, and most clients send all of the body before they read the answer.
_DISCARD_FACTOR = 8


def bind(settings: Settings) -> socket.socket:
    """Bind the listening socket, before anything slow happens. Raises SettingsError (one line) if that fails."""
    where = f"{settings.host}:{settings.port}"
    sock = None
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        sock = socket.socket(family, kind, protocol)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        # Without the option no other server can bind this port before `listen`. With it, on Linux, two could.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)
    except OSError as error:
        if sock is not None:
            sock.close()
        raise _cannot_listen(where, error) from None
    return sock


def listen(sock: socket.socket) -> None:
    """Take connections from now on. Raises SettingsError if another server took the port at the same moment."""
    # Connections inherit the option from the listener. Without it a restart would have to wait for their end.
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.listen(BACKLOG)
    except OSError as error:
        address = sock.getsockname()
        raise _cannot_listen(f"{address[0]}:{address[1]}", error) from None


def _cannot_listen(where: str, error: OSError) -> SettingsError:
    return SettingsError(f"cannot listen on {where}: {error.strerror}; choose another --host or --port")


def serve(state: ApiState, sock: socket.socket, on_started: Callable[[], None] = lambda: None) -> int:
    """Serve until a signal or the engine's death. Returns the exit code.

    on_started: called once, when the server takes requests.
    """
    server = make_server(state, on_started)
    if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:
        signal.signal(signal.SIGHUP, server.handle_exit)  # sent by a closing terminal; under nohup it stays ignored
    # uvicorn raises it if the application's start fails, and has logged why
    with contextlib.suppress(SystemExit):
        server.run(sockets=[sock])
    return server.exit_code if server.started else 1


def make_server(state: ApiState, on_started: Callable[[], None] = lambda: None) -> "GuanacoServer":
    """The server with the application over `state`, not started yet. on_started: as for `serve`."""
    settings = state.settings
    limits = ConnectionLimits(
        header_seconds=settings.header_timeout,
        body_seconds=settings.body_timeout,
        keep_alive_seconds=settings.keep_alive_timeout,
        max_body_bytes=settings.max_body_bytes * _DISCARD_FACTOR,
        upload_path=None if state.training is None else UPLOAD_PATH.encode(),
        upload_seconds=settings.train_upload_timeout,
        max_upload_bytes=settings.max_train_file_bytes + MAX_FORM_BYTES + settings.max_body_bytes * _DISCARD_FACTOR,
        max_connections=_affordable_connections(settings.max_connections),
    )
    config = uvicorn.Config(
        create_app(state),
        http=guarded(limits, state.metrics.count_slow_client, state.metrics.count_rejected),
        ws="none",
        lifespan="on",
        backlog=BACKLOG,
        timeout_keep_alive=settings.keep_alive_timeout,  # type: ignore[arg-type]
        timeout_graceful_shutdown=int(_FLUSH_SECONDS),
        server_header=False,
        proxy_headers=False,
        access_log=False,
        log_config=None,
    )
    return GuanacoServer(config, state, on_started)


def _affordable_connections(wanted: int) -> int:
    """How many connections this process may have open files for, after raising its limit. Without a free file a further
    connection could not even be refused."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    need = wanted + _OTHER_FILES
    if soft != resource.RLIM_INFINITY and soft < need:
        soft = need if hard == resource.RLIM_INFINITY else min(need, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    affordable = wanted if soft == resource.RLIM_INFINITY else max(1, min(wanted, soft - _OTHER_FILES))
    if affordable < wanted:
        logger.warning("only %d connections at once: raise the limit of open files (ulimit -n)", affordable)
    return affordable


class GuanacoServer(uvicorn.Server):
    """uvicorn's server, which a signal or a failed engine ends as the module's docstring says."""

    def __init__(self, config: uvicorn.Config, state: ApiState, on_started: Callable[[], None]) -> None:
        super().__init__(config)
        self.exit_code = 0
        self._state = state
        self._on_started = on_started
        self._num_signals = 0
        self._ending: asyncio.Task[None] | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        for sock in sockets or ():
            listen(sock)
        await super().startup(sockets=sockets)
        # Objects made so far stay forever (torch alone: 200,000). Without this each full collection takes 0.1 s, on the
        # event loop, too.
        gc.collect()
        gc.freeze()
        self._on_started()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002 (a signal handler's arguments)
        """A signal handler. It only sets flags; `on_tick` acts on them within a tenth of a second. uvicorn's own
        handler would close the listener at once and raise the signal again at the end."""
        if sig == signal.SIGHUP and self._num_signals:
            return
        self._num_signals += 1
        self._state.lifecycle.draining = True
        if self._num_signals == 1 and sig == signal.SIGINT:
            seconds = self._state.settings.drain_delay + self._state.settings.drain_timeout
            text = f"\nguanaco: running requests may finish ({seconds:g} s at most); Ctrl-C again ends at once\n"
            with contextlib.suppress(OSError):  # standard error may be closed
                os.write(_STDERR, text.encode())  # not `print`: it may be in the middle of another one
        if self._num_signals > 1:
            self.exit_code = EXIT_BY_SIGNAL + sig
            self.should_exit = self.force_exit = True

    async def on_tick(self, counter: int) -> bool:
        if (self._num_signals or self._state.lifecycle.end_wanted) and self._ending is None:
            self._ending = asyncio.create_task(self._drain())
        if not self.exit_code and not self._state.engine.health().live:
            logger.error("the engine is dead or stuck: ending the process")
            self.exit_code = EXIT_ENGINE_FAILED
            self._state.lifecycle.draining = self._state.lifecycle.refusing = True
            if self._ending is not None:
                self._ending.cancel()
            self._ending = asyncio.create_task(self._end_after_requests())
        return await super().on_tick(counter)

    async def _drain(self) -> None:
        settings, lifecycle = self._state.settings, self._state.lifecycle
        logger.info("draining: running requests may finish, new ones go elsewhere")
        if self._state.training is not None:
            self._state.training.drain()
        await asyncio.sleep(settings.drain_delay)
        lifecycle.refusing = True
        try:
            # The engine itself ends requests at its deadline. This limit is for an engine that doesn't.
            await asyncio.wait_for(
                self._state.engine.drain(settings.drain_timeout), settings.drain_timeout + _FLUSH_SECONDS
            )
        except TimeoutError:
            logger.error("the engine did not drain in time")
        await self._end_after_requests()

    async def _end_streams(self) -> None:
        """End every running request with an error event, without waiting for an engine that is stuck."""
        if self._ending is not None:
            self._ending.cancel()
            await asyncio.gather(self._ending, return_exceptions=True)
        self._state.lifecycle.refusing = True
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._state.engine.drain(0.0), _LAST_WORDS_SECONDS)
        await self._state.lifecycle.wait_all_closed(_LAST_WORDS_SECONDS)

    async def _end_after_requests(self) -> None:
        if not await self._state.lifecycle.wait_all_closed(_FLUSH_SECONDS):
            logger.warning("some requests were still open at the end")
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        if not self.force_exit:
            await super().shutdown(sockets=sockets)
            return
        await self._end_streams()
        for server in self.servers:
            server.close()
        for connection in list(self.server_state.connections):
            if connection.transport is not None:
                connection.transport.abort()
        with contextlib.suppress(TimeoutError):  # otherwise the log would get a traceback of the cancelled shutdown
            await asyncio.wait_for(self.lifespan.shutdown(), _LAST_WORDS_SECONDS)
