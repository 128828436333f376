"""Two server processes with one registry: replaced again and again under load, one of them killed meanwhile."""

import json
import shutil
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from support.adapters.tiny_adapters import make_adapter, targets_of
from support.models.tiny_models import make_tiny_llama, tiny_llama
from support.server.live_server import LiveServer

ADMIN = {"Authorization": "Bearer sesame"}
TURNS = 200
WAIT = 120.0


def arguments(path: Path, name: str) -> list[str]:
    options = {
        "model": path / "model", "adapter-registry": path / "registry", "adapter-store": path / name,
        "train-dir": path / f"{name}-train", "adapter-root": path / "root", "admin-key": "sesame", "threads": 1,
        "cache": path / "cache", "kv-cache-memory": "8MiB", "max-lora-rank": 64,
    }  # fmt: skip
    return [word for option, value in options.items() for word in (f"--{option}", str(value))]


class Replacements:
    """Which version was named when. Every turn has a version of its own."""

    def __init__(self) -> None:
        self.begun: dict[str, float] = {}  # version → when the request that named it was sent
        self.ended: dict[str, float] = {}  # version → when the reply came that named another
        self.lock = threading.Lock()


@pytest.mark.accept
@pytest.mark.timeout(1800)
def test_two_hundred_replacements_under_load(tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    """No client error, no version that no list names, and a server that was killed catches up with the list."""
    make_tiny_llama(tmp_path / "model")
    for part in ("root", "registry"):
        (tmp_path / part).mkdir()
    make_adapter(tmp_path / "root" / "first", targets_of(tiny_llama()), 4, seed=1)
    stop, known, lags = threading.Event(), Replacements(), [0.0]
    seen: list[tuple[str, str, float]] = []  # (server, version, when the request was sent)
    wrong: list[str] = []
    alive = {"one": threading.Event(), "two": threading.Event()}

    def put(client: httpx.Client, turn: int) -> str:
        source = tmp_path / "root" / f"s{turn}"
        shutil.copytree(tmp_path / "root" / "first", source)
        config = json.loads((source / "adapter_config.json").read_text())
        config["lora_alpha"] = 8 + turn / 64
        (source / "adapter_config.json").write_text(json.dumps(config))
        sent = time.monotonic()
        reply = client.put("/v1/adapters/a", json={"source": source.name})
        assert reply.status_code in (200, 201), reply.text
        card = reply.json()
        with known.lock:
            known.begun[card["version"]] = sent
            for earlier in card["history"][-1:]:
                known.ended[earlier] = time.monotonic()
        shutil.rmtree(source)
        return str(card["version"])

    def ask(name: str, server: LiveServer) -> None:
        with httpx.Client(base_url=server.url, timeout=WAIT) as client:
            while not stop.is_set():
                if not alive[name].wait(0.1):
                    continue
                sent = time.monotonic()
                try:
                    reply = client.post("/v1/completions", json={"model": "a", "prompt": "hi", "max_tokens": 4})
                except httpx.HTTPError as error:
                    if alive[name].is_set():
                        wrong.append(repr(error))
                    continue
                version = reply.headers.get("x-adapter-version", "")
                if reply.status_code != 200:
                    wrong.append(reply.text)
                    continue
                seen.append((name, version, sent))

    one, two = (LiveServer(arguments(tmp_path, name), tmp_path / f"{name}.log") for name in ("one", "two"))
    with one, two, ThreadPoolExecutor(4) as threads:
        clients = [httpx.Client(base_url=server.url, headers=ADMIN, timeout=WAIT) for server in (one, two)]
        version = put(clients[0], 0)
        _until(clients[1], version)
        for event in alive.values():
            event.set()
        running = [threads.submit(ask, name, server) for name, server in (("one", one), ("two", two)) * 2]
        try:
            for turn in range(1, TURNS):
                if turn == TURNS // 2:  # without a chance to say goodbye
                    alive["two"].clear()
                    two.kill()
                if turn == TURNS // 2 + 20:
                    two.__enter__()
                    assert _version(clients[1]) == version, "before its first answer it has caught up"
                    alive["two"].set()
                is_away = not alive["two"].is_set()
                version = put(clients[0 if is_away else turn % 2], turn)
        finally:
            stop.set()
        for each in running:
            each.result(WAIT)
        _until(clients[0], version)
        _until(clients[1], version)
    assert not wrong, wrong[:3]
    assert len(known.begun) == TURNS
    for _, version, sent in seen:
        assert version in known.begun, "no list ever named it"
        lags.append(sent - known.ended.get(version, sent))
    assert {name for name, _, _ in seen} == {"one", "two"}
    record_property("replicas: answers while 200 replacements ran", len(seen))
    record_property("replicas: longest use of a replaced version, seconds", round(max(lags), 3))


def _version(client: httpx.Client) -> str:
    return str(client.get("/v1/adapters/a").json().get("version", ""))


def _until(client: httpx.Client, version: str) -> None:
    deadline = time.monotonic() + WAIT
    while _version(client) != version:
        assert time.monotonic() < deadline
        time.sleep(0.05)
