"""Adapters that come and go while the server runs, over HTTP: each answer must be made by exactly the version that it
names, old requests keep theirs, and nothing is left behind.
"""

import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from guanaco.adapters.peft.safetensors import MAX_HEADER_BYTES
from guanaco.adapters.versions.holds import Holder
from guanaco.server.adapters.sources import shown_source
from guanaco.server.api.http.auth import ADMIN_PATHS
from support.server.adapter_client import COMPLETIONS, check_text, complete, error_code, names, put
from support.server.adapter_server import ADMIN, FINGERPRINT, AdapterServer, make_adapter_server
from support.server.api_server import BASE, WAIT, LiveServer, http_post, make_state


@pytest.fixture
def server(tmp_path: Path) -> Iterator[AdapterServer]:
    with make_adapter_server(tmp_path) as made:
        yield made
        made.assert_quiet()


@pytest.fixture
def client(server: AdapterServer) -> Iterator[httpx.Client]:
    with server.client(headers=ADMIN) as made:
        yield made


def test_a_load_has_an_effect_at_once_and_an_unload_too(server: AdapterServer, client: httpx.Client) -> None:
    card = put(client, "a", server.source("a", 1))
    assert (card["state"], card["rank"], card["modules_applied"], card["effect"]) == ("ready", 2, 2, 1.0)
    assert names(client) == [BASE, "a"]
    assert check_text(complete(client, model="a"), "hi", 8) == card["version"]
    assert client.get("/v1/adapters/a").json()["tier"] == "device"
    gone = client.delete("/v1/adapters/a").json()
    assert gone == {"object": "adapter.deleted", "name": "a", "deleted": True, "drained": True}
    assert names(client) == [BASE]
    refused = complete(client, model="a")
    assert (refused.status_code, error_code(refused)) == (404, "model_not_found")
    assert (server.registry.num_bytes, server.model.slots, server.store.versions()) == (0, {}, frozenset())
    assert check_text(complete(client), "hi", 8) == ""


def test_a_stream_names_its_version_too(server: AdapterServer, client: httpx.Client) -> None:
    version = put(client, "a", server.source("a", 1))["version"]
    streamed = complete(client, model="a", stream=True)
    assert streamed.headers["x-adapter-version"] == version
    assert "x-adapter-version" not in complete(client, stream=True).headers


def test_a_cards_root_is_the_source_and_tells_no_path_of_the_server(
    server: AdapterServer, client: httpx.Client
) -> None:
    def root() -> str:
        return str(client.get("/v1/models/a").json()["root"])

    put(client, "a", server.source("deep", 1))
    assert root() == "deep"
    put(client, "a", str(server.root / server.source("absolute", 2)))
    assert root() == "absolute"
    put(client, "a", f"deep/../{server.source('other', 3)}")
    assert root() == "other"
    client.post("/v1/adapters/a/rollback", json={})
    assert root() == "a"
    for source, shown in (("/srv/x/lora/", "lora"), ("~/lora", "lora"), ("../..", "a"), ("/", "a"), ("t/l", "t/l")):
        assert shown_source("a", source) == shown


def test_vllms_routes(server: AdapterServer, client: httpx.Client) -> None:
    body = {"lora_name": "v", "lora_path": server.source("v", 1)}
    done = client.post("/v1/load_lora_adapter", json=body)
    assert (done.status_code, done.text) == (200, "Success: LoRA adapter 'v' added successfully.")
    again = client.post("/v1/load_lora_adapter", json=body)
    assert (again.status_code, again.text) == (200, done.text), "controllers repeat it, and want 200"
    before = client.get("/v1/adapters/v").json()["version"]
    assert client.get("/v1/adapters/v").json()["num_loads"] == 1
    copy = {**body, "lora_path": server.source("copy", 1)}
    assert client.post("/v1/load_lora_adapter", json=copy).status_code == 200, "the same content from elsewhere"
    (server.root / "copy" / "guanaco.json").write_text('{"top_p": 0.5}')
    for other in (copy, {**body, "lora_path": server.source("w", 2)}):
        refused = client.post("/v1/load_lora_adapter", json=other)
        assert (refused.status_code, error_code(refused)) == (400, "name_taken")
        assert "load_inplace" in refused.json()["error"]["message"]
        assert refused.json()["error"]["param"] == "lora_name"
    assert client.get("/v1/adapters/v").json()["version"] == before
    server.source("v", 2)
    assert client.post("/v1/load_lora_adapter", json={**body, "load_inplace": True}).status_code == 200
    assert check_text(complete(client, model="v"), "hi", 8) not in ("", before)
    gone = client.post("/v1/unload_lora_adapter", json={"lora_name": "v"})
    assert (gone.status_code, gone.text) == (200, "Success: LoRA adapter 'v' removed successfully.")
    assert client.post("/v1/unload_lora_adapter", json={"lora_name": "v"}).status_code == 404


def test_vllms_route_refuses_names_with_400_and_names_its_own_fields(
    server: AdapterServer, client: httpx.Client
) -> None:
    put(client, "a", server.source("a", 1))
    client.put("/v1/aliases/x", json={"target": "a"})
    for name, inplace in ((BASE.rpartition("/")[2], True), (BASE, False), (BASE, True), ("x", True)):
        body = {"lora_name": name, "lora_path": "nope", "load_inplace": inplace}
        refused = client.post("/v1/load_lora_adapter", json=body)
        if name in (BASE, "x"):
            assert refused.status_code == 400, name
            assert refused.json()["error"]["param"] == "lora_name"
            assert "load_inplace" not in refused.json()["error"]["message"]
        else:
            assert (refused.status_code, refused.json()["error"]["param"]) == (404, "lora_path")


def test_who_runs_keeps_the_version_and_who_comes_gets_the_new_one(server: AdapterServer, client: httpx.Client) -> None:
    old = put(client, "a", server.source("a", 1))["version"]
    server.model.going.clear()
    body = {"model": "a", "prompt": "long", "max_tokens": 200}
    with ThreadPoolExecutor(1) as threads:
        running = threads.submit(complete, client, "long", 200, model="a")
        server.wait(lambda: server.registry.holds.count(old, Holder.REQUEST) == 1)
        replaced = threading.Thread(target=put, args=(client, "a", server.source("a2", 2)), daemon=True)
        replaced.start()
        server.wait(lambda: server.registry.holds.count(old, Holder.REQUEST) == 1 and server.num_in_engine >= 1)
        server.model.going.set()
        replaced.join(WAIT)
        assert check_text(running.result(WAIT), "long", 200) == old
    new = check_text(client.post(COMPLETIONS, json=body), "long", 200)
    assert new == client.get("/v1/adapters/a").json()["version"] != old
    server.wait(lambda: not server.registry.knows(old))
    assert set(server.model.slots.values()) == {new}


def test_removing_waits_or_ends_what_runs(server: AdapterServer, client: httpx.Client) -> None:
    version = put(client, "a", server.source("a", 1))["version"]
    for query, drained in (("timeout=0", False), ("force=true", True)):
        put(client, "a", "a")
        server.model.going.clear()
        sock = server.connect()
        sock.sendall(http_post(COMPLETIONS, {"model": "a", "prompt": "x", "max_tokens": 4000, "stream": True}))
        server.wait(lambda: server.registry.holds.count(version, Holder.REQUEST) == 1 and server.num_in_engine == 1)
        if drained:
            server.model.going.set()
        assert client.delete(f"/v1/adapters/a?{query}").json()["drained"] is drained
        server.model.going.set()
        received = b""
        while data := sock.recv(1 << 16):
            received += data
        sock.close()
        assert (b"adapter_unloaded" in received) is drained
        assert (b"[DONE]" in received) is not drained
        server.wait(lambda: not server.registry.knows(version))


def test_compare_and_set_history_and_rollback(server: AdapterServer, client: httpx.Client) -> None:
    first = put(client, "a", server.source("one", 1))["version"]
    conflict = client.put("/v1/adapters/a", json={"source": server.source("two", 2), "expected_version": "0" * 64})
    assert (conflict.status_code, error_code(conflict)) == (409, "version_conflict")
    second = put(client, "a", "two", expected_version=first)["version"]
    shutil.rmtree(server.root / "one")  # what was loaded does not need its source
    card = client.post("/v1/adapters/a/rollback", json={}).json()
    assert (card["version"], card["history"]) == (first, [second])
    assert check_text(complete(client, model="a"), "hi", 8) == first
    assert client.post("/v1/adapters/a/rollback", json={"version": second[:8]}).json()["version"] == second
    for name, status, code in (("b", 404, "adapter_not_found"), ("a", 404, "version_missing")):
        refused = client.post(f"/v1/adapters/{name}/rollback", json={"version": "abcdef"})
        assert (refused.status_code, error_code(refused)) == (status, code)


def test_check_says_what_a_load_would_take_and_keeps_nothing(server: AdapterServer, client: httpx.Client) -> None:
    report = client.post("/v1/adapters/a/check", json={"source": server.source("a", 1, rank=3)}).json()
    assert (report["rank"], report["num_bytes"]) == (3, 4 * 3 * (8 + 8 + 16 + 8))
    assert (names(client), server.store.versions(), server.registry.num_bytes) == ([BASE], frozenset(), 0)
    assert put(client, "a", "a")["version"] == report["version"]


def test_without_effect_it_is_refused(server: AdapterServer, client: httpx.Client) -> None:
    version = client.post("/v1/adapters/a/check", json={"source": server.source("a", 1)}).json()["version"]
    server.model.inert.add(version)
    refused = client.put("/v1/adapters/a", json={"source": "a"})
    assert (refused.status_code, error_code(refused)) == (400, "zero_effect")
    server.wait(lambda: not server.registry.knows(version) and not server.model.slots)
    server.wait(lambda: not server.store.versions())


def test_another_base_is_noted_or_refused(tmp_path: Path) -> None:
    """By fingerprint, where the adapter records one; the base's name never matters (make_adapter says "tiny")."""
    for strict in (False, True):
        with make_adapter_server(tmp_path, strict_base=strict) as server, server.client(headers=ADMIN) as client:
            same, other = (server.source(name, 1, base=base) for name, base in (("same", FINGERPRINT), ("o", "0" * 64)))
            assert put(client, "a", same)["notes"] == []
            answer = client.put("/v1/adapters/b", json={"source": other})
            if strict:
                assert (answer.status_code, error_code(answer)) == (400, "base_mismatch")
            else:
                assert "fingerprint 0000" in answer.json()["notes"][0]
                client.delete("/v1/adapters/b")


def test_mixtures(server: AdapterServer, client: httpx.Client) -> None:
    one, two = (put(client, name, server.source(name, seed))["version"] for seed, name in enumerate("ab"))
    both = complete(client, adapters=[{"name": "a", "scale": 0.7}, {"name": "b", "scale": -0.3}])
    assert check_text(both, "hi", 8) == f"{one},{two}"
    fingerprints = {both.json()["system_fingerprint"]}
    for adapters in ([("b", -0.3), ("a", 0.7)], [("a", 0.7), ("b", 0.3)], [("a", 1.0)]):
        answer = complete(client, adapters=[{"name": name, "scale": scale} for name, scale in adapters])
        fingerprints.add(answer.json()["system_fingerprint"])
    assert len(fingerprints) == 4
    assert complete(client, model="a").json()["system_fingerprint"] in fingerprints, "scale 1 is the adapter itself"
    for fields, status, param in (
        ({"adapters": [{"name": "a"}, {"name": "a"}]}, 400, "adapters"),
        ({"adapters": [{"name": "nope"}]}, 404, "adapters[0].name"),
        ({"adapters": [{"name": "a"}], "model": "b"}, 400, "model"),
        ({"adapters": [{"name": BASE}]}, 400, "adapters[0].name"),
        ({"adapters": [{"name": "a", "scale": 17}]}, 400, "adapters[0].scale"),
        ({"adapters": [{"name": n} for n in "abcd"]}, 400, "adapters"),
        ({"adapters": {}}, 400, "adapters"),
    ):
        refused = complete(client, **fields)
        assert (refused.status_code, refused.json()["error"]["param"]) == (status, param), refused.text


def test_a_restart_brings_back_what_can_be_brought_back(tmp_path: Path) -> None:
    with make_adapter_server(tmp_path) as server, server.client(headers=ADMIN) as client:
        versions = {name: put(client, name, server.source(name, seed))["version"] for seed, name in enumerate("abc")}
        second = put(client, "a", server.source("a2", 9))["version"]
        worse = put(client, "c", server.source("c2", 10))["version"]
        client.delete("/v1/adapters/b")
    shutil.rmtree(tmp_path / "root")
    damaged = tmp_path / "store" / worse / "adapter_model.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    with make_adapter_server(tmp_path) as server, server.client(headers=ADMIN) as client:
        assert names(client) == [BASE, "a"]
        assert check_text(complete(client, model="a"), "hi", 8) == second
        assert client.post("/v1/adapters/a/rollback", json={}).json()["version"] == versions["a"]
        broken = client.get("/v1/adapters/c").json()
        assert (broken["state"], broken["version"]) == ("broken", worse)
        assert complete(client, model="c").status_code == 404
        put_back = client.post("/v1/adapters/c/rollback", json={}).json()
        assert (put_back["state"], put_back["version"]) == ("ready", versions["c"])
        assert check_text(complete(client, model="c"), "hi", 8) == versions["c"]
        assert client.delete("/v1/adapters/c").status_code == 200
        server.wait(lambda: server.store.versions() == {second, versions["a"]})


def test_a_name_of_the_command_line_hides_a_loaded_one_and_loses_nothing(tmp_path: Path) -> None:
    with make_adapter_server(tmp_path) as server, server.client(headers=ADMIN) as client:
        loaded = put(client, "a", server.source("a", 1))["version"]
        other = server.root / server.source("other", 2)
    for hidden in (True, False):
        taken = {"a": other} if hidden else {}
        with make_adapter_server(tmp_path, command_line=taken) as server, server.client(headers=ADMIN) as client:
            put(client, "b", "other")  # any change writes the list anew
            assert (check_text(complete(client, model="a"), "hi", 8) == loaded) is not hidden


def test_only_the_admin_key_opens_the_admin_routes(server: AdapterServer) -> None:
    paths = ["/v1/adapters", "/v1/adapters/a", "/v1/adapters/a/check", *ADMIN_PATHS]
    with server.client() as nobody:
        for path in paths:
            for headers in ({}, {"Authorization": "Bearer wrong"}):
                response = nobody.post(path, headers=headers, json={})
                assert (response.status_code, error_code(response)[8:]) == (401, "admin_key")
        assert nobody.get("/v1/models").status_code == 200


def test_without_an_admin_key_there_is_no_admin(tmp_path: Path) -> None:
    for keys, status in (((), 403), (("secret",), 401)):
        with LiveServer(make_state(keys=keys)) as closed, closed.client() as client:
            for path in ADMIN_PATHS:
                assert client.post(path, json={}).status_code == status
            if keys:
                response = client.get("/v1/adapters", headers={"Authorization": "Bearer secret"})
                assert error_code(response) == "admin_disabled"


SOURCES: list[tuple[str, Callable[[AdapterServer], str], str]] = [
    ("outside", lambda s: "../store", "outside_root"),
    ("absolute", lambda s: "/etc", "outside_root"),
    ("nothing there", lambda s: "nope", "not_found"),
    ("a file", lambda s: [(s.root / "f").write_text("x"), "f"][1], "not_a_directory"),
    ("a line break", lambda s: "a\nb", "bad_source"),
    ("a link out", lambda s: [(s.root / "l").symlink_to("/etc"), "l"][1], "outside_root"),
    ("no config", lambda s: [(s.root / "e").mkdir(), "e"][1], "config_missing"),
    ("a rank beyond the limit", lambda s: s.source("r", 1, rank=65), "rank_too_large"),
    ("a linked file", lambda s: _linked(s), "outside_root"),
    ("a huge header", lambda s: _huge_header(s), "header_too_large"),
]


def _linked(server: AdapterServer) -> str:
    server.source("w", 1)
    weights = server.root / "w" / "adapter_model.safetensors"
    weights.rename(server.root.parent / "outside.safetensors")
    weights.symlink_to(server.root.parent / "outside.safetensors")
    return "w"


def _huge_header(server: AdapterServer) -> str:
    server.source("h", 1)
    path = server.root / "h" / "adapter_model.safetensors"
    path.write_bytes((MAX_HEADER_BYTES + 1).to_bytes(8, "little") + b"{" + b" " * (MAX_HEADER_BYTES + 8))
    return "h"


@pytest.mark.parametrize(("source", "code"), [case[1:] for case in SOURCES], ids=[case[0] for case in SOURCES])
def test_bad_sources_are_refused_by_code(
    server: AdapterServer, client: httpx.Client, source: Callable[[AdapterServer], str], code: str
) -> None:
    refused = client.put("/v1/adapters/a", json={"source": source(server)})
    assert (error_code(refused), refused.status_code) == (code, 404 if code == "not_found" else 400), refused.text
    assert names(client) == [BASE]
    assert [path.name for path in server.store.directory.iterdir()] == [".lock"], "nothing is left of it"


@pytest.mark.parametrize(
    ("method", "path", "body", "words"),
    [
        ("PUT", "a", b'{"source": "a", "expected_version": "abc"}', "all 64 hexadecimal digits"),
        ("POST", "a/rollback", b'{"version": "12"}', "6 to 64 of its hexadecimal digits"),
        ("POST", "a/rollback", b"", "{} at least"),
        ("POST", "a/pin", b'{"pinned": true}', "GET /v1/adapters lists them"),
        ("DELETE", "a", b"", "GET /v1/adapters lists them"),
    ],
)
def test_mistakes_are_told_with_what_to_do(
    client: httpx.Client, method: str, path: str, body: bytes, words: str
) -> None:
    headers = {"Content-Type": "application/json"}
    reply = client.request(method, f"/v1/adapters/{path}", content=body, headers=headers)
    assert 400 <= reply.status_code < 500
    assert words in reply.json()["error"]["message"]
