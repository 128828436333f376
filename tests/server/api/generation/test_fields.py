"""Fields of other servers: honoured, refused by name, harmless, or ignored and named; every field on every route."""

import json
from collections.abc import Callable, Mapping
from typing import Any

import httpx
import pytest

from guanaco.server.api.generation.fields import (
    ALIASES,
    ALIASES_IN_COMPLETIONS,
    ALIASES_OF_TOKENIZE,
    HARMLESS,
    HARMLESS_IN_MESSAGE,
    INSTEAD,
    REFUSED_IN_CHAT,
    REFUSED_IN_COMPLETIONS,
    REFUSED_IN_MESSAGE,
    asks_for_nothing,
)
from guanaco.server.api.generation.ignored import HEADER, MAX_NAME_CHARS, MAX_NAMES
from guanaco.server.api.generation.protocol import ChatBody, CompletionBody, DetokenizeBody, TokenizeBody
from guanaco.server.api.values.unsupported import REFUSED
from support.server.api_server import BASE, PIRATE, LiveServer, sse_data

CHAT, COMPLETIONS, TOKENIZE, DETOKENIZE = "/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize"
MESSAGES = [{"role": "user", "content": "hi"}]
# kind of body → (route, a good body, the fields that it must refuse, its own)
BODIES: Mapping[str, tuple[str, dict[str, Any], Mapping[str, tuple[Any, ...]], set[str]]] = {
    "chat": (CHAT, {"model": BASE, "messages": MESSAGES, "max_tokens": 1}, REFUSED_IN_CHAT, set(ChatBody.model_fields)),
    "completions": (
        COMPLETIONS,
        {"model": BASE, "prompt": "hi", "max_tokens": 1},
        REFUSED_IN_COMPLETIONS,
        set(CompletionBody.model_fields),
    ),
    "tokenize chat": (TOKENIZE, {"messages": MESSAGES}, REFUSED_IN_CHAT, set(TokenizeBody.model_fields)),
    "tokenize prompt": (TOKENIZE, {"prompt": "hi"}, REFUSED_IN_COMPLETIONS, set(TokenizeBody.model_fields)),
    "detokenize": (DETOKENIZE, {"tokens": [104]}, REFUSED, set(DetokenizeBody.model_fields)),
}
ANOTHER = {"x": ["asks for something"]}  # a value that no refused field may have

# The fields of the published request schemas (see the module's docstring), beyond those that this server has itself.
PUBLISHED = {
    "llama.cpp": """
        lora n_predict repeat_penalty repeat_last_n typical_p mirostat mirostat_tau mirostat_eta
        dry_multiplier dry_base dry_allowed_length dry_penalty_last_n dry_sequence_breakers xtc_probability
        xtc_threshold samplers dynatemp_range dynatemp_exponent top_n_sigma n_probs min_keep grammar
        json_schema n_keep n_discard n_indent id_slot cache_prompt return_tokens post_sampling_probs
        response_fields t_max_predict_ms n_cmpl n_cache_reuse adaptive_target adaptive_decay backend_sampling
        grammar_lazy grammar_triggers preserved_tokens chat_format chat_parser generation_prompt
        parse_tool_calls reasoning_format reasoning_budget_tokens input_prefix input_suffix input_extra""",
    "SGLang": """
        lora_path input_ids image_data video_data audio_data sampling_params return_logprob logprob_start_len
        top_logprobs_num token_ids_logprob return_hidden_states return_routed_experts return_prompt_token_ids
        return_meta_info reasoning_effort task regex ebnf stop_regex no_stop_trim continue_final_message
        session_id session_params separate_reasoning stream_reasoning chat_template_kwargs max_dynamic_patch
        min_dynamic_patch use_audio_in_video images_config custom_logit_processor custom_params rid extra_key
        priority bootstrap_host bootstrap_port bootstrap_room routed_dp_rank disagg_prefill_dp_rank
        data_parallel_rank custom_labels structural_tag max_new_tokens min_new_tokens json_schema""",
    "TGI and LoRAX": """
        inputs parameters adapter_id adapter_source merged_adapters api_token typical_p do_sample
        max_new_tokens ignore_eos_token return_full_text truncate watermark details decoder_input_details
        top_n_tokens return_k_alternatives apply_chat_template grammar tool_prompt stop_sequences""",
    "mistral.rs": """
        grammar dry_multiplier dry_base dry_allowed_length dry_sequence_breakers enable_thinking
        web_search_options truncate_sequence reasoning_effort""",
    "Ollama": "images format options system template raw keep_alive context num_predict num_keep truncate",
    "Triton": """
        text_input parameters lora_task_id lora_weights lora_config beam_width end_id bad_words stop_words
        random_seed runtime_top_k runtime_top_p return_log_probs return_context_logits
        return_generation_logits embedding_bias prompt_embeds""",
    "vLLM": """
        use_beam_search length_penalty spaces_between_special_tokens truncate_prompt_tokens truncation_side
        prompt_logprobs allowed_token_ids bad_words documents chat_template chat_template_kwargs
        media_io_kwargs mm_processor_kwargs structured_outputs request_id return_tokens_as_token_ids
        return_token_ids kv_transfer_params ec_transfer_params vllm_xargs repetition_detection
        thinking_token_budget include_reasoning guided_json guided_regex guided_choice guided_grammar
        logits_processors lora_request""",
    "OpenAI": """
        audio metadata modalities parallel_tool_calls prediction prompt_cache_key reasoning_effort
        response_format safety_identifier service_tier store tool_choice tools verbosity web_search_options
        functions function_call suffix schema""",
}


def ignored_count(server: LiveServer) -> float:
    return server.state.metrics.registry.get_sample_value("guanaco_ignored_fields_total") or 0.0


@pytest.mark.parametrize("publisher", PUBLISHED)
def test_every_published_field_is_on_a_list(publisher: str) -> None:
    listed = ChatBody.model_fields.keys() | REFUSED.keys() | ALIASES.keys() | HARMLESS | ALIASES_OF_TOKENIZE.keys()
    assert set(PUBLISHED[publisher].split()) - listed == set()


def test_no_field_is_on_two_lists() -> None:
    for own, refused in ((ChatBody, REFUSED_IN_CHAT), (CompletionBody, REFUSED_IN_COMPLETIONS)):
        assert not refused.keys() & own.model_fields.keys()
        assert not HARMLESS & own.model_fields.keys()
        assert set(ALIASES.values()) <= own.model_fields.keys()
    assert not REFUSED.keys() & ALIASES.keys()
    assert not (REFUSED.keys() | ALIASES.keys()) & HARMLESS
    assert not REFUSED_IN_MESSAGE.keys() & HARMLESS_IN_MESSAGE
    assert INSTEAD.keys() <= REFUSED_IN_CHAT.keys() | REFUSED_IN_COMPLETIONS.keys()


@pytest.mark.parametrize("kind", BODIES)
def test_each_refused_field_is_refused_by_name(client: httpx.Client, kind: str) -> None:
    route, good, refused, _ = BODIES[kind]
    wrong = []
    for name in refused.keys() - good.keys() - ({"prompt", "messages"} if route == TOKENIZE else set()):
        response = client.post(route, json={**good, name: ANOTHER})
        error = response.json().get("error", {})
        if (response.status_code, error.get("code"), error.get("param")) != (400, "unsupported_parameter", name):
            wrong.append((name, response.text))
        elif name not in error["message"] or INSTEAD.get(name, "") not in error["message"]:
            wrong.append((name, error["message"]))
    assert not wrong


@pytest.mark.parametrize("kind", BODIES)
def test_what_asks_for_nothing_or_changes_nothing_passes_unnamed(client: httpx.Client, kind: str) -> None:
    route, good, refused, _ = BODIES[kind]
    own = {"prompt", "messages"}
    neutral = {name: values[0] for name, values in refused.items() if values and name not in own}
    nulls = dict.fromkeys(refused.keys() - neutral.keys() - good.keys() - own)
    harmless = dict.fromkeys(HARMLESS, "x")
    for extra in (neutral, nulls, harmless):
        response = client.post(route, json={**good, **extra})
        assert response.status_code == 200, response.text
        assert HEADER not in response.headers


@pytest.mark.parametrize("kind", BODIES)
def test_a_field_on_no_list_is_ignored_counted_and_named(server: LiveServer, client: httpx.Client, kind: str) -> None:
    route, good, _, _ = BODIES[kind]
    before = ignored_count(server)
    response = client.post(route, json={**good, "no_such_field": 1, "another.one": [], "unset": None})
    assert response.status_code == 200
    assert response.headers[HEADER] == "no_such_field, another.one"
    assert ignored_count(server) == before + 2


def test_streams_name_them_too(client: httpx.Client) -> None:
    response = client.post(CHAT, json={**BODIES["chat"][1], "stream": True, "no_such_field": 1})
    assert response.headers[HEADER] == "no_such_field"
    assert sse_data(response.content)[-1] == "[DONE]"


def test_nested_fields_count_too(server: LiveServer, client: httpx.Client) -> None:
    parts = [{"type": "text", "text": "hi", "zoom": 1}, {"type": "text", "text": "hi", "zoom": 2, "cache_control": {}}]
    messages = [{"role": "user", "name": "Ann", "content": parts, "mood": "good"}, {**MESSAGES[0], "mood": "bad"}]
    body = {"model": BASE, "messages": messages, "max_tokens": 1, "stream": True, "stream_options": {"every": 5}}
    response = client.post(CHAT, json=body)
    names = response.headers[HEADER].split(", ")
    assert sorted(names) == ["messages.content.zoom", "messages.mood", "stream_options.every"]


def test_the_header_is_clean_and_bounded(server: LiveServer, client: httpx.Client) -> None:
    good = BODIES["chat"][1]
    evil = {"a\r\nX-Evil: 1": 1, "naïve, x": 1, "y" * 5000: 1, "": 1}
    names = client.post(CHAT, json={**good, **evil}).headers[HEADER].split(", ")
    assert names == ["a??X-Evil??1", "na?ve??x", "y" * MAX_NAME_CHARS, "?"]
    many = {f"field{i}": i for i in range(1000)}
    header = client.post(CHAT, json={**good, **many}).headers[HEADER]
    assert header.count(", ") == MAX_NAMES
    assert header.endswith(f", +{1000 - MAX_NAMES}")
    text = server.state.metrics.render()[0].decode()
    assert "field1" not in text
    assert "Evil" not in text


@pytest.mark.parametrize(
    ("alias", "value", "read"),
    [
        ("n_predict", 3, lambda params: params.max_tokens),
        ("max_new_tokens", 3, lambda params: params.max_tokens),
        ("max_output_tokens", 3, lambda params: params.max_tokens),
        ("num_predict", 3, lambda params: params.max_tokens),
        ("min_new_tokens", 1, lambda params: params.min_tokens),
        ("repeat_penalty", 1.25, lambda params: params.repetition_penalty),
        ("ignore_eos_token", True, lambda params: params.ignore_eos),
        ("sampling_seed", 7, lambda params: params.seed),
        ("random_seed", 7, lambda params: params.seed),
        ("stop_sequences", ["zz"], lambda params: list(params.stop_strings)),
        ("n_cmpl", 1, lambda params: 1),
    ],
)
@pytest.mark.parametrize("kind", ["chat", "completions"])
def test_aliases_are_honoured(
    server: LiveServer, client: httpx.Client, kind: str, alias: str, value: Any, read: Callable
) -> None:
    route, good, _, _ = BODIES[kind]
    body = {**good, "max_tokens": 3}
    body.pop(ALIASES[alias], None)
    response = client.post(route, json={**body, alias: value})
    assert response.status_code == 200, response.text
    assert HEADER not in response.headers
    assert read(server.engine.requests[-1].params) == value


def test_the_cases_cover_all_aliases() -> None:
    marks = {mark.args[0]: mark.args[1] for mark in test_aliases_are_honoured.pytestmark if mark.name == "parametrize"}
    assert {case[0] for case in marks["alias", "value", "read"]} == ALIASES.keys()
    assert ALIASES_IN_COMPLETIONS.keys() - ALIASES.keys() == {"max_completion_tokens"}


def test_an_alias_and_its_field(server: LiveServer, client: httpx.Client) -> None:
    good = BODIES["chat"][1]
    assert client.post(CHAT, json={**good, "n_predict": 1}).status_code == 200, "the same value"
    error = client.post(CHAT, json={**good, "n_predict": 2}).json()["error"]
    assert (error["code"], error["param"]) == ("invalid_value", "n_predict")
    assert "max_tokens" in error["message"]
    error = client.post(CHAT, json={"model": BASE, "messages": MESSAGES, "n_predict": -1}).json()["error"]
    assert error["param"] == "n_predict"
    assert error["message"].startswith("n_predict: ")
    assert client.post(COMPLETIONS, json={"model": BASE, "prompt": "x", "max_completion_tokens": 2}).is_success
    assert server.engine.requests[-1].params.max_tokens == 2


def test_llama_cpp_asks_for_an_adapter_by_its_number(server: LiveServer, client: httpx.Client) -> None:
    before = len(server.engine.requests)
    response = client.post(CHAT, json={**BODIES["chat"][1], "lora": [{"id": 0, "scale": 1.0}]})
    assert (response.status_code, response.json()["error"]["param"]) == (404, "lora[0].id")
    mixture = [{"name": PIRATE, "weight": 0.5}]
    response = client.post(CHAT, json={**BODIES["chat"][1], "adapters": mixture})
    assert (response.status_code, response.json()["error"]["param"]) == (400, "adapters[0]")
    assert len(server.engine.requests) == before, "the base must not answer in an adapter's place"


@pytest.mark.parametrize("name", REFUSED_IN_MESSAGE)
def test_fields_of_messages_are_refused(client: httpx.Client, name: str) -> None:
    for route, more in ((CHAT, {"model": BASE}), (TOKENIZE, {})):
        error = client.post(route, json={**more, "messages": [{**MESSAGES[0], name: ANOTHER}]}).json()["error"]
        assert name in error["message"]
        assert error["param"] == "messages[0]"


def test_numbers_are_no_truth_values() -> None:
    assert asks_for_nothing(0, (0,))
    assert asks_for_nothing(0.0, (0,))
    assert asks_for_nothing(False, (False,))
    assert not asks_for_nothing(0, (False,))
    assert not asks_for_nothing(True, (1,))


class TestTokenRoutes:
    """/tokenize and /detokenize honour and refuse what the generating routes do."""

    @pytest.mark.parametrize(
        "field",
        [
            {"continue_final_message": True},
            {"tools": [{"type": "function"}]},
            {"chat_template": "{{ messages }}"},
            {"chat_template_kwargs": {"messages": 1}},
            {"documents": [{}]},
            {"add_special_tokens": True},
            {"add_special": True},
            {"lora": [{"id": 0, "scale": 1}]},
            {"model": "nobody"},
            {"adapters": [{"name": "nobody"}]},
            {"adapters": [{"name": PIRATE, "scale": 100}]},
            {"model": PIRATE, "adapters": [{"name": PIRATE}]},
        ],
    )
    def test_tokenize_refuses_what_chat_refuses(self, client: httpx.Client, field: dict) -> None:
        chat = client.post(CHAT, json={**BODIES["chat"][1], **field})
        tokenize = client.post(TOKENIZE, json={"messages": MESSAGES, **field})
        if "add_special" not in field:  # llama.cpp's name, of its /tokenize only
            assert tokenize.status_code == chat.status_code
            assert tokenize.json() == chat.json()
        assert 400 <= tokenize.status_code < 500

    def test_it_takes_a_whole_chat_request_and_gives_its_ids(self, server: LiveServer, client: httpx.Client) -> None:
        """vllm-router's cache-aware policy sends the request as it is."""
        body = {**BODIES["chat"][1], "temperature": 0.5, "stream": False, "logprobs": True, "user": "u", "seed": 3}
        for more in ({}, {"model": PIRATE}, {"adapters": [{"name": PIRATE, "scale": 0.5}]}):
            response = client.post(TOKENIZE, json={**body, **more})
            assert HEADER not in response.headers
            assert client.post(CHAT, json={**body, **more}).is_success
            assert tuple(response.json()["tokens"]) == server.engine.requests[-1].prompt_token_ids

    def test_other_servers_names(self, client: httpx.Client) -> None:
        answer = client.post(TOKENIZE, json={"prompt": "a", "add_special": False, "with_pieces": True}).json()
        assert answer["tokens"] == [97]
        assert answer["token_strs"] == ["a"]

    def test_detokenize_knows_its_model(self, client: httpx.Client) -> None:
        assert client.post(DETOKENIZE, json={"tokens": [97], "model": PIRATE}).json() == {"prompt": "a"}
        response = client.post(DETOKENIZE, json={"tokens": [97], "model": "nobody"})
        assert (response.status_code, response.json()["error"]["code"]) == (404, "model_not_found")

    def test_detokenize_skips_special_tokens_where_asked(self, server: LiveServer, client: httpx.Client) -> None:
        tokens = [*b"ab", server.state.tokenizer.eos_ids[0]]
        assert client.post(DETOKENIZE, json={"tokens": tokens}).json() == {"prompt": "ab<eos>"}
        answer = client.post(DETOKENIZE, json={"tokens": tokens, "skip_special_tokens": True}).json()
        assert answer == {"prompt": "ab"}


def test_a_good_body_is_good() -> None:
    """Else the tests above would show nothing."""
    for route, good, _, own in BODIES.values():
        assert good.keys() <= own, route
        assert json.dumps(good)
