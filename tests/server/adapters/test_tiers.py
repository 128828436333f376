"""More adapters than memory holds, over HTTP: those that are away are read again when somebody asks for them, whoever
waits for one that is slow or damaged waits alone, and every answer is made by the version that it names.
"""

import random
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from guanaco.adapters.peft.weights import LoadedAdapter
from guanaco.adapters.residency.host_table import HostTable
from guanaco.adapters.versions.holds import Holder
from guanaco.server.engine.request import SampledToken, ScheduledBatch
from support.adapters.tiny_adapters import make_adapter
from support.server.adapter_server import ADMIN, TARGETS, AdapterServer, make_adapter_server
from support.server.api_server import BASE, WAIT, http_post
from support.server.engine_server import text_of
from support.server.fake_engine import BOS

RANK = 2
BYTES = 4 * RANK * (8 + 8 + 16 + 8)  # of one adapter of the tests
NAMES = "abcdef"


@contextmanager
def serving(directory: Path, *, room: int, names: str = NAMES, **settings: Any) -> Iterator[AdapterServer]:
    """A server with memory for `room` adapters, and all `names` loaded one after the other: the first ones are away."""
    with make_adapter_server(directory, host_memory=room * BYTES, **settings) as server:
        with server.client(headers=ADMIN) as client:
            for seed, name in enumerate(names):
                done = client.put(f"/v1/adapters/{name}", json={"source": server.source(name, seed, RANK)})
                assert done.status_code in (200, 201), done.text
        yield server
        server.assert_quiet()
        server.wait(lambda: not host_of(server)._pins)
        assert not server.scheduler.loading.sequences
        host_of(server).check()


def host_of(server: AdapterServer) -> HostTable:
    return server.scheduler.residency.host


def complete(server: AdapterServer, model: str, prompt: str = "hi", count: int = 8) -> httpx.Response:
    with server.client() as client:
        return client.post("/v1/completions", json={"model": model, "prompt": prompt, "max_tokens": count})


def check(server: AdapterServer, model: str, prompt: str = "hi", count: int = 8) -> None:
    """The answer is that of the model's version, token by token."""
    response = complete(server, model, prompt, count)
    assert response.status_code == 200, response.text
    entry = server.registry.resolve(model)
    version = "" if entry is None else entry.version
    assert response.headers.get("x-adapter-version", "") == version
    assert response.json()["choices"][0]["text"] == text_of((BOS, *prompt.encode()), version, count)


def refused(response: httpx.Response) -> tuple[int, str]:
    return response.status_code, response.json()["error"]["code"]


def tiers(server: AdapterServer) -> dict[str, str]:
    with server.client(headers=ADMIN) as client:
        views = client.get("/v1/adapters").json()["data"]
    return {view["name"]: view["tier"] for view in views}


def version_of(server: AdapterServer, name: str) -> str:
    entry = server.registry.resolve(name)
    assert entry is not None
    return entry.version


class Reads:
    """Counts the reads of a server's store, and holds those of some versions back."""

    def __init__(self, server: AdapterServer, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count: Counter[str] = Counter()
        self.go = threading.Event()
        self.held: set[str] = set()
        self.fails: Callable[[], None] = lambda: None
        self._read = server.store.read
        monkeypatch.setattr(server.store, "read", self)

    def __call__(self, version: str) -> LoadedAdapter:
        self.count[version] += 1
        if version in self.held:
            assert self.go.wait(WAIT)
        self.fails()
        return self._read(version)


def test_those_that_memory_does_not_hold_are_read_when_they_are_wanted(tmp_path: Path) -> None:
    with serving(tmp_path, room=2, num_slots=1) as server:
        assert tiers(server) == {**dict.fromkeys("abcd", "disk"), "e": "host", "f": "device"}
        for name in (*NAMES, *reversed(NAMES), BASE, *NAMES):
            check(server, name)
            assert server.registry.num_bytes <= 2 * BYTES
            assert name == BASE or tiers(server)[name] == "device"
        assert host_of(server).num_evictions > len(NAMES)


def test_everybody_at_once(tmp_path: Path) -> None:
    """Many threads, each asking for any adapter: never a wrong token, never more memory than there may be."""
    with serving(tmp_path, room=3, num_slots=2, adapter_timeout=WAIT) as server:
        most = [0]
        keep = server.registry.keep

        def watched(adapter: LoadedAdapter) -> None:
            keep(adapter)
            most[0] = max(most[0], server.registry.num_bytes)

        server.registry.keep = watched  # type: ignore[method-assign]

        def work(seed: int) -> None:
            rng = random.Random(seed)
            for _ in range(12):
                check(server, rng.choice((*NAMES, BASE)), f"p{rng.randrange(3)}" * rng.randrange(1, 9), 12)

        with ThreadPoolExecutor(8) as threads:
            for done in [threads.submit(work, seed) for seed in range(8)]:
                done.result(WAIT)
        assert 0 < most[0] <= 3 * BYTES
        assert host_of(server).num_reads > 12


def test_a_load_evicts_who_is_idle_and_is_refused_where_nobody_is(tmp_path: Path) -> None:
    with serving(tmp_path, room=1, names="a") as server, server.client(headers=ADMIN) as client:
        sock = server.connect()
        run = server.model.run

        def slowly(batch: ScheduledBatch, begin: Callable[[], None]) -> tuple[SampledToken, ...]:
            time.sleep(0.003)  # else a fast machine is done with it before the load is refused
            return run(batch, begin)

        server.model.run = slowly  # type: ignore[method-assign]
        sock.sendall(http_post("/v1/completions", {"model": "a", "prompt": "x", "max_tokens": 4000, "stream": True}))
        server.wait(lambda: host_of(server).num_pins(version_of(server, "a")) == 1)
        source = server.source("b", 9, RANK)
        assert refused(client.put("/v1/adapters/b", json={"source": source})) == (507, "host_memory_full")
        assert refused(client.post("/v1/adapters/b/check", json={"source": source})) == (507, "host_memory_full")
        sock.close()
        server.wait(lambda: not server.num_in_engine)
        server.wait(lambda: not host_of(server)._pins)
        assert client.put("/v1/adapters/b", json={"source": source}).status_code == 201
        assert tiers(server) == {"a": "disk", "b": "device"}
        too_large = server.source("c", 1, RANK + 1)
        assert refused(client.put("/v1/adapters/c", json={"source": too_large})) == (507, "host_memory_full")
        check(server, "b")


def test_a_slow_read_delays_nobody_else_and_happens_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(tmp_path, room=3) as server:
        reads = Reads(server, monkeypatch)
        slow = version_of(server, "a")
        reads.held.add(slow)
        with ThreadPoolExecutor(6) as threads:
            waiting = [threads.submit(check, server, "a", f"p{number}") for number in range(6)]
            server.wait(lambda: len(server.scheduler.loading.sequences) == 6)
            for name in ("f", BASE, "b", "c", BASE, "b"):  # in memory, on disk, neither
                check(server, name)
            assert not any(one.done() for one in waiting)
            assert tiers(server)["a"] == "disk"
            reads.go.set()
            for one in waiting:
                one.result(WAIT)
        assert (reads.count[slow], reads.count[version_of(server, "f")]) == (1, 0)


def test_who_waits_too_long_is_told_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(tmp_path, room=2, adapter_timeout=0.2) as server:
        reads = Reads(server, monkeypatch)
        reads.held.add(version_of(server, "a"))
        late = complete(server, "a")
        assert refused(late) == (503, "adapter_timeout")
        assert int(late.headers["retry-after"]) >= 1
        server.wait(lambda: not host_of(server)._pins)
        check(server, "b")
        reads.go.set()
        server.wait(lambda: tier_of(server, "a") == "host")  # it came too late for the one, not for the next
        check(server, "a")


def tier_of(server: AdapterServer, name: str) -> str:
    return server.manager.tiers.tier(version_of(server, name))


def test_leaving_while_waiting_frees_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(tmp_path, room=2) as server:
        reads = Reads(server, monkeypatch)
        version = version_of(server, "a")
        reads.held.add(version)
        for _ in range(2):
            sock = server.connect()
            sock.sendall(http_post("/v1/completions", {"model": "a", "prompt": "x", "max_tokens": 9}))
            server.wait(lambda: host_of(server).num_pins(version) == 1)
            sock.close()
            server.wait(lambda: not server.scheduler.loading.sequences and not host_of(server)._pins)
            server.wait(lambda: server.registry.holds.count(version, Holder.REQUEST) == 0)
        reads.go.set()
        check(server, "a")
        assert reads.count[version] == 1, "the read that nobody waited for any more was not begun again"


@pytest.mark.parametrize("damage", ["deleted", "overwritten"])
def test_a_damaged_copy_ends_who_waits_and_marks_the_entry(tmp_path: Path, damage: str) -> None:
    with serving(tmp_path, room=2) as server, server.client(headers=ADMIN) as client:
        version = version_of(server, "a")
        stored = server.store.directory / version / "adapter_model.safetensors"
        if damage == "deleted":
            shutil.rmtree(stored.parent)
        else:
            content = bytearray(stored.read_bytes())
            content[-3] ^= 1
            stored.write_bytes(content)
        assert refused(complete(server, "a")) == (500, "adapter_broken")
        card = client.get("/v1/adapters/a").json()
        code = "version_missing" if damage == "deleted" else "version_damaged"
        assert (card["state"], card["version"], card["error"]["code"]) == ("broken", version, code)
        assert refused(complete(server, "a")) == (404, "model_not_found")
        check(server, "b")
        server.wait(lambda: not server.registry.knows(version))
        assert client.put("/v1/adapters/a", json={"source": "a"}).status_code == 200
        assert version_of(server, "a") == version
        check(server, "a")


def test_a_read_that_fails_for_now_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(tmp_path, room=2) as server:
        reads = Reads(server, monkeypatch)

        def fail() -> None:
            raise OSError(5, "Input/output error")

        reads.fails = fail
        failed = complete(server, "a")
        assert refused(failed) == (503, "adapter_read_failed")
        assert "retry-after" in failed.headers
        reads.fails = lambda: None
        check(server, "a")


def test_one_adapters_queue_is_nobody_elses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hanging adapter's requests take a quarter of the places for those that load, and none of the others'."""
    with serving(tmp_path, room=3, num_slots=1, max_queued_requests=8) as server:
        reads = Reads(server, monkeypatch)
        reads.held.add(version_of(server, "a"))
        with ThreadPoolExecutor(2) as threads:
            waiting = [threads.submit(check, server, "a") for _ in range(2)]
            server.wait(lambda: len(server.scheduler.loading.sequences) == 2)
            assert refused(complete(server, "a")) == (503, "server_overloaded")
            for name in ("b", BASE, "f"):
                check(server, name)
            reads.go.set()
            for one in waiting:
                one.result(WAIT)


def test_a_flood_does_not_fill_the_queue(tmp_path: Path) -> None:
    """Three quarters of it at most are one adapter's; the base and the others find places."""
    with serving(tmp_path, room=3, max_queued_requests=8, max_num_seqs=1) as server:
        server.model.going.clear()
        with ThreadPoolExecutor(9) as threads:
            waiting = [threads.submit(complete, server, "f") for _ in range(9)]
            server.wait(lambda: sum(one.done() for one in waiting) == 2)  # one runs, and six wait
            others = [threads.submit(check, server, name) for name in ("e", BASE)]
            server.wait(lambda: server.num_in_engine == 9)
            server.model.going.set()
            for one in others:
                one.result(WAIT)
            ends = sorted(one.result(WAIT).status_code for one in waiting)
            assert ends == [200] * 7 + [503] * 2


def test_a_restart_with_less_memory_serves_them_all(tmp_path: Path) -> None:
    with serving(tmp_path, room=len(NAMES)) as server:
        assert set(tiers(server).values()) <= {"host", "device"}
    with make_adapter_server(tmp_path, host_memory=2 * BYTES) as server:
        assert tiers(server) == {**dict.fromkeys("ab", "host"), **dict.fromkeys("cdef", "disk")}
        for name in NAMES:
            check(server, name)


def pin(server: AdapterServer, name: str, pinned: bool = True) -> httpx.Response:
    with server.client(headers=ADMIN) as client:
        return client.post(f"/v1/adapters/{name}/pin", json={"pinned": pinned})


def test_a_pinned_one_stays_whatever_it_stands_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(tmp_path, room=2) as server, server.client(headers=ADMIN) as client:
        assert refused(pin(server, "nobody")) == (404, "adapter_not_found")
        card = pin(server, "a").json()  # it is read, in place of an idle one
        assert card["pinned"] is True
        server.wait(lambda: tier_of(server, "a") == "host")
        for name in NAMES[1:]:
            check(server, name)
            assert tier_of(server, "a") != "disk"
        client.put("/v1/adapters/a", json={"source": server.source("a2", 99, RANK)})
        reads = Reads(server, monkeypatch)
        for name in ("d", "e", "a", "d", "e", "a"):
            check(server, name)
        assert reads.count[version_of(server, "a")] == 0
    with make_adapter_server(tmp_path, host_memory=2 * BYTES) as server, server.client(headers=ADMIN) as client:
        for name in NAMES[1:]:
            check(server, name)
            assert tier_of(server, "a") != "disk", "a restart remembers it"
        assert client.get("/v1/adapters/a").json()["pinned"] is True
        assert pin(server, "a", False).json()["pinned"] is False
        for name in NAMES[1:]:
            check(server, name)
        assert tier_of(server, "a") == "disk"


def test_what_is_pinned_is_no_room_for_others(tmp_path: Path) -> None:
    with serving(tmp_path, room=2, adapter_timeout=0.3) as server, server.client(headers=ADMIN) as client:
        assert pin(server, "a").status_code == pin(server, "b").status_code == 200
        assert refused(pin(server, "c")) == (507, "host_memory_full")
        assert client.get("/v1/adapters/c").json()["pinned"] is False
        assert refused(client.put("/v1/adapters/g", json={"source": server.source("g", 7)})) == (
            507,
            "host_memory_full",
        )
        assert refused(complete(server, "c")) == (503, "adapter_timeout")
        client.delete("/v1/adapters/b")
        check(server, "c")


def test_adapters_of_the_command_line_stay(tmp_path: Path) -> None:
    """The store has no copy of them."""
    source = make_adapter(tmp_path / "fixed", TARGETS, RANK, seed=77, modules=("q_proj", "down_proj"))
    with (
        make_adapter_server(tmp_path, host_memory=2 * BYTES, command_line={"fixed": source}) as server,
        server.client(headers=ADMIN) as client,
    ):
        for seed, name in enumerate("ab"):
            made = client.put(f"/v1/adapters/{name}", json={"source": server.source(name, seed, RANK)})
            assert made.status_code == 201, made.text
        for name in ("fixed", "a", "b", "fixed", "a", "b", "fixed"):
            check(server, name)
            assert tiers(server)["fixed"] != "disk"


def test_a_mixture_needs_all_of_its_adapters(tmp_path: Path) -> None:
    with serving(tmp_path, room=2) as server, server.client() as client:
        body = {"model": BASE, "prompt": "hi", "max_tokens": 8}
        for pair in ("ab", "cd", "ae"):
            mixed = client.post("/v1/completions", json={**body, "adapters": [{"name": name} for name in pair]})
            versions = ",".join(version_of(server, name) for name in pair)
            assert mixed.json()["choices"][0]["text"] == text_of((BOS, *b"hi"), versions, 8)
        never = client.post("/v1/completions", json={**body, "adapters": [{"name": name} for name in "abc"]})
        assert refused(never) == (400, "context_length_exceeded")
