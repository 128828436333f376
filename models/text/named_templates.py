"""Prompt formats by name, for models without a chat template: Guanaco's formats and related ones.

Text only, no logic. Called by `chat_template`. No template writes BOS at the start: the tokenizer's own rule adds it.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class NamedTemplate:
    """A Jinja source, and the texts that a model of this format writes instead of stopping."""

    source: str
    stop_strings: tuple[str, ...] = ()


# Checks the roles in all formats with two speakers: an optional system message first, then turns that alternate. No
# model was trained on anything else.
_CHECK_TURNS = """\
{%- if messages and messages[0]['role'] == 'system' -%}
{%- set system = messages[0]['content'] -%}
{%- set turns = messages[1:] -%}
{%- else -%}
{%- set system = default_system -%}
{%- set turns = messages -%}
{%- endif -%}
{%- for turn in turns -%}
{%- if turn['role'] != ('user' if loop.index0 % 2 == 0 else 'assistant') -%}
{{- raise_exception('after an optional system message the roles must alternate: user, assistant, user, …') -}}
{%- endif -%}
{%- endfor -%}
"""


def _two_speakers(default_system: str, body: str) -> str:
    """A template that checks the roles before `body`. There, `system` is the client's system message or the default
    (empty for none), and `turns` are the other messages."""
    return "{%- set default_system = " + repr(default_system) + " -%}\n" + _CHECK_TURNS + body


_CURIOUS_HUMAN = "A chat between a curious human and an artificial intelligence assistant."
_POLITE = "The assistant gives helpful, detailed, and polite answers to the user's questions."

# The format of the QLoRA paper's evaluation (artidoro/qlora, eval/generations): single spaces, none at the end. With an
# empty system message it is the format of the OA prompts there.
_GUANACO = _two_speakers(
    f"{_CURIOUS_HUMAN} {_POLITE}",
    """\
{{- system -}}
{%- for turn in turns -%}
{{- '' if loop.first and not system else ' ' -}}
{{- ('### Human: ' if turn['role'] == 'user' else '### Assistant: ') + turn['content'] -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- ' ### Assistant:' -}}{%- endif -%}
""",
)
# The format of the example on the model cards: no space between the two sentences, a new line before each question.
_GUANACO_CARD = _two_speakers(
    f"{_CURIOUS_HUMAN}{_POLITE}",
    """\
{{- system -}}
{%- for turn in turns -%}
{%- if turn['role'] == 'user' -%}
{{- ('' if loop.first and not system else '\\n') + '### Human: ' + turn['content'] -}}
{%- else -%}
{{- ' ### Assistant: ' + turn['content'] -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- ' ### Assistant:' -}}{%- endif -%}
""",
)
# The format of text-generation front ends: no system sentence, one line for each turn.
_GUANACO_PLAIN = _two_speakers(
    "",
    """\
{{- system -}}
{%- for turn in turns -%}
{{- '' if loop.first and not system else '\\n' -}}
{{- ('### Human: ' if turn['role'] == 'user' else '### Assistant: ') + turn['content'] -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '\\n### Assistant:' -}}{%- endif -%}
""",
)
# Vicuna 1.1 and later (FastChat's `vicuna_v1.1`).
_VICUNA = _two_speakers(
    f"A chat between a curious user and an artificial intelligence assistant. {_POLITE}",
    """\
{{- system -}}
{%- for turn in turns -%}
{%- if turn['role'] == 'user' -%}
{{- ('' if not loop.first or not system else ' ') + 'USER: ' + turn['content'] -}}
{%- else -%}
{{- ' ASSISTANT: ' + turn['content'] + (eos_token or '') -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- ' ASSISTANT:' -}}{%- endif -%}
""",
)
# Stanford Alpaca's prompt without an input; further turns repeat its two headings.
_ALPACA = _two_speakers(
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.",
    """\
{{- system -}}
{%- for turn in turns -%}
{{- '' if loop.first and not system else '\\n\\n' -}}
{{- ('### Instruction:\\n' if turn['role'] == 'user' else '### Response:\\n') + turn['content'] -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '\\n\\n### Response:' -}}{%- endif -%}
""",
)
# LLaMA 2 Chat: each question opens a new text, its answer ends it. The first BOS is left to the tokenizer.
_LLAMA2 = _two_speakers(
    "",
    """\
{%- for turn in turns -%}
{%- if turn['role'] == 'user' -%}
{{- ('' if loop.first else (bos_token or '')) + '[INST] ' -}}
{{- '<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' if loop.first and system else '' -}}
{{- (turn['content'] | trim) + ' [/INST]' -}}
{%- else -%}
{{- ' ' + (turn['content'] | trim) + ' ' + (eos_token or '') -}}
{%- endif -%}
{%- endfor -%}
""",
)
_CHATML = """\
{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""

# In a test, Guanaco models wrote the next turn, too, in 3 to 24 of 80 answers. `###` alone would cut at headings.
_GUANACO_STOPS = ("### Human", "### Assistant")

NAMED = {
    "guanaco": NamedTemplate(_GUANACO, _GUANACO_STOPS),
    "guanaco-card": NamedTemplate(_GUANACO_CARD, _GUANACO_STOPS),
    "guanaco-plain": NamedTemplate(_GUANACO_PLAIN, _GUANACO_STOPS),
    "vicuna": NamedTemplate(_VICUNA, ("USER:",)),
    "alpaca": NamedTemplate(_ALPACA, ("### Instruction",)),
    "llama2": NamedTemplate(_LLAMA2),
    "chatml": NamedTemplate(_CHATML, ("<|im_end|>",)),
}
