"""A corpus of bodies that must be refused: (name, bytes, status, param), for chat and for completions.

`param` is the field that the error must name; ANY where the whole body is at fault.
"""

import json
from collections.abc import Iterator
from typing import Any

ANY = object()
Case = tuple[str, bytes, int, object]

GOOD = {
    "chat": {"model": "pirate", "messages": [{"role": "user", "content": "hi"}]},
    "completions": {"model": "pirate", "prompt": "hi"},
}

_NOT_INTEGERS: tuple[Any, ...] = ("5", 1.5, 5.0, True, [], {}, [5], "")
_NOT_NUMBERS: tuple[Any, ...] = ("0.5", True, [], {}, [0.5], "NaN")
_NOT_BOOLS: tuple[Any, ...] = ("true", 0, 1, [], {}, 1.0)

# field → values that must be refused in both routes
_FIELDS: dict[str, tuple[Any, ...]] = {
    "model": (None, "", 5, True, [], {}, "x" * 257, ["pirate"]),
    "max_tokens": (0, -1, 2**31, 2**63, 2**64, 10**30, -(10**30), *_NOT_INTEGERS),
    "min_tokens": (-1, 2**31, 10**30, *_NOT_INTEGERS),
    "temperature": (-0.1, 2.0001, 1e308, -1e308, 10**400, *_NOT_NUMBERS),
    "top_p": (0, -0.1, 1.0001, 1e308, *_NOT_NUMBERS),
    "top_k": (-2, 1001, 2**63, *_NOT_INTEGERS),
    "min_p": (-0.01, 1.01, *_NOT_NUMBERS),
    "n": (0, -1, 9, 10**9, 2**63, *_NOT_INTEGERS),
    "best_of": (9, 0, -1, 10**9, "1", True),
    "seed": (2**63, -(2**63) - 1, 10**30, *_NOT_INTEGERS),
    "presence_penalty": (-2.01, 2.01, 1e308, *_NOT_NUMBERS),
    "frequency_penalty": (-2.01, 2.01, *_NOT_NUMBERS),
    "repetition_penalty": (0, -1, 2.01, *_NOT_NUMBERS),
    "stop": ("", ["a", ""], ["x"] * 17, "x" * 129, ["x" * 129], 5, True, {}, [5], [None], [["a"]]),
    "stop_token_ids": ("5", 5, ["5"], [5.0], [True], [-1], [2**31], [262], [1] * 65, {}, [None]),
    "logit_bias": (
        *([], "x", 5, True, {"a": 1}, {"-1": 1}, {"1.0": 1}, {"": 1}, {" 1": 1}, {"1": "1"}, {"1": True}, {"1": None}),
        *({"1": 100.1}, {"1": -101}, {"1": 1e308}, {"262": 1}, {"9" * 10: 1}, {"１": 1}, {"1": 1, "01": 2}, {"1": []}),
        {str(i): 0 for i in range(301)},
        {str(i): 0 for i in range(30_000)},
    ),
    "stream": _NOT_BOOLS,
    "ignore_eos": _NOT_BOOLS,
    "speculation": _NOT_BOOLS,
    "skip_special_tokens": _NOT_BOOLS,
    "include_stop_str_in_output": _NOT_BOOLS,
    "stream_options": ({"include_usage": True}, {}, [], "x", 5, True),  # without stream, or not an object
    "cache_salt": ("", "x" * 257, 5, [], True),
    "response_format": ({"type": "json_schema", "json_schema": {}}, {"type": "xml"}, "text", {}, 5, []),
    "structured_outputs": ({}, {"regex": 5}, {"json": "{"}, {"x": 1}, {"choice": []}, 5, [], "x"),
    "guided_choice": ([], ["a", 1], [""], "a", 5, {}),
    "guided_grammar": ("", " ", 5, []),
    "guided_json": ("{", "[]", 5, [], {"not": {}}),
    "guided_regex": ("", 5, []),
}

# field → values that ask for what isn't supported
_REFUSED: dict[str, tuple[Any, ...]] = {
    "adapter_id": ("terse", "", 5, ["pirate"], "x" * 257),
    "lora": ([{"id": 0, "scale": 1.0}], [], "x", [5], [{"id": -1, "scale": 1}], [{"id": 0}]),
    "allowed_token_ids": ([], [-1], [10**6], [2**31], [1.0], ["1"], 1, "1", {}, [True]),
    "audio": ({"voice": "x"},),
    "bad_words": ([""], [" "], [1], "x", {}, ["x"] * 65, ["x" * 129]),
    "chat_template": ("{{ messages }}", ""),
    "chat_template_kwargs": ({"tokenize": True},),
    "continue_final_message": (True,),
    "documents": ([{}],),
    "function_call": ("auto", {"name": "x"}),
    "functions": ([{"name": "x"}],),
    "logits_processors": (["x"],),
    "lora_path": ("/etc/passwd", "", 5, ["pirate"]),
    "lora_request": ({"lora_name": "x"},),
    "modalities": (["text", "audio"], ["audio"], "text"),
    "prompt_embeds": ("gASV",),
    "prompt_logprobs": (-1, 21, 2**63, *_NOT_INTEGERS),
    "suffix": ("x",),
    "tool_choice": (
        "required",
        {"type": "function"},
        {"type": "function", "function": {"name": "f"}},
        5,
        "x",
        [],
        True,
    ),
    "tools": ([{"type": "function"}], {}, "x"),
    "truncate_prompt_tokens": (0, -2, 2**31, *_NOT_INTEGERS),
    "return_token_ids": _NOT_BOOLS,
    "return_tokens_as_token_ids": _NOT_BOOLS,
    "use_beam_search": (True,),
}

_USER: dict[str, Any] = {"role": "user", "content": "x"}
_CALL: dict[str, Any] = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
_MESSAGES: tuple[Any, ...] = (
    *(None, [], "hi", 5, {}, True, [None], ["hi"], [5], [[]], [{}], [{"role": "user"}], [{"content": "x"}]),
    [{"role": "user", "content": None}],
    [{"role": "system"}],
    [{"role": "", "content": "x"}],
    [{"role": "USER", "content": "x"}],
    [{"role": "tool", "content": "x", "tool_call_id": "1"}],
    [{"role": "function", "content": "x", "name": "f"}],
    [{"role": "user\n", "content": "x"}],
    [{"role": 5, "content": "x"}],
    [{"role": None, "content": "x"}],
    [{"role": ["user"], "content": "x"}],
    [{"role": "user", "content": 5}],
    [{"role": "user", "content": True}],
    [{"role": "user", "content": {}}],
    [{"role": "user", "content": {"type": "text", "text": "x"}}],
    [{"role": "user", "content": ["x"]}],
    [{"role": "user", "content": [None]}],
    [{"role": "user", "content": [{}]}],
    [{"role": "user", "content": [{"type": "text"}]}],
    [{"role": "user", "content": [{"type": "text", "text": 5}]}],
    [{"role": "user", "content": [{"type": "text", "text": None}]}],
    [{"role": "user", "content": [{"text": "x"}]}],
    [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://169.254.169.254/"}}]}],
    [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]}],
    [{"role": "user", "content": [{"type": "text", "text": "x"}, {"type": "image_url", "image_url": "x"}]}],
    [{"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}],
    [{"role": "user", "content": [{"type": "file", "file": {}}]}],
    [{"role": "user", "content": [{"type": ["text"], "text": "x"}]}],
    [{"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}],
    *(
        [_USER, {"role": "assistant", "content": None, "tool_calls": calls}]
        for calls in (
            *({}, "x", [None], [{"id": "1", "function": {"name": "f"}}] * 2, [{"function": {"name": "f"}}]),
            *([{"id": i, "function": {"name": "f"}}] for i in ("", 5, "x" * 257)),
            *([{"id": "1", "function": {"name": n}}] for n in ("", 5, None, "x" * 257)),
            *(
                [{"id": "1", "function": {"name": "f", "arguments": a}}]
                for a in ("x", '{"a": [' + "[]," * 40_000 + "[]]}", "[]", "5", "null", '{"a": NaN}', "{", 5, [], True)
            ),
            [{"id": "1", "type": "custom", "custom": {}}],
        )
    ),
    [_USER, {"role": "tool", "content": "x", "tool_call_id": 5}, _USER],
    [{**_USER, "tool_calls": [_CALL]}],
    [
        _USER,
        {"role": "assistant", "content": "", "tool_calls": [_CALL]},
        {"role": "tool", "content": "x", "tool_call_id": "2"},
    ],
    [_USER, {"role": "assistant", "content": "", "tool_calls": [_CALL]}, *([{"role": "tool", "content": "x"}] * 2)],
    [
        _USER,
        {"role": "assistant", "content": "", "tool_calls": [_CALL, {**_CALL, "id": "2"}]},
        {"role": "tool", "content": "x"},
    ],
    [{"role": "assistant", "content": "x", "function_call": {"name": "f"}}],
    [{"role": "assistant", "content": "x", "audio": {"id": "1"}}],
    [{"role": "assistant", "content": "first"}],  # the fake template refuses it
    [{"role": "user", "content": "x"}] * 513,
)
_BAD_FUNCTIONS: tuple[Any, ...] = (
    *(
        None,
        5,
        [],
        {},
        {"name": None},
        {"name": ""},
        {"name": "a b"},
        {"name": "x" * 65},
        {"name": "f\n"},
        {"name": "é"},
    ),
    *({"name": "f", "description": 5}, {"name": "f", "description": "x" * 32769}, {"name": "f", "strict": 1}),
    *(
        {"name": "f", "parameters": p}
        for p in (5, [], "{}", True, {"type": "array"}, {"type": None}, {"a": "x" * 65536})
    ),
    {"name": "f", "parameters": {"a": 2**70}},
)
_PROMPTS: tuple[Any, ...] = (
    *(None, [], {}, 5, True, 1.5, [None], [[]], [[], []], [True], [1.0], ["x", 1], [1, "x"], [[1], 1], [[1], "x"]),
    *([-1], [262], [2**31], [2**63], [[1], [262]], [[1], ["1"]], [[[1]]], [{}], ["x"] * 129, [[1]] * 129, ["x", None]),
    *([1.5], ["x", ["y"]], [[True]], ["x", {}]),
)

_TOOL = {"type": "function", "function": {"name": "f"}}
_CHAT_FIELDS: dict[str, tuple[Any, ...]] = {
    "tools": (
        *([{}], [None], [5], ["f"], [[]], [{"type": "custom", "custom": {"name": "f"}}], [{"type": "web_search"}]),
        *([{"type": ["function"], "function": {"name": "f"}}], [{"function": {"name": "f"}}]),
        *([{"type": "function", "function": function}] for function in _BAD_FUNCTIONS),
        *([_TOOL, _TOOL], [_TOOL] * 129),
    ),
    "tool_choice": (
        *({}, {"type": "custom"}, {"type": "function", "function": {}}, {"type": "function", "function": {"name": 5}}),
        *({"type": "allowed_tools"}, {"type": "allowed_tools", "allowed_tools": {"mode": "none", "tools": []}}),
        *({"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": t}} for t in ([], [{}], 5, ["f"])),
    ),
    "parallel_tool_calls": ("true", 1, []),
    "messages": _MESSAGES,
    "max_completion_tokens": (0, -1, 2**31, "5", 5.0, True),
    "logprobs": ("true", 1, 0, [], {}),
    "top_logprobs": (21, -1, 5, "1", True, 1.0),  # 5: without logprobs
    "add_generation_prompt": ("true", 1, 0),
    "echo": (True, 1, "x"),
}
_COMPLETION_FIELDS: dict[str, tuple[Any, ...]] = {
    "prompt": _PROMPTS,
    "logprobs": (21, -1, "1", True, 1.0, []),
    "echo": ("true", 1, 0, []),
    "add_special_tokens": ("true", 1),
}


def cases(route: str) -> Iterator[Case]:
    """Every body that `route` ("chat" or "completions") must refuse."""
    good = GOOD[route]
    own = _CHAT_FIELDS if route == "chat" else _COMPLETION_FIELDS
    for fields in (_FIELDS, _REFUSED, own):
        for field, values in fields.items():
            for index, value in enumerate(values):
                body = json.dumps({**good, field: value}).encode()
                yield f"{field}-{index}", body, 400, field
    for required in good:
        rest = {k: v for k, v in good.items() if k != required}
        yield f"no-{required}", json.dumps(rest).encode(), 400, required
    yield from _broken_json(json.dumps(good).encode())


def _broken_json(good: bytes) -> Iterator[Case]:
    inside = good[:-1]
    for literal in (b"NaN", b"Infinity", b"-Infinity"):
        yield f"literal-{literal.decode()}", inside + b',"temperature":' + literal + b"}", 400, ANY
        yield f"ignored-literal-{literal.decode()}", inside + b',"user":' + literal + b"}", 400, ANY
    for number in (b"1e400", b"-1e400"):
        yield f"overflow-{number.decode()}", inside + b',"temperature":' + number + b"}", 400, ANY
    for index, body in enumerate(
        (
            *(
                b"",
                b" ",
                b"null",
                b"true",
                b"5",
                b'"x"',
                b"[]",
                b"{",
                b"}",
                b"{}x",
                b"[" + good + b"]",
                b"\x00",
                b"{'a':1}",
            ),
            good[:-1],
            good + b"}",
            good + good,
            b"\xef\xbb\xbf" + good,
            good.decode().encode("utf-16"),
            good.decode().encode("utf-32"),
            good.replace(b"hi", b"\xff\xfe"),
            good.replace(b"hi", b"\xc3"),
            good.replace(b"hi", b"\\ud800"),
            good.replace(b"hi", b"\\udc00\\ud800"),
            good.replace(b"hi", b"\xed\xa0\x80"),
            good.replace(b"hi", b"a\nb"),
            good.replace(b"hi", b"\\x41"),
            good.replace(b"{", b'{"model":"terse",', 1),
            inside + b',"user":{"a":1,"a":2}}',
            inside + b',"n":01}',
            inside + b',"n":+1}',
            inside + b',"n":0x1}',
            inside + b',"n":1,}',
            inside + b',"n":' + b"1" * 5000 + b"}",
            inside + b',"user":' + b"[" * 201 + b"]" * 201 + b"}",
            inside + b',"user":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
            inside + b',"user":' + b'{"a":' * 5000 + b"1" + b"}" * 5000 + b"}",
            inside + b',"user":' + b"[" * 10_000,
            inside + b',"user":[' + b"[]," * 100_000 + b"1]}",
            inside + b',"user":[' + b"{}," * 1_200_000 + b"1]}",
            inside + b',"logit_bias":' + json.dumps({str(i): 0 for i in range(100_000)}).encode() + b"}",
        )
    ):
        yield f"json-{index}", body, 400, ANY
    yield "too-large", good.replace(b"hi", b"x" * (4 << 20)), 413, ANY
