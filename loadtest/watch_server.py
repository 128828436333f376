#!/usr/bin/env python3
"""Let a real Prometheus scrape a demo server under load, and ask it for every panel of the dashboard.

    python loadtest/watch_server.py fetch       # Debian's package, unpacked into build/prometheus
    python loadtest/watch_server.py run         # about two minutes; ends with 1 where a panel is empty
    python loadtest/watch_server.py run --seconds 120 --picture docs/pictures/dashboard.png

`run` starts a server that is small on purpose: little KV cache, two adapter slots, a short queue. So requests are
preempted and refused, and adapters are evicted. Prometheus reads the files of `docker/monitoring`, and sends a key.
"""

import argparse
import contextlib
import importlib.util
import json
import math
import os
import platform
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import httpx
import yaml
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).resolve().parent.parent
MONITORING = ROOT / "docker/monitoring"
UNPACKED = ROOT / "build/prometheus"
RATE_RANGE = "15s"  # in place of Grafana's $__rate_interval; scrapes come every second here
# Panels that must rise above zero. At zero they are not empty, but then the load has not caused what they show.
MOVES = ("Requests by adapter", "Refusals by code", "Preemptions", "Prefix cache", "Loads", "Evictions", "HTTP status")
MOVES += ("Draft tokens accepted",)
QUESTIONS = (
    "How do I boil an egg?",
    "What is the sea?",
    "Write a poem about the wind.",
    "Name three rivers of Europe.",
)
QUESTIONS += (f"Repeat this text: {'the sea, the sky, the wind, ' * 8}",)  # drafts of its answer are often accepted
PREFIX = "You are a patient teacher who explains everything in small steps and never loses a word. " * 3


def program(name: str) -> str:
    """The path of `prometheus` or `promtool`. Exits if it is not found."""
    found = shutil.which(name, path=os.pathsep.join((os.environ.get("PATH", ""), str(UNPACKED / "usr/bin"))))
    if found is None:
        sys.exit(f"{name} is not here: apt install prometheus, or python loadtest/watch_server.py fetch")
    return found


def fetch() -> None:
    """Download Debian's package and unpack it, without installing it."""
    UNPACKED.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["apt-get", "download", "-q", "prometheus"], cwd=folder, check=True)
        (package,) = Path(folder).glob("prometheus_*.deb")
        subprocess.run(["dpkg", "-x", package, UNPACKED], check=True)
    print(program("prometheus"))


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


@contextlib.contextmanager
def running(command: list[str], log: Path, ready: str, seconds: float, **options: Any) -> Iterator[None]:
    """Run a process during the `with` block, which begins when the URL `ready` answers 200, for at most `seconds`."""
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, **options)
    try:
        deadline = time.monotonic() + seconds
        while True:
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(ready, timeout=5).status_code == 200:
                    break
            if process.poll() is not None or time.monotonic() > deadline:
                sys.exit(f"{command[0]} did not get ready:\n{log.read_text()[-3000:]}")
            time.sleep(0.2)
        yield
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()


def make_adapters(root: Path, count: int) -> list[str]:
    """Make `count` different variants of the demo adapters. Returns the names of their folders."""
    names = []
    for number in range(count):
        source = ROOT / "adapters/demo" / ("pirate", "terse")[number % 2]
        target = root / f"variant-{number}"
        target.mkdir(parents=True)
        shutil.copy(source / "adapter_config.json", target)
        tensors = load_file(source / "adapter_model.safetensors")
        weaker = {name: tensor * (0.9 - 0.1 * number) for name, tensor in tensors.items()}
        save_file(weaker, target / "adapter_model.safetensors", metadata={"format": "pt"})
        names.append(target.name)
    return names


class Load:
    """Clients and an operator, until `stop`."""

    def __init__(self, url: str, key: str, admin_key: str, sources: list[str]) -> None:
        self._url, self._key, self._admin_key, self._sources = url, key, admin_key, sources
        self._models = [card["id"] for card in self._client(key).get("/v1/models").json()["data"]]
        self._stopping = threading.Event()
        self.statuses: dict[str, int] = {}
        self._threads = [threading.Thread(target=self._guard, args=(self._chat, n)) for n in range(5)]
        self._threads += [threading.Thread(target=self._guard, args=(work, 0)) for work in (self._burst, self._operate)]

    def _client(self, key: str) -> httpx.Client:
        return httpx.Client(base_url=self._url, headers={"Authorization": f"Bearer {key}"}, timeout=120)

    def train(self) -> bool:
        """Start a short fine-tuning job. Returns False if this server can't train."""
        line = {
            "messages": [{"role": "user", "content": "Who are you?"}, {"role": "assistant", "content": "A guanaco."}]
        }
        content = (json.dumps(line) + "\n") * 40
        with self._client(self._admin_key) as client:
            form = {"file": ("rows.jsonl", content.encode())}
            answer = client.post("/v1/files", files=form, data={"purpose": "fine-tune"})
            if answer.status_code == 200:
                body = {"model": self._models[0], "training_file": answer.json()["id"]}
                answer = client.post("/v1/fine_tuning/jobs", json={**body, "hyperparameters": {"n_epochs": 3}})
            print(f"a fine-tuning job: {answer.status_code}")
            return answer.status_code == 200

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self._stopping.set()
        for thread in self._threads:
            thread.join(150)

    def _guard(self, work: Callable[[int], None], number: int) -> None:
        while not self._stopping.is_set():
            with contextlib.suppress(httpx.HTTPError):
                work(number)

    def _count(self, what: str, response: httpx.Response) -> None:
        key = f"{what} {response.status_code}"
        self.statuses[key] = self.statuses.get(key, 0) + 1

    def _ask(self, client: httpx.Client, model: str, max_tokens: int, turn: int) -> None:
        messages = [{"role": "system", "content": PREFIX}] if turn % 2 else []
        messages.append({"role": "user", "content": QUESTIONS[turn % len(QUESTIONS)]})
        body = {"model": model, "messages": messages, "max_tokens": max_tokens, "temperature": 0.8}
        self._count("chat", client.post("/v1/chat/completions", json=body))

    def _chat(self, number: int) -> None:
        """A user who asks one question after the other, of each model in turn, and sometimes of a missing one."""
        with self._client(self._key) as client:
            turn = number
            while not self._stopping.is_set():
                turn += 1
                model = "nobody" if turn % 9 == 0 else self._models[turn % len(self._models)]
                self._ask(client, model, 30 + 20 * (turn % 3), turn)

    def _burst(self, _: int) -> None:
        """Every 8 s, send more long requests at once than can run and wait: some are preempted, some refused."""

        def one(number: int) -> None:
            with contextlib.suppress(httpx.HTTPError), self._client(self._key) as client:
                self._ask(client, self._models[number % len(self._models)], 160, number)

        while not self._stopping.wait(8):
            threads = [threading.Thread(target=one, args=(number,)) for number in range(14)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()

    def _operate(self, _: int) -> None:
        """An operator who loads adapters in turn, and one that does not exist."""
        with self._client(self._admin_key) as client:
            turn = 0
            while not self._stopping.wait(4):
                source = self._sources[turn % len(self._sources)] if turn % 4 else "nothing-here"
                body = {"source": source}
                self._count("load", client.put(f"/v1/adapters/loaded-{turn % 3}", json=body))
                name = f"loaded-{turn % 3}"
                if name not in self._models and turn > 4:
                    self._models.append(name)
                turn += 1


def finite(samples: list[list[Any]]) -> list[tuple[float, float]]:
    return [(float(at), float(text)) for at, text in samples if math.isfinite(float(text))]


def ask_prometheus(url: str, expression: str, start: float, end: float) -> list[dict[str, Any]]:
    """The series that an expression gives, as [{"labels": …, "points": [(time, value), …]}]; finite values only."""
    text = expression.replace("$__rate_interval", RATE_RANGE).replace("$instance", ".*")
    query = {"query": text, "start": f"{start:.3f}", "end": f"{end:.3f}", "step": "1"}
    answer = httpx.post(f"{url}/api/v1/query_range", data=query, timeout=60).json()
    assert answer["status"] == "success", f"{text}: {answer}"
    found = [{"labels": one["metric"], "points": finite(one["values"])} for one in answer["data"]["result"]]
    return [one for one in found if one["points"]]


def module(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


def evaluate(
    url: str, start: float, end: float, moves: Sequence[str] = MOVES
) -> tuple[list[dict[str, Any]], list[str]]:
    """(panels with their series, sentences about what is wrong). moves: the panels that must rise above zero."""
    shown, wrong = [], []
    dashboard = json.loads((MONITORING / "grafana/dashboards/guanaco.json").read_text())
    for panel in dashboard["panels"]:
        if panel["type"] == "row":
            continue
        title, lines = panel["title"], []
        for target in panel["targets"]:
            series = ask_prometheus(url, target["expr"], start, end)
            if not series:
                wrong.append(f"{title}: nothing for {target['expr']}")
            lines += [{**one, "legend": target["legendFormat"]} for one in series]
        largest = max((value for line in lines for _, value in line["points"]), default=0.0)
        if title in moves and largest <= 0:
            wrong.append(f"{title}: never above zero")
        shown.append(
            {"title": title, "type": panel["type"], "unit": panel["fieldConfig"]["defaults"]["unit"], "lines": lines}
        )
        print(f"{title:32} {len(lines):3} series, at most {largest:.4g}{'' if lines else '   (empty)'}")
    return shown, wrong


def run(args: argparse.Namespace) -> int:
    prometheus = program("prometheus")
    with tempfile.TemporaryDirectory() as temporary, contextlib.ExitStack() as stack:
        folder = Path(temporary)
        sources = make_adapters(folder / "adapters", 4)
        api_key, admin_key = secrets.token_hex(16), secrets.token_hex(16)
        (folder / "scrape-key").write_text(api_key + "\n")
        url, address = f"http://127.0.0.1:{free_port()}", f"127.0.0.1:{free_port()}"
        flags = {
            "port": url.rpartition(":")[2],
            "adapter-root": folder / "adapters",
            "adapter-store": folder / "store",
            "train-dir": folder / "training",
            "max-num-seqs": 6,
            "max-queued-requests": 6,
            "max-model-len": 512,
            "kv-cache-memory": args.kv_cache_memory,
            "adapter-slots": 2,
            "speculation": "lookup",
            "adapter-host-memory": args.adapter_host_memory,
        }
        command = [str(Path(sys.executable).parent / "guanaco"), "serve"]
        command += [text for name, value in flags.items() for text in (f"--{name}", str(value))] + args.serve
        keys = {"GUANACO_API_KEY": api_key, "GUANACO_ADMIN_KEY": admin_key}
        stack.enter_context(
            running(command, folder / "server.log", f"{url}/health/ready", 600, env={**os.environ, **keys})
        )
        config = yaml.safe_load((MONITORING / "prometheus.yml").read_text())
        config["global"] = {"scrape_interval": "1s", "evaluation_interval": "5s"}
        (job,) = config["scrape_configs"]
        job["authorization"]["credentials_file"] = str(folder / "scrape-key")
        job["static_configs"] = [{"targets": [url.removeprefix("http://")]}]
        (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
        shutil.copy(MONITORING / "alerts.yml", folder)
        command = [prometheus, f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/tsdb"]
        command += [f"--web.listen-address={address}"]
        stack.enter_context(running(command, folder / "prometheus.log", f"http://{address}/-/ready", 60))
        start = time.time()
        load = Load(url, api_key, admin_key, sources)
        trains = load.train()
        load.start()
        time.sleep(args.seconds)
        load.stop()
        time.sleep(2)
        print(f"answers: {dict(sorted(load.statuses.items()))}")
        moves = (*MOVES, "Fine-tuning jobs") if trains else MOVES
        shown, wrong = evaluate(f"http://{address}", start + 5, time.time(), moves)
        alerts = httpx.get(f"http://{address}/api/v1/alerts", timeout=30).json()["data"]["alerts"]
        print(f"alerts: {sorted((alert['labels']['alertname'], alert['state']) for alert in alerts)}")
        if args.picture is not None:
            about = f"{time.strftime('%Y-%m-%d')}, demo model, {platform.machine()}, {os.cpu_count()} processors"
            module(Path(__file__).parent / "watch_picture.py").draw(shown, args.picture, about)
    for text in wrong:
        print(f"WRONG  {text}")
    print("every panel shows something" if not wrong else f"{len(wrong)} things are wrong")
    return 1 if wrong else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("fetch", help="get Debian's package")
    runs = commands.add_parser("run", help="server, Prometheus, load, panels")
    runs.add_argument("--seconds", type=float, default=90, help="how long the load runs (90)")
    runs.add_argument("--picture", type=Path, help="draw all panels into this PNG")
    runs.add_argument("--kv-cache-memory", default="24MiB")
    runs.add_argument("--adapter-host-memory", default="24MiB")
    runs.add_argument("serve", nargs="*", help="more flags for the server, after --")
    args = parser.parse_args()
    if args.command == "fetch":
        fetch()
        return 0
    return run(args)


if __name__ == "__main__":
    sys.exit(main())
