"""The ASGI application: its routes, the middleware around them, and a lifespan that starts and stops the engine.

The engine, the models and the adapters come in an `ApiState`. Called by `server.make_server` and by tests.
"""

import asyncio
import contextlib
import functools
import logging
from collections.abc import AsyncIterator, Iterable
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from guanaco.server.api.document.describe import describe
from guanaco.server.api.generation.protocol import ChatBody, CompletionBody, DetokenizeBody, TokenizeBody
from guanaco.server.api.generation.state import ApiState
from guanaco.server.api.http.auth import AuthMiddleware
from guanaco.server.api.http.cors import ClientCors
from guanaco.server.api.http.errors import HANDLED, handle_error
from guanaco.server.api.http.host_check import HostCheck
from guanaco.server.api.http.middleware import Gate, RequestScope
from guanaco.server.api.messages import routes as messages
from guanaco.server.api.messages.protocol import CountBody, MessagesBody
from guanaco.server.api.page import PageFiles
from guanaco.server.api.responses import routes as responses
from guanaco.server.api.responses.protocol import ResponseBody
from guanaco.server.api.responses.store import ResponseStore, StoreLimits
from guanaco.server.api.routes import adapters as adapters_admin
from guanaco.server.api.routes import aliases as aliases_admin
from guanaco.server.api.routes import chat, completions, drain, info, tokens
from guanaco.server.api.training import files as training_files
from guanaco.server.api.training import jobs as training_jobs
from guanaco.server.api.training.protocol import JobBody
from guanaco.server.metrics.server import Metrics
from guanaco.server.page.files import read_page
from guanaco.server.training.jobs.publisher import AdapterPublisher

logger = logging.getLogger("guanaco.api")

_BODIES: tuple[type[BaseModel], ...] = (
    ChatBody,
    CompletionBody,
    TokenizeBody,
    DetokenizeBody,
    MessagesBody,
    CountBody,
    ResponseBody,
)
_LAG_PROBE_SECONDS = 0.5  # between two measurements of the event loop's lag
_FORGET_SECONDS = 10.0  # between two removals of expired responses
_STOP_TIMEOUT_SECONDS = 5.0  # an engine that is stuck in a step must not keep the process alive


def create_app(state: ApiState) -> FastAPI:
    """The application over `state`. The engine is started and stopped by the application's lifespan.

    /openapi.json needs a key as other routes do. /docs is off, because its page loads a script from the internet.
    """
    app = FastAPI(
        title="Guanaco",
        version=state.version,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        lifespan=_lifespan,
        telemetry={"tracing": False, "metrics": False, "logs": False},
    )
    app.state.api = state
    app.state.responses = ResponseStore(StoreLimits.from_settings(state.settings))
    for router in (
        info.router,
        chat.router,
        completions.router,
        messages.router,
        responses.router,
        tokens.router,
        adapters_admin.router,
        aliases_admin.router,
        drain.router,
    ):
        app.include_router(router)
    if state.training is not None:
        app.include_router(training_files.router)
        app.include_router(training_jobs.router)
        app.state.served_families = ("files", "fine_tuning")
    for error in HANDLED:
        app.add_exception_handler(error, handle_error)
    # The middleware that is added last is the outermost.
    train_ids = None if state.training is None else frozenset(state.settings.train_key)
    app.add_middleware(AuthMiddleware, keys=state.keys, admin_keys=state.admin_keys, train_key_ids=train_ids)
    if state.settings.page:
        app.add_middleware(PageFiles, files=read_page())
    app.add_middleware(Gate, lifecycle=state.lifecycle, max_admitted=state.max_admitted)
    app.add_middleware(HostCheck, allowed=state.settings.allowed_host, has_keys=bool(state.keys))
    if state.settings.allow_origin:
        app.add_middleware(ClientCors, origins=state.settings.allow_origin)
    app.add_middleware(RequestScope, lifecycle=state.lifecycle, metrics=state.metrics)
    bodies: tuple[type[BaseModel], ...] = _BODIES if state.training is None else (*_BODIES, JobBody)
    _complete_document(app, bodies, has_keys=bool(state.keys))
    return app


@contextlib.asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    state: ApiState = app.state.api
    state.engine.start()
    if state.adapters is not None:
        state.adapters.start()
    if state.training is not None and state.adapters is not None:
        state.training.start(AdapterPublisher(state.adapters, state.training.jobs))
    background = (
        asyncio.create_task(_measure_loop_lag(state.metrics)),
        asyncio.create_task(_forget_expired(app.state.responses)),
    )
    try:
        yield
    finally:
        for task in background:
            task.cancel()
        await asyncio.gather(*background, return_exceptions=True)
        state.shut_down_workers()
        if state.training is not None:
            await state.training.close()
        if state.adapters is not None:
            await state.adapters.close()
        try:
            await asyncio.wait_for(state.engine.stop(), _STOP_TIMEOUT_SECONDS)
        except TimeoutError:
            logger.error("the engine did not stop in time; leaving it behind")


async def _measure_loop_lag(metrics: Metrics) -> None:
    loop = asyncio.get_running_loop()
    while True:
        due = loop.time() + _LAG_PROBE_SECONDS
        await asyncio.sleep(_LAG_PROBE_SECONDS)
        metrics.observe_loop_lag(max(0.0, loop.time() - due))


async def _forget_expired(responses: ResponseStore) -> None:
    while True:
        await asyncio.sleep(_FORGET_SECONDS)
        responses.forget_expired()


def _complete_document(app: FastAPI, bodies: Iterable[type[BaseModel]], *, has_keys: bool) -> None:
    """Complete the OpenAPI document: FastAPI does not know the bodies, since the routes read them themselves."""
    generate = app.openapi

    @functools.cache
    def openapi() -> dict[str, Any]:
        document = generate()
        _, definitions = models_json_schema(
            [(model, "validation") for model in bodies], ref_template="#/components/schemas/{model}"
        )
        document.setdefault("components", {}).setdefault("schemas", {}).update(definitions.get("$defs", {}))
        describe(document, has_keys=has_keys)
        return document

    app.openapi = openapi  # type: ignore[method-assign]
