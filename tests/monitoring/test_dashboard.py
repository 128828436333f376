"""The dashboards that operators look at: every panel of ours and of vLLM's asks for series that this server has."""

import importlib.util
import json
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import promql_parser
import pytest
import yaml
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.models.dashboard import Dashboard
from prometheus_client.parser import text_string_to_metric_families

from support.server.real_server import ADMIN, BASE, make_real_server

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "docker/monitoring"
ALERTS = yaml.safe_load((FOLDER / "alerts.yml").read_text())["groups"][0]["rules"]
OF_PROMETHEUS = {"up": {"job", "instance"}, "ALERTS": {"alertname", "alertstate"}}
OF_THE_TARGET = {"instance", "job"}  # labels that Prometheus adds to every sample
# The series that vLLM's dashboards ask for: examples/observability/prometheus_grafana/grafana.json of vllm-project/vllm
# at 4b5c627c23e6, then what vllm_overview.json at 0b9faa413893 and vllm_speculative_decoding.json at 8aed4e52b935 add
# to it, both of examples/observability/dashboards/grafana.
VLLM_CLASSIC = """
    e2e_request_latency_seconds_bucket e2e_request_latency_seconds_sum e2e_request_latency_seconds_count
    prompt_tokens_total generation_tokens_total num_requests_running num_requests_waiting kv_cache_usage_perc
    inter_token_latency_seconds_bucket inter_token_latency_seconds_sum inter_token_latency_seconds_count
    time_to_first_token_seconds_bucket time_to_first_token_seconds_sum time_to_first_token_seconds_count
    request_prompt_tokens_bucket request_generation_tokens_bucket request_success_total
    request_queue_time_seconds_sum request_prefill_time_seconds_sum request_decode_time_seconds_sum
    request_max_num_generation_tokens_sum
"""
VLLM_OVERVIEW = """
    num_preemptions_total prefix_cache_hits_total prefix_cache_queries_total num_requests_waiting_by_reason
    request_time_per_output_token_seconds_bucket request_time_per_output_token_seconds_sum
    request_time_per_output_token_seconds_count request_queue_time_seconds_bucket request_queue_time_seconds_count
    request_prefill_time_seconds_count request_decode_time_seconds_count iteration_tokens_total_bucket
    iteration_tokens_total_sum iteration_tokens_total_count external_prefix_cache_hits_total
    external_prefix_cache_queries_total mm_cache_hits_total mm_cache_queries_total prompt_tokens_by_source_total
    request_prompt_tokens_sum request_prompt_tokens_count request_generation_tokens_sum request_generation_tokens_count
"""
VLLM_SPECULATION = """
    spec_decode_num_drafts_total spec_decode_num_draft_tokens_total spec_decode_num_accepted_tokens_total
    spec_decode_num_accepted_tokens_per_pos_total
"""
OF_VLLMS_HTTP = {
    "http_requests_total": {"status", "handler"},
    "http_request_duration_seconds_sum": {"handler"},
    "http_request_duration_seconds_count": {"handler"},
}
# Lines of two panels of the overview that stay empty; both panels have other lines. docs/monitoring.md names them.
EMPTY_LINES = {
    "num_requests_waiting_by_reason",
    "external_prefix_cache_hits_total",
    "external_prefix_cache_queries_total",
    "mm_cache_hits_total",
    "mm_cache_queries_total",
}


def _load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


MADE = json.loads((FOLDER / "grafana/dashboards/guanaco.json").read_text())
PANELS = {panel["title"]: panel for panel in MADE["panels"] if panel["type"] != "row"}


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> dict[str, set[str]]:
    """The series of a server as `guanaco serve` builds it: name → labels, none where it has no sample yet."""
    with make_real_server(tmp_path_factory.mktemp("monitoring")) as server, server.client() as client:
        for model, status in ((BASE, 200), ("nobody", 404)):
            answer = client.post("/v1/completions", json={"model": model, "prompt": "Hello", "max_tokens": 3})
            assert answer.status_code == status, answer.text
        server.assert_quiet()
        text = client.get("/metrics", headers=ADMIN).text
    series: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(text):
        suffixes = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count")}.get(family.type, ("",))
        for suffix in suffixes:
            series.setdefault(family.name + suffix, set())
        for sample in family.samples:
            series.setdefault(sample.name, set()).update(sample.labels)
    return series


def selectors(expression: str) -> Iterator[promql_parser.VectorSelector]:
    found: list[promql_parser.VectorSelector] = []

    def visit(node: object) -> None:
        if isinstance(node, promql_parser.MatrixSelector):
            found.append(node.vector_selector)
        elif isinstance(node, promql_parser.VectorSelector):
            found.append(node)

    promql_parser.walk(promql_parser.parse(expression), visit)
    return iter(found)


def grouped_by(expression: str) -> set[str]:
    labels: set[str] = set()

    def visit(node: object) -> None:
        if isinstance(node, promql_parser.AggregateExpr) and node.modifier is not None:
            labels.update(node.modifier.labels)

    promql_parser.walk(promql_parser.parse(expression), visit)
    return labels


def filled_in(expression: str) -> str:
    return expression.replace("$__rate_interval", "1m").replace("$instance", ".*")


def assert_known(expression: str, known: dict[str, set[str]]) -> None:
    all_labels = set(OF_THE_TARGET)
    for selector in selectors(expression):
        name = selector.name
        assert name in known or name in OF_PROMETHEUS, f"{name} is not a series of this server: {expression}"
        labels = (known.get(name) or OF_PROMETHEUS.get(name, set())) | OF_THE_TARGET
        all_labels |= labels
        asked = {matcher.name for matcher in selector.matchers.matchers}
        assert not known.get(name) or asked <= labels, f"{name} has no label {asked - labels}"
    if all(known.get(selector.name) for selector in selectors(expression)):
        assert grouped_by(expression) <= all_labels, expression


def test_the_file_is_what_the_list_of_panels_makes() -> None:
    written = (FOLDER / "grafana/dashboards/guanaco.json").read_text()
    assert written == _load(FOLDER / "dashboard.py").as_text(), "run python docker/monitoring/dashboard.py"


@pytest.mark.parametrize("title", PANELS)
def test_a_panel_asks_for_series_that_the_server_has(title: str, known: dict[str, set[str]]) -> None:
    panel = PANELS[title]
    assert panel["targets"]
    for target in panel["targets"]:
        expression = filled_in(target["expr"])
        assert "$" not in expression
        assert_known(expression, known)
        legend = set(re.findall(r"{{(\w+)}}", target["legendFormat"]))
        assert legend <= grouped_by(expression), "a legend names a label that the expression has not kept"


def test_an_unknown_series_or_label_is_found(known: dict[str, set[str]]) -> None:
    for wrong in (
        "sum(rate(vllm:no_such_total[1m]))",
        "up / guanaco_adapters",
        'vllm:num_requests_running{adapter="a"}',
    ):
        with pytest.raises(AssertionError):
            assert_known(wrong, known)
    with pytest.raises(AssertionError):
        assert_known("sum by (code) (guanaco_rejected_total)", known)
    with pytest.raises(ValueError, match=r"."):
        assert_known("sum(rate(x[1m])", known)


@pytest.mark.parametrize("alert", ALERTS, ids=lambda rule: rule["alert"])
def test_an_alert_asks_for_series_that_the_server_has(alert: dict[str, Any], known: dict[str, set[str]]) -> None:
    assert_known(alert["expr"], known)
    assert {"summary", "description"} == set(alert["annotations"])


def test_vllms_dashboards_show_no_empty_panel(known: dict[str, set[str]]) -> None:
    names = {f"vllm:{name}" for name in (VLLM_CLASSIC + VLLM_OVERVIEW + VLLM_SPECULATION).split()}
    assert names - known.keys() == {f"vllm:{name}" for name in EMPTY_LINES}
    assert all("model_name" in known[name] for name in names & known.keys()), "their filter is the model's name"
    for name, labels in OF_VLLMS_HTTP.items():
        assert labels <= known[name]
    assert "finished_reason" in known["vllm:request_success_total"]
    assert "position" in known["vllm:spec_decode_num_accepted_tokens_per_pos_total"]
    page = (ROOT / "docs/monitoring.md").read_text()
    assert not [name for name in EMPTY_LINES if name not in page]


def test_panels_fill_the_grid_without_overlap() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in MADE["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert place["x"] + place["w"] <= 24
        assert not cells & taken, panel["title"]
        taken |= cells
    ids = [panel["id"] for panel in MADE["panels"]]
    assert len(set(ids)) == len(ids)
    assert len(PANELS) == sum(panel["type"] != "row" for panel in MADE["panels"]), "two panels have one title"


def _missing(ours: Any, theirs: Any, where: str = "") -> Iterator[str]:
    """What of our JSON is not in what Grafana's types kept of it."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        for key, value in ours.items():
            if value is not None:  # absent for the types
                yield from _missing(value, theirs.get(key), f"{where}.{key}")
    elif isinstance(ours, list) and isinstance(theirs, list) and len(ours) == len(theirs):
        for number, (one, other) in enumerate(zip(ours, theirs, strict=True)):
            yield from _missing(one, other, f"{where}[{number}]")
    elif ours != theirs:
        yield f"{where}: {ours!r}, kept {theirs!r}"


def _kept(dashboard: dict[str, Any]) -> Any:
    register_default_plugins()
    return json.loads(json.dumps(Dashboard.from_json(dashboard), cls=JSONEncoder))


def test_grafanas_own_types_know_every_field() -> None:
    """Grafana's published types (for 11.6) read the file and write it again: a field that they don't know is lost."""
    assert list(_missing(MADE, _kept(MADE))) == []
    wrong = json.loads(json.dumps(MADE))
    wrong["panels"][1]["options"]["grafMode"] = "area"
    wrong["refreshEvery"] = "5s"
    assert len(list(_missing(wrong, _kept(wrong)))) == 2


def test_compose_mounts_files_that_exist_and_publishes_on_this_machine_only() -> None:
    compose = yaml.safe_load((ROOT / "docker/compose.yaml").read_text())
    services = {name: s for name, s in compose["services"].items() if s.get("profiles") == ["monitoring"]}
    assert set(services) == {"prometheus", "grafana"}
    for service in services.values():
        assert all(port.startswith("127.0.0.1:") for port in service["ports"])
        for volume in service["volumes"]:
            source = volume.partition(":")[0]
            assert (ROOT / "docker" / source).exists() if source.startswith(".") else source in compose["volumes"]
        assert ":latest" not in service["image"]
    assert set(services["prometheus"]["secrets"]) <= set(compose["secrets"])
    config = yaml.safe_load((FOLDER / "prometheus.yml").read_text())
    (job,) = config["scrape_configs"]
    assert job["authorization"]["credentials_file"] == f"/run/secrets/{services['prometheus']['secrets'][0]}"
    assert job["job_name"] == "guanaco", "the alerts ask for this job"
