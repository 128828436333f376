"""Aliases over HTTP: names that lead elsewhere, split by weight, changed at one moment, with a history that lasts."""

import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from guanaco.adapters.versions.holds import Holder
from guanaco.server.api.http.auth import KeyRing
from support.server.adapter_client import check_text, complete, error_code, names, put
from support.server.adapter_server import ADMIN, AdapterServer, make_adapter_server
from support.server.api_server import BASE, WAIT


@pytest.fixture
def server(tmp_path: Path) -> Iterator[AdapterServer]:
    with make_adapter_server(tmp_path) as made:
        yield made
        made.assert_quiet()


@pytest.fixture
def client(server: AdapterServer) -> Iterator[httpx.Client]:
    with server.client(headers=ADMIN) as made:
        yield made


def point(client: httpx.Client, name: str, target: str | None = None, **fields: Any) -> Any:
    body = fields if target is None else {"target": target, **fields}
    response = client.put(f"/v1/aliases/{name}", json=body)
    assert response.status_code in (200, 201), response.text
    return response.json()


def ask(client: httpx.Client, model: str, key: str | None = None, **fields: Any) -> str:
    """The version that answers."""
    headers = {} if key is None else {"X-Split-Key": key}
    body = {"model": model, "prompt": "hi", "max_tokens": 2, **fields}
    return check_text(client.post("/v1/completions", json=body, headers=headers), "hi", 2)


def test_an_alias_leads_to_a_name_or_to_a_version(server: AdapterServer, client: httpx.Client) -> None:
    first = put(client, "a", server.source("a", 1))["version"]
    assert client.put("/v1/aliases/prod", json={"target": "a"}).status_code == 201
    assert point(client, "fixed", f"a@{first[:8]}")["split"] == {f"a@{first}": 1}
    second = put(client, "a", server.source("a2", 2))["version"]
    assert (ask(client, "prod"), ask(client, "fixed"), ask(client, "a")) == (second, first, second)
    assert names(client) == [BASE, "a", "prod", "fixed"]
    card = client.get("/v1/models/fixed").json()
    assert (card["id"], card["root"], card["parent"]) == ("fixed", "a", BASE)
    assert complete(client, model="prod").json()["model"] == "prod"
    for _ in range(10):  # its history forgets the pinned version, its alias doesn't
        put(client, "a", server.source("a3", 3 + _))
    assert first not in client.get("/v1/adapters/a").json()["history"]
    assert ask(client, "fixed") == first
    mixed = complete(client, adapters=[{"name": "fixed", "scale": 0.5}, {"name": "a"}])
    assert check_text(mixed, "hi", 8).split(",")[0] == first
    assert client.get("/v1/adapters/a").json()["aliases"] == ["prod", "fixed"]


def test_a_split_can_be_reproduced(server: AdapterServer, client: httpx.Client) -> None:
    one, two = (put(client, "a", server.source(source, seed))["version"] for seed, source in enumerate("xy"))
    card = point(client, "prod", split={f"a@{one[:10]}": 75, f"a@{two[:10]}": 25})
    assert card["versions"] == {f"a@{one}": one, f"a@{two}": two}
    keys = [f"user-{number}" for number in range(60)]
    chosen = [ask(client, "prod", key) for key in keys]
    assert chosen == [ask(client, "prod", key) for key in keys]
    assert chosen == [ask(client, "prod", user=key) for key in keys], "`user`, where there is no header"
    body = {"model": "prod", "prompt": "x", "max_tokens": 1}
    by_id = [client.post("/v1/completions", json=body, headers={"X-Request-Id": key}) for key in keys]
    assert chosen == [answer.headers["x-adapter-version"] for answer in by_id], "the request's id, without either"
    assert Counter(chosen)[one] / len(keys) == pytest.approx(0.75, abs=0.15)
    assert point(client, "prod", split={"a": 1})["revision"] == 2
    assert {ask(client, "prod", key) for key in keys} == {two}
    card = client.get("/v1/aliases/prod").json()
    assert (card["num_uses"], card["history"][0]["split"]) == (300, {f"a@{one}": 75, f"a@{two}": 25})
    bad = client.post("/v1/completions", json={"model": "prod", "prompt": "x"}, headers={"X-Split-Key": "k" * 257})
    assert (bad.status_code, bad.json()["error"]["param"]) == (400, "X-Split-Key")


def test_what_is_not_loaded_is_said_and_never_the_base(server: AdapterServer, client: httpx.Client) -> None:
    version = put(client, "a", server.source("a", 1))["version"]
    put(client, "b", server.source("b", 2))
    point(client, "prod", "a")
    point(client, "fixed", f"a@{version}")
    point(client, "both", split={"a": 1, "b": 1})
    client.delete("/v1/adapters/a")
    for name in ("prod", "fixed"):
        answer = complete(client, model=name)
        assert (answer.status_code, error_code(answer)) == (404, "alias_target_missing")
        assert client.get(f"/v1/aliases/{name}").json()["state"] == "dangling"
    answers = [complete(client, model="both", user=str(number), max_tokens=1) for number in range(20)]
    assert {answer.status_code for answer in answers} == {200, 404}, "the other half is not made up for"
    assert client.get("/v1/aliases/both").json()["state"] == "degraded"
    assert names(client) == [BASE, "b"]
    server.wait(lambda: not server.registry.knows(version))
    put(client, "a", server.source("other", 3))
    assert ask(client, "fixed") == version, "its copy was kept"
    assert client.delete("/v1/adapters/a").json()["drained"] is True
    for name in ("prod", "fixed", "both"):
        assert client.delete(f"/v1/aliases/{name}").json() == {"object": "alias.deleted", "name": name, "deleted": True}
    server.wait(lambda: len(server.store.versions()) == 1)


def test_refusals(server: AdapterServer, client: httpx.Client) -> None:
    put(client, "a", server.source("a", 1))
    point(client, "x", "a")
    point(client, "y", "x")
    for name, body, status, code in (
        ("x", {"target": "y"}, 409, "alias_cycle"),
        ("x", {"target": "x"}, 409, "alias_cycle"),
        ("a", {"target": "x"}, 409, "name_taken"),
        ("bad%20name", {"target": "a"}, 400, "bad_name"),
        ("x", {"target": "nope"}, 404, "target_not_found"),
        ("x", {"target": "nope@abcdef"}, 404, "target_not_found"),
        ("x", {"target": "a@abcdef"}, 404, "version_missing"),
        ("x", {"target": "y@abcdef"}, 400, "bad_target"),
        ("x", {"target": BASE}, 400, "bad_target"),
        ("x", {"target": "a/b"}, 400, "bad_target"),
        ("x", {"split": {"a": 0}}, 400, "bad_split"),
        ("x", {"split": {}}, 400, "bad_split"),
        ("x", {"split": {"a": 0.5}}, 400, "invalid_value"),
        ("x", {"split": {"a": True}}, 400, "invalid_value"),
        ("x", {"split": ["a"]}, 400, "invalid_value"),
        ("x", {"target": "a", "split": {"a": 1}}, 400, "invalid_value"),
        ("x", {}, 400, "invalid_value"),
        ("x", {"target": "a", "expected_revision": 2}, 409, "revision_conflict"),
        ("new", {"target": "a", "expected_revision": 1}, 409, "revision_conflict"),
    ):
        refused = client.put(f"/v1/aliases/{name}", json=body)
        assert (refused.status_code, error_code(refused)) == (status, code), (name, body, refused.text)
    assert point(client, "new", "a", expected_revision=0)["revision"] == 1
    taken = client.put("/v1/adapters/x", json={"source": "a"})
    assert (taken.status_code, error_code(taken)) == (409, "name_taken")
    for method, path, body, code in (
        ("GET", "/v1/aliases/nope", None, "alias_not_found"),
        ("DELETE", "/v1/aliases/nope", None, "alias_not_found"),
        ("POST", "/v1/aliases/nope/rollback", {}, "alias_not_found"),
        ("POST", "/v1/aliases/nope/rename", {"name": "other"}, "alias_not_found"),
        ("POST", "/v1/aliases/x/rename", {"name": "y"}, "name_taken"),
        ("POST", "/v1/aliases/x/rename", {"name": "a"}, "name_taken"),
        ("POST", "/v1/aliases/x/rollback", {}, "no_history"),
    ):
        refused = client.request(method, path, json=body)
        assert error_code(refused) == code, (method, path)
    point(client, "x", split={"a": 2})
    refused = client.post("/v1/aliases/x/rollback", json={"revision": 9})
    assert (refused.status_code, error_code(refused)) == (404, "revision_missing")


def test_history_renaming_and_a_restart(tmp_path: Path) -> None:
    with make_adapter_server(tmp_path) as server, server.client(headers=ADMIN) as client:
        one, two = (put(client, "a", server.source(source, seed))["version"] for seed, source in enumerate("xy"))
        point(client, "prod", f"a@{one}")
        point(client, "outer", "prod")
        point(client, "prod", "a")
        renamed = client.post("/v1/aliases/prod/rename", json={"name": "live"}).json()
        assert (renamed["name"], renamed["revision"]) == ("live", 2)
        assert complete(client, model="prod").status_code == 404
    with make_adapter_server(tmp_path) as server, server.client(headers=ADMIN) as client:
        assert (ask(client, "live"), ask(client, "outer")) == (two, two)
        back = client.post("/v1/aliases/live/rollback", json={}).json()
        assert (back["revision"], back["split"]) == (3, {f"a@{one}": 1})
        assert (ask(client, "live"), ask(client, "outer")) == (one, one)
        forward = client.post("/v1/aliases/live/rollback", json={"revision": 2}).json()
        assert (forward["revision"], ask(client, "outer")) == (4, two)
        client.post("/v1/aliases/live/rollback", json={"revision": 1})
    with make_adapter_server(tmp_path) as server, server.client(headers=ADMIN) as client:
        assert ask(client, "outer") == one, "a pinned version that its name has left behind comes back too"


def test_a_pinned_version_outlives_its_names_history_and_a_name_that_is_gone(tmp_path: Path) -> None:
    with make_adapter_server(tmp_path) as server, server.client(headers=ADMIN) as client:
        one, other = (put(client, "a", server.source(source, seed))["version"] for seed, source in enumerate("xy"))
        point(client, "prod", split={f"a@{one}": 1, f"a@{other}": 0})
        for seed in range(2, 13):  # the history has eight
            put(client, "a", server.source("next", seed))
        assert one not in client.get("/v1/adapters/a").json()["history"]
        assert ask(client, "prod") == one
    with make_adapter_server(tmp_path) as server, server.client(headers=ADMIN) as client:
        assert ask(client, "prod") == one
        client.put("/v1/aliases/prod", json={"target": f"a@{other}"})
        assert ask(client, "prod") == other, "a weight of zero keeps it at hand"
        client.delete("/v1/adapters/a")
        assert error_code(complete(client, model="prod")) == "alias_target_missing"
    with make_adapter_server(tmp_path) as server, server.client(headers=ADMIN) as client:
        assert error_code(complete(client, model="prod")) == "alias_target_missing"
        assert other in server.store.versions(), "nothing that an alias leads to is collected"
        put(client, "a", server.source("new", 20))
        assert ask(client, "prod") == other


def test_a_pinned_version_that_is_damaged_is_said_at_the_start(tmp_path: Path) -> None:
    with make_adapter_server(tmp_path) as server, server.client(headers=ADMIN) as client:
        one, two = (put(client, "a", server.source(source, seed))["version"] for seed, source in enumerate("xy"))
        point(client, "prod", f"a@{one}")
    damaged = tmp_path / "store" / one / "adapter_model.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    with make_adapter_server(tmp_path) as server, server.client(headers=ADMIN) as client:
        assert error_code(complete(client, model="prod")) == "alias_target_missing"
        assert ask(client, "a") == two


def test_only_who_may_use_all_targets_knows_of_an_alias(tmp_path: Path) -> None:
    yours = KeyRing(["yours"]).find(b"yours")
    assert yours is not None
    with make_adapter_server(tmp_path, keys=["mine", "yours"]) as server, server.client() as client:
        for name, profile in (("a", {"allowed_keys": [yours.id]}), ("b", {})):
            body = {"source": server.source(name, ord(name)), "profile": profile}
            assert client.put(f"/v1/adapters/{name}", json=body, headers=ADMIN).status_code == 201
        split = {"split": {"a": 1, "b": 1}}
        assert client.put("/v1/aliases/both", json=split, headers=ADMIN).status_code == 201
        for key, status, seen in (("yours", 200, [BASE, "a", "b", "both"]), ("mine", 404, [BASE, "b"])):
            headers = {"X-Api-Key": key}
            assert [model["id"] for model in client.get("/v1/models", headers=headers).json()["data"]] == seen
            for user in range(8):  # whichever of the two it would be
                body = {"model": "both", "prompt": "x", "max_tokens": 1, "user": str(user)}
                assert client.post("/v1/completions", json=body, headers=headers).status_code == status
        assert not server.registry.holds.held(Holder.REQUEST, Holder.LOAD)


def test_re_pointed_between_two_looks(
    server: AdapterServer, client: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A request that has just read where an alias leads gets what it leads to now, and no error."""
    one, two = (put(client, "a", server.source(source, seed))["version"] for seed, source in enumerate("xy"))
    put(client, "a", server.source("z", 9))
    point(client, "prod", f"a@{one}")
    table, looks = server.manager.aliases.table, []
    follow = table.follow

    def then_changed(name: str, key: str) -> Any:
        target = follow(name, key)
        looks.append(target)
        if len(looks) == 1:
            other = server.client(headers=ADMIN)
            point(other, "prod", f"a@{two}")
            other.close()
            server.wait(lambda: not server.registry.knows(one))
        return target

    monkeypatch.setattr(table, "follow", then_changed)
    assert ask(client, "prod") == two
    assert [target.version for target in looks] == [one, two]


def test_re_pointed_again_and_again_under_load(server: AdapterServer, client: httpx.Client) -> None:
    """Between two pinned versions, of which only one is held at a time: every answer is one of them, none is lost."""
    versions = [put(client, "a", server.source(source, seed))["version"] for seed, source in enumerate("xy")]
    put(client, "a", server.source("z", 9))
    point(client, "prod", f"a@{versions[0]}")
    stop, seen = threading.Event(), Counter[str]()

    def generate(seed: int) -> None:
        with server.client() as other:
            while not stop.is_set():
                seen[ask(other, "prod", user=str(seed))] += 1

    with ThreadPoolExecutor(3) as threads:
        running = [threads.submit(generate, seed) for seed in range(3)]
        try:
            for turn in range(30):
                point(client, "prod", f"a@{versions[turn % 2]}")
                assert ask(client, "prod") == versions[turn % 2], "from the reply on"
        finally:
            stop.set()
        for one in running:
            one.result(WAIT)
    assert set(seen) == set(versions)
    server.wait(lambda: not server.registry.knows(versions[0]))
