#!/usr/bin/env python3
"""Measure the cost of HTTP, streaming and the event loop: tokens/s of N streams through the server and offline.

    .venv/bin/python loadtest/bench/http_vs_offline.py [--model DIR] [--streams 1,8] [--rounds 3]

Server and `guanaco bench engine` run in turns on the same model and threads, greedily, at the same mean length, the
best of three each; the rate through HTTP is that of the time in which all streams run. Medians and ratios go to
loadtest/results with their conditions. The client's work is in the HTTP rate too: it runs on the same cores.
"""

import argparse
import asyncio
import datetime
import json
import platform
import re
import shlex
import socket
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path

import httpx
import uvloop

from guanaco.server.bootstrap.machine import look

HERE = Path(__file__).resolve().parent
GUANACO = str(Path(sys.executable).parent / "guanaco")
CONTEXT_WORDS = 24
STEPS = 64
# With the demo's tokenizer a stream begins with 23 tokens (CONTEXT_WORDS / 3 words) and grows by STEPS. A stream of
# `guanaco bench engine` grows by 24 tokens. So with this context both have 55 tokens on average.
OFFLINE_CONTEXT = 43
COUNT = re.compile(rb'"completion_tokens":(\d+)')


class _Recorder(asyncio.Protocol):
    """Keeps the received bytes with their times. They are parsed after the end, so the engine's cores are not used."""

    def __init__(self) -> None:
        self.pieces: list[tuple[float, bytes]] = []
        self.ended = asyncio.get_running_loop().create_future()

    def data_received(self, data: bytes) -> None:
        self.pieces.append((time.perf_counter(), data))

    def connection_lost(self, _: Exception | None) -> None:
        if not self.ended.done():  # the task that waited may have been cancelled
            self.ended.set_result(None)


async def stream(
    host: str, model: str, number: int, num_words: int = CONTEXT_WORDS // 3, steps: int = STEPS
) -> list[float]:
    """The times at which one stream's tokens came, in seconds of `time.perf_counter`.

    Uses a bare connection: the client runs on the engine's cores, and an HTTP library takes longer to read than the
    server to write. The number of tokens in a chunk comes from its usage.
    """
    prompt = " ".join(f"{number}{i}" for i in range(num_words))
    body = {"model": model, "prompt": prompt, "max_tokens": steps, "ignore_eos": True, "stream": True, "temperature": 0}
    body["stream_options"] = {"include_usage": True, "continuous_usage_stats": True}
    data = json.dumps(body).encode()
    name, port = host.split(":")
    transport, recorder = await asyncio.get_running_loop().create_connection(_Recorder, name, int(port))
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nConnection: close\r\n"
    transport.write(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
    try:
        await recorder.ended
    finally:
        transport.abort()
    return _token_times(recorder.pieces, steps)


def _token_times(pieces: list[tuple[float, bytes]], steps: int) -> list[float]:
    times: list[float] = []
    lines: list[bytes] = []
    rest = b""
    for now, piece in pieces:
        *new, rest = (rest + piece).split(b"\n")
        for line in new:
            if line.startswith(b"data: {") and (found := COUNT.search(line)):
                times += [now] * (int(found[1]) - len(times))
        lines += new
    assert lines[:1] == [b"HTTP/1.1 200 OK\r"], lines[:1]
    assert b"data: [DONE]" in lines, "the stream broke off"
    assert len(times) == steps, f"{len(times)} tokens came"
    return times


async def http_rate(url: str, count: int) -> float:
    """Tokens/s of all streams together while all run: from the latest first token to the earliest last token."""
    model = httpx.get(f"{url}/v1/models").json()["data"][0]["id"]
    host = url.removeprefix("http://")
    runs = await asyncio.gather(*(stream(host, model, i) for i in range(count)))
    start, end = max(times[0] for times in runs), min(times[-1] for times in runs)
    return sum(start < t <= end for times in runs for t in times) / (end - start)


def offline(args: argparse.Namespace) -> dict[str, float]:
    command = [GUANACO, "bench", "engine", "--json", "--batches", args.streams, "--prompt", "32"]
    command += ["--context", str(OFFLINE_CONTEXT), *model_flags(args)]
    best: dict[str, float] = {}
    for _ in range(3):
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd="/tmp")
        found = json.loads(done.stdout.strip().splitlines()[-1])
        best |= {key: max(value, best.get(key, 0)) for key, value in found.items() if re.fullmatch(r"tg\d+", key)}
    return best


def model_flags(args: argparse.Namespace) -> list[str]:
    return ["--threads", str(args.threads), *(["--model", args.model] if args.model else [])]


def through_http(args: argparse.Namespace) -> dict[str, float]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    command = [GUANACO, "serve", "--port", str(port), "--speculation", "off", *model_flags(args)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd="/tmp")
    try:
        for _ in range(1200):
            try:
                if httpx.get(f"{url}/health", timeout=5).status_code == 200:
                    break
            except httpx.HTTPError:
                pass  # the port is not open yet
            time.sleep(0.1)
        uvloop.run(http_rate(url, 1))  # not counted: the first request is slower
        return {
            f"tg{n}": max(uvloop.run(http_rate(url, n)) for _ in range(3)) for n in map(int, args.streams.split(","))
        }
    finally:
        server.terminate()
        server.wait(60)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", help="absolute path; none: the demo")
    p.add_argument("--streams", default="1,8")
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--rounds", type=int, default=3)
    args = p.parse_args()
    samples: dict[str, dict[str, list[float]]] = {"http": defaultdict(list), "offline": defaultdict(list)}
    started = datetime.datetime.now(datetime.UTC)
    for _ in range(args.rounds):
        for name, measure in (("http", through_http), ("offline", offline)):
            for key, value in measure(args).items():
                samples[name][key].append(round(value, 2))
    ratios = {
        key: round(statistics.median(a / b for a, b in zip(samples["http"][key], values, strict=True)), 3)
        for key, values in samples["offline"].items()
    }
    result = {
        "date": started.isoformat(timespec="seconds"),
        "command": "http_vs_offline.py " + shlex.join(sys.argv[1:]),
        "machine": f"{look().cpu_name}, Python {platform.python_version()}",
        "http_over_offline": ratios,
        "samples": samples,
    }
    path = HERE.parent / "results" / f"http-{Path(args.model).name if args.model else 'demo'}-{started:%Y-%m-%d}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(samples), ratios, path, sep="\n")


if __name__ == "__main__":
    main()
