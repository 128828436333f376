"""Several servers with one registry: a change on one is served by all."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from guanaco.adapters.versions import shared_registry
from guanaco.adapters.versions.shared_registry import SharedRegistry
from guanaco.server.adapters import sharing
from support.adapters.fleet import KEY, Fleet, until, until_serves, version_of
from support.adapters.tiny_adapters import make_adapter
from support.models.tiny_models import make_tiny_llama
from support.server.adapter_client import check_text, complete, error_code, names, put
from support.server.adapter_server import ADMIN, TARGETS, AdapterServer
from support.server.api_server import WAIT
from support.server.real_server import make_real_server, obey_permissions


def test_a_load_a_replacement_a_rollback_and_a_removal_reach_the_other(
    fleet: Fleet, one: httpx.Client, two: httpx.Client
) -> None:
    first = put(one, "a", fleet.one.source("s", 1))["version"]
    until_serves(two, "a", first)
    second = put(one, "a", fleet.one.source("s", 2))["version"]
    until_serves(two, "a", second)
    card = two.get("/v1/adapters/a").json()
    assert (card["history"], card["source"]) == ([first], "s")
    assert two.post("/v1/adapters/a/rollback", json={}).json()["version"] == first  # made on the follower
    until_serves(one, "a", first)
    assert fleet.listed() == {"a": first}
    assert one.delete("/v1/adapters/a").json()["drained"] is True
    until_serves(two, "a", None)
    assert (names(two)[1:], fleet.listed()) == ([], {})
    assert two.get("/health/ready").json()["adapter_registry"] == "current"


def test_aliases_reach_the_other(fleet: Fleet, one: httpx.Client, two: httpx.Client) -> None:
    old = put(one, "a", fleet.one.source("s", 1))["version"]
    new = put(one, "a", fleet.one.source("s", 2))["version"]
    assert one.put("/v1/aliases/prod", json={"target": f"a@{old[:8]}"}).status_code == 201
    until_serves(two, "prod", old)
    assert two.put("/v1/aliases/prod", json={"target": "a", "expected_revision": 1}).status_code == 200
    until_serves(one, "prod", new)
    assert one.post("/v1/aliases/prod/rollback", json={}).json()["split"] == {f"a@{old}": 1}
    assert two.post("/v1/aliases/prod/rename", json={"name": "live"}).status_code == 200
    until_serves(one, "live", old)
    assert version_of(one, "prod") is None
    assert one.delete("/v1/aliases/live").status_code == 200
    until_serves(two, "live", None)
    # A name may change from an alias to an adapter in what a follower sees as one step.
    put(two, "live", fleet.two.source("s", 3))
    until(lambda: version_of(one, "live") is not None)


def test_the_changes_of_two_servers_do_not_lose_one_another(fleet: Fleet, one: httpx.Client, two: httpx.Client) -> None:
    def load(at: tuple[AdapterServer, httpx.Client, str]) -> str:
        server, client, name = at
        version = str(put(client, name, server.source(name, sum(name.encode())))["version"])
        assert client.put(f"/v1/aliases/to-{name}", json={"target": name}).status_code == 201
        return version

    work = [(s, c, f"{n}{i}") for i in range(6) for s, c, n in ((fleet.one, one, "x"), (fleet.two, two, "y"))]
    with ThreadPoolExecutor(8) as threads:
        made = dict(zip((name for _, _, name in work), threads.map(load, work), strict=True))
    assert fleet.listed() == made
    for name, version in made.items():
        until_serves(one, f"to-{name}", version)
        until_serves(two, f"to-{name}", version)
    # Nor do loads of one name: the later one has the earlier one in its history.
    first, second = load((fleet.one, one, "z")), put(two, "z", fleet.two.source("q", 99))["version"]
    assert two.get("/v1/adapters/z").json()["history"] == [first]
    conflict = one.put("/v1/adapters/z", json={"source": "z", "expected_version": first})
    assert (conflict.status_code, error_code(conflict)) == (409, "version_conflict"), "the list, not what one had"
    assert one.put("/v1/adapters/z", json={"source": "z", "expected_version": second}).status_code == 200


def test_a_change_begins_with_what_others_have_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No server looks by itself here: each learns of the others' changes when it makes one."""
    monkeypatch.setattr(sharing, "POLL_SECONDS", 3600.0)
    fleet = Fleet(tmp_path)
    with fleet.one, fleet.two, fleet.one.client(headers=ADMIN) as one, fleet.two.client(headers=ADMIN) as two:
        version = put(one, "a", fleet.one.source("s", 1))["version"]
        assert one.put("/v1/aliases/x", json={"target": "a"}).status_code == 201
        assert two.put("/v1/aliases/y", json={"target": "x"}).status_code == 201
        assert [version_of(two, name) for name in ("a", "x", "y")] == [version] * 3
        assert two.delete("/v1/adapters/a").status_code == 200
        assert one.put("/v1/aliases/z", json={"target": "a"}).status_code == 404
        assert {card["name"] for card in one.get("/v1/aliases").json()["data"]} == {"x", "y"}
        assert one.post("/v1/adapters/a/rollback", json={}).status_code == 404


def test_a_server_that_was_away_catches_up(fleet: Fleet, one: httpx.Client) -> None:
    put(one, "stays", fleet.one.source("a", 1))
    put(one, "goes", fleet.one.source("b", 2))
    put(one, "moves", fleet.one.source("c", 3))
    with fleet.make("three") as third, third.client(headers=ADMIN) as client:
        assert set(names(client)[1:]) == {"stays", "goes", "moves"}, "at its first start"
    one.delete("/v1/adapters/goes")
    moved = put(one, "moves", fleet.one.source("c", 4))["version"]
    new = put(one, "new", fleet.one.source("d", 5))["version"]
    with fleet.make("three") as third, third.client(headers=ADMIN) as client:
        assert set(names(client)[1:]) == {"stays", "moves", "new"}, "before the first request"
        assert (version_of(client, "moves"), version_of(client, "new")) == (moved, new)
        back = client.post("/v1/adapters/moves/rollback", json={}).json()["version"]  # a version that it had
    until_serves(one, "moves", back)


def test_a_history_that_a_server_never_served_can_be_rolled_back_to(fleet: Fleet, one: httpx.Client) -> None:
    versions = [put(one, "a", fleet.one.source("s", seed))["version"] for seed in range(3)]
    with fleet.make("three") as third, third.client(headers=ADMIN) as client:
        assert client.post("/v1/adapters/a/rollback", json={"version": versions[0]}).status_code == 200
        assert version_of(client, "a") == versions[0]


def test_a_change_waits_for_that_of_another_server_but_not_for_ever(
    fleet: Fleet, one: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sharing, "_LOCK_SECONDS", 0.05)
    lock = SharedRegistry(fleet.shared).try_lock()
    assert lock is not None
    source = fleet.one.source("s", 1)
    refused = one.put("/v1/adapters/a", json={"source": source})
    assert (refused.status_code, error_code(refused)) == (503, "registry_busy")
    lock.close()
    put(one, "a", source)


def test_profiles_and_their_keys_are_those_of_the_list(fleet: Fleet, one: httpx.Client, two: httpx.Client) -> None:
    (key,) = fleet.one.state.keys._keys
    client = {"Authorization": f"Bearer {KEY}"}
    version = put(one, "a", fleet.one.source("s", 1), profile={"allowed_keys": [key.id]})["version"]
    until_serves(two, "a", None)  # the admin key is another tenant
    with fleet.two.client(headers=client) as tenant:
        until_serves(tenant, "a", version)
        put(two, "a", fleet.two.source("s", 1), profile={"allowed_keys": []})
        with fleet.one.client(headers=client) as other:
            until_serves(other, "a", None)
        put(one, "a", fleet.one.source("s", 1), profile={})
        until_serves(tenant, "a", version)
        until_serves(two, "a", version)


def test_an_adapter_of_the_command_line_goes_before_the_list(fleet: Fleet, one: httpx.Client, tmp_path: Path) -> None:
    own = make_adapter(tmp_path / "own", TARGETS, 2, seed=50, modules=("q_proj", "down_proj"))
    with fleet.make("three", command_line={"a": own}) as third, third.client(headers=ADMIN) as client:
        mine = version_of(client, "a")
        shared = put(one, "a", fleet.one.source("s", 1))["version"]
        put(one, "b", fleet.one.source("t", 2))
        until(lambda: version_of(client, "b") is not None)
        assert (version_of(client, "a"), fleet.listed()["a"]) == (mine, shared)
        client.delete("/v1/adapters/a")  # ends here what is only here
        assert fleet.listed()["a"] == shared


def test_versions_that_no_list_names_leave_the_registry(
    fleet: Fleet, one: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    version = put(one, "a", fleet.one.source("s", 1))["version"]
    one.delete("/v1/adapters/a")
    put(one, "b", fleet.one.source("t", 2))
    assert fleet.folder(version).exists(), "another server may just copy it"
    monkeypatch.setattr(shared_registry, "UNNAMED_SECONDS", -1.0)
    put(one, "c", fleet.one.source("u", 3))
    assert not fleet.folder(version).exists()
    assert {path.name for path in (fleet.shared / "versions").iterdir()} == set(fleet.listed().values())


def test_a_follower_needs_no_admin_key_and_only_reads(tmp_path: Path) -> None:
    """Over real tensors: `guanaco serve --adapter-registry` without an admin key answers as the server that loaded."""
    shared, model = tmp_path / "shared", make_tiny_llama(tmp_path / "tiny")
    for part in (shared, tmp_path / "leader", tmp_path / "follower"):
        part.mkdir()
    with make_real_server(tmp_path / "leader", model=model, adapter_registry=shared) as leader:
        make_adapter(leader.root / "a", leader.targets, 8, seed=7)
        with leader.client(headers=ADMIN) as client:
            put(client, "a", "a")
        told = leader.answers("a")
        (folder,) = shared.iterdir()
        for directory in (folder, folder / "versions"):
            directory.chmod(0o555)
        options: dict[str, Any] = {"admin_key": None, "adapter_registry": shared, "thread_setup": obey_permissions}
        with make_real_server(tmp_path / "follower", model=model, **options) as follower:
            assert follower.answers("a") == told != follower.answers("tiny")
            with follower.client(headers=ADMIN) as client:
                assert error_code(client.get("/v1/adapters")) == "admin_disabled"
                for directory in (folder, folder / "versions"):
                    directory.chmod(0o755)
                with leader.client(headers=ADMIN) as operator:
                    assert operator.delete("/v1/adapters/a").status_code == 200
                until(lambda: "a" not in names(client))
                assert client.get("/health/ready").json()["adapter_registry"] == "current"


def test_replaced_again_and_again_under_load(
    fleet: Fleet, one: httpx.Client, two: httpx.Client, proof_count: Callable[[int, int], int]
) -> None:
    """Every answer of both servers comes from a version that the list named by then; at the end both serve the last."""
    sources = [(fleet.one.source(f"s{seed}", seed), fleet.two.source(f"s{seed}", seed)) for seed in range(5)]
    stop, named, seen = threading.Event(), set[str](), set[str]()
    write = SharedRegistry.write

    def noted(self: SharedRegistry, changed: Any) -> Any:
        named.update(record.version for record in changed.records)
        return write(self, changed)

    def ask(server: AdapterServer) -> None:
        with server.client(headers=ADMIN) as client:
            while not stop.is_set():
                response = complete(client, "prompt" * 8, 40, model="a")
                version = check_text(response, "prompt" * 8, 40)
                assert version in named
                seen.add(version)

    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(4) as threads:
        patch.setattr(SharedRegistry, "write", noted)
        until_serves(two, "a", put(one, "a", sources[4][0])["version"])
        running = [threads.submit(ask, server) for server in (fleet.one, fleet.two) * 2]
        try:
            for turn in range(proof_count(8, 200)):
                client, source = (one, sources[turn % 5][0]) if turn % 2 else (two, sources[turn % 5][1])
                version = put(client, "a", source)["version"]
                assert version_of(client, "a") == version, "from the reply on"
        finally:
            stop.set()
        for each in running:
            each.result(WAIT)
    assert len(seen) > 1
    until_serves(one, "a", version)
    until_serves(two, "a", version)
    fleet.one.wait(lambda: len(fleet.one.registry.versions()) == 1)
    fleet.two.wait(lambda: len(fleet.two.registry.versions()) == 1)
