#!/usr/bin/env python3
"""Measure through HTTP how speed depends on the number of registered adapters, and of different ones in a step.

    .venv/bin/python loadtest/bench/adapters_scaling.py prepare        # makes and loads them, once; takes minutes
    .venv/bin/python loadtest/bench/adapters_scaling.py measure        # then this, on a machine that does nothing else
    .venv/bin/python loadtest/bench/adapters_scaling.py plot RESULT.json

The model is the demo, with eight streams. For each rank `measure` starts a server with all prepared adapters, and
removes them in steps; `prepare` loads them again. Results go to loadtest/results, with a picture.
"""

import argparse
import asyncio
import datetime
import itertools
import json
import platform
import random
import re
import shlex
import shutil
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from http_vs_offline import GUANACO, HERE, stream

from guanaco.server.bootstrap.machine import look

sys.path.append(str(HERE.parents[1] / "tests" / "importable"))

ADMIN = {"Authorization": "Bearer scaling"}
STREAMS = 8
STEPS = 64
WORDS = 8  # words of a prompt, about 32 tokens
DISTINCT = (0, 1, 2, 4, 8)  # adapters in one step; 0: the base alone
MODULES = ("q_proj", "v_proj")  # all layers of both: what most adapters have


@contextmanager
def server(work: Path, rank: int, args: argparse.Namespace) -> Iterator[httpx.Client]:
    """Run a server with one rank's adapters. Yields a client with the admin key."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (work / "root").mkdir(parents=True, exist_ok=True)
    options = {"port": port, "admin-key": "scaling", "adapter-root": work / "root", "threads": args.threads}
    options |= {"adapter-store": work / f"rank{rank}", "adapter-host-memory": args.host_memory}
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    with (work / "server.log").open("wb") as log:
        process = subprocess.Popen([GUANACO, "serve", *words, *args.serve], stdout=log, stderr=log, cwd="/tmp")
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", headers=ADMIN, timeout=120) as client:
            for _ in range(3000):
                assert process.poll() is None, (work / "server.log").read_text()
                try:
                    if client.get("/health/ready").status_code == 200:
                        break
                except httpx.HTTPError:
                    time.sleep(0.1)
            yield client
    finally:
        process.terminate()
        process.wait(60)


def names(client: httpx.Client) -> list[str]:
    """The names of the prepared adapters that are ready, in order."""
    found = [card["name"] for card in client.get("/v1/adapters").json()["data"] if card["state"] == "ready"]
    return sorted(name for name in found if re.fullmatch(r"n\d+", name))


def prepare(args: argparse.Namespace) -> None:
    """For each rank, make and load the adapters that are missing up to the largest number in --counts."""
    import torch

    from support.adapters.tiny_adapters import make_adapter

    for rank in args.ranks:
        with server(args.work, rank, args) as client:
            targets = _targets(client)
            missing = {f"n{i:04}" for i in range(max(args.counts))} - set(names(client))
            started = time.perf_counter()
            for name in sorted(missing):
                source = args.work / "root" / "next"
                shutil.rmtree(source, ignore_errors=True)
                make_adapter(source, targets, rank, seed=int(name[1:]), dtype=torch.bfloat16, modules=MODULES)
                reply = client.put(f"/v1/adapters/{name}", json={"source": "next"})
                assert reply.status_code in (200, 201), reply.text
            print(f"rank {rank}: {len(missing)} loaded in {time.perf_counter() - started:.0f} s", flush=True)


def _targets(client: httpx.Client) -> dict[str, tuple[int, int]]:
    """Name → (rows, columns) of q and v in SmolLM2-135M: 30 layers, 9 query heads and 3 KV heads of size 64."""
    assert client.get("/v1/models").json()["data"][0]["id"] == "smollm2-135m-instruct"
    sizes = {"q_proj": (576, 576), "v_proj": (576, 192)}
    return {f"layers.{i}.self_attn.{name}": size for i in range(30) for name, size in sizes.items()}


_numbers = itertools.count(10_000)  # each prompt begins with a new number, so the prefix cache never helps


async def one_round(host: str, models: list[str]) -> tuple[float, list[float]]:
    """(tokens/s of all streams while all run, the streams' first-token times in seconds)."""
    started = time.perf_counter()
    runs = await asyncio.gather(*(stream(host, model, next(_numbers), WORDS, STEPS) for model in models))
    start, end = max(times[0] for times in runs), min(times[-1] for times in runs)
    rate = sum(start < t <= end for times in runs for t in times) / (end - start)
    return rate, [times[0] - started for times in runs]


def measure_cell(host: str, base: str, there: list[str], distinct: int, args: argparse.Namespace) -> dict[str, Any]:
    """Run eight streams over `distinct` adapters. Each round chooses them anew among all registered ones."""
    rng, rates, firsts = random.Random(distinct), [], []
    for _ in range(args.rounds):
        chosen = rng.sample(there, distinct) if distinct else [base]
        rate, first = asyncio.run(one_round(host, [chosen[i % len(chosen)] for i in range(STREAMS)]))
        rates.append(round(rate, 1))
        firsts += first
    return {
        "registered": len(there),
        "distinct": distinct,
        "tokens_per_second": rates,
        "first_token_seconds_median": round(statistics.median(firsts), 4),
        "first_token_seconds_max": round(max(firsts), 4),
    }


def solo_first_tokens(host: str, there: list[str], count: int = 16) -> dict[str, Any]:
    """First-token times of single requests on an idle server, each for a random adapter."""
    rng, seconds = random.Random(1), []
    for _ in range(count):
        started = time.perf_counter()
        times = asyncio.run(stream(host, rng.choice(there), next(_numbers), WORDS, 2))
        seconds.append(times[0] - started)
    return {
        "registered": len(there),
        "first_token_seconds_median": round(statistics.median(seconds), 4),
        "first_token_seconds_max": round(max(seconds), 4),
    }


def measure(args: argparse.Namespace) -> None:
    began = datetime.datetime.now(datetime.UTC)
    result: dict[str, Any] = {
        "date": began.isoformat(timespec="seconds"),
        "command": "adapters_scaling.py " + shlex.join(sys.argv[1:]),
        "machine": _machine(),
        "streams": STREAMS,
        "tokens_each": STEPS,
        "modules": MODULES,
        "ranks": {},
    }
    for rank in args.ranks:
        cells, solo = [], []
        with server(args.work, rank, args) as client:
            host = str(client.base_url).removeprefix("http://").rstrip("/")
            base = client.get("/v1/models").json()["data"][0]["id"]
            asyncio.run(one_round(host, [base] * STREAMS))  # not counted: the first requests are slower
            for count in sorted(args.counts, reverse=True):
                for name in names(client)[count:]:
                    assert client.delete(f"/v1/adapters/{name}").status_code == 200
                there = names(client)
                assert len(there) == count, f"{len(there)} of {count} are there: run prepare first"
                solo.append(solo_first_tokens(host, there))
                for distinct in (d for d in DISTINCT if d <= count):
                    cells.append(measure_cell(host, base, there, distinct, args))
                    print(rank, json.dumps(cells[-1]), flush=True)
                print(rank, "solo", json.dumps(solo[-1]), flush=True)
        result["ranks"][str(rank)] = {"eight_streams": cells, "one_request": solo}
    path = HERE.parent / "results" / f"adapters-scaling-{began:%Y-%m-%d}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(path)
    plot(path)


def _machine() -> str:
    return f"{look().cpu_name}, Python {platform.python_version()}"


def plot(path: Path) -> None:
    """Draw the picture of a result, as a PNG beside it."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    result = json.loads(path.read_text())
    figure, (by_count, by_step, first) = plt.subplots(1, 3, figsize=(12, 4), layout="constrained")
    colours = {0: "#555555", 1: "#1b7837", 8: "#c0392b"}
    result_ranks = list(result["ranks"])
    ranks = dict(zip(result_ranks, ("-", "--"), strict=False))
    largest = 0
    for rank, style in ranks.items():
        cells = result["ranks"][rank]["eight_streams"]
        largest = max(cell["registered"] for cell in cells)
        for distinct, colour in colours.items():
            chosen = sorted((c["registered"], c["tokens_per_second"]) for c in cells if c["distinct"] == distinct)
            if distinct == 0 and rank != result_ranks[0]:
                continue  # the base has no rank
            label = "base alone" if distinct == 0 else f"{distinct} per step, rank {rank}"
            _line(by_count, chosen, label, color=colour, linestyle=style)
        for count, colour in ((largest, "#1f77b4"), (8, "#ff7f0e")):
            chosen = sorted((c["distinct"], c["tokens_per_second"]) for c in cells if c["registered"] == count)
            _line(by_step, chosen, f"{count} registered, rank {rank}", color=colour, linestyle=style)
        single = result["ranks"][rank]["one_request"]
        _line(first, _first(single), f"rank {rank}, one request on an idle server", color="#1f77b4", linestyle=style)
    for axes, title, across in (
        (by_count, "tokens/s by adapters registered", "registered adapters"),
        (by_step, "tokens/s by different adapters in a step", "different adapters in a step (8 streams)"),
        (first, "first-token time by adapters registered", "registered adapters"),
    ):
        axes.set_title(title, fontsize=11)
        axes.set_xlabel(across)
        axes.set_ylim(0, 1.4 * axes.get_ylim()[1] if axes is first else None)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7.5, loc="lower left" if axes is not first else "upper left")
        if across == "registered adapters":
            axes.set_xscale("log", base=2)
            counts = sorted({c["registered"] for c in result["ranks"][rank]["eight_streams"]})
            axes.set_xticks(counts, [str(count) for count in counts])
            axes.minorticks_off()
        else:
            axes.set_xticks(DISTINCT, ["base", *map(str, DISTINCT[1:])])
    by_count.set_ylabel("tokens/s, eight streams together")
    first.set_ylabel("milliseconds, median")
    machine = result["machine"].split(",")[0]
    figure.suptitle(f"SmolLM2-135M in NF4, adapters on q and v of all layers: {machine}", fontsize=10)
    target = path.with_suffix(".png")
    figure.savefig(target, dpi=100)
    print(target)


def _first(cells: list[dict[str, Any]]) -> list[tuple[int, list[float]]]:
    """(registered adapters, [median milliseconds to the first token]) of each cell, in order."""
    return sorted((cell["registered"], [1000 * cell["first_token_seconds_median"]]) for cell in cells)


def _line(axes: Any, points: list[tuple[int, list[float]]], label: str, **style: Any) -> None:
    """Draw the medians as a line, with bars from the smallest to the largest value."""
    xs = [x for x, _ in points]
    middle = [statistics.median(values) for _, values in points]
    bars = [
        [m - min(values) for m, (_, values) in zip(middle, points, strict=True)],
        [max(values) - m for m, (_, values) in zip(middle, points, strict=True)],
    ]
    axes.errorbar(xs, middle, yerr=bars, label=label, marker="o", markersize=4, capsize=2, linewidth=1.4, **style)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("what", choices=("prepare", "measure", "plot"))
    p.add_argument("result", type=Path, nargs="?", help="of plot: the JSON file")
    p.add_argument("--work", type=Path, default=Path("/tmp/guanaco-scaling"), help="where the adapters are kept")
    p.add_argument("--counts", type=lambda text: [int(n) for n in text.split(",")], default=[1, 8, 64, 512])
    p.add_argument("--ranks", type=lambda text: [int(n) for n in text.split(",")], default=[8, 64])
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--host-memory", default="6GiB")
    p.add_argument("--serve", type=shlex.split, default=[], help="more flags for guanaco serve")
    args = p.parse_args()
    if args.what == "plot":
        plot(args.result)
    else:
        {"prepare": prepare, "measure": measure}[args.what](args)


if __name__ == "__main__":
    main()
