"""Small tokenizers of each kind that LLaMA checkpoints have, written as files: real code paths without a download.

Used by the tests of the tokenizer, the templates and the GGUF metadata.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from guanaco.models.text.tokenizer_json import SPACE, AddedToken, sentencepiece_json
from support.models.tiny_models import SPECIAL_TOKENS, write_tokenizer

WORDS = (
    "the of and to in is that for it as was with be by on not he his but at are this have from or had an they which "
    "one you were all her she there would their we him been has when who will no more if out so up said what its about "
    "than into them can only other time new some could these two may first then do any like my now over such our man "
    "even most made after also did many off before must well back through years much where your way down should hello "
    "human assistant user system answer question name llama return print value true false null"
).split()


def sentencepiece_pieces() -> tuple[list[str], list[float], list[bool]]:
    """(pieces, scores, whether text can become them) of a small vocabulary: controls, bytes, merges, letters."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    plain = [False] * len(pieces)
    scores = [0.0] * len(pieces)
    merged: dict[str, None] = {}
    for word in WORDS:
        for text in (SPACE + word, word):
            merged.update({text[:end]: None for end in range(2, len(text) + 1)})
    spaces = [SPACE * count for count in range(2, 9)]
    letters = [SPACE, *"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,:;!?#'\"()[]{}<>|/_-+=*é"]
    for score, piece in enumerate([*merged, *letters], start=1):
        pieces.append(piece)
        scores.append(-float(score))
    for piece in spaces:  # LLaMA's have the lowest score of all
        pieces.append(piece)
        scores.append(-1e9)
    return pieces, scores, plain + [True] * (len(pieces) - len(plain))


def write_sentencepiece_like(path: Path, *, legacy: bool = True, **config: Any) -> Path:
    """A tokenizer.json of the LLaMA 1 and 2 kind, with BOS; legacy: as their own files have it, else as transformers
    writes it today. `config` becomes fields of tokenizer_config.json."""
    pieces, scores, plain = sentencepiece_pieces()
    added = [AddedToken(0, "<unk>", True), AddedToken(1, "<s>", True), AddedToken(2, "</s>", True)]
    content = sentencepiece_json(pieces, scores, plain, added, add_prefix_space=True, bos=added[1])
    if not legacy:
        content["normalizer"] = None
        content["pre_tokenizer"] = {
            "type": "Metaspace", "replacement": SPACE, "prepend_scheme": "first", "split": False
        }  # fmt: skip
    fields = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", **config}
    return write_files(path, content, fields)


def write_byte_level(path: Path, *, extra: tuple[dict[str, Any], ...] = (), **config: Any) -> Path:
    """A byte-level tokenizer of 384 ids, ChatML's markers among them; `extra` are more added tokens, with flags."""
    path.mkdir(parents=True, exist_ok=True)
    write_tokenizer(path)
    content = json.loads((path / "tokenizer.json").read_text())
    fields = json.loads((path / "tokenizer_config.json").read_text())
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    content["added_tokens"] += [{"id": 384 + number, **flags, **token} for number, token in enumerate(extra)]
    return write_files(path, content, {**fields, **config})


def write_files(path: Path, content: dict[str, Any], fields: dict[str, Any]) -> Path:
    """tokenizer.json and tokenizer_config.json; fields that are None are left out."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "tokenizer.json").write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    fields = {"tokenizer_class": "PreTrainedTokenizerFast", **fields}
    kept = {name: value for name, value in fields.items() if value is not None}
    (path / "tokenizer_config.json").write_text(json.dumps(kept, ensure_ascii=False), encoding="utf-8")
    return path


# Templates in the styles of real models, written anew: what matters are the constructs and the tokens.
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SMOLLM = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a test.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
    "{% set system = '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' %}"
    "{% else %}{% set loop_messages = messages %}{% set system = '' %}{% endif %}"
    "{% for message in loop_messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + (system if loop.first else '') "
    "+ message['content'] | trim + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'] | trim + ' ' + eos_token }}{% endif %}{% endfor %}"
)
LLAMA3 = """\
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- bos_token }}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" + system_message + "<|eot_id|>" }}
{%- for message in messages %}
    {%- if message.tool_calls is defined %}{%- continue %}{%- endif %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
    {{- message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
ZEPHYR = """\
{% for message in messages %}
{% if message['role'] == 'user' %}
{{ '<|user|>
' + message['content'] + eos_token }}
{% elif message['role'] == 'system' %}
{{ '<|system|>
' + message['content'] + eos_token }}
{% elif message['role'] == 'assistant' %}
{{ '<|assistant|>
'  + message['content'] + eos_token }}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}
"""
PHI = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + '\n' + message['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
TEMPLATES = {
    "chatml": CHATML, "smollm": SMOLLM, "llama2": LLAMA2, "llama3": LLAMA3, "zephyr": ZEPHYR, "phi": PHI
}  # fmt: skip
# What the templates above write as control tokens beside those of the tiny byte-level vocabulary.
TEMPLATE_TOKENS = (
    {"content": "<|start_header_id|>"}, {"content": "<|end_header_id|>"}, {"content": "<|eot_id|>"},
    {"content": "<|user|>", "rstrip": True}, {"content": "<|assistant|>", "rstrip": True},
    {"content": "<|system|>"}, {"content": "<|end|>", "rstrip": True, "lstrip": True}, {"content": "<s>"},
    {"content": "</s>", "normalized": True}, {"content": "[INST]", "special": False},
)  # fmt: skip

assert SPECIAL_TOKENS[1:] == ("<|im_start|>", "<|im_end|>")


def edit_json(path: Path, file: str, change: Callable[[dict[str, Any]], Any]) -> Path:
    """Change one JSON file of a directory; the directory."""
    content = json.loads((path / file).read_text()) if (path / file).exists() else {}
    change(content)
    (path / file).write_text(json.dumps(content))
    return path


def as_transformers(path: Path) -> Any:
    """The tokenizer that transformers makes of a directory."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(path)
