"""The rows about load: nothing is lost, mixed up or left behind, however much comes. Each returns a `Finding`.

`problems` is what must be empty on any machine. `times` are milliseconds, beside their targets: they say something only
on a machine that does nothing else.
"""

import asyncio
import threading
import time
from dataclasses import asdict, dataclass, field
from typing import Any

from guanaco.server.commands.bench.serving.arrivals import LINEAR, Ramp
from guanaco.server.commands.bench.serving.client import Outcome
from guanaco.server.commands.bench.serving.metrics import is_good, seconds_of, summarise
from guanaco.server.commands.bench.serving.runner import Run, run_load
from support.load.oracle import Oracle, get, outcomes, p99_ms

SLO = {"ttft": 1000.0, "itl": 250.0}


@dataclass
class Finding:
    """What a row's run showed."""

    row: str
    counts: dict[str, Any] = field(default_factory=dict)
    times: dict[str, float | None] = field(default_factory=dict)  # milliseconds, unless the name says otherwise
    targets: dict[str, float] = field(default_factory=dict)  # name of a time → the most it should be
    problems: list[str] = field(default_factory=list)

    def must(self, holds: object, problem: str) -> None:
        if not holds:
            self.problems.append(problem)

    @property
    def missed(self) -> list[str]:
        """Times beyond their targets."""
        return [
            f"{name}: {self.times[name]} > {most}"
            for name, most in self.targets.items()
            if (value := self.times.get(name)) is not None and value > most
        ]

    def told(self) -> dict[str, Any]:
        return {**asdict(self), "missed": self.missed}


def streams_at_once(
    *,
    streams: int = 1000,
    adapters: int = 64,
    slots: int = 8,
    tokens: int = 32,
    runs: int = 3,
    step_seconds: float = 0.01,
) -> Finding:
    """L1: so many streams opened within a second, over adapters by Zipf(1), with the caps set for it."""
    finding = Finding("L1", targets={"health p99": 250.0, "memory growth, MiB": 150.0})
    settings = {"max_num_seqs": 256, "max_queued_requests": streams, "max_connections": streams + 64}
    health: list[float] = []
    first: list[float] = []
    settings["max_queued_tokens"] = streams * 64
    with Oracle(adapters=adapters, slots=slots, step_seconds=step_seconds, settings=settings) as oracle:
        run_load(oracle.target(), oracle.plan(16, rate=100, tokens=4, seed=99), timeout=60)
        before = oracle.resident_mib()
        counts: dict[str, int] = {}
        for number in range(runs):
            plan = oracle.plan(streams, rate=streams, tokens=tokens, seed=number)
            run = run_load(oracle.target(), plan, timeout=120, watch=lambda: get(oracle.port, "/health/live"))
            counts = {k: counts.get(k, 0) + v for k, v in outcomes(run.exchanges).items()}
            health += [seconds for _, (seconds, _, _) in run.samples]
            first += [seconds_of(e, "ttft") for e in run.exchanges if e.outcome is Outcome.COMPLETED]
            finding.problems += oracle.wrong(plan, run.exchanges)[:5]
            finding.problems += sorted({e.error for e in run.exchanges if e.error})
            finding.must(all(status == 200 for _, (_, status, _) in run.samples), "/health/live was not 200")
        finding.must(counts == {"completed": streams * runs}, f"outcomes {counts}")
        finding.must(not any(_left(oracle).values()), f"left behind: {_left(oracle)}")
        finding.times = {
            "health p99": p99_ms(health),
            "memory growth, MiB": round(oracle.resident_mib() - before, 1),
            "first token p99": p99_ms(first),
        }
    finding.counts = {**counts, "tokens checked": streams * runs * tokens}
    return finding


def overload(
    *,
    seconds: float = 60.0,
    factor: float = 3.0,
    seqs: int = 8,
    step_seconds: float = 0.02,
    tokens: int = 16,
    queue_seconds: float = 0.125,
) -> Finding:
    """L4: an open loop at a multiple of the capacity. Accepted requests keep their goals; others are refused at once.

    The capacity is that of a closed loop with all places taken. The queue holds `queue_seconds` of the whole server's
    work. With eight adapters by Zipf that is a second for the most popular one, since adapters take turns.
    """
    finding = Finding("L4", targets={"refusal p99": 100.0})
    rough = seqs / step_seconds / tokens  # requests/s, if a step took its time alone
    settings = {
        "max_num_seqs": seqs,
        "max_queued_requests": max(2, int(rough * queue_seconds)),
        "max_queued_tokens": 1 << 20,
    }
    with Oracle(adapters=8, slots=8, step_seconds=step_seconds, settings=settings) as oracle:
        plan = oracle.plan(max(40, int(rough * min(5.0, seconds / 2))), rate=float("inf"), tokens=tokens, seed=1)
        closed = run_load(oracle.target(), plan, timeout=120, max_concurrency=seqs)
        finding.problems += oracle.wrong(plan, closed.exchanges)[:5]
        capacity = sum(e.outcome is Outcome.COMPLETED for e in closed.exchanges) / closed.duration
        plan = oracle.plan(int(seconds * factor * capacity), rate=factor * capacity, tokens=tokens, seed=2)
        run = run_load(oracle.target(), plan, timeout=120)
        finding.problems += oracle.wrong(plan, run.exchanges)[:5]
        _refusals(finding, run)
        finding.counts["capacity, requests/s"] = round(capacity, 2)
        finding.counts["share of capacity served"] = round(finding.counts["completed"] / run.duration / capacity, 3)
        after = oracle.plan(20, rate=capacity / 2, tokens=tokens, seed=3)
        calm = run_load(oracle.target(), after, timeout=60)
        finding.must(outcomes(calm.exchanges) == {"completed": 20}, f"afterwards: {outcomes(calm.exchanges)}")
        finding.must(not any(_left(oracle).values()), f"left behind: {_left(oracle)}")
    return finding


def _refusals(finding: Finding, run: Run) -> None:
    """Only whole answers, and 503 with Retry-After; the shares and times go into the finding."""
    told = summarise(run, percentiles=[50, 99], goals=SLO)
    whole = [e for e in run.exchanges if e.outcome is Outcome.COMPLETED]
    refused = [e for e in run.exchanges if e.outcome is Outcome.REFUSED]
    finding.counts = {**outcomes(run.exchanges), "statuses": sorted({e.status for e in run.exchanges})}
    finding.counts["accepted within the goals"] = round(sum(is_good(e, SLO) for e in whole) / max(1, len(whole)), 4)
    finding.must(told["cut_off"] == told["no_answer"] == 0, f"not whole and not refused: {told['error_counts']}")
    finding.must(all(e.status == 503 and e.retry_after for e in refused), "a refusal is no 503 with Retry-After")
    finding.must(refused, "nothing was refused")
    finding.times = {
        "refusal p50": round(told.get("median_refusal_ms", 0.0), 1),
        "refusal p99": round(told.get("p99_refusal_ms", 0.0), 1),
        "accepted first token p99": round(told.get("p99_ttft_ms", 0.0), 1),
        "accepted inter-token p99": round(told.get("p99_itl_ms", 0.0), 1),
        "client's lag p99": round(told.get("p99_send_lag_ms", 0.0), 1),
    }


def ramp_and_bursts(*, seconds: float = 60.0, seqs: int = 16, step_seconds: float = 0.02, tokens: int = 16) -> Finding:
    """L5: a ramp to one and a half of the capacity, then a step to three times of it, in bursts (CV 8)."""
    finding = Finding("L5")
    rough, cap = seqs / step_seconds / tokens, 32
    settings = {"max_num_seqs": seqs, "max_queued_requests": cap, "max_queued_tokens": 1 << 20}
    with Oracle(adapters=16, slots=8, step_seconds=step_seconds, settings=settings) as oracle:
        ramp = Ramp(LINEAR, 0.0, 1.5 * rough)
        waiting: list[float] = []
        total: dict[str, int] = {}
        plans = [
            oracle.plan(int(seconds * ramp.mean), rate=ramp.mean, tokens=tokens, ramp=ramp, seed=1),
            oracle.plan(int(seconds / 2 * 3 * rough), rate=3 * rough, tokens=tokens, burstiness=1 / 64, seed=2),
        ]
        for plan in plans:
            run = run_load(oracle.target(), plan, timeout=120, watch=lambda: get(oracle.port, "/metrics"))
            finding.problems += oracle.wrong(plan, run.exchanges)[:5]
            total = {k: total.get(k, 0) + v for k, v in outcomes(run.exchanges).items()}
            waiting += [_series(body, "vllm:num_requests_waiting") for _, (_, _, body) in run.samples]
        lost = total.get("cut_off", 0) + total.get("failed", 0)
        finding.must(lost == 0, f"lost: {total}")
        finding.must(max(waiting) <= cap, f"{max(waiting)} waited, the cap is {cap}")
        finding.must(not any(_left(oracle).values()), f"left behind: {_left(oracle)}")
    finding.counts = {**total, "most waiting": max(waiting), "cap": cap, "samples": len(waiting)}
    return finding


def cancellations(*, requests: int = 5000, rate: float = 100.0, tokens: int = 32) -> Finding:
    """L7: half of the clients leave in the middle; nothing of their requests stays."""
    finding = Finding("L7", targets={"quiet after, ms": 250.0})
    settings = {"max_num_seqs": 32, "max_queued_requests": requests, "max_queued_tokens": 1 << 24}
    with Oracle(adapters=16, slots=8, step_seconds=0.005, settings={**settings, "max_connections": 4096}) as oracle:
        run_load(oracle.target(), oracle.plan(64, rate=200, tokens=4, seed=9), timeout=60)
        before = oracle.until_quiet()
        plan = oracle.plan(requests, rate=rate, tokens=tokens, cancel_share=0.5)
        run = run_load(oracle.target(), plan, timeout=120)
        began = time.perf_counter()
        after = oracle.until_quiet()
        finding.times["quiet after, ms"] = round(1000 * (time.perf_counter() - began), 1)
        finding.problems += oracle.wrong(plan, run.exchanges)[:5]
        counts = outcomes(run.exchanges)
        finding.must(counts.keys() <= {"completed", "cancelled"}, f"outcomes {counts}")
        finding.must(counts.get("cancelled", 0) > requests // 4, f"outcomes {counts}")
        nothing_stays(finding, before, after)
    finding.counts = {**counts, "before": before, "after": after}
    return finding


def freeze(*, seconds: float = 2.0, rate: float = 50.0, before: float = 2.0, after: float = 2.0) -> Finding:
    """L9: the whole server process stands still. Every request that is due meanwhile has the waiting in its time."""
    finding = Finding("L9")
    settings = {"max_num_seqs": 64, "max_queued_requests": 1024, "max_queued_tokens": 1 << 20}
    with Oracle(adapters=2, slots=2, settings=settings) as oracle:
        run_load(oracle.target(), oracle.plan(8, rate=100, tokens=2, seed=9), timeout=60)
        plan = oracle.plan(int(rate * (before + seconds + after)), rate=rate, tokens=4, burstiness=float("inf"))
        stopping = oracle.freeze_after(before, seconds)
        run = run_load(oracle.target(), plan, timeout=60)
        stopping.join()
        finding.problems += oracle.wrong(plan, run.exchanges)[:5]
    counts = outcomes(run.exchanges)
    times = sorted(seconds_of(e, "ttft") for e in run.exchanges if e.outcome is Outcome.COMPLETED)
    late = [t for t in times if t > 0.05 * seconds]
    told = summarise(run, percentiles=[50, 99], goals={})
    finding.must(counts == {"completed": len(plan)}, f"outcomes {counts}")
    finding.must(told["p99_ttft_ms"] >= 950 * seconds, f"p99 {told['p99_ttft_ms']:.0f} ms: the freeze is not seen")
    finding.must(len(late) >= 0.95 * 0.95 * rate * seconds, f"only {len(late)} requests were late")
    finding.counts = {**counts, "late": len(late), "due while frozen": int(rate * seconds)}
    finding.times = {
        "first token p50": round(told["median_ttft_ms"], 1),
        "first token p99": round(told["p99_ttft_ms"], 1),
    }
    return finding


def idle_connections(*, idle: int = 2000, requests: int = 400, rate: float = 50.0, keep_alive: float = 5.0) -> Finding:
    """L3: connections that ask nothing cost the others nothing, and are closed when their time is over."""
    finding = Finding("L3")
    settings = {"max_num_seqs": 64, "max_connections": idle + 512, "header_timeout": keep_alive}
    with Oracle(
        adapters=8, slots=8, step_seconds=0.005, settings={**settings, "keep_alive_timeout": keep_alive}
    ) as oracle:
        run_load(oracle.target(), oracle.plan(32, rate=100, tokens=4, seed=9), timeout=60)
        plans = [oracle.plan(requests, rate=rate, tokens=8, seed=seed) for seed in (1, 2)]
        alone = run_load(oracle.target(), plans[0], timeout=60)

        async def hold() -> tuple[int, float]:
            """Open them all; how many the server closed, and how long the last one took."""
            pairs = await asyncio.gather(*(asyncio.open_connection("127.0.0.1", oracle.port) for _ in range(idle)))
            began = time.perf_counter()
            ends = await asyncio.gather(*(asyncio.wait_for(r.read(-1), keep_alive + 30) for r, _ in pairs))
            for _, writer in pairs:
                writer.close()
            return len(ends), time.perf_counter() - began

        results: list[tuple[int, float]] = []
        holder = threading.Thread(target=lambda: results.append(asyncio.run(hold())))
        holder.start()
        time.sleep(1.0)
        beside = run_load(oracle.target(), plans[1], timeout=60)
        holder.join(keep_alive + 60)
        for plan, run in zip(plans, (alone, beside), strict=True):
            finding.problems += oracle.wrong(plan, run.exchanges)[:5]
            finding.must(outcomes(run.exchanges) == {"completed": requests}, f"outcomes {outcomes(run.exchanges)}")
        finding.must(results and results[0][0] == idle, f"closed: {results}")
    p99 = [p99_ms([seconds_of(e, "ttft") for e in run.exchanges]) for run in (alone, beside)]
    finding.times = {"first token p99 alone": p99[0], "first token p99 beside": p99[1]}
    finding.targets = {"first token p99 beside": round(1.2 * p99[0], 1)}
    finding.counts = {"idle closed": results[0][0], "last closed after, s": round(results[0][1], 2)}
    return finding


def _left(oracle: Oracle) -> dict[str, int]:
    left = oracle.until_quiet()
    return {name: left[name] for name in ("sequences", "blocks", "admitted", "streams", "leases")}


def nothing_stays(finding: Finding, before: dict[str, int], after: dict[str, int]) -> None:
    """What requests held is free, and there are no more files and threads than a few of a pool's."""
    for name in ("sequences", "blocks", "admitted", "streams", "leases"):
        finding.must(after[name] == 0, f"{after[name]} {name} are left")
    finding.must(after["files"] <= before["files"] + 5, f"files: {before['files']} before, {after['files']} after")
    finding.must(after["threads"] <= before["threads"] + 4, f"threads: {before['threads']}, then {after['threads']}")


def _series(body: bytes, name: str) -> float:
    """The sum of a metric's samples."""
    lines = [line for line in body.decode().splitlines() if line.startswith((name + "{", name + " "))]
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines)
