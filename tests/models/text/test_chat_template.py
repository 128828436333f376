"""Templates: our formats byte for byte, transformers' results for real ones, and nothing that the sandbox forbids."""

import json
from pathlib import Path
from typing import Any

import pytest

from guanaco.models.text.chat_template import (
    MAX_OUTPUT_CHARS,
    MAX_TEMPLATE_CHARS,
    ChatTemplate,
    TemplateError,
    load_template,
    named_template,
)
from guanaco.models.text.named_templates import NAMED
from support.models.tiny_tokenizers import TEMPLATES

SHARED = Path("/work/shared/data")
CURIOUS = "A chat between a curious human and an artificial intelligence assistant."
POLITE = "The assistant gives helpful, detailed, and polite answers to the user's questions."
TURNS = [
    {"role": "user", "content": "q1"},
    {"role": "assistant", "content": "a1"},
    {"role": "user", "content": "q2"},
]


def render(name: str, messages: list[dict[str, Any]], **options: Any) -> str:
    return named_template(name).render(messages, bos_token="<s>", eos_token="</s>", **options)


def test_guanaco_is_the_papers_evaluation_format() -> None:
    """eval/generations of artidoro/qlora: one space everywhere, no newline, none at the end."""
    assert render("guanaco", TURNS[:1]) == f"{CURIOUS} {POLITE} ### Human: q1 ### Assistant:"
    expected = f"{CURIOUS} {POLITE} ### Human: q1 ### Assistant: a1 ### Human: q2 ### Assistant:"
    assert render("guanaco", TURNS) == expected
    assert (
        render("guanaco", TURNS[:2], add_generation_prompt=False) == expected[: -len(" ### Human: q2 ### Assistant:")]
    )


def test_guanaco_takes_another_system_sentence_or_none() -> None:
    system = [{"role": "system", "content": "Be brief."}, *TURNS]
    tail = "### Human: q1 ### Assistant: a1 ### Human: q2 ### Assistant:"
    assert render("guanaco", system) == f"Be brief. {tail}"
    assert render("guanaco", [{"role": "system", "content": ""}, *TURNS]) == tail


@pytest.mark.skipif(not SHARED.is_dir(), reason="the OA prompts are not here")
def test_guanaco_without_system_makes_the_oa_prompts() -> None:
    """Every prompt of eval/prompts/oa_questions.jsonl that can be cut back into its turns without doubt."""
    num_equal = 0
    for line in (SHARED / "oa_questions.jsonl").read_text(encoding="utf-8").splitlines():
        prompt = json.loads(line)["input"]
        messages = [{"role": "system", "content": ""}]
        for turn in prompt.removesuffix(" ### Assistant:").removeprefix("### Human: ").split(" ### Human: "):
            question, separator, answer = turn.partition(" ### Assistant: ")
            messages.append({"role": "user", "content": question})
            if separator:
                messages.append({"role": "assistant", "content": answer})
        num_equal += render("guanaco", messages) == prompt
    assert num_equal == 953


@pytest.mark.parametrize(
    ("name", "one", "three"),
    [
        (
            "guanaco-card",
            f"{CURIOUS}{POLITE}\n### Human: q1 ### Assistant:",
            f"{CURIOUS}{POLITE}\n### Human: q1 ### Assistant: a1\n### Human: q2 ### Assistant:",
        ),
        (
            "guanaco-plain",
            "### Human: q1\n### Assistant:",
            "### Human: q1\n### Assistant: a1\n### Human: q2\n### Assistant:",
        ),
        (
            "vicuna",
            f"A chat between a curious user and an artificial intelligence assistant. {POLITE} USER: q1 ASSISTANT:",
            f"A chat between a curious user and an artificial intelligence assistant. {POLITE} USER: q1 ASSISTANT:"
            " a1</s>USER: q2 ASSISTANT:",
        ),
        (
            "alpaca",
            "Below is an instruction that describes a task. Write a response that appropriately completes the request."
            "\n\n### Instruction:\nq1\n\n### Response:",
            "Below is an instruction that describes a task. Write a response that appropriately completes the request."
            "\n\n### Instruction:\nq1\n\n### Response:\na1\n\n### Instruction:\nq2\n\n### Response:",
        ),
        ("llama2", "[INST] q1 [/INST]", "[INST] q1 [/INST] a1 </s><s>[INST] q2 [/INST]"),
        (
            "chatml",
            "<|im_start|>user\nq1<|im_end|>\n<|im_start|>assistant\n",
            "<|im_start|>user\nq1<|im_end|>\n<|im_start|>assistant\na1<|im_end|>\n<|im_start|>user\nq2<|im_end|>\n"
            "<|im_start|>assistant\n",
        ),
    ],
)
def test_named_formats(name: str, one: str, three: str) -> None:
    assert render(name, TURNS[:1]) == one
    assert render(name, TURNS) == three


def test_named_formats_with_a_system_message() -> None:
    system = [{"role": "system", "content": "S"}, *TURNS[:1]]
    assert render("llama2", system) == "[INST] <<SYS>>\nS\n<</SYS>>\n\nq1 [/INST]"
    assert render("vicuna", system) == "S USER: q1 ASSISTANT:"
    assert render("alpaca", system) == "S\n\n### Instruction:\nq1\n\n### Response:"
    assert render("chatml", system).startswith("<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nq1")


@pytest.mark.parametrize("name", NAMED)
def test_named_templates_are_not_complete_and_know_how_their_models_run_on(name: str) -> None:
    template = named_template(name)
    assert not template.is_complete
    assert not render(name, TURNS).startswith("<s>")
    if name.startswith("guanaco"):
        assert template.stop_strings == ("### Human", "### Assistant")


@pytest.mark.parametrize("name", [name for name in NAMED if name != "chatml"])
@pytest.mark.parametrize(
    "roles", [["assistant"], ["user", "user"], ["user", "system"], ["system", "system"], ["user", "assistant", "tool"]]
)
def test_turns_that_no_model_has_seen_are_refused(name: str, roles: list[str]) -> None:
    with pytest.raises(TemplateError, match="alternate"):
        render(name, [{"role": role, "content": "x"} for role in roles])


# --- transformers as the oracle -----------------------------------------------------------------------------------

CONVERSATIONS = [
    TURNS,
    [{"role": "system", "content": "  Be\nbrief. "}, *TURNS],
    [{"role": "user", "content": " spaces \n and é 🙂 <b>&amp;</b> "}],
    [{"role": "user", "content": "x", "name": None, "tool_calls": None}, {"role": "assistant", "content": "{{ 1 }}"}],
]
CONSTRUCTS = {
    "tojson": "{{ messages | tojson }}{{ messages[0] | tojson(indent=2) }}"
    "{{ {'b': '<é>', 'a': 1} | tojson(sort_keys=true) }}",
    "namespace": "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
    "loop controls": "{% for m in messages %}{% if loop.index > 2 %}{% break %}{% endif %}{{ m.content }}{% endfor %}",
    "trimming": "a\n  {% if true %}\n  b\n  {% endif %}\nc\n{#- note -#}\n  d\n",
    "generation": "{% for m in messages %}{% generation %}{{ m['content'] }}{% endgeneration %}{% endfor %}",
    "absent": "{{ tools }}|{{ documents }}|{{ nothing }}|{% if tools is defined and tools %}x{% endif %}"
    "{% if bos_token is defined %}{{ bos_token }}{% endif %}{{ messages[0].name is defined }}",
    "macro": "{% macro turn(m) %}[{{ m.role | upper }}] {{ caller() if caller else '' }}{% endmacro %}"
    "{% for m in messages %}{{ turn(m) }}{% endfor %}",
    "methods": "{{ messages[0].content.strip().split('q') }}{{ messages[-1]['content'].startswith('q') }}"
    "{% for key, value in messages[0].items() %}{{ key }}={{ value }};{% endfor %}{{ dict(a=1)['a'] }}",
    "numbers": "{{ 3 * 'ab' }}{{ 2 ** 10 }}{{ '%05.1f' % 2.5 }}{{ 7 // 2 }}{{ [1] * 3 }}",
}


@pytest.mark.parametrize("conversation", CONVERSATIONS, ids=range(len(CONVERSATIONS)))
@pytest.mark.parametrize("add_generation_prompt", [True, False])
@pytest.mark.parametrize("name", [*TEMPLATES, *CONSTRUCTS])
def test_renders_what_transformers_renders(
    name: str, add_generation_prompt: bool, conversation: list[dict[str, Any]]
) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    source = {**TEMPLATES, **CONSTRUCTS}[name]
    # As apply_chat_template prepares them.
    cleaned = [{key: value for key, value in m.items() if value is not None} for m in conversation]
    tokens = {"bos_token": "<s>", "eos_token": "</s>"}
    try:
        expected = render_jinja_template(
            [cleaned], chat_template=source, add_generation_prompt=add_generation_prompt, **tokens
        )[0][0]
    except Exception:  # a template that does not fit the conversation has to fail here as well
        with pytest.raises(TemplateError):
            ChatTemplate(source).render(conversation, add_generation_prompt=add_generation_prompt, **tokens)
        return
    assert ChatTemplate(source).render(conversation, add_generation_prompt=add_generation_prompt, **tokens) == expected


def test_strftime_now() -> None:
    assert ChatTemplate("{{ strftime_now('%Y-%m') }}").render([])[:2] == "20"


# --- what must not work -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__ }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ ''['__class__'] }}",
        "{{ ('' | attr('__class__')) }}",
        "{{ '{0.__class__}'.format(1) }}",
        "{{ '{0.__class__}' | format(1) }}{{ ''.__class__ }}",
        "{{ cycler.__init__.__globals__.os }}",
        "{{ namespace.__init__.__globals__ }}",
        "{{ namespace(__class__=1) }}",
        "{% set ns = namespace() %}{% set ns.__x = 1 %}",
        "{{ self.__init__.__globals__ }}",
        "{{ raise_exception.__globals__ }}",
        "{{ strftime_now.__code__ }}",
        "{{ dict.mro() }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update({'role': 'x'}) }}",
        "{{ messages[0].clear() }}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}",
        "{{ open('/etc/passwd').read() }}",
        "{% for i in range(1000000000) %}{% endfor %}",
        "{{ 'x' * 10000000000 }}",
        "{{ [0] * 10000000000 }}",
        "{{ 10 ** 1000000000 }}",
        "{% for i in range(99999) %}{{ 'x' * 100000 }}{% endfor %}",
        "{{ lipsum(1000000) }}",
    ],
)
def test_escapes_and_bombs_are_refused(source: str) -> None:
    with pytest.raises(TemplateError):
        ChatTemplate(source).render(TURNS)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("{{ raise_exception('No tools here!') }}", "No tools here!"),
        ("{{ messages[9]['role'] }}", "9"),
        ("{{ missing.field }}", "missing"),
        ("{{ 1 / 0 }}", "division"),
        ("{{ messages[0]['content'] + 1 }}", "str"),
        ("{{ messages | tojson(indent=messages) }}", "."),
        ("{{ messages | no_such_filter }}", "no_such_filter"),
    ],
)
def test_what_goes_wrong_inside_is_one_error(source: str, words: str) -> None:
    with pytest.raises(TemplateError, match=words):
        ChatTemplate(source).render(TURNS)


def test_syntax_errors_name_the_line() -> None:
    with pytest.raises(TemplateError, match="line 3"):
        ChatTemplate("{{ 1 }}\n\n{% for %}")


def test_sizes_are_limited() -> None:
    with pytest.raises(TemplateError, match="characters"):
        ChatTemplate("x" * (MAX_TEMPLATE_CHARS + 1))
    long = [{"role": "user", "content": "x" * (MAX_OUTPUT_CHARS // 4)}]
    assert len(ChatTemplate("{% for i in range(4) %}{{ messages[0].content }}{% endfor %}").render(long)) > 0
    with pytest.raises(TemplateError, match="exceeds"):
        ChatTemplate("{% for i in range(5) %}{{ messages[0].content }}{% endfor %}").render(long)


def test_only_plain_data_get_into_a_template() -> None:
    class Trap(str):
        def secret(self) -> str:
            return "secret"

    assert ChatTemplate("{{ messages[0].content }}").render([{"role": "user", "content": Trap("x")}]) == "x"
    with pytest.raises(TemplateError):
        ChatTemplate("{{ messages[0].content.secret() }}").render([{"role": "user", "content": Trap("x")}])
    with pytest.raises(TemplateError, match="PosixPath"):
        ChatTemplate("{{ messages }}").render([{"role": "user", "content": Path("/")}])


def test_rendering_leaves_no_trace() -> None:
    """A namespace or a changed message of one rendering is not seen by the next."""
    template = ChatTemplate("{% set ns = namespace(n=1) %}{% set ns.n = ns.n + 1 %}{{ ns.n }}{{ messages | length }}")
    assert template.render(TURNS) == template.render(TURNS) == "23"
    assert TURNS[0] == {"role": "user", "content": "q1"}


def test_templates_by_name_and_from_files(tmp_path: Path) -> None:
    assert load_template("guanaco") is named_template("guanaco")
    file = tmp_path / "own.jinja"
    file.write_text("{{ messages[0]['content'] }}é", encoding="utf-8")
    template = load_template(str(file))
    assert (template.render(TURNS), template.is_complete) == ("q1é", True)
    file.write_text("{% if %}")
    with pytest.raises(TemplateError, match=r"own\.jinja"):
        load_template(str(file))
    file.write_bytes(b"\xff")
    with pytest.raises(TemplateError, match="cannot be read"):
        load_template(str(file))
    with pytest.raises(TemplateError, match="guanaco-card"):
        load_template("no-such-template")
