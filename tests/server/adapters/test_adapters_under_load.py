"""Adapters that change while they are used, over HTTP: one load for many who ask, replacing without end, and a storm of
everything at once.
"""

import json
import random
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from support.server.adapter_client import check_text, complete, error_code, put
from support.server.adapter_server import ADMIN, AdapterServer, make_adapter_server
from support.server.api_server import WAIT

# What an operator's or a client's request may end with while adapters change under it.
DOCUMENTED = {200, 201, 400, 404, 409, 503, 507}


@pytest.fixture
def server(tmp_path: Path) -> Iterator[AdapterServer]:
    with make_adapter_server(tmp_path) as made:
        yield made
        made.assert_quiet()


def test_the_same_load_twice_at_once_happens_once(server: AdapterServer, monkeypatch: pytest.MonkeyPatch) -> None:
    reads, go = [], threading.Event()
    ingest = server.store.ingest

    def slow(path: Path, **options: Any) -> Any:
        reads.append(path)
        assert go.wait(WAIT)
        return ingest(path, **options)

    monkeypatch.setattr(server.store, "ingest", slow)
    source = server.source("a", 1)

    def load(_: int) -> str:
        with server.client(headers=ADMIN) as client:
            return str(put(client, "a", source)["version"])

    with ThreadPoolExecutor(6) as threads:
        loads = threads.map(load, range(6))
        server.wait(lambda: server.state.lifecycle.num_open == 6)
        with server.client() as other:  # a slow source delays nobody else
            assert check_text(complete(other), "hi", 8) == ""
        go.set()
        assert len(set(loads)) == 1
    assert len(reads) == 1


def test_replaced_again_and_again_under_load(server: AdapterServer, proof_count: Callable[[int, int], int]) -> None:
    """Each answer shows exactly one version, and one that was current between its request and its reply."""
    sources = [server.source(f"s{seed}", seed) for seed in range(5)]
    stop = threading.Event()
    checked = []

    def generate(seed: int) -> None:
        with server.client() as client:
            while not stop.is_set():
                prompt = f"prompt {seed % 3}" * 8  # shared between threads: the prefix cache is hit all the time
                checked.append(check_text(complete(client, prompt, 40, model="a"), prompt, 40))

    with server.client(headers=ADMIN) as client:
        put(client, "a", sources[0])
        with ThreadPoolExecutor(4) as threads:
            running = [threads.submit(generate, seed) for seed in range(4)]
            try:
                for turn in range(proof_count(40, 200)):
                    version = put(client, "a", sources[turn % 5])["version"]
                    assert check_text(complete(client, model="a"), "hi", 8) == version, "from the reply on"
            finally:
                stop.set()
            for one in running:
                one.result(WAIT)
        assert len(set(checked)) > 1
        server.wait(lambda: len(server.model.slots) == 1)
        assert len(server.registry._snapshot.versions) == 1


@pytest.mark.parametrize("host_memory", [1 << 30, 2500], ids=["room", "tight"])
def test_storm(tmp_path: Path, host_memory: int, proof_count: Callable[[int, int], int]) -> None:
    """Adapters are loaded, replaced, removed, pinned and used at random, many more than there are slots or (tight) than
    memory holds, while their sources are deleted, truncated, overwritten and renamed over: no token of another version,
    no undocumented status."""
    with make_adapter_server(tmp_path, host_memory=host_memory, adapter_timeout=5.0) as server:
        _storm(server, proof_count)
        server.assert_quiet()
        assert (server.scheduler.residency.host.num_evictions > 0) is (host_memory < 1 << 30)


def _storm(server: AdapterServer, proof_count: Callable[[int, int], int]) -> None:
    num_threads, turns = proof_count(8, 32), proof_count(25, 500)
    faults = ("delete", "truncate", "garbage", "rename", "chmod", "none", "none", "none")
    num_tokens, lock = [0], threading.Lock()

    def work(seed: int) -> None:
        rng = random.Random(seed)
        with server.client(headers=ADMIN) as client:
            for _ in range(turns):
                name = f"n{min(int(rng.paretovariate(0.8)), 64)}"  # Zipf-like
                roll = rng.random()
                if roll < 0.15:
                    source = server.source(f"{seed}-{name}", rng.randrange(1000), rank=rng.choice((1, 2, 8)))
                    weights = server.root / source / "adapter_model.safetensors"
                    fault = rng.choice(faults)
                    damage = threading.Thread(target=_damage, args=(weights, fault), daemon=True)
                    damage.start()
                    response = client.put(f"/v1/adapters/{name}", json={"source": source})
                    damage.join(WAIT)
                elif roll < 0.2:
                    force = rng.choice(("true", "false"))
                    response = client.delete(f"/v1/adapters/{name}?timeout=0&force={force}")
                elif roll < 0.22:
                    response = client.post(f"/v1/adapters/{name}/pin", json={"pinned": rng.random() < 0.4})
                else:
                    prompt, count = f"p{rng.randrange(4)}" * rng.randrange(1, 20), rng.randrange(1, 40)
                    response = complete(client, prompt, count, model=name)
                    if response.status_code == 200:
                        check_text(response, prompt, count)
                        with lock:
                            num_tokens[0] += count
                assert response.status_code in DOCUMENTED, response.text
                assert server.registry.num_bytes <= server.scheduler.residency.host.limit_bytes
                if response.status_code >= 400:
                    assert error_code(response) != "internal_error", response.text

    with server.client(headers=ADMIN) as client:
        for index in range(1, 12):
            put(client, f"n{index}", server.source(f"start{index}", index))
        with ThreadPoolExecutor(num_threads) as threads:
            for done in [threads.submit(work, seed) for seed in range(num_threads)]:
                done.result(WAIT * 20)
        assert num_tokens[0] >= proof_count(500, 100_000)
        for view in client.get("/v1/adapters").json()["data"]:
            assert view["pins"] == 0
            client.delete(f"/v1/adapters/{view['name']}")
    server.wait(lambda: not server.model.slots and not server.registry.num_bytes)
    server.wait(lambda: not server.store.versions())
    assert json.loads((server.store.directory / "registry.json").read_text())["adapters"] == []


def _damage(path: Path, fault: str) -> None:
    try:
        match fault:
            case "delete":
                path.unlink()
            case "truncate":
                with path.open("r+b") as file:
                    file.truncate(path.stat().st_size // 2)
            case "garbage":
                with path.open("r+b") as file:
                    file.seek(200)
                    file.write(b"\xff" * 64)
            case "rename":
                other = path.with_suffix(".other")
                other.write_bytes(b"not an adapter")
                other.rename(path)
            case "chmod":
                path.chmod(0)
    except OSError:
        pass  # somebody else's turn has replaced the folder meanwhile
