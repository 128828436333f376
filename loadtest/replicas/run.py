#!/usr/bin/env python3
"""Load two replicas with one adapter registry behind a router, while one of them drains, comes back, and is killed.

    .venv/bin/python loadtest/replicas/run.py --env DIR --front envoy-picker --front envoy-ring --front vllm-router

DIR is a Python environment with the routers (docs/replicas.md says what to install). Both replicas serve the demo model
on this machine. Clients ask twelve adapters, chosen by Zipf's law, for short answers. Results for each router: share of
requests whose adapter was on the device of the replica that answered, the errors that clients saw while a replica was
away, and whether that replica caught up with the registry. Results go to loadtest/results.
"""

import argparse
import asyncio
import datetime
import itertools
import json
import os
import random
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx

HERE = Path(__file__).resolve().parent
sys.path += [str(HERE.parent / "bench"), str(HERE.parents[1] / "tests" / "importable")]

GUANACO = str(Path(sys.executable).parent / "guanaco")
ADMIN = {"Authorization": "Bearer fleet"}
NUM_ADAPTERS = 12
SLOTS = 6  # of each replica: all adapters just fit if no adapter is on both replicas
DRAIN_DELAY = 3
FRONTS = ("envoy-picker", "envoy-ring", "vllm-router")
_numbers = itertools.count(1)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def until(holds: Callable[[], bool], seconds: float, what: str) -> float:
    """Wait until `holds` returns true. Returns the seconds that this took."""
    started = time.monotonic()
    while not holds():
        if time.monotonic() - started > seconds:
            raise TimeoutError(what)
        time.sleep(0.05)
    return time.monotonic() - started


class Program:
    """One process with a log."""

    def __init__(self, work: Path, name: str, command: list[str], **options: Any) -> None:
        self.log = work / f"{name}.log"
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, cwd=work, **options)

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(30)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()


class Replica:
    """`guanaco serve` on the demo model, with a store of its own and the common registry."""

    def __init__(self, work: Path, number: int, extra: list[str]) -> None:
        self.work, self.number, self.port = work, number, free_port()
        self.extra = extra
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{self.port}", headers=ADMIN, timeout=60)
        self.start()

    def start(self) -> None:
        options = {
            "port": self.port, "admin-key": "fleet", "adapter-root": self.work / "root", "threads": 1,
            "adapter-registry": self.work / "registry", "adapter-store": self.work / f"store{self.number}",
            "train-dir": self.work / f"train{self.number}", "adapter-slots": SLOTS, "max-num-seqs": 8,
            "kv-cache-memory": "64MiB", "drain-delay": DRAIN_DELAY,
        }  # fmt: skip
        words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
        command = [GUANACO, "serve", *words, "--no-page", "--log-level", "warning", *self.extra]
        self.program = Program(self.work, f"replica{self.number}", command)

    def is_ready(self) -> bool:
        assert self.program.process.poll() is None, self.program.log.read_text()[-2000:]
        try:
            return self.client.get("/health/ready").status_code == 200
        except httpx.HTTPError:
            return False

    def versions(self) -> dict[str, str]:
        cards = self.client.get("/v1/adapters").json()["data"]
        return {card["name"]: card["version"] for card in cards if card["state"] == "ready"}

    def counted(self) -> tuple[int, int]:
        """(ended requests with an adapter, how often an adapter was brought to a slot) since the replica's start."""
        text = self.client.get("/metrics").text
        requests = sum(float(n) for n in re.findall(r"^guanaco_adapter_requests_total\{.*\} (\S+)$", text, re.M))
        evicted = re.findall(r'^guanaco_adapter_evictions_total\{tier="device"\} (\S+)$', text, re.M)
        newest = max(
            re.findall(r'^vllm:lora_requests_info\{.*running_lora_adapters="([^"]*)".*\} (\S+)$', text, re.M),
            key=lambda found: float(found[1]),
            default=("", "0"),
        )
        return int(requests), int(float(evicted[0])) + len([name for name in newest[0].split(",") if name])


class Load:
    """Workers that ask one question after another, each for an adapter that Zipf's law chooses."""

    def __init__(self, url: str, names: list[str], args: argparse.Namespace) -> None:
        self.url, self.names, self.args = url, names, args
        self.weights = [1 / (rank + 1) for rank in range(len(names))]
        self.seen: list[tuple[float, float, str, str]] = []  # (start, seconds, outcome, replica)
        self.versions: set[tuple[str, str]] = set()

    async def run(self, stop: asyncio.Event) -> None:
        limits = httpx.Limits(max_connections=self.args.users, max_keepalive_connections=self.args.users)
        async with httpx.AsyncClient(base_url=self.url, timeout=120, limits=limits) as client:
            await asyncio.gather(*(self._ask(client, stop, number) for number in range(self.args.users)))

    async def _ask(self, client: httpx.AsyncClient, stop: asyncio.Event, number: int) -> None:
        rng = random.Random(number)
        while not stop.is_set():
            name = rng.choices(self.names, self.weights)[0]
            body = {"model": name, "prompt": f"Question {next(_numbers)}: why?", "max_tokens": 6, "ignore_eos": True}
            headers = {"X-Adapter": name, "X-Session-ID": name}
            started = time.monotonic()
            try:
                response = await client.post("/v1/completions", json=body, headers=headers)
                outcome = str(response.status_code)
                if response.status_code != 200:
                    print("not 200:", response.status_code, response.text[:300], flush=True)
                self.versions.add((name, response.headers.get("x-adapter-version", "")))
                replica = response.headers.get("x-replica", "")
            except httpx.HTTPError as error:
                outcome, replica = type(error).__name__, ""
            self.seen.append((started, time.monotonic() - started, outcome, replica))

    def summary(self, since: int) -> dict[str, Any]:
        """Counts, errors and seconds of the requests from number `since` on, as clients saw them."""
        part = self.seen[since:]
        seconds = sorted(took for _, took, _, _ in part)
        errors = Counter(outcome for _, _, outcome, _ in part if outcome != "200")
        return {
            "requests": len(part),
            "client_errors": dict(errors),
            "seconds_median": round(statistics.median(seconds), 3) if seconds else None,
            "seconds_p95": round(seconds[int(len(seconds) * 0.95)], 3) if seconds else None,
        }


def envoy_config(front: str, ports: list[int], port: int, admin_port: int, picker_port: int) -> str:
    """envoy.yaml with a picker, or with a ring hash of the header X-Adapter."""
    base = "type.googleapis.com/envoy.extensions"
    if front == "envoy-picker":
        mode = (
            "{request_header_mode: SEND, request_body_mode: FULL_DUPLEX_STREAMED, request_trailer_mode: SEND, "
            "response_header_mode: SKIP, response_trailer_mode: SKIP}"
        )
        picker = f"""\
          - name: picker
            typed_config:
              "@type": {base}.filters.http.ext_proc.v3.ExternalProcessor
              grpc_service: {{envoy_grpc: {{cluster_name: picker}}, timeout: 10s}}
              processing_mode: {mode}
              message_timeout: 10s"""
        balancing = f"""\
    load_balancing_policy:
      policies:
      - typed_extension_config:
          name: envoy.load_balancing_policies.override_host
          typed_config:
            "@type": {base}.load_balancing_policies.override_host.v3.OverrideHost
            override_host_sources: [{{header: x-gateway-destination-endpoint}}]
            fallback_policy:
              policies:
              - typed_extension_config:
                  name: envoy.load_balancing_policies.round_robin
                  typed_config: {{"@type": {base}.load_balancing_policies.round_robin.v3.RoundRobin}}"""
    else:
        picker, balancing = "", "    lb_policy: RING_HASH"
    endpoints = "\n".join(
        f"        - endpoint: {{address: {{socket_address: {{address: 127.0.0.1, port_value: {p}}}}}}}" for p in ports
    )
    text = (HERE / "envoy.yaml").read_text()
    values = {
        "port": port, "admin_port": admin_port, "picker_port": picker_port, "picker_filter": picker,
        "balancing": balancing, "endpoints": endpoints,
    }  # fmt: skip
    for name, value in values.items():
        text = text.replace(f"{{{name}}}", str(value))
    return text


def start_front(front: str, work: Path, env: Path, replicas: list[Replica], stack: ExitStack) -> tuple[str, int | None]:
    """Start a router. Returns its address, and the port of Envoy's own statistics."""
    port, ports = free_port(), [replica.port for replica in replicas]
    url, admin_port = f"http://127.0.0.1:{port}", None
    if front == "vllm-router":
        workers = [f"http://127.0.0.1:{p}" for p in ports]
        command = [
            str(env / "bin" / "vllm-router"), "--port", str(port), "--worker-urls", *workers,
            "--policy", "consistent_hash", "--health-check-interval-secs", "1", "--health-failure-threshold", "1",
            "--health-success-threshold", "1", "--health-check-endpoint", "/health/ready",
            "--prometheus-port", str(free_port()), "--log-level", "warning",
        ]  # fmt: skip
    else:
        admin_port, picker_port = free_port(), free_port()
        if front == "envoy-picker":
            found = [word for p in ports for word in ("--replica", f"127.0.0.1:{p}")]
            python = str(env / "bin" / "python")
            picker = Program(work, "picker", [python, str(HERE / "picker.py"), "--port", str(picker_port), *found])
            stack.callback(picker.stop)
        config = work / f"{front}.yaml"
        config.write_text(envoy_config(front, ports, port, admin_port, picker_port))
        command = [
            str(env / "bin" / "envoy"), "-c", str(config), "--concurrency", "1", "--log-level", "warning",
            "--disable-hot-restart",
        ]  # fmt: skip
    program = Program(work, front, command)
    stack.callback(program.stop)

    def answers() -> bool:
        assert program.process.poll() is None, program.log.read_text()[-3000:]
        try:
            return httpx.get(f"{url}/v1/models", timeout=5).status_code == 200
        except httpx.HTTPError:
            return False

    until(answers, 60, f"{front} does not answer: {program.log}")
    return url, admin_port


def make_adapters(replicas: list[Replica], work: Path) -> tuple[list[str], list[float]]:
    """Load twelve adapters on the first replica. Returns their names, and the seconds until the second served each."""
    import torch
    from adapters_scaling import MODULES, _targets

    from support.adapters.tiny_adapters import make_adapter

    names, lags = [f"a{number:02}" for number in range(NUM_ADAPTERS)], []
    targets = _targets(replicas[0].client)
    for number, name in enumerate(names):
        source = make_adapter(work / "root" / name, targets, 8, seed=number, dtype=torch.bfloat16, modules=MODULES)
        reply = replicas[0].client.put(f"/v1/adapters/{name}", json={"source": source.name})
        assert reply.status_code == 201, reply.text
        version = reply.json()["version"]
        lags.append(until(lambda n=name, v=version: replicas[1].versions().get(n) == v, 60, "no adapter"))
    return names, lags


async def phases(front: str, url: str, replicas: list[Replica], names: list[str], args: argparse.Namespace) -> Any:
    """The phases under load: steady; one replica drains and restarts; it is killed and restarts; steady."""
    load, stop = Load(url, names, args), asyncio.Event()
    running = asyncio.create_task(load.run(stop))
    result: dict[str, Any] = {}

    async def phase(name: str, seconds: float, *, counts: bool = False) -> None:
        since, before = len(load.seen), [await asyncio.to_thread(r.counted) for r in replicas] if counts else []
        await asyncio.sleep(seconds)
        result[name] = load.summary(since)
        if counts:
            after = [await asyncio.to_thread(r.counted) for r in replicas]
            asked = [a[0] - b[0] for a, b in zip(after, before, strict=True)]
            brought = [a[1] - b[1] for a, b in zip(after, before, strict=True)]
            result[name] |= {"requests_by_replica": asked, "brought_to_a_slot_by_replica": brought}
            result[name]["found_resident"] = round(1 - sum(brought) / max(1, sum(asked)), 4)
        print(front, name, result[name], flush=True)

    async def gone(name: str, sign: int) -> None:
        """Signal the second replica; meanwhile replace an adapter on the first; start the second again."""
        since, one, two = len(load.seen), replicas[0], replicas[1]
        two.program.process.send_signal(sign)
        code = await asyncio.to_thread(two.program.process.wait, 120)
        source = f"{names[3]}-{name}"
        shutil.copytree(one.work / "root" / names[0], one.work / "root" / source, dirs_exist_ok=True)
        _scale(one.work / "root" / source, front, name)
        reply = await asyncio.to_thread(lambda: one.client.put(f"/v1/adapters/{names[3]}", json={"source": source}))
        assert reply.status_code == 200, reply.text
        await asyncio.sleep(args.seconds / 4)
        two.start()
        took = await asyncio.to_thread(until, two.is_ready, 300, "the replica does not come back")
        caught_up = (await asyncio.to_thread(two.versions)) == (await asyncio.to_thread(one.versions))
        await asyncio.sleep(args.seconds / 4)
        result[name] = load.summary(since) | {"exit_code": code, "restart_seconds": round(took, 1)}
        result[name]["caught_up_at_its_first_answer"] = caught_up
        print(front, name, result[name], flush=True)

    try:
        await phase("warm_up", args.seconds / 3)
        await phase("steady", args.seconds, counts=True)
        await gone("one_drains", signal.SIGTERM)
        await gone("one_is_killed", signal.SIGKILL)
        await phase("settling", args.seconds / 3)
        await phase("steady_again", args.seconds, counts=True)
    finally:
        stop.set()
        await running
    return result


def _scale(folder: Path, *salt: str) -> None:
    """Change an adapter's alpha a little, which makes another version. salt: decides the new alpha."""
    config = json.loads((folder / "adapter_config.json").read_text())
    config["lora_alpha"] = 8 + random.Random("".join(salt)).random()
    (folder / "adapter_config.json").write_text(json.dumps(config))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", type=Path, required=True, help="environment with the routers")
    parser.add_argument("--front", action="append", choices=FRONTS, help="repeat for more; none: all three")
    parser.add_argument("--seconds", type=float, default=60, help="of each steady phase")
    parser.add_argument("--users", type=int, default=6)
    parser.add_argument("--out", type=Path, default=HERE.parent / "results")
    parser.add_argument("--keep", type=Path, help="keep logs and files in this directory")
    args = parser.parse_args()
    from adapters_scaling import _machine

    result: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "machine": _machine(),
        "load_average_before": os.getloadavg(),
        "adapters": NUM_ADAPTERS,
        "slots_of_each_replica": SLOTS,
        "users": args.users,
        "fronts": {},
    }
    for front in args.front or FRONTS:
        with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
            work = (args.keep or Path(folder)) / front
            for part in ("root", "registry"):
                (work / part).mkdir(parents=True)
            replicas = [Replica(work, number, []) for number in (1, 2)]
            for replica in replicas:
                stack.callback(lambda r=replica: r.program.stop())
            for replica in replicas:
                until(replica.is_ready, 300, "a replica does not start")
            names, lags = make_adapters(replicas, work)
            url, admin_port = start_front(front, work, args.env, replicas, stack)
            measured = asyncio.run(phases(front, url, replicas, names, args))
            measured["seconds_until_the_other_served_a_load"] = {"median": statistics.median(lags), "max": max(lags)}
            if admin_port is not None:
                stats = httpx.get(f"http://127.0.0.1:{admin_port}/stats", params={"filter": "replicas.upstream_rq_"})
                wanted = ("upstream_rq_retry:", "upstream_rq_retry_success:", "upstream_rq_503:", "upstream_rq_200:")
                measured["envoy"] = [line for line in stats.text.splitlines() if any(w in line for w in wanted)]
            result["fronts"][front] = measured
    result["load_average_after"] = os.getloadavg()
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"replicas-{datetime.date.today()}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(path)


if __name__ == "__main__":
    main()
