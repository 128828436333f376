"""The calls of two Kubernetes controllers that load adapters, in their order, judged by what they take for success.

Read from the sources of vLLM's production-stack (operator/internal/controller/loraadapter_controller.go, commit
0c2b361f) and of AIBrix (pkg/controller/modeladapter/lora_client.go, commit 0e92423a). Both send one bearer token on all
routes, and both name adapters by full paths of the container.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from support.server.adapter_client import check_text, complete
from support.server.adapter_server import AdapterServer, make_adapter_server
from support.server.api_server import BASE

ADMIN_KEY, CLIENT_KEY = "sesame", "client"
TRIES = 5  # of AIBrix for one pod, the first included


@pytest.fixture
def server(tmp_path: Path) -> Iterator[AdapterServer]:
    with make_adapter_server(tmp_path, keys=(CLIENT_KEY,)) as made:
        yield made
        made.assert_quiet()


class Refused(Exception):
    """What a controller writes into its log before it tries again."""


class ProductionStack:
    """`sendRequest` and what calls it. A body is sent with GET too: none; the header Content-Type always."""

    def __init__(self, server: AdapterServer, key: str) -> None:
        self._client = server.client(headers={"Content-Type": "application/json", "Authorization": f"Bearer {key}"})

    def _send(self, method: str, path: str, payload: dict[str, str] | None = None) -> bytes:
        response = self._client.request(method, path, content=None if payload is None else json.dumps(payload))
        if response.status_code == 400:
            # Go's decoder leaves fields that are absent empty; here they are nested, so this never is a success.
            told = json.loads(response.content)
            if told.get("type") == "InvalidUserInput" and "has already been loaded" in told.get("message", ""):
                return response.content
        if response.status_code != 200:
            raise Refused(f"unexpected status code: {response.status_code}, body: {response.text}")
        return response.content

    def load(self, name: str, path: str) -> None:
        self._send("POST", "/v1/load_lora_adapter", {"lora_name": name, "lora_path": path})

    def unload(self, name: str) -> None:
        self._send("POST", "/v1/unload_lora_adapter", {"lora_name": name})

    def registrations(self) -> list[tuple[str, str, int]]:
        """(name, path, load time) of each model with a parent. Typed as the operator's struct is."""
        found = []
        for model in json.loads(self._send("GET", "/v1/models"))["data"]:
            assert isinstance(model["id"], str)
            assert isinstance(model["root"], str)
            assert isinstance(model["created"], int)
            assert isinstance(model["object"], str)
            assert isinstance(model["owned_by"], str)
            if model["parent"] is not None:
                assert isinstance(model["parent"], str)
                found.append((model["id"], model["root"], model["created"]))
        return found

    def reconcile(self, name: str, path: str, *, wanted: bool) -> None:
        """One round: list, then load what is missing or unload what is too much."""
        is_there = any(there == name for there, _, _ in self.registrations())
        if wanted and not is_there:
            self.load(name, path)
        if is_there and not wanted:
            self.unload(name)


class AiBrix:
    """`LoadAdapter` and `UnloadAdapter` of the direct form, without AIBrix's sidecar."""

    def __init__(self, server: AdapterServer, key: str | None) -> None:
        self._client = server.client(headers={} if key is None else {"Authorization": f"Bearer {key}"})
        self.warnings: list[str] = []

    def _post(self, path: str, payload: dict[str, str]) -> httpx.Response:
        return self._client.post(path, content=json.dumps(payload), headers={"Content-Type": "application/json"})

    def models(self) -> set[str]:
        response = self._client.get("/v1/models")
        if response.status_code != 200:
            raise Refused(f"failed to get models: {response.text}")
        return {model["id"] for model in response.json()["data"]}

    def load(self, name: str, artifact: str) -> tuple[bool, bool]:
        """(loaded, was there)."""
        if name in self.models():
            return False, True
        payload = {"lora_name": name, "lora_path": artifact.removeprefix("huggingface://")}
        response = self._post("/v1/load_lora_adapter", payload)
        if response.status_code not in (200, 201):
            raise Refused(f"failed to load LoRA adapter: {response.text}")
        return True, False

    def unload(self, name: str) -> None:
        """Never fails: the controller only warns."""
        response = self._post("/v1/unload_lora_adapter", {"lora_name": name})
        if response.status_code not in (200, 201):
            self.warnings.append(response.text)


def says_which(server: AdapterServer, name: str) -> str:
    with server.client(headers={"Authorization": f"Bearer {CLIENT_KEY}"}) as client:
        version = check_text(complete(client, model=name), "hi", 8)
        (card,) = (c for c in client.get("/v1/models").json()["data"] if c["id"] == name)
        assert card["parent"] == BASE
        return version


def full_path(server: AdapterServer, name: str, seed: int) -> str:
    return str(server.root / server.source(name, seed))


def test_production_stack_loads_lists_and_unloads(server: AdapterServer) -> None:
    operator, path = ProductionStack(server, ADMIN_KEY), full_path(server, "legal", 1)
    assert operator.registrations() == []
    operator.reconcile("legal", path, wanted=True)
    version = says_which(server, "legal")
    ((name, _, loaded),) = operator.registrations()
    assert (name, loaded > 0) == ("legal", True)
    operator.reconcile("legal", path, wanted=True)  # it is there: nothing is sent
    operator.load("legal", path)  # two reconcilers at once, or one that was restarted: the second gets 200 as well
    assert says_which(server, "legal") == version
    operator.reconcile("legal", path, wanted=False)
    assert operator.registrations() == []
    with pytest.raises(Refused, match="404"):
        operator.unload("legal")


def test_production_stack_sees_why_a_load_fails(server: AdapterServer) -> None:
    path = full_path(server, "a", 1)
    with pytest.raises(Refused, match="401"):
        ProductionStack(server, "wrong").registrations()
    with pytest.raises(Refused, match="401"):
        ProductionStack(server, CLIENT_KEY).load("a", path)
    operator = ProductionStack(server, ADMIN_KEY)
    with pytest.raises(Refused, match="404"):
        operator.load("a", str(server.root / "nothing"))
    with pytest.raises(Refused, match=r"40[034]"):
        operator.load("a", "/etc")
    operator.load("a", path)
    with pytest.raises(Refused, match="name_taken"):  # another content: not what its "already been loaded" means
        operator.load("a", full_path(server, "b", 2))


def test_aibrix_loads_lists_and_unloads(server: AdapterServer) -> None:
    controller, path = AiBrix(server, ADMIN_KEY), full_path(server, "support", 3)
    assert controller.load("support", path) == (True, False)
    version = says_which(server, "support")
    assert controller.load("support", path) == (False, True)
    assert controller._post("/v1/load_lora_adapter", {"lora_name": "support", "lora_path": path}).status_code == 200
    assert says_which(server, "support") == version
    controller.unload("support")
    assert controller.models() == {BASE}
    assert controller.warnings == []
    controller.unload("support")  # a second deletion is a warning, no failure
    assert len(controller.warnings) == 1


def test_aibrix_tries_again_until_the_files_are_there(server: AdapterServer) -> None:
    controller, path = AiBrix(server, ADMIN_KEY), str(server.root / "late")
    outcomes: list[str] = []
    for number in range(TRIES):
        if number == 3:
            server.source("late", 4)
        try:
            assert controller.load("late", path) == (True, False)
        except Refused as error:
            outcomes.append("not there" if '"code":"not_found"' in str(error) else str(error))
            continue
        break
    assert outcomes == ["not there"] * 3
    assert says_which(server, "late")
    with pytest.raises(Refused, match="missing_api_key"):
        AiBrix(server, None).load("late", path)
    with pytest.raises(Refused, match="not_found"):  # without --hub-adapters-unpinned it is a folder below the root
        controller.load("from-hub", "huggingface://org/adapter")
