#!/usr/bin/env python3
"""Measure how an open page slows a stream down: the stream's rate with no page open, and beside an open one.

    .venv/bin/python loadtest/bench/page_cost.py [--model DIR] [--streams 1] [--rounds 10] [--browser]

The server runs as a process of its own. In each round the same stream runs once with no page ("closed") and once while
this process sends what the page's Operate view sends, at its pace ("polled"). With --browser it also runs beside a
Chromium that shows Operate ("browser"): on one machine the browser's own work then takes part of the processor. The
order changes from round to round. The result is the median over the rounds of each round's ratio to "closed", with a
95 % interval by bootstrap. `seconds_of_polls` is measured without streams: the server's processor time for all polls of
a second. It bounds what they can take from the engine, and hardly depends on what else the machine does.
"""

import argparse
import asyncio
import contextlib
import datetime
import json
import platform
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from http_vs_offline import GUANACO, HERE, stream

KEY = "page-cost-admin-key"
# Path → seconds between two requests, as server/page/static has it for the view Operate with the admin key.
PACE = {
    "/metrics": 2.0,
    "/v1/adapters": 5.0,
    "/v1/aliases": 5.0,
    "/v1/fine_tuning/jobs?limit=50": 5.0,
    "/health/ready": 15.0,
    "/v1/models": 30.0,
}
WARM_UP_SECONDS = 2.0


@contextlib.contextmanager
def server(args: argparse.Namespace) -> Iterator[tuple[str, int]]:
    """Run a server. Yields (host:port, process id)."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [GUANACO, "serve", "--port", str(port), "--admin-key", KEY]
    command += ["--model", args.model] if args.model else []
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd="/tmp")
    try:
        while True:
            assert process.poll() is None, "the server ended"
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(f"http://127.0.0.1:{port}/health/ready", timeout=5).status_code == 200:
                    break
            time.sleep(0.1)
        yield f"127.0.0.1:{port}", process.pid
    finally:
        process.terminate()
        process.wait(60)


async def rate(host: str, model: str, args: argparse.Namespace) -> float:
    """Tokens per second of all streams together, while all of them run."""
    times = await asyncio.gather(*(stream(host, model, n + 1, steps=args.steps) for n in range(args.streams)))
    begin, end = max(t[0] for t in times), min(t[-1] for t in times)
    return sum(sum(begin < at <= end for at in t) for t in times) / (end - begin)


@contextlib.asynccontextmanager
async def polls(host: str) -> Any:
    """Send the page's requests at its pace during the `async with` block."""
    async with httpx.AsyncClient(base_url=f"http://{host}", headers={"Authorization": f"Bearer {KEY}"}) as client:

        async def ask(path: str, seconds: float) -> None:
            while True:
                (await client.get(path)).raise_for_status()
                await asyncio.sleep(seconds)

        tasks = [asyncio.create_task(ask(path, seconds)) for path, seconds in PACE.items()]
        try:
            yield
        finally:
            for task in tasks:
                assert not task.done(), task.exception()
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


@contextlib.asynccontextmanager
async def browser(host: str) -> Any:
    """Run a Chromium that shows Operate with the admin key during the `async with` block."""
    from playwright.async_api import async_playwright

    async with async_playwright() as playwright:
        chromium = await playwright.chromium.launch(executable_path="/usr/bin/chromium", args=["--no-sandbox"])
        page = await chromium.new_page()
        await page.add_init_script(f"sessionStorage.setItem('guanaco.adminKey', '{KEY}')")
        await page.goto(f"http://{host}/#/operate", wait_until="domcontentloaded")
        await page.locator("section[aria-labelledby=adapters] tbody tr").first.wait_for()
        try:
            yield
        finally:
            await chromium.close()


def processor_seconds(pid: int) -> float:
    """Processor time of all threads of a process so far."""
    return sum(int((task / "schedstat").read_text().split()[0]) for task in Path(f"/proc/{pid}/task").iterdir()) / 1e9


async def seconds_of_polls(host: str, pid: int, repeats: int = 100) -> tuple[float, dict[str, float]]:
    """(the server's processor seconds for all polls of a second, path → milliseconds of one poll), without streams."""
    spent = {}
    async with httpx.AsyncClient(base_url=f"http://{host}", headers={"Authorization": f"Bearer {KEY}"}) as client:
        for path in PACE:
            begin = processor_seconds(pid)
            for _ in range(repeats):
                (await client.get(path)).raise_for_status()
            spent[path] = (processor_seconds(pid) - begin) / repeats
    return sum(spent[path] / PACE[path] for path in PACE), {path: round(1000 * s, 3) for path, s in spent.items()}


async def measure(host: str, pid: int, args: argparse.Namespace) -> dict[str, Any]:
    model = httpx.get(f"http://{host}/v1/models").json()["data"][0]["id"]
    kinds = {"closed": None, "polled": polls, **({"browser": browser} if args.browser else {})}
    await rate(host, model, args)  # warm
    rates: dict[str, list[float]] = {kind: [] for kind in kinds}
    for number in range(args.rounds):
        names = list(kinds)
        for kind in names[number % len(names) :] + names[: number % len(names)]:
            opened = kinds[kind]
            async with contextlib.AsyncExitStack() as stack:
                if opened is not None:
                    await stack.enter_async_context(opened(host))
                await asyncio.sleep(WARM_UP_SECONDS)
                rates[kind].append(await rate(host, model, args))
        print(number + 1, {kind: round(of[-1], 2) for kind, of in rates.items()}, file=sys.stderr, flush=True)
    share, each = await seconds_of_polls(host, pid)
    rng = np.random.default_rng(0)
    told: dict[str, Any] = {"model": model, "seconds_of_polls": round(share, 6), "milliseconds_of_each_poll": each}
    for kind, of in rates.items():
        told[kind] = {"tokens_per_second": round(float(np.median(of)), 2), "all": [round(x, 2) for x in of]}
        if kind != "closed":
            ratios = np.array(of) / np.array(rates["closed"])
            drawn = np.median(rng.choice(ratios, (4000, len(ratios))), axis=1)
            told[kind]["of_closed"] = round(float(np.median(ratios)), 4)
            told[kind]["interval"] = [round(float(x), 4) for x in np.quantile(drawn, [0.025, 0.975])]
    return told


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="", help="a directory; none: the demo model")
    parser.add_argument("--streams", type=int, default=1)
    parser.add_argument("--steps", type=int, default=400, help="tokens of each stream")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--browser", action="store_true", help="measure beside a Chromium, too")
    args = parser.parse_args()
    with server(args) as (host, pid):
        told = asyncio.run(measure(host, pid, args))
    told |= {
        "command": shlex.join(["loadtest/bench/page_cost.py", *sys.argv[1:]]), "python": platform.python_version(),
        "machine": platform.processor() or platform.machine(), "date": datetime.date.today().isoformat(),
    }  # fmt: skip
    out = Path(HERE).parent / "results" / f"page-cost-{told['date']}.json"
    out.write_text(json.dumps(told, indent=1) + "\n")
    print(json.dumps(told))


if __name__ == "__main__":
    main()
