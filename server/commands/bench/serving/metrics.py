"""The result of a run, under the names of `vllm bench serve` where the meaning is the same.

`ttft` is the time to the first piece of text, `tpot` the mean time of each further token, `itl` the gap between two
pieces, `e2el` the time to the end of the answer; all in milliseconds, and counted from when the request was due. For a
goal, `itl` of one request is the 99th percentile of its gaps.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from guanaco.server.commands.bench.serving.client import Exchange, Outcome
from guanaco.server.commands.bench.serving.runner import Run

METRICS = ("ttft", "tpot", "itl", "e2el")
_LENGTHS = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768)
_BUCKETS_OVER_TIME = 60


def gaps(exchange: Exchange) -> list[float]:
    """Seconds between the pieces of an answer."""
    return [b - a for a, b in zip(exchange.pieces, exchange.pieces[1:], strict=False)]


def seconds_of(exchange: Exchange, metric: str) -> float:
    """A metric of a whole answer in seconds; 0 if the answer has none, such as gaps in an answer of one piece."""
    first = exchange.first
    assert first is not None, "only whole answers have latencies"
    if metric == "ttft":
        return first - exchange.due
    if metric == "e2el":
        return exchange.ended - exchange.due
    if metric == "tpot":
        return (exchange.ended - first) / (exchange.output_tokens - 1) if exchange.output_tokens > 1 else 0.0
    between = gaps(exchange)
    return float(np.percentile(between, 99)) if between else 0.0


def is_good(exchange: Exchange, goals: Mapping[str, float]) -> bool:
    """Whether an answer is whole and meets every goal (milliseconds)."""
    return exchange.outcome is Outcome.COMPLETED and all(
        1000 * seconds_of(exchange, name) <= most for name, most in goals.items()
    )


def summarise(run: Run, *, percentiles: Sequence[float], goals: Mapping[str, float]) -> dict[str, Any]:
    """All figures of a run."""
    whole = [e for e in run.exchanges if e.outcome is Outcome.COMPLETED]
    counts = Counter(e.outcome for e in run.exchanges)
    asked = len(run.exchanges) - counts[Outcome.CANCELLED]
    good = sum(is_good(e, goals) for e in whole)
    seconds = run.duration or math.inf
    num_input = sum(e.prompt_tokens or 0 for e in whole)
    num_output = sum(e.output_tokens for e in whole)
    refused = [e for e in run.exchanges if e.outcome is Outcome.REFUSED]
    return {
        "duration": run.duration,
        "completed": len(whole),
        "failed": asked - len(whole),
        "refused": len(refused),
        "cut_off": counts[Outcome.CUT_OFF],
        "no_answer": counts[Outcome.FAILED],
        "cancelled": counts[Outcome.CANCELLED],
        "error_counts": dict(Counter(e.error for e in run.exchanges if e.error).most_common()),
        "refused_without_retry_after": sum(not e.retry_after for e in refused),
        "total_input_tokens": num_input,
        "total_cached_tokens": sum(e.cached_tokens or 0 for e in whole),
        "total_output_tokens": num_output,
        "request_throughput": len(whole) / seconds,
        "request_goodput": good / seconds if goals else None,
        "goodput_share": good / asked if goals and asked else None,
        "goodput_share_of_accepted": good / (asked - len(refused)) if goals and asked > len(refused) else None,
        "output_throughput": num_output / seconds,
        "total_token_throughput": (num_input + num_output) / seconds,
        "max_output_tokens_per_s": _most_tokens_in_a_second(whole),
        "max_concurrent_requests": _most_at_once(run.exchanges),
        **latencies(whole, METRICS, percentiles),
        **_spread("refusal", [e.ended - e.due for e in refused], percentiles),
        **_spread("send_lag", [e.sent - e.due for e in run.exchanges if e.sent is not None], percentiles),
        "client_cpu_share": run.client_cpu,
        "latencies_count_from": "when the request was due",
    }


def latencies(whole: Sequence[Exchange], metrics: Sequence[str], percentiles: Sequence[float]) -> dict[str, float]:
    """Mean, median, standard deviation and percentiles of each metric over whole answers, in milliseconds."""
    found: dict[str, float] = {}
    for metric in metrics:
        if metric == "itl":
            values = [gap for e in whole for gap in gaps(e)]
        else:
            values = [seconds_of(e, metric) for e in whole if metric != "tpot" or e.output_tokens > 1]
        found |= _spread(metric, values, percentiles)
    return found


def _spread(name: str, seconds: Sequence[float], percentiles: Sequence[float]) -> dict[str, float]:
    if not seconds:
        return {}
    values = 1000 * np.asarray(seconds)
    return {
        f"mean_{name}_ms": float(values.mean()),
        f"median_{name}_ms": float(np.median(values)),
        f"std_{name}_ms": float(values.std()),
        **{f"p{p:g}_{name}_ms": float(np.percentile(values, p)) for p in percentiles},
    }


def details(run: Run) -> dict[str, list[Any]]:
    """The lists that --save-detailed adds to the JSON file, each with one entry per request. Times are in seconds."""
    rows = run.exchanges
    return {
        "input_lens": [e.prompt_tokens or 0 for e in rows],
        "output_lens": [e.output_tokens if e.outcome is Outcome.COMPLETED else 0 for e in rows],
        "ttfts": [0.0 if e.first is None else e.first - e.due for e in rows],
        "itls": [gaps(e) for e in rows],
        "latencies": [e.ended - e.due for e in rows],
        "start_times": [e.due for e in rows],
        "queue_times": [0.0 if e.sent is None else e.sent - e.due for e in rows],
        "generated_texts": [e.text for e in rows],
        "errors": [e.error for e in rows],
        "models": [e.model for e in rows],
        "outcomes": [str(e.outcome) for e in rows],
    }


def by_model(run: Run, percentiles: Sequence[float]) -> list[dict[str, Any]]:
    """A row for each model, most asked first."""
    asked = Counter(e.model for e in run.exchanges)
    rows = []
    for model, count in asked.most_common():
        whole = [e for e in run.exchanges if e.model == model and e.outcome is Outcome.COMPLETED]
        tokens = sum(e.output_tokens for e in whole)
        rows.append(
            {"model": model, "requests": count, "completed": len(whole), "output_tokens": tokens}
            | latencies(whole, ("ttft", "itl"), percentiles)
        )
    return rows


def by_prompt_length(run: Run, percentiles: Sequence[float]) -> list[dict[str, Any]]:
    """A row for each range of prompt lengths in tokens that has whole answers, shortest first.

    `prompt_tokens_per_s`: the median over the answers of prompt tokens divided by the time to the first piece.
    `tokens_per_s`: the median of an answer's further tokens divided by their time.
    """
    whole = [e for e in run.exchanges if e.outcome is Outcome.COMPLETED and e.prompt_tokens]
    rows, low = [], 1
    for high in (*_LENGTHS, math.inf):
        found = [e for e in whole if low <= (e.prompt_tokens or 0) <= high]
        if found:
            speeds = [seconds_of(e, "tpot") for e in found if seconds_of(e, "tpot") > 0]
            firsts = [(e.prompt_tokens or 0) / max(1e-6, seconds_of(e, "ttft")) for e in found]
            row: dict[str, Any] = {
                "from": low,
                "to": None if math.isinf(high) else int(high),
                "requests": len(found),
                "mean_prompt_tokens": float(np.mean([e.prompt_tokens or 0 for e in found])),
                "prompt_tokens_per_s": float(np.median(firsts)),
                "tokens_per_s": 1 / float(np.median(speeds)) if speeds else None,
            }
            rows.append(row | latencies(found, ("ttft", "itl"), percentiles))
        low = int(high) + 1 if not math.isinf(high) else low
    return rows


def tokens_over_time(run: Run) -> tuple[list[float], dict[str, list[float]]]:
    """(middles of the stretches of time in seconds, model → pieces of text per second in each stretch).

    The models are in the order of their numbers of requests, the largest first.
    """
    width = max(run.duration, 1e-3) / _BUCKETS_OVER_TIME
    edges = np.arange(_BUCKETS_OVER_TIME + 1) * width
    series = {}
    for model, _ in Counter(e.model for e in run.exchanges).most_common():
        times = [t for e in run.exchanges if e.model == model for t in e.pieces]
        series[model] = [float(n) / width for n in np.histogram(times, edges)[0]]
    return [float(t) for t in (edges[:-1] + edges[1:]) / 2], series


def knee(results: Sequence[Mapping[str, Any]]) -> int | None:
    """Index of the run with the highest quotient of requests/s and mean latency (Kleinrock's power).

    At lower rates the server has room for more; at higher rates further requests mostly wait. None for fewer than three
    runs, or if no run has a whole answer.
    """
    powers = [r["request_throughput"] / r["mean_e2el_ms"] if r.get("mean_e2el_ms") else 0.0 for r in results]
    return int(np.argmax(powers)) if len(powers) > 2 and max(powers) > 0 else None


def capacity(results: Sequence[Mapping[str, Any]], share: float = 0.99) -> int | None:
    """Index of the run with the highest rate at which at least `share` of the requests met the goals."""
    found = [i for i, r in enumerate(results) if r.get("goodput_share") is not None and r["goodput_share"] >= share]
    return max(found, key=lambda i: float(results[i]["request_rate"]), default=None)  # it may be the text "inf"


def _most_tokens_in_a_second(whole: Sequence[Exchange]) -> float:
    """Most tokens in one second of the run. Each answer's tokens are spread evenly over its pieces, since a piece may
    hold several; the tokens of an answer without text count at its end."""
    tokens: dict[int, float] = {}
    for e in whole:
        times = e.pieces or [e.ended]
        for t in times:
            tokens[int(t)] = tokens.get(int(t), 0.0) + e.output_tokens / len(times)
    return max(tokens.values(), default=0.0)


def _most_at_once(exchanges: Sequence[Exchange]) -> int:
    """Most requests in flight at one time. A request that ends at the moment another begins is not counted with it."""
    events = sorted((t, step) for e in exchanges if e.sent is not None for t, step in ((e.sent, 1), (e.ended, -1)))
    now = most = 0
    for _, step in events:
        now += step
        most = max(most, now)
    return most
