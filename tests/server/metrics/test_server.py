"""The names that dashboards and routers read, their buckets, and series whose number no client can drive up."""

import re
from collections.abc import Iterator

import pytest
from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families

from guanaco.server.engine.request import DraftOutcome, StepStats
from guanaco.server.metrics.histogram import HotHistogram
from guanaco.server.metrics.server import Metrics, RequestStats, count_buckets
from support.server.api_server import (
    BASE,
    PIRATE,
    PIRATE_VERSION,
    TERSE,
    TERSE_VERSION,
    LiveServer,
    chat_body,
    make_state,
)

# As vLLM's exporter declares them, and what its Grafana dashboard, the production-stack router and the Gateway API's
# endpoint picker ask for.
GAUGES = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
COUNTERS = ("prompt_tokens", "generation_tokens", "request_success", "num_preemptions", "prefix_cache_queries")
COUNTERS += ("prefix_cache_hits", "prompt_tokens_cached", "prompt_tokens_by_source")
HISTOGRAMS = ("time_to_first_token_seconds", "inter_token_latency_seconds", "time_per_output_token_seconds")
HISTOGRAMS += ("request_time_per_output_token_seconds", "e2e_request_latency_seconds", "request_queue_time_seconds")
HISTOGRAMS += ("request_prefill_time_seconds", "request_decode_time_seconds", "request_inference_time_seconds")
HISTOGRAMS += ("request_prompt_tokens", "request_generation_tokens", "iteration_tokens_total", "request_params_n")
HISTOGRAMS += ("request_params_max_tokens", "request_max_num_generation_tokens")


def step(**fields: object) -> StepStats:
    defaults = {
        "num_running": 0,
        "num_waiting": 0,
        "num_scheduled_tokens": 0,
        "num_preempted": 0,
        "kv_usage_ratio": 0.0,
        "prefix_queries_tokens": 0,
        "prefix_hits_tokens": 0,
        "step_seconds": 0.0,
        "running_adapters": (),
        "waiting_adapters": (),
    }
    return StepStats(**{**defaults, **fields})


def stats(**fields: object) -> RequestStats:
    defaults = {
        "adapter": None,
        "finish_reason": "stop",
        "num_prompt_tokens": 5,
        "num_generation_tokens": 11,
        "max_tokens": 20,
        "n": 1,
        "e2e_seconds": 3.0,
    }
    return RequestStats(**{**defaults, **fields})


@pytest.fixture
def metrics() -> Metrics:
    made = Metrics(BASE, max_model_len=4096, adapter_slots=4)
    made.adapters.set_names({PIRATE_VERSION: PIRATE, TERSE_VERSION: TERSE})
    return made


def value(metrics: Metrics, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(
        name, {"model_name": BASE, "engine": "0", **labels} if name.startswith("vllm") else labels
    )


def test_names_and_types(metrics: Metrics) -> None:
    metrics.set_cache_config(block_size=16, num_blocks=1234, cache_dtype="float32")
    text = metrics.render()[0].decode()
    types = dict(re.findall(r"^# TYPE (\S+) (\S+)$", text, re.MULTILINE))
    for names, kind, suffix in ((GAUGES, "gauge", ""), (COUNTERS, "counter", "_total"), (HISTOGRAMS, "histogram", "")):
        for name in names:
            assert types[f"vllm:{name}{suffix}"] == kind
    assert types["vllm:lora_requests_info"] == types["vllm:cache_config_info"] == "gauge"
    assert 'vllm:cache_config_info{block_size="16",cache_dtype="float32",engine="0",num_gpu_blocks="1234"} 1.0' in text
    for reason in ("stop", "length", "abort", "error"):
        assert f'vllm:request_success_total{{engine="0",finished_reason="{reason}",model_name="{BASE}"}} 0.0' in text
    for family in text_string_to_metric_families(text):
        if family.name.startswith("vllm:") and family.name != "vllm:lora_requests_info":  # vLLM's has none either
            assert all(sample.labels["engine"] == "0" for sample in family.samples), family.name
    assert "_created" not in text
    assert "process_resident_memory_bytes" in text


def test_both_formats_parse(metrics: Metrics) -> None:
    metrics.observe_step(step(num_running=1, running_adapters=(PIRATE_VERSION,)))
    metrics.observe_request(stats())
    assert len(list(text_string_to_metric_families(metrics.render()[0].decode()))) > 30
    body, content_type = metrics.render("application/openmetrics-text; version=1.0.0")
    assert "openmetrics" in content_type
    assert len(list(parse_openmetrics(body.decode()))) > 30


PROMETHEUS_2 = "application/openmetrics-text;version=1.0.0,application/openmetrics-text;version=0.0.1;q=0.75"
PROMETHEUS_2 += ",text/plain;version=0.0.4;q=0.5,*/*;q=0.1"
PROMETHEUS_3 = "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.6"
PROMETHEUS_3 += ",text/plain;version=1.0.0;escaping=allow-utf-8;q=0.5,text/plain;version=0.0.4;q=0.2,*/*;q=0.1"


@pytest.mark.parametrize(
    "accept",
    [
        *("", "text/plain", "text/plain; version=1.0.0", PROMETHEUS_2, PROMETHEUS_3, "application/openmetrics-text"),
        "application/openmetrics-text; version=1.0.0; escaping=underscores",
        *("text/plain; version=new", "text/plain;version=1.x;q=0.5", f"text/plain; version={'1' * 5000}"),
    ],
)
def test_every_scraper_gets_the_names_as_they_are(metrics: Metrics, accept: str) -> None:
    body, content_type = metrics.render(accept)
    parse = parse_openmetrics if "openmetrics" in content_type else text_string_to_metric_families
    names = {sample.name for family in parse(body.decode()) for sample in family.samples}
    assert {"vllm:num_requests_running", "vllm:time_to_first_token_seconds_bucket", "guanaco_step_seconds_sum"} <= names
    assert not [name for name in names if name.startswith("vllm_")]
    assert ("openmetrics" in accept) == ("openmetrics" in content_type)


def test_buckets_are_vllms(metrics: Metrics) -> None:
    def edges(name: str) -> list[float]:
        text = metrics.render()[0].decode()
        return [float(e) for e in re.findall(rf'^vllm:{name}_bucket{{engine="0",le="([^"]+)"', text, re.MULTILINE)][:-1]

    ttft = "0.001 0.005 0.01 0.02 0.04 0.06 0.08 0.1 0.25 0.5 0.75 1 2.5 5 7.5 10 20 40 80 160 640 2560"
    assert edges("time_to_first_token_seconds") == [float(e) for e in ttft.split()]
    itl = "0.01 0.025 0.05 0.075 0.1 0.15 0.2 0.3 0.4 0.5 0.75 1 2.5 5 7.5 10 20 40 80"
    for name in HISTOGRAMS[1:4]:
        assert edges(name) == [float(e) for e in itl.split()]
    e2e = "0.3 0.5 0.8 1 1.5 2 2.5 5 10 15 20 30 40 50 60 120 240 480 960 1920 7680"
    for name in HISTOGRAMS[4:9]:
        assert edges(name) == [float(e) for e in e2e.split()]
    assert edges("request_prompt_tokens") == [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000]
    assert edges("request_max_num_generation_tokens") == edges("request_prompt_tokens")
    assert edges("iteration_tokens_total") == [1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384]
    assert count_buckets(1) == (1,)
    assert count_buckets(100) == (1, 2, 5, 10, 20, 50, 100)


def test_steps(metrics: Metrics) -> None:
    metrics.observe_step(
        step(
            num_running=3,
            num_waiting=2,
            num_scheduled_tokens=40,
            num_preempted=1,
            kv_usage_ratio=0.25,
            prefix_queries_tokens=100,
            prefix_hits_tokens=64,
            step_seconds=0.02,
            running_adapters=(PIRATE_VERSION, TERSE_VERSION),
            waiting_adapters=("c" * 64,),
            sequence_versions=((PIRATE_VERSION,), (PIRATE_VERSION,), (), (PIRATE_VERSION, TERSE_VERSION), ("c" * 64,)),
        )
    )
    shown = {"pirate": 2, "(base)": 1, "(mixture)": 1, "(other)": 1}
    for name, running in shown.items():
        assert value(metrics, "guanaco_adapter_running_sequences", adapter=name) == running
    assert value(metrics, "vllm:num_requests_running") == 3
    assert value(metrics, "vllm:num_requests_waiting") == 2
    assert value(metrics, "vllm:kv_cache_usage_perc") == 0.25
    assert value(metrics, "vllm:num_preemptions_total") == 1
    assert value(metrics, "vllm:prefix_cache_queries_total") == 100
    assert value(metrics, "vllm:prefix_cache_hits_total") == 64
    assert value(metrics, "vllm:iteration_tokens_total_sum") == 40
    assert value(metrics, "guanaco_step_seconds_sum") == 0.02
    assert value(metrics, "guanaco_adapter_slots", state="running") == 2
    assert value(metrics, "guanaco_adapter_slots", state="total") == 4


def test_hot_histograms_are_prometheus_clients_own() -> None:
    """Bucket by bucket, edges and what lies beyond them included, under each of their names."""
    names, edges, labels = {"a:b_total": "One.", "c": "Two."}, (0.5, 1, 2.5, 1e9), {"model_name": "m"}
    hot, plain = CollectorRegistry(), CollectorRegistry()
    fast = HotHistogram(hot, names, edges, labels)
    slow = [Histogram(name, text, list(labels), buckets=edges, registry=plain) for name, text in names.items()]
    for number in (0.0, 0.5, 0.5000001, 1, 1.5, 2.5, 3e9):
        fast.observe(number)
        for histogram in slow:
            histogram.labels(**labels).observe(number)
    found, expected = (sorted(generate_latest(registry).splitlines()) for registry in (hot, plain))
    assert found == [line for line in expected if b"_created" not in line]
    assert b'a:b_total_bucket{le="1e+09",model_name="m"} 6.0' in found


def test_lora_info_is_one_series_with_the_time_as_its_value() -> None:
    now = [1000.0]
    metrics = Metrics(BASE, max_model_len=64, adapter_slots=4, clock=lambda: now[0])
    metrics.adapters.set_names({PIRATE_VERSION: PIRATE, TERSE_VERSION: TERSE})

    def shown() -> list[tuple[dict[str, str], float]]:
        (family,) = [f for f in metrics.registry.collect() if f.name == "vllm:lora_requests_info"]
        return [(sample.labels, sample.value) for sample in family.samples]

    assert shown() == [({"max_lora": "4", "running_lora_adapters": "", "waiting_lora_adapters": ""}, 1000.0)]
    on_device: list[str] = []
    metrics.adapters.set_device(lambda: on_device)
    for there, waiting, names in (
        ((TERSE, PIRATE), (), ("pirate,terse", "")),
        ((PIRATE,), (TERSE_VERSION,), ("pirate", "terse")),
        ((PIRATE,), (TERSE_VERSION,), ("pirate", "terse")),
    ):
        now[0] += 5
        on_device[:] = there
        metrics.observe_step(step(num_running=1, running_adapters=(PIRATE_VERSION,), waiting_adapters=waiting))
        labels = {"max_lora": "4", "running_lora_adapters": names[0], "waiting_lora_adapters": names[1]}
        assert shown() == [(labels, now[0])]
    metrics.observe_step(step())
    assert shown()[0][0]["running_lora_adapters"] == PIRATE, "what is idle on the device is listed: routers want it"
    changed = now[0]
    now[0] += 5
    assert shown()[0][1] == changed, "nothing changed since"
    on_device.clear()
    assert shown() == [({"max_lora": "4", "running_lora_adapters": "", "waiting_lora_adapters": ""}, now[0])]


def test_old_names_are_there_if_they_are_wanted(metrics: Metrics) -> None:
    old = {"gpu_cache_usage_perc", "gpu_prefix_cache_hits_total", "gpu_prefix_cache_queries_total"}
    compat = Metrics(BASE, max_model_len=64, old_names=True)
    for made, wanted in ((metrics, set()), (compat, old)):
        made.observe_step(step(kv_usage_ratio=0.25, prefix_queries_tokens=100, prefix_hits_tokens=64))
        text = made.render()[0].decode()
        assert set(re.findall(r"^vllm:(gpu_\w+)\{", text, re.MULTILINE)) == wanted
        for new in ("kv_cache_usage_perc", "prefix_cache_hits_total", "prefix_cache_queries_total"):
            assert value(made, f"vllm:{new}") in (0.25, 64, 100)
    found = [value(compat, f"vllm:{name}") for name in sorted(old)]
    assert found == [0.25, 64, 100]


def test_prompt_tokens_by_source(metrics: Metrics) -> None:
    metrics.observe_prompt(PIRATE, 40, 32)
    metrics.observe_prompt(None, 5)
    assert value(metrics, "vllm:prompt_tokens_total") == 45
    assert value(metrics, "vllm:prompt_tokens_cached_total") == 32
    assert value(metrics, "vllm:prompt_tokens_by_source_total", source="local_compute") == 13
    assert value(metrics, "vllm:prompt_tokens_by_source_total", source="local_cache_hit") == 32


def test_request_times(metrics: Metrics) -> None:
    metrics.observe_request(stats(queue_seconds=0.5, first_token_seconds=1.0, last_token_seconds=2.5))
    for name, seconds in (("queue", 0.5), ("prefill", 0.5), ("decode", 1.5), ("inference", 2.0)):
        assert value(metrics, f"vllm:request_{name}_time_seconds_sum") == pytest.approx(seconds)
    assert value(metrics, "vllm:request_time_per_output_token_seconds_sum") == pytest.approx(0.15)
    assert value(metrics, "vllm:e2e_request_latency_seconds_sum") == 3.0
    metrics.observe_request(stats(finish_reason="abort", num_generation_tokens=0))
    assert value(metrics, "vllm:request_decode_time_seconds_count") == 1, "it never came to decoding"
    assert value(metrics, "vllm:request_success_total", finished_reason="abort") == 1


def test_two_servers_in_one_process(metrics: Metrics) -> None:
    other = Metrics(BASE, max_model_len=64)
    other.observe_request(stats())
    assert value(metrics, "vllm:request_success_total", finished_reason="stop") == 0


def test_heartbeat_is_read_at_the_scrape(metrics: Metrics) -> None:
    age = [1.0]
    metrics.set_heartbeat(lambda: age[0])
    age[0] = 7.5
    assert value(metrics, "guanaco_engine_heartbeat_age_seconds") == 7.5


class TestThroughTheServer:
    @pytest.fixture
    def server(self) -> Iterator[LiveServer]:
        with LiveServer(make_state()) as live:
            yield live

    def test_a_request_counts_once_everywhere(self, server: LiveServer) -> None:
        with server.client() as client:
            for streaming in (False, True):
                body = {**chat_body("hello", max_tokens=6, n=2, stream=streaming), "model": PIRATE}
                assert client.post("/v1/chat/completions", json=body).status_code == 200
        server.assert_quiet()
        metrics = server.state.metrics
        assert value(metrics, "vllm:request_success_total", finished_reason="length") == 4
        assert value(metrics, "vllm:generation_tokens_total") == 24
        assert value(metrics, "vllm:prompt_tokens_total") == 36
        assert value(metrics, "vllm:time_to_first_token_seconds_count") == 4
        assert value(metrics, "vllm:inter_token_latency_seconds_count") == 20
        assert value(metrics, "vllm:request_params_n_sum") == 8
        assert value(metrics, "vllm:request_max_num_generation_tokens_count") == 2, "one for each prompt"
        assert value(metrics, "vllm:request_max_num_generation_tokens_sum") == 12
        assert value(metrics, "guanaco_adapter_generation_tokens_total", adapter=PIRATE) == 24
        assert value(metrics, "guanaco_adapter_prompt_tokens_total", adapter=PIRATE) == 36

    def test_clients_cannot_make_series(self, server: LiveServer) -> None:
        def count() -> int:
            return server.state.metrics.render()[0].count(b"\n")

        with server.client() as client:
            client.post("/v1/completions", json={"model": "nobody", "prompt": "x"})
            client.get("/nope")
            before = count()
            for index in range(100):
                name = f"nobody-{index}"
                client.post("/v1/completions", json={"model": name, "prompt": "x", "user": name})
                client.get(f"/{name}", headers={"X-Request-Id": name})
        assert count() == before
        assert value(server.state.metrics, "guanaco_rejected_total", reason="model_not_found") == 101


def test_drafts_are_counted_by_place_and_by_adapter() -> None:
    metrics = Metrics("base", max_model_len=100)
    metrics.adapters.set_names({"v1": "pirate"})
    metrics.observe_step(step(drafts=(DraftOutcome(("v1",), 3, 2), DraftOutcome((), 5, 0))))
    metrics.observe_step(step(drafts=(DraftOutcome(("v1",), 1, 1), DraftOutcome(("v1", "v2"), 2, 1))))
    text = metrics.render()[0].decode()

    def value(series: str) -> float:
        (line,) = [line for line in text.splitlines() if line.startswith(series + " ")]
        return float(line.rpartition(" ")[2])

    labels = 'engine="0",model_name="base"'
    assert value(f"vllm:spec_decode_num_drafts_total{{{labels}}}") == 4
    assert value(f"vllm:spec_decode_num_draft_tokens_total{{{labels}}}") == 11
    assert value(f"vllm:spec_decode_num_accepted_tokens_total{{{labels}}}") == 4
    by_place = [f'vllm:spec_decode_num_accepted_tokens_per_pos_total{{{labels},position="{i}"}}' for i in range(3)]
    assert [value(series) for series in by_place] == [3, 1, 0]
    by_adapter = {
        name: value(f'guanaco_adapter_draft_tokens_total{{adapter="{name}"}}') for name in ("pirate", "(base)")
    }
    assert by_adapter == {"pirate": 4, "(base)": 5}
    assert value('guanaco_adapter_accepted_draft_tokens_total{adapter="pirate"}') == 3
    assert value('guanaco_adapter_accepted_draft_tokens_total{adapter="(mixture)"}') == 1
