"""Several servers with one registry: a bad list, a version that can't be read and a full disk leave the rest alone."""

import json
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from guanaco.adapters.versions.shared_registry import SharedRegistry
from guanaco.server.adapters.following import ListFollower
from support.adapters.fleet import Fleet, damaged_copies, state, until, until_serves, version_of
from support.adapters.tiny_adapters import make_adapter
from support.server.adapter_client import error_code, put
from support.server.adapter_server import ADMIN, TARGETS


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
    fleet: Fleet, one: httpx.Client, damage: Callable[[Path], None], code: str
) -> None:
    first = put(one, "a", fleet.one.source("s", 1))["version"]
    with fleet.make("three") as third, third.client(headers=ADMIN) as client:
        with damaged_copies(damage):
            second = put(one, "a", fleet.one.source("s", 2))["version"]
        until(lambda: state(client)["state"] == "behind")
        behind = state(client)["behind"]
        assert [(b["name"], b["version"], b["code"]) for b in behind] == [("a", second, code)]
        assert client.get("/health/ready").status_code == 200, "it serves what it has"
        assert client.get("/health/ready").json()["adapter_registry"] == "behind"
        assert version_of(client, "a") == first
        other = put(client, "b", third.source("t", 7))["version"]  # other names go on
        until_serves(one, "b", other)
        # Loading it again, anywhere, heals it: also on the server that could not follow.
        assert put(client, "a", third.source("s", 2))["history"] == [first]
        until(lambda: state(client)["state"] == "current")
        assert version_of(client, "a") == second


def test_a_version_that_cannot_be_read_leaves_no_more_open_than_the_list(
    fleet: Fleet, one: httpx.Client, two: httpx.Client
) -> None:
    first = put(one, "a", fleet.one.source("s", 1))["version"]
    until_serves(two, "a", first)
    with damaged_copies():
        put(one, "a", fleet.one.source("s", 2), profile={"allowed_keys": []})
    until(lambda: state(two)["state"] == "behind")
    assert version_of(two, "a") is None
    second = put(one, "a", fleet.one.source("s", 2), profile={})["version"]
    until_serves(two, "a", second)


@pytest.mark.parametrize("repair", ["load", "rollback"])
def test_a_server_that_is_behind_keeps_the_keys_of_the_list(
    fleet: Fleet, one: httpx.Client, two: httpx.Client, repair: str
) -> None:
    first = put(one, "a", fleet.one.source("s", 1))["version"]
    until_serves(two, "a", first)
    with damaged_copies():
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
