#!/usr/bin/env python3
"""Latencies while clients misbehave, as percentiles: of refusals, of chats, and of /health (the event loop's lag).

    .venv/bin/python loadtest/latency_under_attack.py [--seconds 10] [--out FILE] [-- SERVE ARGUMENTS]

Starts a server (the demo, unless arguments say otherwise) on a free port of loopback. The event loop's lag is the time
that /health takes beyond its median on the idle server. `make accept` runs this script; it asserts nothing.
"""

import argparse
import asyncio
import contextlib
import json
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from pathlib import Path
from typing import Any

import httpx

GUANACO = str(Path(sys.executable).parent / "guanaco")
NUM_LOOPS = 64
TEXT = "A legal text of 131 kB, as long as many clients would send. " * 2184
JSON = {"Content-Type": "application/json"}
CHAT = {"messages": [{"role": "user", "content": "How do I boil an egg?"}], "max_tokens": 16, "temperature": 0}


def bad_bodies(model: str) -> dict[str, tuple[str, bytes]]:
    """Name → (route, body). The bodies are about four megabytes, except that of the many choices."""
    head = {"model": model, **CHAT}
    parts = [{"role": "user", "content": [{"type": "text", "text": ""}] * 99_000}]
    choices = {"model": model, "prompt": ["a"] * 32, "n": 8, "logprobs": 5, "max_tokens": 16}
    bodies = {
        "300,000 keys": ("/v1/chat/completions", head | {"logit_bias": {str(i): 1 for i in range(300_000)}}),
        "1.9 million integers": ("/v1/completions", {"model": model, "prompt": [1] * 1_900_000}),
        "99,000 parts": ("/v1/chat/completions", head | {"messages": parts}),
        "4 MB of text": ("/tokenize", {"model": model, "prompt": "word " * 800_000}),
        "256 choices with log-probabilities": ("/v1/completions", choices),
    }
    return {name: (path, json.dumps(body, separators=(",", ":")).encode()) for name, (path, body) in bodies.items()}


def percentiles(seconds: list[float]) -> dict[str, float]:
    """Percentiles of times in seconds, as milliseconds, and the number of times."""
    ordered = sorted(seconds)
    if not ordered:
        return {"count": 0}
    at = {f"p{p}": ordered[min(len(ordered) - 1, len(ordered) * p // 100)] for p in (50, 90, 99)}
    return {"count": len(ordered)} | {
        name: round(1000 * value, 1) for name, value in (at | {"max": ordered[-1]}).items()
    }


async def repeat(work: Callable[[], Awaitable[None]], until: float) -> None:
    while time.monotonic() < until:
        await work()


async def timed(client: httpx.AsyncClient, into: list[float], method: str, path: str, **options: Any) -> int:
    began = time.perf_counter()
    with contextlib.suppress(httpx.HTTPError):
        response = await client.request(method, path, **options)
        into.append(time.perf_counter() - began)
        return response.status_code
    return 0


async def beside(
    client: httpx.AsyncClient, model: str, seconds: float, attack: Callable[[], Coroutine[Any, Any, None]], num: int
) -> dict[str, Any]:
    """The latencies of chats and of /health while `num` clients call `attack` in loops."""
    chats: list[float] = []
    health: list[float] = []
    until = time.monotonic() + seconds

    async def chat() -> None:
        await timed(client, chats, "POST", "/v1/chat/completions", json={"model": model, **CHAT})

    async def ping() -> None:
        await timed(client, health, "GET", "/health")
        await asyncio.sleep(0.01)

    await asyncio.gather(repeat(chat, until), repeat(ping, until), *(repeat(attack, until) for _ in range(num)))
    return {"chat_ms": percentiles(chats), "health_ms": percentiles(health)}


async def measure(url: str, seconds: float) -> dict[str, Any]:
    limits = httpx.Limits(max_connections=200)
    async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits) as client:
        model = (await client.get("/v1/models")).json()["data"][0]["id"]

        async def nothing() -> None:
            await asyncio.sleep(0.1)

        result: dict[str, Any] = {"idle": await beside(client, model, seconds, nothing, 0)}
        answered: list[float] = []
        refused: list[float] = []
        statuses: Counter[int] = Counter()
        body = json.dumps({"model": model, "prompt": TEXT[:131_000]}).encode()

        async def tokenize() -> None:
            took: list[float] = []
            status = await timed(client, took, "POST", "/tokenize", content=body, headers=JSON)
            statuses[status] += 1
            (refused if status == 429 else answered).extend(took)
            await asyncio.sleep(0.05 if status == 429 else 0)

        result[f"{NUM_LOOPS} /tokenize loops"] = await beside(client, model, seconds, tokenize, NUM_LOOPS) | {
            "refusal_ms": percentiles(refused),
            "answer_ms": percentiles(answered),
            "statuses": dict(statuses),
        }
        for name, (path, content) in bad_bodies(model).items():
            seen: Counter[int] = Counter()

            async def attack(path: str = path, content: bytes = content, seen: Counter[int] = seen) -> None:
                seen[await timed(client, [], "POST", path, content=content, headers=JSON)] += 1

            result[name] = await beside(client, model, seconds, attack, 1) | {"statuses": dict(seen)}
        return result


@contextlib.asynccontextmanager
async def server(arguments: list[str]) -> AsyncIterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen([GUANACO, "serve", "--port", str(port), *arguments], stdout=log, stderr=log)
        try:
            async with httpx.AsyncClient(base_url=url) as client:
                while True:
                    if process.poll() is not None:
                        log.seek(0)
                        raise SystemExit(f"the server did not start:\n{log.read().decode(errors='replace')}")
                    with contextlib.suppress(httpx.HTTPError):
                        if (await client.get("/health/ready")).status_code == 200:
                            break
                    await asyncio.sleep(0.2)
            yield url
        finally:
            process.terminate()
            process.wait(60)


async def run(seconds: float, arguments: list[str]) -> dict[str, Any]:
    async with server(arguments) as url:
        return await measure(url, seconds)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=10.0, help="for each kind of attack")
    parser.add_argument("--out", type=Path, help="write the result there, as JSON")
    parser.add_argument("serve", nargs="*", help="arguments of `guanaco serve`, after --")
    args = parser.parse_args()
    text = json.dumps(asyncio.run(run(args.seconds, args.serve)), indent=1)
    print(text)
    if args.out is not None:
        args.out.write_text(text + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
