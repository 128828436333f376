"""Guanaco's Grafana dashboard: the list of its panels, and a command that writes Grafana's JSON from the list.

    python docker/monitoring/dashboard.py     # writes grafana/dashboards/guanaco.json beside this file

Imports nothing of the server. `tests/monitoring/test_dashboard.py` compares the JSON with this file, and every
expression with the server's metrics.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

JSON_FILE = Path(__file__).parent / "grafana/dashboards/guanaco.json"
DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
COLUMNS = 24  # of Grafana's grid
STAT_SIZE, GRAPH_SIZE = (4, 4), (8, 8)  # (columns, rows of the grid)


@dataclass(frozen=True)
class Panel:
    """One panel. `lines`: legend → PromQL, in the short form that `expression` completes."""

    title: str
    unit: str  # Grafana's name of the unit
    lines: dict[str, str]
    about: str
    stacked: bool = False
    most: float | None = None  # upper end of the axis; None: Grafana chooses
    is_stat: bool = False  # shows the last value as a number, no graph


@dataclass(frozen=True)
class Row:
    title: str
    panels: tuple[Panel, ...]


def expression(short: str) -> str:
    """The PromQL of a line: `{I` becomes a filter by the chosen instances, and `[R]` the range of a rate."""
    return short.replace("{I", '{instance=~"$instance"').replace("[R]", "[$__rate_interval]")


def _percentiles(series: str, *, labels: str = "", of: Sequence[float] = (0.5, 0.9, 0.99)) -> dict[str, str]:
    by = f"le, {labels}" if labels else "le"
    suffix = f" {{{{{labels}}}}}" if labels else ""
    buckets = f"sum by ({by}) (rate({series}_bucket{{I}}[R]))"
    return {f"p{quantile * 100:.0f}{suffix}": f"histogram_quantile({quantile}, {buckets})" for quantile in of}


def _share(part: str, whole: str) -> str:
    return f"sum(rate({part}{{I}}[R])) / sum(rate({whole}{{I}}[R]))"


def _number(title: str, unit: str, short: str, about: str) -> Panel:
    """A panel that shows the last value of one expression."""
    return Panel(title, unit, {"": short}, about, is_stat=True)


_FIRING = 'count(ALERTS{alertname=~"Guanaco.*", alertstate="firing"}) or vector(0)'
_FIRST_P90 = _percentiles("vllm:time_to_first_token_seconds", of=(0.9,))["p90"]
_NEXT_P90 = _percentiles("vllm:inter_token_latency_seconds", of=(0.9,))["p90"]
NOW = Row(
    "Now",
    (
        _number("Alerts", "short", _FIRING, "Alerts of alerts.yml that fire."),
        _number("Servers", "short", "count(vllm:num_requests_running{I})", "Servers that answer."),
        _number("Requests", "reqps", "sum(rate(vllm:request_success_total{I}[R]))", "Requests that ended, in any way."),
        _number("Tokens out", "short", "sum(rate(vllm:generation_tokens_total{I}[R]))", "Per second."),
        _number("First token, p90", "s", _FIRST_P90, "Nine of ten requests had their first token within this time."),
        _number("Next token, p90", "s", _NEXT_P90, "Nine of ten tokens came within this time after the previous one."),
    ),
)

TRAFFIC = Row(
    "Traffic",
    (
        Panel(
            "Requests by adapter",
            "reqps",
            {"{{adapter}}": "sum by (adapter) (rate(guanaco_adapter_requests_total{I}[R]))"},
            "(base): without an adapter; (mixture): several at once; (other): names beyond --metrics-adapters.",
            stacked=True,
        ),
        Panel(
            "Tokens per second",
            "short",
            {
                "prompt, computed": 'sum(rate(vllm:prompt_tokens_by_source_total{I, source="local_compute"}[R]))',
                "prompt, cached": 'sum(rate(vllm:prompt_tokens_by_source_total{I, source="local_cache_hit"}[R]))',
                "generated": "sum(rate(vllm:generation_tokens_total{I}[R]))",
            },
            "Prompt tokens that the prefix cache had cost no work.",
        ),
        Panel(
            "Generated tokens by adapter",
            "short",
            {"{{adapter}}": "sum by (adapter) (rate(guanaco_adapter_generation_tokens_total{I}[R]))"},
            "Per second.",
            stacked=True,
        ),
        Panel(
            "How requests end",
            "reqps",
            {"{{finished_reason}}": "sum by (finished_reason) (rate(vllm:request_success_total{I}[R]))"},
            "abort: the client left, or the server was told to stop. error: the server could not finish.",
            stacked=True,
        ),
        Panel(
            "Refusals by code",
            "reqps",
            {"{{reason}}": "sum by (reason) (rate(guanaco_rejected_total{I}[R]))"},
            "Requests that were answered with an error, by the code in the answer.",
            stacked=True,
        ),
        Panel(
            "HTTP status",
            "reqps",
            {"{{status}}": "sum by (status) (rate(http_requests_total{I}[R]))"},
            "Without probes and scrapes.",
            stacked=True,
        ),
    ),
)

LATENCY = Row(
    "Latency",
    (
        Panel("First token", "s", _percentiles("vllm:time_to_first_token_seconds"), "From a request's arrival."),
        Panel(
            "First token by adapter",
            "s",
            _percentiles("guanaco_adapter_time_to_first_token_seconds", labels="adapter", of=(0.9,)),
            "Nine of ten requests of the adapter had their first token within this time.",
        ),
        Panel("Next token", "s", _percentiles("vllm:inter_token_latency_seconds"), "Between two tokens of a request."),
        Panel("Whole request", "s", _percentiles("vllm:e2e_request_latency_seconds"), "From arrival to the end."),
        Panel("In the queue", "s", _percentiles("vllm:request_queue_time_seconds"), "From arrival to the first step."),
        Panel("Engine step", "s", _percentiles("guanaco_step_seconds"), "One step of all running requests."),
    ),
)

ENGINE = Row(
    "Engine",
    (
        Panel(
            "Queue",
            "short",
            {
                "running": "sum(vllm:num_requests_running{I})",
                "waiting": "sum(vllm:num_requests_waiting{I})",
                "may wait": "sum(guanaco_max_queued_requests{I})",
            },
            "More than --max-queued-requests are refused with 503.",
        ),
        Panel(
            "KV cache in use",
            "percentunit",
            {"{{instance}}": "max by (instance) (vllm:kv_cache_usage_perc{I})"},
            "When it is full, running requests are preempted.",
            most=1,
        ),
        Panel(
            "Preemptions",
            "short",
            {"{{instance}}": "sum by (instance) (rate(vllm:num_preemptions_total{I}[R]))"},
            "Requests per second that lost their KV blocks and are computed again.",
        ),
        Panel(
            "Prefix cache",
            "percentunit",
            {"hits": _share("vllm:prefix_cache_hits_total", "vllm:prefix_cache_queries_total")},
            "Share of prompt tokens that were found in the cache.",
            most=1,
        ),
        Panel(
            "Draft tokens accepted",
            "percentunit",
            {
                "accepted": _share(
                    "vllm:spec_decode_num_accepted_tokens_total", "vllm:spec_decode_num_draft_tokens_total"
                )
            },
            "Share of guessed tokens that the model would have chosen too. Empty where --speculation is off.",
            most=1,
        ),
        Panel(
            "Stalls",
            "s",
            {
                "engine, present step": "max(guanaco_engine_heartbeat_age_seconds{I})",
                **{
                    f"event loop, {name}": text
                    for name, text in _percentiles("guanaco_event_loop_lag_seconds", of=(0.99,)).items()
                },
            },
            "How long the present step has run, and how late the event loop ran a timer.",
        ),
    ),
)

ADAPTERS = Row(
    "Adapters",
    (
        Panel(
            "Where adapters are",
            "short",
            {
                "{{tier}}": "sum by (tier) (guanaco_adapter_versions{I})",
                "places on the device": 'sum(guanaco_adapter_slots{I, state="total"})',
            },
            "Versions that are known, in host memory, and on the device.",
        ),
        Panel(
            "Memory of adapters",
            "bytes",
            {"{{tier}}": "sum by (tier) (guanaco_adapter_bytes{I})"},
            "On a CPU the device uses the host's copies.",
            stacked=True,
        ),
        Panel(
            "Running sequences by adapter",
            "short",
            {"{{adapter}}": "sum by (adapter) (guanaco_adapter_running_sequences{I})"},
            "After the latest step.",
            stacked=True,
        ),
        Panel(
            "Loads",
            "short",
            {"{{result}}": "sum by (result) (increase(guanaco_adapter_loads_total{I}[R]))"},
            "refused: something is wrong with the adapter. failed: not the adapter's fault.",
            stacked=True,
        ),
        Panel(
            "Time of a load by stage",
            "s",
            {
                "{{stage}}": "sum by (stage) (rate(guanaco_adapter_load_stage_seconds_sum{I}[R]))"
                " / sum by (stage) (rate(guanaco_adapter_load_stage_seconds_count{I}[R]))"
            },
            "Mean. Only stages that ran in the interval.",
            stacked=True,
        ),
        Panel(
            "Evictions",
            "short",
            {"from {{tier}}": "sum by (tier) (increase(guanaco_adapter_evictions_total{I}[R]))"},
            "Many: more adapters are in use than --adapter-slots or --adapter-host-memory holds.",
        ),
    ),
)

PROCESS = Row(
    "Process and training",
    (
        Panel(
            "Memory",
            "bytes",
            {
                "of the server": "sum(process_resident_memory_bytes{I})",
                "left": "sum(guanaco_memory_available_bytes{I})",
                "limit": "sum(guanaco_memory_limit_bytes{I})",
            },
            "Limit and what is left of it: of the container where it has a limit, else of the machine.",
        ),
        Panel(
            "Processors",
            "short",
            {"{{instance}}": "sum by (instance) (rate(process_cpu_seconds_total{I}[R]))"},
            "Processors that the server keeps busy.",
        ),
        Panel(
            "Fine-tuning jobs",
            "short",
            {"{{status}}": "sum by (status) (guanaco_training_jobs{I})"},
            "Jobs that are kept, by state. Empty without an admin key.",
        ),
        Panel(
            "The running job",
            "short",
            {"steps done": "sum(guanaco_training_step{I})", "steps in all": "sum(guanaco_training_steps{I})"},
            "0 while no job runs.",
        ),
    ),
)

ROWS = (NOW, TRAFFIC, LATENCY, ENGINE, ADAPTERS, PROCESS)


def _targets(panel: Panel) -> list[dict[str, Any]]:
    return [
        {
            "datasource": DATASOURCE,
            "expr": expression(short),
            "legendFormat": legend or panel.title,
            "refId": chr(ord("A") + number),
        }
        for number, (legend, short) in enumerate(panel.lines.items())
    ]


def _stat(panel: Panel) -> dict[str, Any]:
    steps = [{"color": "text", "value": None}]
    if panel.title == "Alerts":
        steps = [{"color": "green", "value": None}, {"color": "red", "value": 1}]
    return {
        "type": "stat",
        "fieldConfig": {
            "defaults": {"unit": panel.unit, "thresholds": {"mode": "absolute", "steps": steps}},
            "overrides": [],
        },
        "options": {"reduceOptions": {"calcs": ["lastNotNull"]}, "graphMode": "area", "colorMode": "value"},
    }


def _graph(panel: Panel) -> dict[str, Any]:
    drawing: dict[str, Any] = {"lineWidth": 1, "fillOpacity": 25 if panel.stacked else 5, "showPoints": "never"}
    if panel.stacked:
        drawing["stacking"] = {"mode": "normal", "group": "A"}
    defaults: dict[str, Any] = {"unit": panel.unit, "min": 0, "custom": drawing}
    if panel.most is not None:
        defaults["max"] = panel.most
    return {
        "type": "timeseries",
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "options": {
            "legend": {"showLegend": True, "displayMode": "list", "placement": "bottom", "calcs": []},
            "tooltip": {"mode": "multi", "sort": "desc"},
        },
    }


def _laid_out() -> Iterator[dict[str, Any]]:
    """Rows and panels with their places in the grid, from left to right and top to bottom."""
    number = top = 0
    for row in ROWS:
        number += 1
        place = {"h": 1, "w": COLUMNS, "x": 0, "y": top}
        yield {"type": "row", "title": row.title, "id": number, "gridPos": place, "collapsed": False, "panels": []}
        top, left = top + 1, 0
        width, height = STAT_SIZE if row.panels[0].is_stat else GRAPH_SIZE
        for panel in row.panels:
            number += 1
            if left + width > COLUMNS:
                left, top = 0, top + height
            yield {
                "title": panel.title,
                "description": panel.about,
                "id": number,
                "gridPos": {"h": height, "w": width, "x": left, "y": top},
                "datasource": DATASOURCE,
                "targets": _targets(panel),
                **(_stat(panel) if panel.is_stat else _graph(panel)),
            }
            left += width
        top += height


def dashboard() -> dict[str, Any]:
    """The dashboard as Grafana reads it."""
    return {
        "uid": "guanaco",
        "title": "Guanaco",
        "description": "One base model and its adapters: traffic, latency, engine, adapters, training.",
        "tags": ["guanaco"],
        "schemaVersion": 39,
        "editable": True,
        "graphTooltip": 1,  # one cross hair through all panels
        "refresh": "10s",
        "time": {"from": "now-30m", "to": "now"},
        "templating": {
            "list": [
                {"name": "datasource", "label": "Prometheus", "type": "datasource", "query": "prometheus"},
                {
                    "name": "instance",
                    "label": "Server",
                    "type": "query",
                    "datasource": DATASOURCE,
                    "query": {"query": "label_values(vllm:num_requests_running, instance)", "refId": "instance"},
                    "refresh": 2,  # refresh when the time range changes
                    "includeAll": True,
                    "multi": True,
                    "allValue": ".*",
                    "current": {"text": ["All"], "value": ["$__all"]},
                },
            ]
        },
        "panels": list(_laid_out()),
    }


def as_text() -> str:
    """The JSON file's text."""
    return json.dumps(dashboard(), indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    JSON_FILE.write_text(as_text())
