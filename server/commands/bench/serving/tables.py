"""The result of a run as tables on the terminal."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

METRIC_TITLES = {
    "ttft": "time to first token",
    "tpot": "time per output token",
    "itl": "inter-token latency",
    "e2el": "end-to-end latency",
}
BUSY_CLIENT = 0.8  # share of a core; above it the client itself may be the bottleneck
LATE_SENDING_MS = 50.0


def print_run(
    console: Console, result: Mapping[str, Any], metrics: Sequence[str], percentiles: Sequence[float]
) -> None:
    """Print counts, throughput and latencies of one run, then warnings about the figures."""
    console.print(
        f"[bold]{escape(rate_words(result))}[/], {result['num_prompts']} requests to {escape(str(result['model_id']))}"
    )
    counts = Table(box=None, show_header=False, pad_edge=False)
    for name, value in count_rows(result):
        counts.add_row(name, value)
    console.print(counts)
    latencies = Table("latency (ms)", "mean", *(f"p{p:g}" for p in percentiles), box=None, pad_edge=False)
    for row in latency_rows(result, metrics, percentiles):
        latencies.add_row(*row)
    console.print(latencies)
    for warning in warnings(result):
        console.print(f"[yellow]{escape(warning)}[/]")


def print_sweep(console: Console, results: Sequence[Mapping[str, Any]], marks: Mapping[int, str]) -> None:
    """Print one row for each rate. marks: row → a remark, such as that it is the knee."""
    heads = ("rate", "answers/s", "tokens/s", "refused", "cut", "ttft p50", "ttft p99", "itl p99", "good", "")
    table = Table(*heads, box=None, pad_edge=False)
    for i, result in enumerate(results):
        table.add_row(*sweep_row(result), marks.get(i, ""))
    console.print(table)


def sweep_row(result: Mapping[str, Any]) -> list[str]:
    """The cells of a rate's row, without the mark."""
    good = result.get("goodput_share")
    return [
        f"{float(result['request_rate']):g}",
        f"{result['request_throughput']:.2f}",
        f"{result['output_throughput']:.1f}",
        str(result["refused"]),
        str(result["cut_off"]),
        *(_ms(result.get(key)) for key in ("median_ttft_ms", "p99_ttft_ms", "p99_itl_ms")),
        "" if good is None else f"{100 * good:.1f} %",
    ]


def rate_words(result: Mapping[str, Any]) -> str:
    """The run's rate in words."""
    if result.get("ramp_up_strategy"):
        start, end = result["ramp_up_start_rps"], result["ramp_up_end_rps"]
        return f"{start:g} to {end:g} requests/s ({result['ramp_up_strategy']})"
    if result.get("self_timed"):
        return "At the times in the data"
    return "All at once" if result["request_rate"] == "inf" else f"{float(result['request_rate']):g} requests/s"


def count_rows(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(name, value) of the counts and the throughput."""
    errors = ", ".join(f"{name} {count}" for name, count in result["error_counts"].items())
    rows = [
        ("completed", str(result["completed"])),
        ("refused (429, 503, 529)", str(result["refused"])),
        ("cut off", str(result["cut_off"])),
        ("no answer", str(result["no_answer"])),
        *([("cancelled by us", str(result["cancelled"]))] if result["cancelled"] else []),
        *([("errors", errors)] if errors else []),
        ("duration", f"{result['duration']:.2f} s"),
        ("answers", f"{result['request_throughput']:.2f} /s"),
        ("output tokens", f"{result['total_output_tokens']}, {result['output_throughput']:.1f} /s"),
        ("prompt tokens", f"{result['total_input_tokens']}, {result['total_cached_tokens']} of them cached"),
        ("most requests at once", str(result["max_concurrent_requests"])),
    ]
    if result["goodput_share"] is not None:
        goals = ", ".join(f"{name} {most:g} ms" for name, most in result["goodput"].items())
        share = f"{result['request_goodput']:.2f} /s, {100 * result['goodput_share']:.1f} % of the requests"
        rows.append((f"goodput ({goals})", share))
    if "median_refusal_ms" in result:
        rows.append(
            ("refusal (ms), p50 and p99", f"{_ms(result['median_refusal_ms'])}, {_ms(result['p99_refusal_ms'])}")
        )
    return rows


def latency_rows(result: Mapping[str, Any], metrics: Sequence[str], percentiles: Sequence[float]) -> list[list[str]]:
    """A row for each metric: its name, its mean, its percentiles."""
    return [
        [
            f"{METRIC_TITLES[m]} ({m})",
            *(_ms(result.get(key)) for key in (f"mean_{m}_ms", *(f"p{p:g}_{m}_ms" for p in percentiles))),
        ]
        for m in metrics
    ]


def warnings(result: Mapping[str, Any]) -> list[str]:
    """Reasons why the figures may be wrong."""
    found = []
    if result["client_cpu_share"] > BUSY_CLIENT and result["duration"] > 1:
        share = f"{100 * result['client_cpu_share']:.0f} %"
        found.append(f"This client used {share} of a core: the latencies may be its own. Ask less, or use two clients.")
    late = result.get("p99_send_lag_ms")
    if late is not None and late > LATE_SENDING_MS and not result["max_concurrency"]:
        found.append(f"1 % of the requests were sent {late:.0f} ms late or later: this client had no time for them.")
    if result["total_input_tokens"] and result["total_cached_tokens"] > 0.25 * result["total_input_tokens"]:
        found.append("The server had part of the prompts in its prefix cache: another --seed or data asks new ones.")
    if result["refused_without_retry_after"]:
        found.append(f"{result['refused_without_retry_after']} refusals did not say Retry-After.")
    return found


def _ms(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"
