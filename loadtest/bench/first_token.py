#!/usr/bin/env python3
"""Measure how soon a server answers after its start, its memory, and one stream's speed against the memory's bandwidth.

    .venv/bin/python loadtest/bench/first_token.py --model DIR --bandwidth METER [--starts 2] [--words 150]

Starts `guanaco serve` several times. Measures the seconds from the process's start to ready and to a short prompt's
first token, then the first-token time of a long prompt, and the peak of resident memory (mapped pages count) once that
stream has ended. The first start may quantise and pack the weights; all starts are listed. Then `guanaco bench engine`
and the bandwidth meter run in turns.
"""

import argparse
import asyncio
import datetime
import json
import os
import platform
import re
import shlex
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path

import httpx
from compare_peers import step_bytes
from http_vs_offline import GUANACO, HERE, stream

from guanaco.server.bootstrap.machine import look


def resident_gb(pid: int, field: str) -> float:
    """VmRSS or VmHWM (`field`) of a process, in GB."""
    status = Path(f"/proc/{pid}/status").read_text()
    found = re.search(rf"^{field}:\s+(\d+) kB", status, re.MULTILINE)
    assert found, f"{field} is missing"
    return int(found[1]) * 1024 / 1e9


def one_start(args: argparse.Namespace) -> dict[str, float]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    started = time.perf_counter()
    command = [GUANACO, "serve", "--model", args.model, "--port", str(port), "--threads", str(args.threads)]
    server = subprocess.Popen(
        [*command, "--kv-cache-memory", args.kv_cache_memory],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd="/tmp",
    )
    try:
        while True:
            assert server.poll() is None, "the server ended"
            try:
                if httpx.get(f"{url}/health", timeout=5).status_code == 200:
                    break
            except httpx.HTTPError:
                pass  # the port is not open yet
            time.sleep(0.05)
        ready = time.perf_counter() - started
        model = httpx.get(f"{url}/v1/models").json()["data"][0]["id"]
        short = asyncio.run(stream(url.removeprefix("http://"), model, 1, num_words=4, steps=2))
        first = short[0] - started
        asked = time.perf_counter()
        times = asyncio.run(stream(url.removeprefix("http://"), model, 2, num_words=args.words, steps=args.steps))
        return {
            "ready_seconds": round(ready, 2),
            "first_token_seconds": round(first, 2),
            "long_prompt_first_token_seconds": round(times[0] - asked, 2),
            "peak_resident_gb": round(resident_gb(server.pid, "VmHWM"), 3),
            "resident_gb": round(resident_gb(server.pid, "VmRSS"), 3),
            "stream_tokens_per_second": round((len(times) - 1) / (times[-1] - times[0]), 2),
        }
    finally:
        server.terminate()
        server.wait(60)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", required=True, help="absolute path")
    p.add_argument("--bandwidth", required=True, help="the compiled meter")
    p.add_argument("--starts", type=int, default=2)
    p.add_argument(
        "--words", type=int, default=150, help="of the long prompt; a made-up tokenizer has many tokens each"
    )
    p.add_argument("--steps", type=int, default=64)
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--kv-cache-memory", default="600MiB")
    args = p.parse_args()
    began = datetime.datetime.now(datetime.UTC)
    starts = []
    for _ in range(args.starts):
        starts.append(one_start(args))
        print(json.dumps(starts[-1]), flush=True)
    bench = [
        GUANACO,
        "bench",
        "engine",
        "--model",
        args.model,
        "--json",
        "--threads",
        str(args.threads),
        "--batches",
        "1",
    ]
    rates, bandwidths = [], []
    environment = os.environ | {"OMP_NUM_THREADS": str(args.threads)}
    for _ in range(args.rounds):
        meter = subprocess.run([args.bandwidth], capture_output=True, text=True, check=True, env=environment)
        bandwidths.append(float(re.findall(r"[\d.]+", meter.stdout)[-1]))
        done = subprocess.run([*bench, "--prompt", "32"], capture_output=True, text=True, check=True, cwd="/tmp")
        result = json.loads([line for line in done.stdout.splitlines() if line.startswith("{")][-1])
        rates.append(result["tg1"])
        print(bandwidths[-1], rates[-1], flush=True)
    num_bytes = step_bytes(Path(args.model))
    shares = [rate * num_bytes / 1e9 / bandwidth for rate, bandwidth in zip(rates, bandwidths, strict=True)]
    out = {
        "date": began.isoformat(timespec="seconds"),
        "command": "first_token.py " + shlex.join(sys.argv[1:]),
        "machine": f"{look().cpu_name}, Python {platform.python_version()}",
        "starts": starts,
        "tg1": rates,
        "read_bandwidth_gb_s": bandwidths,
        "step_bytes": num_bytes,
        "tg1_share_of_bandwidth": round(statistics.median(shares), 3),
    }
    path = HERE.parent / "results" / f"first-token-{Path(args.model).name}-{began:%Y-%m-%d}.json"
    path.write_text(json.dumps(out, indent=1) + "\n")
    print(path, out["tg1_share_of_bandwidth"])


if __name__ == "__main__":
    main()
