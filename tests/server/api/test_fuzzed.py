"""schemathesis against the OpenAPI document: made-up requests to every route of clients, as it describes and not.

Each run asks the same. A body asks for a model that is there, as most would end at the first wrong name. It asks for no
stream: those have tests of their own.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.strategies import SearchStrategy, booleans, builds, just
from schemathesis import Case, GenerationMode
from schemathesis.checks import content_type_conformance, not_a_server_error, response_schema_conformance

from guanaco.server.api.app import create_app
from guanaco.server.api.document.examples import EXAMPLES
from guanaco.server.api.http.auth import is_admin_path
from support.server.api_server import PIRATE, LiveServer, make_state

DOCUMENT: dict[str, Any] = create_app(make_state()).openapi()
SCHEMA = schemathesis.openapi.from_dict(DOCUMENT)
ROUTES = [
    (method.upper(), path)
    for path, methods in DOCUMENT["paths"].items()
    for method in methods
    if not is_admin_path(path)
]
CHECKS = [not_a_server_error, content_type_conformance, response_schema_conformance]
DESCRIBED = "as described"
MODES = {DESCRIBED: GenerationMode.POSITIVE, "wrong": GenerationMode.NEGATIVE}


@pytest.fixture(scope="module")
def server() -> Iterator[LiveServer]:
    with LiveServer(make_state()) as live:
        yield live


@pytest.fixture(scope="module")
def session() -> Iterator[requests.Session]:
    with requests.Session() as made:
        yield made


def made_up(method: str, path: str, mode: str) -> SearchStrategy[Case]:
    """Requests of a route. Half of the described ones are its example with more fields: whole made-up bodies are
    mostly refused, as a schema can't say which fields go together."""

    def changed(case: Case, is_example: bool) -> Case:
        if isinstance(case.body, dict):
            if isinstance(case.body.get("model"), str):
                case.body["model"] = PIRATE
            if is_example:
                few = [name for name in sorted(case.body) if name not in ("messages", "prompt")][:2]
                case.body = {name: case.body[name] for name in few} | EXAMPLES[path]
            case.body.pop("stream", None)
            case.body.pop("stream_options", None)
        return case

    cases = SCHEMA[path][method].as_strategy(generation_mode=MODES[mode])
    is_example = booleans() if path in EXAMPLES and mode == DESCRIBED else just(False)
    return builds(changed, cases, is_example)


def has_parts(method: str, path: str, *places: str) -> bool:
    """Whether a request has a body, or parameters in one of the places."""
    route = DOCUMENT["paths"][path][method.lower()]
    return "requestBody" in route or any(given["in"] in places for given in route.get("parameters", ()))


# A text in a path can't be of a wrong type.
CASES = [(*route, mode) for route in ROUTES for mode in MODES if mode == DESCRIBED or has_parts(*route, "query")]


@pytest.mark.parametrize(("method", "path", "mode"), CASES, ids=[" ".join(case) for case in CASES])
def test_made_up_requests(server: LiveServer, session: requests.Session, method: str, path: str, mode: str) -> None:
    statuses: list[int] = []

    @settings(
        max_examples=12 if has_parts(method, path, "query", "path") else 1,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=made_up(method, path, mode))
    def ask(case: Case) -> None:
        answer = case.call(base_url=server.url, session=session)
        case.validate_response(answer, checks=CHECKS)
        statuses.append(answer.status_code)

    ask()
    assert statuses
    if path in EXAMPLES and mode == DESCRIBED:
        assert 200 in statuses, "all were refused: no answer was compared with its schema"
