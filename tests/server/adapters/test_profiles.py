"""Serving profiles over HTTP: template, stops, sampling defaults and allowed keys of one name, and of nobody else."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from guanaco.adapters.errors import AdapterError
from guanaco.adapters.versions.profile import (
    BUILT_IN,
    MAX_PROFILE_BYTES,
    PROFILE_NAME,
    Profile,
    named_profile,
    parse_profile,
)
from guanaco.adapters.versions.registry import parse_name_option
from guanaco.models.text.chat_template import TEMPLATE_NAMES, named_template
from guanaco.server.api.http.auth import KeyRing
from guanaco.server.engine.request import SamplingParams
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
        assert put(client, "a", server.source("c", 3)).json()["profile"] is None


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
        assert server.registry.num_leases(server.registry.entries()[0].version) == 0


def test_a_new_version_does_not_open_a_closed_name(server: AdapterServer, client: httpx.Client) -> None:
    """Whether it comes by our route, by vLLM's or by a rollback; only an operator's profile opens the name."""

    def allowed() -> Any:
        return client.get("/v1/adapters/a").json().get("profile", {}).get("allowed_keys")

    one, two = server.source("a", 1), server.source("b", 2)
    put(client, "a", one, profile={"allowed_keys": ["x"], "temperature": 0.5})
    put(client, "a", two)
    assert allowed() == ["x"]
    body = {"lora_name": "a", "lora_path": one, "load_inplace": True}
    assert client.post("/v1/load_lora_adapter", json=body).status_code == 200
    assert allowed() == ["x"]
    assert client.post("/v1/adapters/a/rollback", json={}).status_code == 200
    assert allowed() == ["x"]
    put(client, "a", two, profile={})
    assert allowed() is None


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
