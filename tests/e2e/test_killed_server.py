"""`guanaco serve` killed outright, again and again, while adapters are loaded, replaced and removed: each restart comes
up with what was acknowledged, and every listed adapter answers with its version's tokens.
"""

import random
import statistics
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import httpx
import pytest

from support.adapters.tiny_adapters import make_adapter, targets_of
from support.models.tiny_models import make_tiny_llama, tiny_llama
from support.server.live_server import LiveServer
from support.server.real_server import ADMIN, BASE, PROMPTS, WAIT, complete

NAMES = ("a", "b", "c")
SOURCES = tuple(f"s{seed}" for seed in range(6))
GONE = ""  # as a version: the name is not there


class Server:
    """The files of one server, which is started and killed many times."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        model = make_tiny_llama(directory / BASE)
        targets = targets_of(tiny_llama())
        for seed, source in enumerate(SOURCES):
            make_adapter(directory / "root" / source, targets, 8, seed=seed)
        paths = {"model": model, "cache": directory / "cache", "adapter-store": directory / "store"}
        paths["adapter-root"] = directory / "root"
        options = {"admin-key": "sesame", "kv-cache-memory": "8MiB", "threads": "1"}
        self.arguments = [word for name, value in (paths | options).items() for word in (f"--{name}", str(value))]
        self.seconds: list[float] = []  # that each start took

    def start(self) -> LiveServer:
        live, started = LiveServer(self.arguments, self.directory / "server.log"), time.monotonic()
        live.__enter__()
        self.seconds.append(time.monotonic() - started)
        return live


def client_of(live: LiveServer) -> httpx.Client:
    return httpx.Client(base_url=live.url, timeout=WAIT, verify=False, headers=ADMIN)


def listed(client: httpx.Client) -> dict[str, str]:
    """name → version; each must be in order."""
    cards = client.get("/v1/adapters").json()["data"]
    assert {card["state"] for card in cards} <= {"ready"}, cards
    return {card["name"]: card["version"] for card in cards}


class Changes:
    """One name's changes, one after the other until the server is gone; which versions it may have after that."""

    def __init__(self, client: httpx.Client, name: str, versions: dict[str, str], now: str, seed: int) -> None:
        self.possible = {now}  # what was acknowledged, and what was asked for meanwhile
        self.num_acknowledged = 0
        self.odd: list[str] = []  # replies that a change must not have
        self._client, self._name, self._versions = client, name, versions
        self._rng = random.Random(seed)
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        path = f"/v1/adapters/{self._name}"
        with suppress(httpx.HTTPError):  # the server is killed
            while True:
                source = self._rng.choice(SOURCES)
                remove = self._rng.random() < 0.2
                wanted = GONE if remove else self._versions[source]
                self.possible.add(wanted)
                reply = self._client.delete(path) if remove else self._client.put(path, json={"source": source})
                if reply.status_code not in (200, 201) and not (remove and reply.status_code == 404):
                    self.odd.append(reply.text)
                    return
                self.possible = {wanted}
                self.num_acknowledged += 1


def refuse_a_damaged_list(server: Server) -> None:
    """No kill does that to it (it is written whole), but a disk may; then it is not taken for an empty one."""
    (path,) = (server.directory / "store").glob("*/registry.json")
    path.write_bytes(path.read_bytes()[:-10])
    before = path.read_bytes()
    with pytest.raises(AssertionError, match=r"registry\.json is damaged; move it away"):
        server.start()
    assert path.read_bytes() == before


def test_killed_again_and_again(
    tmp_path: Path, proof_count: Callable[[int, int], int], record_property: Callable[[str, object], None]
) -> None:
    server, rng, num_acknowledged, caught = Server(tmp_path), random.Random(3), 0, 0
    live = server.start()
    with client_of(live) as client:
        versions, answers = {}, {GONE: ()}
        for source in SOURCES:
            versions[source] = client.put("/v1/adapters/learn", json={"source": source}).json()["version"]
            answers[versions[source]] = tuple(complete(client, "learn", prompt) for prompt in PROMPTS)
        assert len(set(answers.values())) == len(SOURCES) + 1
        client.delete("/v1/adapters/learn")
    now = dict.fromkeys(NAMES, GONE)
    num_kills = proof_count(2, 50)
    for kill in range(num_kills):
        with client_of(live) as client:
            changes = {name: Changes(client, name, versions, now[name], kill * 7 + i) for i, name in enumerate(NAMES)}
            time.sleep(0.05 + rng.random() * 0.6)
            live.process.kill()
            live.process.wait(WAIT)
            for change in changes.values():
                change.thread.join(WAIT)
                assert change.odd == []
        num_acknowledged += sum(change.num_acknowledged for change in changes.values())
        caught += sum(len(change.possible) > 1 for change in changes.values())
        live = server.start()
        with client_of(live) as client:
            found = listed(client)
            now = {name: found.pop(name, GONE) for name in NAMES}
            assert found == {}
            for name, version in now.items():
                assert version in changes[name].possible, f"after kill {kill} {name} is what nobody acknowledged"
                if version:
                    assert tuple(complete(client, name, prompt) for prompt in PROMPTS) == answers[version]
    left = {path.name for path in (tmp_path / "store").glob("*/*")}
    assert {name for name in left if name.startswith(".incoming")} == set()
    assert live.terminate() == 0, live.output()
    refuse_a_damaged_list(server)
    assert num_acknowledged > num_kills, "the server never came so far as to change anything"
    assert caught, "no kill came in the middle of a change"
    restarts = server.seconds[1:]
    record_property("kills", num_kills)
    record_property("changes_acknowledged", num_acknowledged)
    record_property("kills_in_the_middle_of_a_change", caught)
    record_property("slowest_restart_seconds", round(max(restarts), 2))
    record_property("median_restart_seconds", round(statistics.median(restarts), 2))
