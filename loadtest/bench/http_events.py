#!/usr/bin/env python3
"""Measure how many events a second the HTTP side writes, with an engine that has no model.

    .venv/bin/python loadtest/bench/http_events.py [--streams 1,16,64] [--seconds 5] [--rounds 3] [--tree OLD=DIR]...

N clients ask for a streamed chat, read it to its end and ask again, over bare connections. The fake engine of the tests
answers at once, so the rate is that of the event loop: parsing, text, JSON, writing. A further tree (a git worktree of
another commit) is measured in turns with this one, with this one's Python and packages; the file in loadtest/results
has the median ratio of this one to each.
"""

import argparse
import asyncio
import datetime
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import uvloop

from guanaco.server.bootstrap.machine import look

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
THIS = "this"
ROOMS = ("adapters", "kernels", "models", "server")
MODEL = "org/base-model"  # of the fake server


class _Counter(asyncio.Protocol):
    """Counts the events of a response."""

    def __init__(self) -> None:
        self.num_events = 0
        self.head = b""
        self._tail = b""
        self.ended = asyncio.get_running_loop().create_future()

    def data_received(self, data: bytes) -> None:
        self.head = self.head or data[:15]
        seen = self._tail + data
        self.num_events += seen.count(b"data: {")
        self._tail = seen[-6:]

    def connection_lost(self, _: Exception | None) -> None:
        if not self.ended.done():
            self.ended.set_result(None)


async def one_stream(port: int, number: int) -> int:
    """The number of events of one answer."""
    message = {"role": "user", "content": f"hello {number}"}
    data = json.dumps({"model": MODEL, "messages": [message], "stream": True, "max_tokens": 2000}).encode()
    transport, counter = await asyncio.get_running_loop().create_connection(_Counter, "127.0.0.1", port)
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: t\r\nContent-Type: application/json\r\nConnection: close\r\n"
    transport.write(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
    try:
        await counter.ended
    finally:
        transport.abort()
    assert counter.head == b"HTTP/1.1 200 OK", counter.head
    return counter.num_events


async def rate(port: int, count: int, seconds: float) -> float:
    """Events/s of `count` clients together."""
    end = time.perf_counter() + seconds

    async def client(number: int) -> int:
        total = 0
        while time.perf_counter() < end:
            total += await one_stream(port, number)
        return total

    started = time.perf_counter()
    totals = await asyncio.gather(*(client(number) for number in range(count)))
    return sum(totals) / (time.perf_counter() - started)


@contextmanager
def fake_server(tree: Path) -> Iterator[int]:
    """Run the fake server of a tree. Yields its port."""
    candidates = sorted((tree / "tests/support").rglob("serve_fake.py"))
    assert candidates, f"{tree} has no tests/support/**/serve_fake.py"
    with tempfile.TemporaryDirectory() as folder:
        package = Path(folder) / "guanaco"
        package.mkdir()
        for room in ROOMS:
            (package / room).symlink_to(tree / room)
        paths = [folder, str(tree / "tests/importable"), str(tree / "tests/support")]
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
        command = [sys.executable, str(candidates[0]), "{}"]
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=env, cwd=folder, text=True
        ) as server:
            assert server.stdout is not None
            try:
                line = next((line for line in server.stdout if line.strip().isdecimal()), None)
                assert line is not None, f"the server of {tree} did not start: {shlex.join(command)}"
                yield int(line)
            finally:
                server.terminate()
                server.wait(60)


def measured(tree: Path, streams: list[int], seconds: float) -> dict[str, float]:
    with fake_server(tree) as port:
        uvloop.run(rate(port, 4, 1.0))  # not counted: the first requests are slower
        return {f"streams_{count}": round(uvloop.run(rate(port, count, seconds)), 1) for count in streams}


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--streams", default="1,16,64")
    p.add_argument("--seconds", type=float, default=5.0)
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--tree", action="append", default=[], metavar="NAME=DIR", help="another tree to compare with")
    args = p.parse_args()
    trees = {THIS: ROOT}
    for given in args.tree:
        name, _, path = given.partition("=")
        trees[name] = Path(path).resolve()
    streams = [int(count) for count in args.streams.split(",")]
    samples: dict[str, dict[str, list[float]]] = {name: defaultdict(list) for name in trees}
    started = datetime.datetime.now(datetime.UTC)
    for _ in range(args.rounds):
        for name, tree in trees.items():
            for key, value in measured(tree, streams, args.seconds).items():
                samples[name][key].append(value)
    ratios = {
        f"{THIS}_over_{name}": {
            key: round(statistics.median(a / b for a, b in zip(samples[THIS][key], values, strict=True)), 3)
            for key, values in samples[name].items()
        }
        for name in trees
        if name != THIS
    }
    result = {
        "date": started.isoformat(timespec="seconds"),
        "command": "http_events.py " + shlex.join(sys.argv[1:]),
        "machine": f"{look().cpu_name}, Python {platform.python_version()}",
        "ratios": ratios,
        "events_per_second": samples,
    }
    path = HERE.parent / "results" / f"http-events-{started:%Y-%m-%d}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(samples), json.dumps(ratios), path, sep="\n")


if __name__ == "__main__":
    main()
