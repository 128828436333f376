"""What a demand on the answer's text changes in a prepared request: what may end it, and what no longer cuts it."""

import sys
from dataclasses import replace
from typing import Any

import pytest

from guanaco.server.api.generation.catalog import Caller
from guanaco.server.api.generation.serving import Prepared
from guanaco.server.api.generation.state import ApiState
from guanaco.server.api.http.lifecycle import Admission, Lifecycle
from guanaco.server.api.routes.chat import prepare_chat
from guanaco.server.grammars.spec import choice, json_object
from support.server.api_server import LiveServer, chat_body, make_state
from support.server.fake_engine import BOS, END, EOS, FakeTemplate


def state_with_stops() -> ApiState:
    return replace(make_state(), chat_template=FakeTemplate(stop_strings=("\nHuman:", "<end>")))


def prepare(state: ApiState, **fields: Any) -> Prepared:
    return prepare_chat(state, Caller(None, None, "r"), chat_body(**fields), Admission(Lifecycle()))[0]


def test_a_templates_texts_cut_no_answer_that_ends_by_its_grammar() -> None:
    state = state_with_stops()
    plain = prepare(state).prompts[0].params
    assert plain.stop_strings == ("\nHuman:", "<end>")
    params = prepare(state, response_format={"type": "json_object"}).prompts[0].params
    assert params.stop_strings == ("<end>",), "a control token is no text"
    own = prepare(state, guided_choice=["a"], stop="Human").prompts[0].params
    assert own.stop_strings == ("Human", "<end>"), "the client's own stop string stays"


def test_ends_are_eos_and_the_control_tokens_that_stop() -> None:
    state = state_with_stops()
    params = prepare(state, guided_choice=["a"], stop_token_ids=[BOS, 65]).prompts[0].params
    assert state.ends_of(params) == {EOS, END, BOS}
    params = prepare(state, guided_choice=["a"], ignore_eos=True).prompts[0].params
    assert state.ends_of(params) == set()
    assert replace(state, eos_ids=frozenset({7})).ends_of(params) == set()
    assert replace(state, eos_ids=frozenset({7})).ends_of(prepare(state).prompts[0].params) == {7, END}


def test_the_grammar_is_prepared_and_belongs_to_every_choice() -> None:
    prepared = prepare(make_state(), response_format={"type": "json_object"}, n=3)
    assert prepared.grammar == json_object()
    made: list[object] = []

    def constraint(_: object) -> Any:
        made.append(object())
        return made[-1]

    requests = prepared.engine_requests("a", 0.0, constraint)
    assert [request.constraint for request in requests] == made
    assert len(set(map(id, made))) == 3
    assert prepare(make_state(), guided_choice=["a", "b"]).grammar == choice(["a", "b"])
    assert prepare(make_state()).grammar is None


def test_a_server_without_the_library_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """501, and every other request is served."""
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with LiveServer(make_state()) as server, server.client() as client:
        refused = client.post("/v1/chat/completions", json=chat_body(guided_choice=["a"]))
        assert refused.status_code == 501
        error = refused.json()["error"]
        assert (error["code"], error["param"]) == ("grammar_unavailable", "guided_choice")
        assert "not installed" in error["message"]
        assert client.post("/v1/chat/completions", json=chat_body()).status_code == 200
        server.assert_quiet()


def test_a_process_that_cannot_start_asks_to_try_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("guanaco.server.grammars.compiler._WORKER", "guanaco.server.grammars.nothing")
    with LiveServer(make_state()) as server, server.client() as client:
        refused = client.post("/v1/chat/completions", json=chat_body(guided_choice=["a"]))
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "grammar_unavailable")
        server.assert_quiet()


def test_an_answer_by_a_grammar_of_its_own_has_no_calls() -> None:
    """Its text may look like a call. response_format is different: then the model chooses between calls and content."""
    tools = [{"type": "function", "function": {"name": "look"}}]
    assert prepare(make_state(), tools=tools).tools.reader() is not None
    assert prepare(make_state(), tools=tools, response_format={"type": "json_object"}).tools.reader() is not None
    assert prepare(make_state(), tools=tools, guided_json={"type": "object"}).tools.reader() is None
    assert prepare(make_state(), tools=tools, structured_outputs={"regex": "a+"}).tools.reader() is None


def test_a_grammar_that_is_kept_does_not_wait_for_those_that_compile() -> None:
    with LiveServer(make_state()) as server, server.client() as client:
        body = chat_body(guided_choice=["a"])
        first = client.post("/v1/chat/completions", json=body)
        server.state.grammar_work.shutdown()  # no thread compiles any more
        assert client.post("/v1/chat/completions", json=body).status_code == first.status_code == 200
        server.assert_quiet()
