#!/usr/bin/env python3
"""Compare the first-token times of other adapters while one adapter is flooded with those on an idle server.

Also measures the flood's tokens per second, alone and beside the others.

    .venv/bin/python loadtest/bench/adapters_scaling.py prepare --counts 8 --ranks 8      # once
    .venv/bin/python loadtest/bench/adapters_flood.py [--flood 64] [--serve "--max-num-seqs 16"]

The model is the demo. `--flood` clients ask one adapter, each again as soon as its last answer ends. Meanwhile single
requests for the seven other adapters come one at a time, at random moments. Results go to loadtest/results.
"""

import argparse
import asyncio
import contextlib
import datetime
import json
import random
import re
import shlex
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import httpx
from adapters_scaling import HERE, _machine, names, server
from http_vs_offline import stream


async def flood(host: str, model: str, number: int, args: argparse.Namespace) -> None:
    """One of the flood's clients, until it is cancelled."""
    turn = 0
    while True:
        turn += 1
        await stream(host, model, 10_000 + 1000 * number + turn % 1000, args.words, args.steps)


async def first_tokens(host: str, models: list[str], args: argparse.Namespace, seed: int) -> list[float]:
    """First-token seconds of single requests, one after the other, for each of `models` in turn."""
    rng, seconds = random.Random(seed), []
    for number in range(args.requests):
        await asyncio.sleep(rng.random() * 0.3)
        started = time.perf_counter()
        times = await stream(host, models[number % len(models)], 1000 * seed + number, args.words, 8)
        seconds.append(times[0] - started)
    return seconds


def counted(client: httpx.Client, adapter: str) -> tuple[float, int, int]:
    """(seconds, prompt tokens, generated tokens) of an adapter so far, by the server's metrics."""
    text = client.get("/metrics").text
    found = [
        int(float(re.findall(rf'^guanaco_adapter_{kind}_tokens_total{{adapter="{adapter}"}} (\S+)', text, re.M)[0]))
        for kind in ("prompt", "generation")
    ]
    return time.perf_counter(), found[0], found[1]


def rates(before: tuple[float, int, int], after: tuple[float, int, int]) -> dict[str, float]:
    """Tokens per second between two results of `counted`."""
    seconds = after[0] - before[0]
    return {
        "prompt": round((after[1] - before[1]) / seconds, 1),
        "generated": round((after[2] - before[2]) / seconds, 1),
    }


async def under_flood(
    client: httpx.Client, host: str, victim: str, others: list[str], args: argparse.Namespace
) -> tuple[list[float], dict[str, Any]]:
    """(first-token seconds of the others, the flood's rates alone and beside the others)."""
    clients = [asyncio.create_task(flood(host, victim, number, args)) for number in range(args.flood)]
    try:
        await asyncio.sleep(args.warm_up)
        moments = [await asyncio.to_thread(counted, client, victim)]
        await asyncio.sleep(args.alone)
        moments.append(await asyncio.to_thread(counted, client, victim))
        assert not any(task.done() for task in clients), "the flood broke off"
        seconds = await first_tokens(host, others, args, 7)
        moments.append(await asyncio.to_thread(counted, client, victim))
        return seconds, {"alone": rates(*moments[:2]), "beside_the_others": rates(*moments[1:])}
    finally:
        for task in clients:
            task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.gather(*clients, return_exceptions=True)


def summary(seconds: list[float]) -> dict[str, float]:
    ordered = sorted(seconds)
    return {
        "median": round(statistics.median(ordered), 4),
        "p90": round(ordered[int(0.9 * (len(ordered) - 1))], 4),
        "max": round(ordered[-1], 4),
    }


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--work", type=Path, default=Path("/tmp/guanaco-scaling"), help="as prepared by adapters_scaling.py")
    p.add_argument("--rank", type=int, default=8)
    p.add_argument("--flood", type=int, default=64, help="streams that ask one adapter at the same time")
    p.add_argument("--requests", type=int, default=28, help="of the others")
    p.add_argument("--words", type=int, default=8, help="of a prompt; about four tokens each")
    p.add_argument("--steps", type=int, default=64, help="tokens of each answer of the flood")
    p.add_argument("--warm-up", type=float, default=6.0, help="seconds of flood before it is measured")
    p.add_argument("--alone", type=float, default=15.0, help="seconds of flood before the first of the others")
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--host-memory", default="6GiB")
    p.add_argument("--serve", type=shlex.split, default=[], help="more flags for guanaco serve")
    p.add_argument("--out", type=Path, default=HERE.parent / "results")
    args = p.parse_args()
    began = datetime.datetime.now(datetime.UTC)
    with server(args.work, args.rank, args) as client:
        host = str(client.base_url).removeprefix("http://").rstrip("/")
        victim, *others = names(client)[:8]
        assert others, "run prepare first: measure removes most of them"
        asyncio.run(first_tokens(host, others, args, 3))  # not counted: the first requests are slower
        solo = asyncio.run(first_tokens(host, others, args, 5))
        flooded, flood_rates = asyncio.run(under_flood(client, host, victim, others, args))
    alone, among = summary(solo), summary(flooded)
    result: dict[str, Any] = {
        "date": began.isoformat(timespec="seconds"),
        "command": "adapters_flood.py " + shlex.join(sys.argv[1:]),
        "machine": _machine(),
        "first_token_seconds": {"solo": alone, "under_flood": among},
        "ratio": {key: round(among[key] / alone[key], 2) for key in alone},
        "flood_tokens_per_second": flood_rates,
        "samples": {"solo": [round(s, 4) for s in solo], "under_flood": [round(s, 4) for s in flooded]},
    }
    path = args.out / f"adapters-flood-{args.flood}-{began:%Y-%m-%d}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(
        path,
        *(json.dumps(result[key]) for key in ("first_token_seconds", "ratio", "flood_tokens_per_second")),
        sep="\n",
    )


if __name__ == "__main__":
    main()
