"""The row about a hub that fails: it refuses, is silent, answers 429 or 500, drips, breaks off, lies, or redirects."""

import socket
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
from huggingface_hub import constants

from guanaco.server.adapters.hub import AdapterHub
from support.adapters.fake_hub import COMMIT, FakeHub, serve_hub
from support.adapters.tiny_adapters import make_adapter
from support.load.oracle import p99_ms
from support.load.rows_of_load import Finding
from support.server.adapter_client import check_text, complete, error_code
from support.server.adapter_server import ADMIN, TARGETS, AdapterServer, make_adapter_server

WEIGHTS = "adapter_model.safetensors"
_CLEAR = {404, 500, 502, 503, 504}


def hub_faults(*, loads: int = 100, patience: float = 30.0) -> Finding:
    """A6: each fault ends a load with a clear error while others are answered; then the hub is back and all is well.

    loads: operators that ask at once for one adapter that is not here; it is downloaded once. patience: seconds after
    which we ask no longer. A hub that sends a byte a second is waited for longer than that (30 minutes at most).
    """
    finding = Finding("A6")
    online = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = False
    try:
        with tempfile.TemporaryDirectory() as folder:
            made = make_adapter(Path(folder, "made"), TARGETS, 2, seed=1, modules=("q_proj", "down_proj"))
            files = {COMMIT: {file.name: file.read_bytes() for file in made.iterdir()}}
            with serve_hub(FakeHub(files)) as hub:
                _each_fault(finding, Path(folder), hub, patience)
                _many_at_once(finding, Path(folder), hub, loads)
    finally:
        constants.HF_HUB_OFFLINE = online
    return finding


def _server(folder: Path, name: str, endpoint: str) -> AdapterServer:
    """A server with an empty cache of its own, and a good adapter from its root."""
    (folder / name).mkdir()
    return make_adapter_server(
        folder / name, hub=AdapterHub(folder / name / "cache", endpoint=endpoint), queue_timeout=60
    )


def _each_fault(finding: Finding, folder: Path, hub: FakeHub, patience: float) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        nowhere = f"http://127.0.0.1:{closed.getsockname()[1]}"
    release = threading.Event()
    faults: dict[str, dict[str, Any]] = {
        "refused": {}, "silent": {"silent": release}, "429": {"fail_status": 429}, "500": {"fail_status": 500},
        "a byte a second": {"drip_seconds": 1.0},
        "half a file": {"break_off": {WEIGHTS: 60}, "status_after_break": 503},
        "a wrong size": {"sizes": {WEIGHTS: 1 << 60}}, "sent elsewhere": {"redirect": f"{nowhere}/x"},
    }  # fmt: skip
    for number, (name, fields) in enumerate(faults.items()):
        whole = {field: getattr(hub, field) for field in (*fields, "fail_status")}
        with _server(folder, f"f{number}", nowhere if name == "refused" else hub.endpoint) as server:
            with server.client(headers=ADMIN) as client:
                client.timeout = httpx.Timeout(patience)
                server.source("good", 3)
                assert client.put("/v1/adapters/good", json={"source": "good"}).status_code == 201
                for field, value in fields.items():
                    setattr(hub, field, value)
                status, code, seconds, beside = _load_beside_traffic(server, client)
                finding.counts[name] = f"{status} {code}"
                finding.times[f"{name}: error after"] = round(1000 * seconds, 1)
                finding.times[f"{name}: others' p99"] = p99_ms(beside)
                finding.targets[f"{name}: error after"] = 10_000.0
                is_clear = status in _CLEAR or code == "file_too_large" or name == "a byte a second"
                finding.must(is_clear, f"{name}: {status} {code}")
                finding.must(len(beside) > 0, f"{name}: nobody else was answered")
                for field, value in whole.items():
                    setattr(hub, field, value)
                if name == "refused":
                    continue
                back = client.put("/v1/adapters/missing", json={"source": "org/tiny@main"})
                loaded = back.status_code in (200, 201)  # 200: the dripping one has come to its end
                finding.must(loaded, f"{name}, afterwards: {back.status_code} {back.text[:200]}")
                if loaded:
                    check_text(complete(client, model="missing"), "hi", 8)
            server.assert_quiet()
    release.set()


def _load_beside_traffic(server: AdapterServer, client: httpx.Client) -> tuple[int, str, float, list[float]]:
    """(status, code, seconds) of a load from the hub, and the seconds of another adapter's answers meanwhile."""
    ended, took = threading.Event(), list[float]()

    def ask() -> None:
        with server.client() as other:
            while not ended.is_set():
                began = time.perf_counter()
                check_text(complete(other, model="good"), "hi", 8)
                took.append(time.perf_counter() - began)
                time.sleep(0.02)

    asking = threading.Thread(target=ask)
    asking.start()
    began = time.perf_counter()
    status, code = 0, "no answer"
    try:
        reply = client.put("/v1/adapters/missing", json={"source": "org/tiny@main"})
        status, code = reply.status_code, error_code(reply) if reply.status_code >= 400 else ""
    except httpx.TimeoutException:
        pass
    seconds = time.perf_counter() - began
    ended.set()
    asking.join()
    return status, code, seconds, took


def _many_at_once(finding: Finding, folder: Path, hub: FakeHub, loads: int) -> None:
    hub.requests.clear()
    statuses: Counter[int] = Counter()
    with _server(folder, "many", hub.endpoint) as server:

        def load() -> None:
            with server.client(headers=ADMIN) as client:
                statuses[client.put("/v1/adapters/missing", json={"source": "org/tiny@main"}).status_code] += 1

        threads = [threading.Thread(target=load) for _ in range(loads)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        server.assert_quiet()
    downloads = sum(method == "GET" and path.endswith(WEIGHTS) for method, path, _ in hub.requests)
    finding.counts[f"{loads} loads at once"] = f"{downloads} download, statuses {dict(statuses)}"
    finding.must(downloads == 1, f"{loads} loads at once made {downloads} downloads")
    finding.must(statuses.keys() <= {200, 201}, f"{loads} loads at once: {dict(statuses)}")
