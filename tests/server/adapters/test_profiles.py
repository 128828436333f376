"""Serving profiles over HTTP: template, stops, sampling defaults and allowed keys of one name, and of nobody else."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.core import GaugeMetricFamily

from guanaco.adapters.errors import AdapterError
from guanaco.adapters.versions.holds import Holder
from guanaco.adapters.versions.names import parse_name_option
from guanaco.adapters.versions.profile import (
    BUILT_IN,
    MAX_PROFILE_BYTES,
    PROFILE_NAME,
    Profile,
    named_profile,
    parse_profile,
)
from guanaco.models.text.chat_template import TEMPLATE_NAMES, named_template
from guanaco.server.api.http.auth import KeyRing
from guanaco.server.engine.request import SamplingParams
from guanaco.server.metrics.adapters import without_names
from support.server.adapter_server import ADMIN, AdapterServer, make_adapter_server
from support.server.api_server import BASE

CHAT = "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "hi"}]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[AdapterServer]:
    with make_adapter_server(tmp_path) as made:
        yield made
        made.assert_quiet()


@pytest.fixture
def client(server: AdapterServer) -> Iterator[httpx.Client]:
    with server.client(headers=ADMIN) as made:
        yield made


def put(client: httpx.Client, name: str, source: str, **fields: Any) -> httpx.Response:
    return client.put(f"/v1/adapters/{name}", json={"source": source, **fields})


def params_of(server: AdapterServer, client: httpx.Client, route: str = CHAT, **fields: Any) -> SamplingParams:
    """What the engine was asked for."""
    what = {"messages": MESSAGES} if route == CHAT else {"prompt": "hi"}
    answer = client.post(route, json={"max_tokens": 2, **what, **fields})
    assert answer.status_code == 200, answer.text
    assert server.model.params is not None
    return server.model.params


def test_the_file_beside_the_adapter(server: AdapterServer, client: httpx.Client) -> None:
    source = server.source("a", 1)
    (server.root / source / PROFILE_NAME).write_text('{"profile": "guanaco", "top_p": 0.5, "top_k": 7}')
    card = put(client, "a", source).json()
    assert card["profile"] == {
        "chat_template": "guanaco", "stop": ["### Human", "### Assistant"], "temperature": 0.7, "top_p": 0.5, "top_k": 7
    }  # fmt: skip
    params = params_of(server, client, model="a")
    assert (params.temperature, params.top_p, params.top_k) == (0.7, 0.5, 7)
    assert params.stop_strings == ("### Human", "### Assistant")
    given = params_of(server, client, model="a", temperature=0.0, top_p=0.9, stop=["x"])
    assert (given.temperature, given.top_p, given.stop_strings) == (0.0, 0.9, ("x", "### Human", "### Assistant"))
    assert params_of(server, client, model="a", ignore_eos=True).stop_strings == ()
    text = params_of(server, client, "/v1/completions", model="a")
    assert (text.temperature, text.stop_strings) == (0.7, ("### Human", "### Assistant"))
    for others in ({"model": BASE}, {"model": BASE, "adapters": [{"name": "a"}]}):
        params = params_of(server, client, **others)
        assert (params.temperature, params.top_p, params.stop_strings) == (1.0, 1.0, ())


def test_the_operators_profile_goes_first_and_lasts(tmp_path: Path) -> None:
    with make_adapter_server(tmp_path) as server, server.client(headers=ADMIN) as client:
        source = server.source("a", 1)
        (server.root / source / PROFILE_NAME).write_text('{"temperature": 0.1}')
        assert put(client, "a", source).json()["profile"] == {"temperature": 0.1}
        version = put(client, "a", source, profile={"temperature": 0.2}).json()["version"]
        assert params_of(server, client, model="a").temperature == 0.2
        assert put(client, "a", server.source("b", 2), profile={"stop": "END"}).json()["version"] != version
    with make_adapter_server(tmp_path) as server, server.client(headers=ADMIN) as client:
        assert params_of(server, client, model="a").stop_strings == ("END",)
        back = client.post("/v1/adapters/a/rollback", json={}).json()
        assert (back["version"], back["profile"]) == (version, {"stop": ["END"]})
        assert put(client, "a", server.source("c", 3)).json()["profile"] == {"stop": ["END"]}


def test_an_adapter_of_the_command_line_has_one_too(tmp_path: Path) -> None:
    with make_adapter_server(tmp_path) as first:
        path = first.root / first.source("a", 1)
    (path / PROFILE_NAME).write_text('{"min_p": 0.25}')
    with make_adapter_server(tmp_path, command_line={"a": path}) as server, server.client(headers=ADMIN) as client:
        assert params_of(server, client, model="a").min_p == 0.25


def test_the_built_in_one_by_its_name(server: AdapterServer, client: httpx.Client) -> None:
    """For the adapters of 2023, which bring none."""
    assert put(client, "a", server.source("a", 1), profile="guanaco").json()["profile"] == BUILT_IN["guanaco"].public()
    assert params_of(server, client, model="a").stop_strings == ("### Human", "### Assistant")
    refused = put(client, "a", "a", profile="vicuna")
    assert (refused.json()["error"]["code"], refused.json()["error"]["param"]) == ("bad_profile", "profile")
    assert put(client, "a", "a", profile=1).status_code == 400


def test_a_profile_on_the_command_line(tmp_path: Path) -> None:
    assert named_profile("guanaco", TEMPLATE_NAMES) == BUILT_IN["guanaco"]
    file = tmp_path / "p.json"
    file.write_text('{"profile": "guanaco", "top_p": 0.5}')
    assert named_profile(str(file), TEMPLATE_NAMES).top_p == 0.5
    for text, said in (("vicuna", "built-in profile"), (str(tmp_path), "built-in profile"), (str(file), "is not JSON")):
        file.write_text("{")
        with pytest.raises(AdapterError, match=said) as refused:
            named_profile(text, TEMPLATE_NAMES)
        assert refused.value.code == "bad_profile"
    assert parse_name_option("a=b=c", "PROFILE") == ("a", "b=c")
    for bad in ("a", "a=", "=b", "a b=c"):
        with pytest.raises(AdapterError):
            parse_name_option(bad, "PROFILE")


def test_only_allowed_keys_know_of_it(tmp_path: Path) -> None:
    yours, mine = KeyRing(["yours"]).find(b"yours"), {"Authorization": "Bearer mine"}
    assert yours is not None
    with make_adapter_server(tmp_path, keys=["mine", "yours"]) as server, server.client() as client:
        body = {"source": server.source("a", 1), "profile": {"allowed_keys": [yours.id]}}
        assert client.put("/v1/adapters/a", json=body, headers=ADMIN).status_code == 201
        for headers, status, seen in (({"X-Api-Key": "yours"}, 200, [BASE, "a"]), (mine, 404, [BASE])):
            models = client.get("/v1/models", headers=headers).json()["data"]
            assert [model["id"] for model in models] == seen
            ask = {"model": "a", "prompt": "hi", "max_tokens": 2}
            mixed = {**ask, "model": BASE, "adapters": [{"name": "a"}]}
            assert client.get("/v1/models/a", headers=headers).status_code == status
            assert client.post("/v1/completions", json=ask, headers=headers).status_code == status
            assert client.post("/v1/completions", json=mixed, headers=headers).status_code == status
            tokenize = {"model": "a", "messages": MESSAGES}
            assert client.post("/tokenize", json=tokenize, headers=headers).status_code == status
        unknown = client.get("/v1/models/b", headers=mine).json()
        assert client.get("/v1/models/a", headers=mine).json() == unknown
        assert server.registry.holds.count(server.registry.entries()[0].version, Holder.REQUEST) == 0


def test_a_restriction_stays_until_another_profile_is_given(tmp_path: Path) -> None:
    """Loads without a profile, vLLM's loads, rollbacks and restarts keep it."""
    closed = {"allowed_keys": ["deadbeef"]}
    with make_adapter_server(tmp_path) as server, server.client(headers=ADMIN) as client:
        one, two = server.source("x", 1), server.source("y", 2)
        assert put(client, "a", one, profile=closed).json()["notes"] == []
        (server.root / two / PROFILE_NAME).write_text('{"temperature": 0.1}')
        kept = put(client, "a", two).json()
        assert kept["profile"] == closed
        assert "was kept" in kept["notes"][-1]
        inplace = {"lora_name": "a", "lora_path": one, "load_inplace": True}
        for body in (inplace, {**inplace, "load_inplace": False}):  # the second is the same again
            assert client.post("/v1/load_lora_adapter", json=body).status_code == 200
        assert client.post("/v1/adapters/a/rollback", json={}).json()["profile"] == closed
    with make_adapter_server(tmp_path) as server, server.client(headers=ADMIN) as client:
        card = client.get("/v1/adapters/a").json()
        assert (card["profile"], "was kept" in card["notes"][-1]) == (closed, True)
        assert put(client, "a", one).json()["profile"] == closed
        assert client.post(CHAT, json={"model": "a", "messages": MESSAGES}).status_code == 404
        taken = put(client, "a", one, profile={}).json()
        assert (taken["profile"], taken["notes"]) == ({}, [])
        assert client.post(CHAT, json={"model": "a", "messages": MESSAGES}).status_code == 200
        assert put(client, "a", two).json()["profile"] == {"temperature": 0.1}


def test_a_profile_of_the_command_line_stays_too(tmp_path: Path) -> None:
    with make_adapter_server(tmp_path) as server, server.client(headers=ADMIN) as client:
        server.registry.load("a", server.root / server.source("x", 1), Profile(allowed_keys=()))
        assert put(client, "a", server.source("y", 2)).json()["profile"] == {"allowed_keys": []}


def test_a_saved_profile_that_is_refused_now_keeps_its_restriction(tmp_path: Path) -> None:
    """A name whose template is gone is broken; a load that mends it opens it to nobody else."""
    with make_adapter_server(tmp_path) as server, server.client(headers=ADMIN) as client:
        profile = {"chat_template": "guanaco", "allowed_keys": ["deadbeef"]}
        assert put(client, "a", server.source("x", 1), profile=profile).status_code == 201
    saved = tmp_path / "store" / "registry.json"
    saved.write_text(saved.read_text().replace('"guanaco"', '"gone"'))
    with make_adapter_server(tmp_path) as server, server.client(headers=ADMIN) as client:
        assert client.get("/v1/adapters/a").json()["state"] == "broken"
        assert put(client, "a", "x").json()["profile"] == {"allowed_keys": ["deadbeef"]}


@pytest.mark.parametrize("how", ["replaced", "removed and loaded"])
def test_an_earlier_version_is_for_the_keys_it_was_published_for(tmp_path: Path, how: str) -> None:
    """By a pin, after a restart, and after a rollback: the name's open profile does not open it."""
    yours = KeyRing(["yours"]).find(b"yours")
    assert yours is not None

    def check(client: httpx.Client, models: dict[str, int]) -> None:
        for model, status in models.items():
            for key, expected in (("mine", status), ("yours", 200)):
                body = {"model": model, "prompt": "hi", "max_tokens": 1}
                answer = client.post("/v1/completions", json=body, headers={"X-Api-Key": key})
                assert answer.status_code == expected, (model, key, answer.text)
            names = client.get("/v1/models", headers={"X-Api-Key": "mine"}).json()["data"]
            assert (model in [card["id"] for card in names]) == (status == 200)

    with make_adapter_server(tmp_path, keys=["mine", "yours"]) as server, server.client() as client:
        body = {"source": server.source("x", 1), "profile": {"allowed_keys": [yours.id]}}
        old = client.put("/v1/adapters/a", json=body, headers=ADMIN).json()["version"]
        target = {"target": f"a@{old}"}
        assert client.put("/v1/aliases/pin", json=target, headers=ADMIN).status_code == 201
        if how != "replaced":
            assert client.delete("/v1/adapters/a", headers=ADMIN).status_code == 200
        body = {"source": server.source("y", 2), "profile": {}}
        assert client.put("/v1/adapters/a", json=body, headers=ADMIN).status_code in (200, 201)
        check(client, {"a": 200, "pin": 404})
    with make_adapter_server(tmp_path, keys=["mine", "yours"]) as server, server.client() as client:
        check(client, {"a": 200, "pin": 404})
        if how == "replaced":
            assert client.post("/v1/adapters/a/rollback", json={}, headers=ADMIN).status_code == 200
            check(client, {"a": 404, "pin": 404})
            assert client.post("/v1/adapters/a/rollback", json={}, headers=ADMIN).status_code == 200
            check(client, {"a": 200, "pin": 404})


def test_metrics_show_no_adapter_that_the_key_may_not_use(tmp_path: Path) -> None:
    yours = KeyRing(["yours"]).find(b"yours")
    assert yours is not None
    with make_adapter_server(tmp_path, keys=["mine", "yours"]) as server, server.client() as client:
        for name, profile in (("secret", {"allowed_keys": [yours.id]}), ("open", {})):
            body = {"source": server.source(name, len(name)), "profile": profile}
            assert client.put(f"/v1/adapters/{name}", json=body, headers=ADMIN).status_code == 201
            ask = {"model": name, "prompt": "hi", "max_tokens": 1}
            assert client.post("/v1/completions", json=ask, headers={"X-Api-Key": "yours"}).status_code == 200
        for accept in ("", "application/openmetrics-text; version=1.0.0"):
            for headers, sees in (({"X-Api-Key": "yours"}, True), (ADMIN, True), ({"X-Api-Key": "mine"}, False)):
                text = client.get("/metrics", headers={**headers, "Accept": accept}).text
                assert ("secret" in text, 'adapter="open"' in text) == (sees, True)


def test_lists_of_names_in_the_metrics_lose_hidden_ones() -> None:
    labels = ["max_lora", "running_lora_adapters", "waiting_lora_adapters"]
    family = GaugeMetricFamily("vllm:lora_requests_info", "x", labels=labels)
    family.add_metric(["8", "open,secret", "secret"], 1.0)
    (shown,) = without_names([family], {"secret"})
    assert [sample.labels for sample in shown.samples] == [dict(zip(labels, ("8", "open", ""), strict=True))]
    assert family.samples[0].labels["waiting_lora_adapters"] == "secret", "the registry's own stays"


def test_without_keys_an_allow_list_lets_nobody_in(server: AdapterServer, client: httpx.Client) -> None:
    put(client, "a", server.source("a", 1), profile={"allowed_keys": []})
    assert client.post(CHAT, json={"model": "a", "messages": MESSAGES}).status_code == 404


BAD: list[tuple[dict[str, Any], str]] = [
    ({"profile": "vicuna"}, "profile"),
    ({"profile": ["guanaco"]}, "profile"),
    ({"chat_template": "../../etc/passwd"}, "chat_template"),
    ({"chat_template": 1}, "chat_template"),
    ({"stop": 1}, "stop"),
    ({"stop": [""]}, "stop"),
    ({"stop": ["a"] * 5}, "stop"),
    ({"stop": ["a" * 129]}, "stop"),
    ({"temperature": 2.5}, "temperature"),
    ({"temperature": "0.5"}, "temperature"),
    ({"temperature": True}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"top_k": 1.5}, "top_k"),
    ({"top_k": 1001}, "top_k"),
    ({"min_p": -0.1}, "min_p"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"allowed_keys": "all"}, "allowed_keys"),
    ({"allowed_keys": [1]}, "allowed_keys"),
    ({"temprature": 0.5}, "temprature"),
]


def test_bad_profiles_change_nothing(server: AdapterServer, client: httpx.Client) -> None:
    source = server.source("a", 1)
    before = put(client, "a", source, profile={"temperature": 0.5}).json()
    for fields, field in BAD:
        refused = put(client, "a", source, profile=fields)
        error = refused.json()["error"]
        assert (refused.status_code, error["code"], error["param"]) == (400, "bad_profile", field), fields
    file = server.root / source / PROFILE_NAME
    for text in ("", "[]", "{", '{"top_p": NaN}', '{"top_p": 1, "top_p": 1}', "\x00", '{"stop": [1]}'):
        file.write_text(text)
        assert put(client, "a", source).json()["error"]["code"] == "bad_profile", text
    file.write_text(json.dumps({"stop": "a" * MAX_PROFILE_BYTES}))
    assert put(client, "a", source).json()["error"]["code"] == "file_too_large"
    file.unlink()
    file.symlink_to("/etc/passwd")
    assert put(client, "a", source).json()["error"]["code"] == "outside_root"
    after = client.get("/v1/adapters/a").json()
    assert {key: after[key] for key in ("version", "profile", "loaded_at")} == {
        key: before[key] for key in ("version", "profile", "loaded_at")
    }


@pytest.mark.parametrize("name", BUILT_IN)
def test_built_in_profiles_are_valid_and_come_back(name: str) -> None:
    profile = parse_profile({"profile": name}, TEMPLATE_NAMES)
    assert profile == BUILT_IN[name]
    assert parse_profile(json.loads(json.dumps(profile.public())), TEMPLATE_NAMES) == profile
    assert profile.chat_template is not None
    assert named_template(profile.chat_template).stop_strings == profile.stop


def test_an_empty_allow_list_is_not_none() -> None:
    closed = parse_profile({"allowed_keys": []}, frozenset())
    assert (closed, closed.public()) == (Profile(allowed_keys=()), {"allowed_keys": []})


def test_a_template_that_is_gone_is_refused() -> None:
    with pytest.raises(AdapterError, match="chat_template"):
        parse_profile({"profile": "guanaco"}, frozenset({"vicuna"}))
