"""The report of `guanaco bench serve` as one HTML file with pictures, without scripts and without links to other files.

The names of models come from the server, so they are escaped like every text.
"""

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

from guanaco.server.commands.bench.serving.client import Outcome
from guanaco.server.commands.bench.serving.metrics import METRICS, gaps, seconds_of, tokens_over_time
from guanaco.server.commands.bench.serving.runner import Run
from guanaco.server.commands.bench.serving.tables import count_rows, latency_rows, rate_words, sweep_row, warnings
from guanaco.server.reports.page import page, table
from guanaco.server.reports.plots import NUM_COLOURS, Axis, Curve, areas, axis_for, cumulative, curves

_SWEEP = ("requests/s", "answers/s", "output tokens/s", "refused", "cut off", "first token p50", "first token p99",
          "inter-token p99", "met goals", "")  # fmt: skip
_SHOWN_RUNS = 4  # runs drawn over time; if there are more, only the marked ones and the last
_PERCENTILES = (50.0, 99.0)

Results = Sequence[Mapping[str, Any]]


def html_report(results: Results, runs: Sequence[Run], marks: Mapping[int, str]) -> str:
    """The report of one run or of a sweep. marks: index of a run → a remark, such as that it is the knee."""
    first = results[0]
    return page(
        f"Load on {first['model_id']}",
        [
            f'<p class="conditions">{escape(_conditions(first))}</p>',
            *(f'<p class="words">{escape(words)}</p>' for words in _headline(results, marks)),
            *(f'<p class="warning">{escape(f"{rate_words(r)}: {w}")}</p>' for r in results for w in warnings(r)),
            *_sweep(results, marks),
            *_distributions(results, runs),
            *_lengths(results, marks),
            *_over_time(results, runs, marks),
            *_tables(results),
        ],
    )


def _conditions(result: Mapping[str, Any]) -> str:
    arrivals = "even gaps" if result["burstiness"] == float("inf") else f"burstiness {result['burstiness']:g}"
    return (
        f"{result['date']}, {result['num_prompts']} requests in the first run, prompts: {result['dataset']}, "
        f"{arrivals}, Zipf exponent {result['zipf']:g} over {len(result['models'])} models, seed {result['seed']}. "
        "Times count from when a request was due, so waiting for a server that stands still is in them."
    )


def _headline(results: Results, marks: Mapping[int, str]) -> Iterator[str]:
    asked = sum(r["num_prompts"] for r in results)
    whole, cut = sum(r["completed"] for r in results), sum(r["cut_off"] for r in results)
    yield f"{whole} of {asked} requests got a whole answer; {cut} answers were cut off."
    for at, words in sorted(marks.items()):
        result = results[at]
        speed = f"{result['request_throughput']:.2f} answers/s and {result['output_throughput']:.0f} tokens/s"
        if "knee" in words:
            yield f"The knee is at {rate_words(result)}: {speed}. Beyond it, further requests mostly wait."
        if "capacity" in words:
            goals = ", ".join(f"{name} {most:g} ms" for name, most in result["goodput"].items())
            yield f"The capacity is {rate_words(result)}: the highest of these rates at which 99 % met {goals}."


def _sweep(results: Results, marks: Mapping[int, str]) -> Iterator[str]:
    if len(results) < 2:
        return
    yield table("All rates (ms)", _SWEEP, [[*sweep_row(r), marks.get(i, "")] for i, r in enumerate(results)])
    drawn = [r for r in results if r["request_rate"] != "inf"]
    rates = [float(r["request_rate"]) for r in drawn]
    if len(drawn) < 2:
        return
    lines = [(float(results[at]["request_rate"]), words) for at, words in marks.items() if results[at] in drawn]
    x = axis_for("requests/s that were sent", rates)
    answered = [r["request_throughput"] for r in drawn]
    series: list[Curve] = [("sent", list(zip(rates, rates, strict=True))), ("answered", _points(rates, answered))]
    if drawn[0]["request_goodput"] is not None:
        series.append(("met all goals", _points(rates, [r["request_goodput"] for r in drawn])))
    y = axis_for("requests/s", [*rates, *answered])
    title = "Throughput against rate"
    yield _section(title, curves(series, x=x, y=y, title=title, dots=True, marks=lines))
    title = "Output tokens against rate"
    tokens = [r["output_throughput"] for r in drawn]
    yield _section(
        title, curves([("tokens/s", _points(rates, tokens))], x=x, y=axis_for("tokens/s", tokens), title=title,
                      dots=True, marks=lines),
    )  # fmt: skip
    title = "Latency against rate"
    keys = {"first token p50": "median_ttft_ms", "first token p99": "p99_ttft_ms", "inter-token p99": "p99_itl_ms"}
    found = {n: [(rate, r[k]) for rate, r in zip(rates, drawn, strict=True) if r.get(k)] for n, k in keys.items()}
    values = [v for points in found.values() for _, v in points]
    y = axis_for("milliseconds", values, log=True)
    yield _section(title, curves(list(found.items()), x=x, y=y, title=title, dots=True, marks=lines))


def _distributions(results: Results, runs: Sequence[Run]) -> Iterator[str]:
    for metric, title in (("ttft", "Time to the first token"), ("itl", "Time between two pieces of text")):
        series = []
        for result, run in zip(results, runs, strict=True):
            whole = [e for e in run.exchanges if e.outcome is Outcome.COMPLETED]
            found = [g for e in whole for g in gaps(e)] if metric == "itl" else [seconds_of(e, "ttft") for e in whole]
            if found:
                series.append((rate_words(result), cumulative([max(0.1, 1000 * s) for s in found])))
        if series:
            x = axis_for("milliseconds", [v for _, points in series for v, _ in points], log=True)
            y = Axis("percent at most that long", 0, 100)
            yield _section(title, curves(series, x=x, y=y, title=title))


def _lengths(results: Results, marks: Mapping[int, str]) -> Iterator[str]:
    """Figures by prompt length of the run at the knee, or else of the run with the most whole answers."""
    knee = next((results[at] for at, words in marks.items() if "knee" in words), None)
    best = knee or max(results, key=lambda r: r["completed"])
    rows = best["by_prompt_length"]
    if not rows:
        return
    if len(rows) > 1:
        x = axis_for("prompt tokens", [r["mean_prompt_tokens"] for r in rows], log=True)
        for title, keys in (
            ("First token by prompt length", {"p50": "median_ttft_ms", "p99": "p99_ttft_ms"}),
            ("Prompt tokens per second by prompt length", {"median, from due to first token": "prompt_tokens_per_s"}),
            ("Output tokens per second of one stream by prompt length", {"median": "tokens_per_s"}),
        ):
            series = [(n, [(r["mean_prompt_tokens"], r[k]) for r in rows if r.get(k)]) for n, k in keys.items()]
            values = [v for _, points in series for _, v in points]
            if values:
                y = axis_for("milliseconds" if "ttft" in str(keys) else "tokens/s", values)
                yield _section(f"{title} ({rate_words(best)})", curves(series, x=x, y=y, title=title, dots=True))
    heads = ("prompt tokens", "requests", "prompt tokens/s", "tokens/s of a stream", "first token p50", "p99",
             "inter-token p50", "p99")  # fmt: skip
    yield table(f"By prompt length ({rate_words(best)}; ms)", heads, [_length_row(row) for row in rows])


def _length_row(row: Mapping[str, Any]) -> list[str]:
    span = f"{row['from']} or more" if row["to"] is None else f"{row['from']} to {row['to']}"
    keys = ("median_ttft_ms", "p99_ttft_ms", "median_itl_ms", "p99_itl_ms")
    return [span, str(row["requests"]), *(_short(row.get(k)) for k in ("prompt_tokens_per_s", "tokens_per_s", *keys))]


def _over_time(results: Results, runs: Sequence[Run], marks: Mapping[int, str]) -> Iterator[str]:
    chosen = list(range(len(runs)))
    if len(runs) > _SHOWN_RUNS:
        chosen = sorted({*marks, len(runs) - 1})
    for at in chosen:
        xs, series = tokens_over_time(runs[at])
        if not any(any(values) for values in series.values()):
            continue
        shown = list(series.items())[: NUM_COLOURS - 1]
        if rest := list(series.items())[NUM_COLOURS - 1 :]:
            shown.append((f"{len(rest)} others", [sum(v[i] for _, v in rest) for i in range(len(xs))]))
        title = f"Models and adapters over time ({rate_words(results[at])})"
        x = Axis("seconds", 0.0, max(runs[at].duration, 1e-3))
        yield _section(title, areas(xs, shown, x=x, y_title="pieces of text per second", title=title))


def _tables(results: Results) -> Iterator[str]:
    for result in results:
        words = rate_words(result)
        yield table(f"Counts ({words})", ("", ""), count_rows(result))
        heads = ("latency (ms)", "mean", *(f"p{p:g}" for p in _PERCENTILES))
        yield table(f"Latencies ({words})", heads, latency_rows(result, METRICS, _PERCENTILES))
        rows = [
            [r["model"], str(r["requests"]), str(r["completed"]), str(r["output_tokens"]),
             *(_short(r.get(k)) for k in ("median_ttft_ms", "p99_ttft_ms", "median_itl_ms", "p99_itl_ms"))]
            for r in result["by_model"]
        ]  # fmt: skip
        heads = ("model", "requests", "completed", "tokens", "first token p50", "p99", "inter-token p50", "p99")
        yield table(f"By model ({words})", heads, rows)


def _points(xs: Sequence[float], ys: Sequence[float]) -> list[tuple[float, float]]:
    return list(zip(xs, ys, strict=True))


def _section(title: str, picture: str) -> str:
    return f"<h2>{escape(title)}</h2>{picture}"


def _short(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"
