"""Several servers with one registry: a change on one is served by all. What one can't serve leaves the rest alone."""

import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from guanaco.adapters.versions import shared_registry
from guanaco.adapters.versions.shared_registry import SharedRegistry
from guanaco.server.adapters import sharing
from guanaco.server.adapters.following import ListFollower
from support.adapters.tiny_adapters import make_adapter
from support.models.tiny_models import make_tiny_llama
from support.server.adapter_client import check_text, complete, error_code, names, put
from support.server.adapter_server import ADMIN, TARGETS, AdapterServer, make_adapter_server
from support.server.api_server import WAIT
from support.server.real_server import make_real_server, obey_permissions

KEY = "tenant-key"


class Fleet:
    """Two servers over one registry, and an operator's client of each."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.shared = path / "shared"
        self.one, self.two = self.make("one"), self.make("two")

    def make(self, name: str, **options: Any) -> AdapterServer:
        return make_adapter_server(self.path / name, shared=self.shared, keys=(KEY,), **options)

    def listed(self) -> dict[str, str]:
        """Name → version, as the list has it."""
        content = json.loads((self.shared / "list.json").read_text())
        return {record["name"]: record["version"] for record in content["adapters"]}

    def profile(self, name: str) -> dict[str, Any] | None:
        """The profile that the list gives a name."""
        records = json.loads((self.shared / "list.json").read_text())["adapters"]
        return next(record["profile"] for record in records if record["name"] == name)

    def folder(self, version: str) -> Path:
        return self.shared / "versions" / version


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Look often, so that the tests need not wait."""
    monkeypatch.setattr(sharing, "POLL_SECONDS", 0.02)
    monkeypatch.setattr(sharing, "_RETRY_SECONDS", 0.1)


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[Fleet]:
    made = Fleet(tmp_path)
    with made.one, made.two:
        yield made
        made.one.assert_quiet()
        made.two.assert_quiet()


@pytest.fixture
def one(fleet: Fleet) -> Iterator[httpx.Client]:
    with fleet.one.client(headers=ADMIN) as client:
        yield client


@pytest.fixture
def two(fleet: Fleet) -> Iterator[httpx.Client]:
    with fleet.two.client(headers=ADMIN) as client:
        yield client


def version_of(client: httpx.Client, name: str) -> str | None:
    """The version that makes a name's answers; None if there is no such name."""
    response = complete(client, model=name)
    if response.status_code == 404:
        return None
    return check_text(response, "hi", 8)


def until(holds: Callable[[], bool]) -> None:
    """Ask again until it is so."""
    deadline = time.monotonic() + WAIT
    while not holds():
        assert time.monotonic() < deadline, "it did not become so"
        time.sleep(0.01)


def until_serves(client: httpx.Client, name: str, version: str | None) -> None:
    until(lambda: version_of(client, name) == version)


def state(client: httpx.Client) -> dict[str, Any]:
    registry: dict[str, Any] = client.get("/v1/adapters").json()["registry"]
    return registry


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


def list_of(*records: dict[str, Any], aliases: int = 0) -> bytes:
    """A list as another program might write it."""
    defaults = {"name": "a", "version": "a" * 64, "source": "s"}
    now = {"number": 1, "changed_at": 0, "targets": [{"name": "a", "version": None, "weight": 1}]}
    made = [{"name": f"x{i}", "now": now, "history": []} for i in range(aliases)]
    return json.dumps({"format": 1, "adapters": [{**defaults, **r} for r in records], "aliases": made}).encode()


FOREIGN_LISTS = (
    list_of({"name": "no name"}),
    list_of({"version": "../../elsewhere"}),
    list_of({"history": ["/etc"]}),
    list_of({}, {"version": "b" * 64}),  # one name, two versions
    list_of({"effect": 10**400}),
    list_of({}, aliases=1025),
)


def half_copied(folder: Path) -> None:
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-5])


def other_content(folder: Path) -> None:
    shutil.rmtree(folder)
    make_adapter(folder, TARGETS, 2, seed=999, modules=("q_proj", "down_proj"))


@pytest.mark.parametrize(
    ("damage", "code"),
    [(shutil.rmtree, "version_missing"), (half_copied, "truncated"), (other_content, "version_damaged")],
)
def test_a_version_that_cannot_be_read_leaves_what_was_there(
    fleet: Fleet, one: httpx.Client, damage: Callable[[Path], None], code: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = put(one, "a", fleet.one.source("s", 1))["version"]
    with fleet.make("three") as third, third.client(headers=ADMIN) as client:
        # The list first, so that the third finds the damage and not the copy.
        write = SharedRegistry.write

        def write_damaged(self: SharedRegistry, changed: Any) -> Any:
            damage(self.folder(changed.record("a").version))
            return write(self, changed)

        monkeypatch.setattr(SharedRegistry, "write", write_damaged)
        second = put(one, "a", fleet.one.source("s", 2))["version"]
        until(lambda: state(client)["state"] == "behind")
        behind = state(client)["behind"]
        assert [(b["name"], b["version"], b["code"]) for b in behind] == [("a", second, code)]
        assert client.get("/health/ready").status_code == 200, "it serves what it has"
        assert client.get("/health/ready").json()["adapter_registry"] == "behind"
        assert version_of(client, "a") == first
        monkeypatch.setattr(SharedRegistry, "write", write)
        other = put(client, "b", third.source("t", 7))["version"]  # other names go on
        until_serves(one, "b", other)
        # Loading it again, anywhere, heals it: also on the server that could not follow.
        assert put(client, "a", third.source("s", 2))["history"] == [first]
        until(lambda: state(client)["state"] == "current")
        assert version_of(client, "a") == second


def test_a_version_that_cannot_be_read_leaves_no_more_open_than_the_list(
    fleet: Fleet, one: httpx.Client, two: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = put(one, "a", fleet.one.source("s", 1))["version"]
    until_serves(two, "a", first)
    write = SharedRegistry.write

    def write_damaged(self: SharedRegistry, changed: Any) -> Any:
        shutil.rmtree(self.folder(changed.record("a").version))
        return write(self, changed)

    with monkeypatch.context() as patch:
        patch.setattr(SharedRegistry, "write", write_damaged)
        put(one, "a", fleet.one.source("s", 2), profile={"allowed_keys": []})
    until(lambda: state(two)["state"] == "behind")
    assert version_of(two, "a") is None
    second = put(one, "a", fleet.one.source("s", 2), profile={})["version"]
    until_serves(two, "a", second)


@pytest.mark.parametrize("repair", ["load", "rollback"])
def test_a_server_that_is_behind_keeps_the_keys_of_the_list(
    fleet: Fleet, one: httpx.Client, two: httpx.Client, monkeypatch: pytest.MonkeyPatch, repair: str
) -> None:
    first = put(one, "a", fleet.one.source("s", 1))["version"]
    until_serves(two, "a", first)
    write = SharedRegistry.write

    def write_damaged(self: SharedRegistry, changed: Any) -> Any:
        shutil.rmtree(self.folder(changed.record("a").version))
        return write(self, changed)

    with monkeypatch.context() as patch:
        patch.setattr(SharedRegistry, "write", write_damaged)
        put(one, "a", fleet.one.source("s", 2), profile={"allowed_keys": []})
    until(lambda: state(two)["state"] == "behind")
    if repair == "load":
        put(two, "a", fleet.two.source("s", 2))
    else:
        assert two.post("/v1/adapters/a/rollback", json={}).json()["version"] == first
    assert fleet.profile("a") == {"allowed_keys": []}
    until(lambda: state(one)["state"] == "current" == state(two)["state"])
    assert (version_of(one, "a"), version_of(two, "a")) == (None, None)


@pytest.mark.parametrize("change", ["load", "rollback"])
def test_keys_that_another_server_gives_during_a_change_are_not_lost(
    fleet: Fleet, one: httpx.Client, two: httpx.Client, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    put(one, "a", fleet.one.source("s", 1))
    second = put(one, "a", fleet.one.source("s", 2))["version"]
    until_serves(two, "a", second)
    own, others = fleet.two.source("s", 3), fleet.one.source("s", 4)
    add, begun = SharedRegistry.add_version, threading.Event()

    def add_late(self: SharedRegistry, *given: Any) -> None:
        if not begun.is_set():
            begun.set()
            put(one, "a", others, profile={"allowed_keys": []})
        add(self, *given)

    monkeypatch.setattr(SharedRegistry, "add_version", add_late)
    path = "/v1/adapters/a"
    made = two.put(path, json={"source": own}) if change == "load" else two.post(f"{path}/rollback", json={})
    assert (made.status_code, error_code(made)) == (503, "registry_busy")
    assert fleet.profile("a") == {"allowed_keys": []}
    assert put(two, "a", own)["profile"] == {"allowed_keys": []}, "tried again, it keeps them"


def test_a_profile_that_cannot_be_read_is_open_to_nobody_and_stops_no_other_name(
    fleet: Fleet, one: httpx.Client, two: httpx.Client
) -> None:
    version = put(one, "a", fleet.one.source("s", 1))["version"]
    until_serves(two, "a", version)
    content = json.loads((fleet.shared / "list.json").read_text())
    record = {**content["adapters"][0], "profile": {"allowed_keys": 5}}
    content["adapters"] = [record, {**record, "name": "b", "profile": None}]
    (fleet.shared / "list.json").write_text(json.dumps(content))
    until_serves(two, "b", version)
    assert version_of(two, "a") is None
    assert [(b["name"], b["code"]) for b in state(two)["behind"]] == [("a", "bad_profile")]


def test_a_list_that_could_not_be_applied_is_not_called_current(
    fleet: Fleet, one: httpx.Client, two: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fails(*_: object) -> None:
        raise RuntimeError("a fault of ours")

    put(one, "a", fleet.one.source("s", 1))
    with monkeypatch.context() as patch:
        patch.setattr(ListFollower, "apply", fails)
        (fleet.shared / "list.json").write_bytes(list_of())
        until(lambda: two.get("/health/ready").json()["adapter_registry"] == "unreadable")
    until(lambda: two.get("/health/ready").json()["adapter_registry"] == "current")


def test_a_bad_list_leaves_what_was_there(
    fleet: Fleet, one: httpx.Client, two: httpx.Client, caplog: pytest.LogCaptureFixture
) -> None:
    version = put(one, "a", fleet.one.source("s", 1))["version"]
    until_serves(two, "a", version)
    good = (fleet.shared / "list.json").read_bytes()
    lists = [b"{", b'{"format": 1}', b'{"format": 99, "adapters": []}', b'{"format": 1, "adapters": [{"name": 3}]}']
    for bad in (*lists, *FOREIGN_LISTS):
        (fleet.shared / "list.json").write_bytes(bad)
        until(lambda: state(two)["state"] == "unreadable")
        refused = two.put("/v1/adapters/b", json={"source": fleet.two.source("t", 2)})
        assert (refused.status_code, error_code(refused)) == (507, "registry_failed")
        assert "move it away" in refused.text
        assert version_of(two, "b") is None, "refused means that nothing changed"
        assert version_of(two, "a") == version
        (fleet.shared / "list.json").write_bytes(good)
        until(lambda: state(two)["state"] == "current")
    assert "cannot be followed" in caplog.text
    # A list that is gone names nothing, but removes nothing either. A change writes it anew.
    (fleet.shared / "list.json").unlink()
    until(lambda: state(two)["state"] == "unreadable")
    assert version_of(two, "a") == version
    put(two, "b", fleet.two.source("t", 2))
    assert fleet.listed().keys() == {"a", "b"}
    until(lambda: version_of(one, "b") is not None)


@pytest.mark.parametrize("bad", [b"{", FOREIGN_LISTS[0], FOREIGN_LISTS[4]])
def test_a_start_with_a_bad_list_serves_what_was_known(fleet: Fleet, one: httpx.Client, bad: bytes) -> None:
    version = put(one, "a", fleet.one.source("s", 1))["version"]
    with fleet.make("three"):
        pass
    good = (fleet.shared / "list.json").read_bytes()
    (fleet.shared / "list.json").write_bytes(bad)
    with fleet.make("three") as third, third.client(headers=ADMIN) as client:
        assert version_of(client, "a") == version
        until(lambda: state(client)["state"] == "unreadable")
        (fleet.shared / "list.json").write_bytes(good)
        until(lambda: state(client)["state"] == "current")


def test_a_registry_that_cannot_be_written_refuses_the_change(
    fleet: Fleet, one: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = put(one, "a", fleet.one.source("s", 1))["version"]
    one.put("/v1/aliases/prod", json={"target": "a"})

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("guanaco.adapters.versions.registry_file.RegistryFile.write_list", full)
    for response in (
        one.put("/v1/adapters/a", json={"source": fleet.one.source("s", 2)}),
        one.delete("/v1/adapters/a"),
        one.put("/v1/aliases/prod", json={"target": f"a@{first[:6]}"}),
        one.delete("/v1/aliases/prod"),
    ):
        assert (response.status_code, error_code(response)) == (507, "registry_failed"), response.text
    assert (version_of(one, "a"), version_of(one, "prod")) == (first, first)
    assert one.get("/v1/aliases/prod").json()["revision"] == 1


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
