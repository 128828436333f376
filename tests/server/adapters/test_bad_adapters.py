"""Adapters that must not be served, loaded over HTTP into a real server: each refused by its own code, while clients of
the base and of another adapter get their right answers, and nothing is left of any.
"""

import ast
import time
import unicodedata
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import httpx
import pytest

from guanaco.adapters.errors import AdapterError
from guanaco.adapters.peft.config import REFUSED
from guanaco.adapters.peft.weights import _FEATURES
from guanaco.models.error_codes import ErrorCode
from guanaco.server.api.routes.adapters import refusal
from support.adapters.bad_adapters import CASES, BadAdapter, make
from support.adapters.bad_weights import CANARY
from support.adapters.tiny_adapters import make_adapter
from support.server.documented import ADAPTER_CODES, REPOSITORY
from support.server.real_server import (
    ADMIN,
    BASE,
    RealServer,
    Traffic,
    make_real_server,
    nothing_is_left,
    obey_permissions,
)

# These never come through a route: of converting, of the command line, and of a start that fails.
ELSEWHERE = {"conversion.py", "worker.py", "torch_pickle.py", "registry_file.py"}
NOT_OF_LOADS = {  # of the command line
    ErrorCode.BAD_OPTION, ErrorCode.STORE_IN_USE, ErrorCode.TARGET_EXISTS, ErrorCode.TARGET_UNWRITABLE,
}  # fmt: skip


class Scene(NamedTuple):
    """A server with one good adapter, and clients that use it and the base all the time."""

    server: RealServer
    admin: httpx.Client
    traffic: Traffic
    before: dict[str, Any]
    seconds: dict[str, float]  # by case: how long the refusal of a load took


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    directory = tmp_path_factory.mktemp("bad")
    with (
        make_real_server(directory, thread_setup=obey_permissions) as server,
        server.client(headers=ADMIN) as admin,
    ):
        make_adapter(server.root / "good", server.targets, 8, seed=7)
        (server.root / unicodedata.normalize("NFD", "é")).mkdir()
        assert admin.put("/v1/adapters/good", json={"source": "good"}).status_code == 201
        expected = {model: server.answers(model) for model in (BASE, "good")}
        assert len(set(sum(expected.values(), ()))) == 6, "each adapter's answers are its own"
        with nothing_is_left(server), Traffic(server, expected) as traffic:
            yield Scene(server, admin, traffic, server.holdings(), {})


@pytest.mark.parametrize("case", CASES, ids=[case.title.replace(" ", "_") for case in CASES])
def test_refused_by_its_code(scene: Scene, case: BadAdapter) -> None:
    server, folder = scene.server, scene.server.root / f"case{CASES.index(case)}"
    source = make(case, folder, server.targets)
    url, body = f"/v1/adapters/{case.name}", {"source": source, **case.fields}
    started = time.monotonic()
    refused = scene.admin.put(url, json=body)
    scene.seconds[case.title] = time.monotonic() - started
    error = refused.json()["error"]
    assert (refused.status_code, error["code"]) == (case.status, case.code), refused.text
    assert error["message"].isprintable()
    assert len(error["message"]) < 1500
    if case.name == "bad":
        assert scene.admin.get(url).status_code == 404
    if not (case.proof or case.fields or case.code == "name_taken"):
        checked = scene.admin.post(f"{url}/check", json=body)
        assert (checked.status_code, checked.json()["error"]["code"]) == (case.status, case.code), "check says the same"
    server.wait(lambda: server.stored() == set(scene.before["stored"]))
    assert not (server.root.parent / CANARY).exists(), "a pickle was opened"
    if folder.is_dir() and not folder.is_symlink():
        folder.chmod(0o755)


def test_nobody_was_disturbed(scene: Scene, record_property: Callable[[str, object], None]) -> None:
    """Runs last, while the clients still ask."""
    scene.server.wait(lambda: scene.traffic.num_right > 20)
    assert scene.traffic.wrong == []
    if scene.seconds:
        slowest = max(scene.seconds, key=lambda title: scene.seconds[title])
        record_property("bad_adapters", len(scene.seconds))
        record_property("slowest_refusal_seconds", round(scene.seconds[slowest], 3))
        record_property("slowest_refusal", slowest)
    after = scene.server.holdings()
    assert after["names"] == scene.before["names"]
    assert after["host copies"] == scene.before["host copies"]


def test_there_are_enough_of_them() -> None:
    titles = [case.title for case in CASES]
    assert len(CASES) >= 120
    assert len(set(titles)) == len(titles)
    assert len({case.code for case in CASES}) >= 50
    assert all(400 <= case.status < 500 for case in CASES)


def _codes_in(tree: ast.AST) -> set[ErrorCode]:
    named = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    return {ErrorCode[node.attr] for node in named if getattr(node.value, "id", "") == "ErrorCode"}


def test_every_code_is_documented_with_its_status() -> None:
    """The table of docs/adapter-codes.md is what the adapters' code raises, and its statuses follow from the kinds."""
    raised = {code for code, _ in REFUSED.values()} | {code for _, code, _ in _FEATURES}
    for shared in ("models/formats/hub_errors.py", "models/formats/safetensors_header.py"):
        raised |= _codes_in(ast.parse((REPOSITORY / shared).read_text()))
    sources = [*(REPOSITORY / "adapters").rglob("*.py"), *(REPOSITORY / "server").rglob("*.py")]
    for path in (*sources, REPOSITORY / "models/loading/hub_files.py"):
        if path.name in ELSEWHERE:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("AdapterError", "HubError"):
                raised |= _codes_in(node.args[0])
    codes = {ErrorCode(code): status for code, status in ADAPTER_CODES.items()}
    assert codes.keys() == raised - NOT_OF_LOADS
    assert {code: refusal(AdapterError(code, "")).status for code in codes} == codes
    own = {case.code: case.status for case in CASES if case.code != "invalid_value"}
    assert {code: ADAPTER_CODES[code] for code in own} == own
