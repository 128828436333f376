"""What is counted of adapters: by name within a bound, mixtures as what they are, loads by stage; over HTTP too."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from guanaco.server.adapters.sources import LoadRequest
from guanaco.server.metrics.adapters import IDLE_SECONDS, LOAD_STAGES
from guanaco.server.metrics.server import Metrics, RequestStats
from support.server.adapter_client import complete, put
from support.server.adapter_server import ADMIN, AdapterServer, make_adapter_server
from support.server.api_server import BASE


def stats(adapter: str | None, mixed: tuple[str, ...] = ()) -> RequestStats:
    return RequestStats(adapter, "stop", 5, 11, 20, 1, 3.0, mixed_adapters=mixed)


def read(metrics: Metrics, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(name, labels)


def requests_by_adapter(metrics: Metrics) -> dict[str, float]:
    family = next(f for f in metrics.registry.collect() if f.name == "guanaco_adapter_requests")
    return {sample.labels["adapter"]: sample.value for sample in family.samples}


def num_series(metrics: Metrics) -> int:
    return sum(len(family.samples) for family in metrics.registry.collect())


def test_labels_are_bounded_and_counters_never_run_backwards() -> None:
    metrics = Metrics("base", max_model_len=128, max_adapter_labels=3)
    names = [f"adapter-{index}" for index in range(9)]
    metrics.adapters.set_names({name: name for name in names})
    before: dict[str, float] = {}
    for name in names * 2:
        metrics.observe_request(stats(name))
        metrics.observe_tokens(name, 3, None)
        metrics.observe_prompt(name, 5)
        metrics.observe_first_token(name, 0.2)
        now = requests_by_adapter(metrics)
        assert all(now[label] >= count for label, count in before.items())
        before = now
    assert before == {"adapter-0": 2, "adapter-1": 2, "adapter-2": 2, "(other)": 12}
    assert read(metrics, "guanaco_adapter_time_to_first_token_seconds_count", adapter="(other)") == 12
    assert read(metrics, "guanaco_adapter_time_to_first_token_seconds_sum", adapter="adapter-0") == pytest.approx(0.4)


def test_who_goes_gives_its_series_to_others() -> None:
    metrics = Metrics("base", max_model_len=128, max_adapter_labels=2)
    sizes = set()
    for turn in range(20):  # adapters come and go for ever
        names = [f"n{turn}", f"n{turn + 1}"]
        metrics.adapters.set_names({name: name for name in names})
        for name in (*names, "gone", None):
            metrics.observe_request(stats(name))
            metrics.observe_first_token(name, 0.1)
        assert requests_by_adapter(metrics).keys() == {*names, "(other)", "(base)"}
        sizes.add(num_series(metrics))
    assert len(sizes) == 1
    assert requests_by_adapter(metrics)["(other)"] == 20


def test_who_is_idle_for_long_gives_its_series_to_who_has_traffic() -> None:
    now = [0.0]
    metrics = Metrics("base", max_model_len=128, max_adapter_labels=2, clock=lambda: now[0])
    metrics.adapters.set_names({name: name for name in "abcd"})
    for name in "abc":
        metrics.observe_request(stats(name))
    now[0] = IDLE_SECONDS - 1
    for name in "ac":
        metrics.observe_request(stats(name))
    assert requests_by_adapter(metrics) == {"a": 2, "b": 1, "(other)": 2}, "b is not idle for long enough"
    now[0] = IDLE_SECONDS
    for name in "cad":
        metrics.observe_request(stats(name))
    assert requests_by_adapter(metrics) == {"a": 3, "c": 1, "(other)": 3}
    assert read(metrics, "guanaco_adapter_prompt_tokens_total", adapter="b") is None, "all of its series go together"
    assert read(metrics, "guanaco_adapter_prompt_tokens_total", adapter="c") == 0
    now[0] += IDLE_SECONDS
    metrics.observe_request(stats("b"))
    assert requests_by_adapter(metrics)["b"] == 1, "it begins at zero again, as after a restart"


def test_loads_and_tiers() -> None:
    metrics = Metrics("base", max_model_len=128)
    metrics.adapters.set_tiers(
        sizes={"host": lambda: 7.0, "device": lambda: 5.0},
        evictions={"host": lambda: 3.0, "device": lambda: 4.0},
        counts={"stored": lambda: 9.0, "host": lambda: 2.0},
    )
    for result, seconds in (("ok", 0.5), ("refused", 9.0), ("refused", 9.0)):
        metrics.adapters.observe_load(result, seconds)
    results = ("ok", "refused", "failed")
    assert [read(metrics, "guanaco_adapter_loads_total", result=result) for result in results] == [1, 2, 0]
    assert read(metrics, "guanaco_adapter_load_seconds_sum") == 0.5
    assert [read(metrics, "guanaco_adapter_bytes", tier=tier) for tier in ("host", "device")] == [7, 5]
    assert [read(metrics, "guanaco_adapter_evictions_total", tier=tier) for tier in ("host", "device")] == [3, 4]
    assert [read(metrics, "guanaco_adapter_versions", tier=tier) for tier in ("stored", "host")] == [9, 2]


class TestThroughTheServer:
    @pytest.fixture
    def server(self, tmp_path: Path) -> Iterator[AdapterServer]:
        with make_adapter_server(tmp_path) as made:
            yield made

    @pytest.fixture
    def client(self, server: AdapterServer) -> Iterator[httpx.Client]:
        with server.client(headers=ADMIN) as made:
            yield made

    def value(self, server: AdapterServer, name: str, **labels: Any) -> float:
        return read(server.state.metrics, name, **labels) or 0.0

    def test_a_load_has_stages(self, server: AdapterServer, client: httpx.Client) -> None:
        def counts() -> dict[str, float]:
            name = "guanaco_adapter_load_stage_seconds_count"
            return {stage: self.value(server, name, stage=stage) for stage in LOAD_STAGES}

        put(client, "a", server.source("a", 1))
        assert counts() == {"fetch": 0, "read": 1, "ingest": 1, "probe": 1, "publish": 1}
        seconds = sum(self.value(server, "guanaco_adapter_load_stage_seconds_sum", stage=s) for s in LOAD_STAGES)
        assert 0 < seconds <= self.value(server, "guanaco_adapter_load_seconds_sum")
        client.put("/v1/adapters/b", json={"source": server.source("b", 1, rank=65)})
        assert counts() == {"fetch": 0, "read": 1, "ingest": 1, "probe": 1, "publish": 1}
        assert self.value(server, "guanaco_adapter_loads_total", result="refused") == 1

    def test_mixtures_are_no_base(self, server: AdapterServer, client: httpx.Client) -> None:
        for seed, name in enumerate("ab"):
            put(client, name, server.source(name, seed))
        client.put("/v1/aliases/x", json={"target": "b"})
        complete(client, max_tokens=3, adapters=[{"name": "a", "scale": 0.5}, {"name": "x"}])
        complete(client, max_tokens=2, model="x")
        complete(client, max_tokens=1)
        server.assert_quiet()
        tokens = {"(mixture)": 3, "b": 2, "(base)": 1, "a": 0, "x": 0}
        for name, count in tokens.items():
            assert self.value(server, "guanaco_adapter_generation_tokens_total", adapter=name) == count, name
            first = self.value(server, "guanaco_adapter_time_to_first_token_seconds_count", adapter=name)
            assert first == (count > 0), name
        mixed = [self.value(server, "guanaco_adapter_mixture_requests_total", adapter=name) for name in "abx"]
        assert mixed == [1, 1, 0]

    def test_two_names_of_one_content_are_counted_apart(self, server: AdapterServer, client: httpx.Client) -> None:
        for name in "ab":
            put(client, name, server.source("one", 1))
        for name, count in (("a", 2), ("b", 3)):
            complete(client, max_tokens=count, model=name)
        server.assert_quiet()
        for name, count in (("a", 2), ("b", 3), ("(other)", 0)):
            assert self.value(server, "guanaco_adapter_generation_tokens_total", adapter=name) == count, name

    def test_an_old_version_keeps_its_name_and_a_new_name_needs_no_restart(
        self, server: AdapterServer, client: httpx.Client
    ) -> None:
        put(client, "a", server.source("one", 1))
        put(client, "a", server.source("two", 2))
        shown = server.state.metrics.adapters
        old, new = client.get("/v1/adapters/a").json()["history"][0], client.get("/v1/adapters/a").json()["version"]
        metrics = server.state.metrics
        labels = {"max_lora": str(shown._num_slots), "running_lora_adapters": "a", "waiting_lora_adapters": "(other),a"}

        def show() -> float | None:
            metrics.render()  # the steps up to here have been shown
            shown.observe_step((old,), (old, "0" * 64))
            shown.show(1.0)
            return metrics.registry.get_sample_value("vllm:lora_requests_info", labels)

        assert server.call(show) == 1.0  # on the loop: no step comes between
        assert new in server.scheduler.residency.slots.resident, "since it was tried out; no request runs"
        client.delete("/v1/adapters/a")
        families = server.call(lambda: list(metrics.registry.collect()))
        (family,) = [f for f in families if f.name == "vllm:lora_requests_info"]
        assert [sample.labels["running_lora_adapters"] for sample in family.samples] == [""]

    def test_cards_count_loads_and_say_what_is_loading(
        self, server: AdapterServer, client: httpx.Client, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for seed in range(3):
            put(client, "a", server.source("a", seed))
        complete(client, max_tokens=1, model="a")
        card = client.get("/v1/adapters/a").json()
        assert (card["num_loads"], card["num_uses"], card["loading"]) == (3, 1, None)
        assert card["last_used"] >= card["loaded_at"]
        monkeypatch.setattr(server.manager, "_loads", {LoadRequest("a", "s"): None, LoadRequest("n", "t"): None})
        a, n = client.get("/v1/adapters").json()["data"]
        assert (a["state"], a["loading"], n["state"], n["loading"], n["source"]) == ("ready", "s", "loading", "t", "t")
        assert client.get("/v1/adapters/n").json()["object"] == "adapter"
        monkeypatch.undo()
        assert client.get("/v1/adapters/n").status_code == 404
        assert [model["id"] for model in client.get("/v1/models").json()["data"]] == [BASE, "a"]
