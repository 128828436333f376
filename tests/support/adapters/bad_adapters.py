"""Adapters that must be refused, each a good one with one thing wrong, as attackers and bad tools make them.

Each of CASES is made in a folder that holds a good adapter of rank 4 for `targets` (all projections of every layer).
Used against a running server, over HTTP.
"""

import json
import os
import pickle
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import load, save

from support.adapters.bad_weights import CONFIG, RANK, WEIGHTS, file_cases, header_cases, split, tensor_cases
from support.adapters.tiny_adapters import make_adapter

PROFILE = "guanaco.json"


@dataclass(frozen=True)
class BadAdapter:
    """`spoil` makes the good adapter in a folder the bad one; `source` and `name` are what to ask for."""

    title: str
    code: str
    spoil: Callable[[Path], object] = lambda _: None
    status: int = 400
    source: str | None = None  # none: the folder
    name: str = "bad"  # in the URL, as it is sent
    proof: bool = False  # only found by trying it out, which `check` does not
    fields: dict[str, Any] = field(default_factory=dict)  # more of the request's body


def make(case: BadAdapter, folder: Path, targets: dict[str, tuple[int, int]]) -> str:
    """Write the case's adapter into `folder`, below the root; the source to ask for."""
    make_adapter(folder, targets, RANK, seed=1)
    case.spoil(folder)
    return folder.name if case.source is None else case.source


def _config_fields() -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(what, code, fields that replace those of the good config)"""
    yield from (
        ("no peft_type", "peft_type_missing", {"peft_type": None}),
        *((f"peft_type {kind!r}", "peft_type_unsupported", {"peft_type": kind}) for kind in ("IA3", "lora", "\x1b[")),
        ("rank 0", "bad_rank", {"r": 0}),
        ("rank -1", "bad_rank", {"r": -1}),
        ("rank true", "bad_rank", {"r": True}),
        ("rank 4.0", "bad_rank", {"r": 4.0}),
        ("rank text", "bad_rank", {"r": "4"}),
        ("rank null", "bad_rank", {"r": None}),
        ("rank huge", "bad_rank", {"r": 2**40}),
        ("rank of a thousand digits", "bad_rank", {"r": 10**1000}),
        ("rank not the file's", "rank_mismatch", {"r": RANK + 1}),
        ("rank_pattern not the file's", "rank_mismatch", {"rank_pattern": {"q_proj": RANK * 2}}),
        ("rank_pattern of 0", "bad_rank", {"rank_pattern": {"q_proj": 0}}),
        ("rank_pattern a list", "bad_field", {"rank_pattern": [["q_proj", 4]]}),
        ("rank_pattern of thousands", "too_many_patterns", {"rank_pattern": {f"q{i}": 1 for i in range(3000)}}),
        ("alpha text", "bad_alpha", {"lora_alpha": "16"}),
        ("alpha true", "bad_alpha", {"lora_alpha": True}),
        ("alpha 1e30", "bad_alpha", {"lora_alpha": 1e30}),
        ("alpha of a thousand digits", "bad_alpha", {"lora_alpha": 10**1000}),
        ("alpha beyond the scale's limit", "scale_too_large", {"lora_alpha": 1e6}),
        ("alpha 0", "zero_effect", {"lora_alpha": 0}),
        ("alpha_pattern null", "bad_alpha", {"alpha_pattern": {"q_proj": None}}),
        ("alpha_pattern beyond the scale's limit", "scale_too_large", {"alpha_pattern": {"q_proj": -1e8}}),
        ("DoRA", "dora_unsupported", {"use_dora": True}),
        ("DoRA as text", "dora_unsupported", {"use_dora": "false"}),
        ("modules_to_save", "modules_to_save_unsupported", {"modules_to_save": ["lm_head"]}),
        ("fan_in_fan_out", "fan_in_fan_out_unsupported", {"fan_in_fan_out": True}),
        ("bias all", "bias_unsupported", {"bias": "all"}),
        ("bias lora_only", "bias_unsupported", {"bias": "lora_only"}),
        ("lora_bias", "lora_bias_unsupported", {"lora_bias": True}),
        ("layer_replication", "layer_replication_unsupported", {"layer_replication": [[0, 2], [1, 2]]}),
        ("trained tokens", "trainable_tokens_unsupported", {"trainable_token_indices": [1]}),
        ("activated LoRA", "alora_unsupported", {"alora_invocation_tokens": [1]}),
        ("target_parameters", "target_parameters_unsupported", {"target_parameters": ["experts"]}),
        ("weight tying", "weight_tying_unsupported", {"ensure_weight_tying": True}),
        ("QALoRA", "qalora_unsupported", {"use_qalora": True}),
        ("PiSSA", "init_changes_base", {"init_lora_weights": "pissa_niter_4"}),
        ("LoftQ", "init_changes_base", {"init_lora_weights": "loftq"}),
        ("an unknown init", "init_unknown", {"init_lora_weights": "../../etc/passwd"}),
        ("use_rslora text", "bad_field", {"use_rslora": "yes"}),
        ("no targets", "no_targets", {"target_modules": []}),
        ("targets of another model", "no_targets", {"target_modules": ["c_attn", "query_key_value"]}),
        ("a target that is not there as well", "untargeted_tensor", {"target_modules": ["q_proj", "c_attn"]}),
        ("targets a number", "bad_field", {"target_modules": 7}),
        ("targets with null", "bad_field", {"target_modules": ["q_proj", None]}),
        ("targets nested", "bad_field", {"target_modules": [["q_proj"]]}),
        ("targets fewer than the file's", "untargeted_tensor", {"target_modules": ["q_proj"]}),
        ("everything excluded", "no_targets", {"exclude_modules": ".*"}),
        ("layers beyond the model", "no_targets", {"layers_to_transform": [99]}),
        ("layers negative", "bad_field", {"layers_to_transform": [-1]}),
        ("layers with a pattern", "conflicting_fields", {"target_modules": ".*", "layers_to_transform": [0]}),
        ("layers_pattern alone", "conflicting_fields", {"layers_pattern": "layers"}),
        ("pattern with a look-ahead", "pattern_unsupported", {"target_modules": "(?!x).*q_proj"}),
        ("pattern with a reference", "pattern_unsupported", {"target_modules": r"(.*)\1"}),
        ("pattern that never ends", "pattern_unsupported", {"target_modules": "(" * 5000}),
        ("pattern that explodes", "pattern_unsupported", {"target_modules": "(" * 30 + "a" + "{64})" * 30}),
        ("pattern that backtracks", "no_targets", {"target_modules": "(a+)+(a+)+(a+)+$"}),
        ("patterns that take all day", "pattern_unsupported",
         {"rank_pattern": {f"({'(.*)*' * 9}){i}": 4 for i in range(900)}}),
        ("pattern with an invisible sign", "no_targets", {"target_modules": ["q\u200b_proj"]}),
    )  # fmt: skip


def _config_bytes() -> Iterator[tuple[str, str, Callable[[bytes], bytes]]]:
    """(what, code, the good file's bytes → the bad one's)"""
    yield from (
        ("config empty", "bad_config", lambda _: b""),
        ("config null", "bad_config", lambda _: b"null"),
        ("config a list", "bad_config", lambda good: b"[" + good + b"]"),
        ("config cut off", "bad_config", lambda good: good[:-5]),
        ("config twice", "bad_config", lambda good: good + good),
        ("config with a key twice", "bad_config", lambda good: good.replace(b"{", b'{"r": 64,', 1)),
        ("config with a key twice by escape", "bad_config", lambda good: good.replace(b"{", b'{"\\u0072": 64,', 1)),
        ("config with an inner key twice", "bad_config",
         lambda good: good.replace(b"{", b'{"rank_pattern": {"q_proj": 4, "q_proj": 8},', 1)),
        ("config with NaN", "bad_config", lambda good: good.replace(b"16", b"NaN")),
        ("config with -Infinity", "bad_config", lambda good: good.replace(b"16", b"-Infinity")),
        ("config with 1e999", "bad_config", lambda good: good.replace(b"16", b"1e999")),
        ("config with an endless number", "bad_config", lambda good: good.replace(b"16", b"9" * 20_000)),
        ("config with a byte order mark", "bad_config", lambda good: b"\xef\xbb\xbf" + good),
        ("config in UTF-16", "bad_config", lambda good: good.decode().encode("utf-16")),
        ("config in Latin-1", "bad_config", lambda good: good.replace(b"tiny", b"t\xefny")),
        ("config with NUL", "bad_config", lambda good: good.replace(b"tiny", b"ti\0y")),
        ("config nested deeply", "bad_config", lambda good: good.replace(b"{", b'{"x":' + b"[" * 30_000, 1)),
        ("config of YAML", "bad_config", lambda _: b"r: 4\npeft_type: LORA\n"),
        ("config with comments", "bad_config", lambda good: b"// mine\n" + good),
        ("config too large", "file_too_large", lambda good: good + b" " * 70_000),
        ("config a pickle", "bad_config", lambda _: pickle.dumps({"r": 4})),
        ("config of another server's error", "bad_config", lambda _: b"<html>404</html>"),
    )  # fmt: skip


# (what, code, source, status)
_SOURCES: tuple[tuple[str, str, str, int], ...] = (
    ("one above the root", "outside_root", "..", 400),
    ("the store", "outside_root", "../store", 400),
    ("through a good one and out", "outside_root", "good/../../store", 400),
    ("absolute", "outside_root", "/etc", 400),
    ("absolute with two slashes", "outside_root", "//etc/passwd", 400),
    ("a process", "outside_root", "/proc/self/cwd", 400),
    ("home", "not_found", "~", 404),
    ("a variable", "not_found", "$HOME", 404),
    ("a command", "not_found", "$(id)", 404),
    ("an option", "not_found", "-rf", 404),
    ("a URL", "not_found", "file:///etc/passwd", 404),
    ("escaped dots", "not_found", "%2e%2e/store", 404),
    ("escaped twice", "not_found", "..%252fstore", 404),
    ("dots that look like dots", "not_found", "\u2024\u2024/store", 404),
    ("wide dots", "not_found", "\uff0e\uff0e/store", 404),
    ("four dots", "not_found", "..../store", 404),
    ("backslashes", "not_found", "..\\store", 404),
    ("a drive", "not_found", "C:\\x", 404),
    ("a share", "not_found", "\\\\srv\\x", 404),
    ("a good one with a space behind", "not_found", "good ", 404),
    ("a good one's file", "not_a_directory", f"good/{CONFIG}", 400),
    ("below a good one's file", "not_found", f"good/{CONFIG}/x", 404),
    ("another case", "not_found", "GOOD", 404),
    ("composed letters for decomposed ones", "not_found", "\u00e9", 404),  # the folder e\u0301 is there
    ("a part of 300 letters", "not_found", "x" * 300, 404),
    ("a path of 1024 letters", "not_found", "x/" * 512, 404),
    ("a path of 1025 letters", "invalid_value", "x" * 1025, 400),
    ("nothing", "invalid_value", "", 400),
    ("a NUL", "bad_source", "good\0", 400),
    ("a line break", "bad_source", "good\n", 400),
    ("a turn of direction", "bad_source", "good\u202e", 400),
    ("a bell", "bad_source", "\x07", 400),
)
# (what, code, name as it stands in the URL, status)
_NAMES: tuple[tuple[str, str, str, int], ...] = (
    ("dots for a name", "bad_name", "%2e%2e", 400),
    ("a dot for a name", "bad_name", "%2e", 400),
    ("a path for a name", "not_found", "a%2fb", 404),  # no such route
    ("a path out for a name", "not_found", "..%2f..%2fetc", 404),
    ("a path escaped twice for a name", "bad_name", "..%252fetc", 400),
    ("a NUL in the name", "bad_name", "a%00", 400),
    ("a line break behind the name", "bad_name", "a%0a", 400),
    ("an escape in the name", "bad_name", "a%1b%5b2J", 400),
    ("a space before the name", "bad_name", "%20a", 400),
    ("a hyphen before the name", "bad_name", "-a", 400),
    ("a letter that is none in the name", "bad_name", "p%D1%96rate", 400),
    ("a broken letter in the name", "bad_name", "a%ff", 400),
    ("a template for a name", "bad_name", "%7B%7B7*7%7D%7D", 400),
    ("a comma in the name", "bad_name", "a,b", 400),
    ("65 letters for a name", "bad_name", "a" * 65, 400),
    ("5,000 letters for a name", "bad_name", "a" * 5000, 400),
    ("the base's name", "name_taken", "tiny", 409),
)
# (what, the profile beside the adapter)
_PROFILES: tuple[tuple[str, bytes], ...] = (
    ("profile empty", b""),
    ("profile a list", b"[]"),
    ("profile with a key twice", b'{"stop": "a", "stop": "b"}'),
    ("profile with NaN", b'{"temperature": NaN}'),
    ("profile with an unknown field", b'{"system_prompt": "x"}'),
    ("profile with an unknown template", b'{"chat_template": "{{ 7*7 }}"}'),
    ("profile with a template's path", b'{"chat_template": "../../etc/passwd"}'),
    ("profile with an unknown built-in", b'{"profile": ["guanaco"]}'),
    ("profile with a wild temperature", b'{"temperature": 1e9}'),
    ("profile with top_k a fraction", b'{"top_k": 0.5}'),
    ("profile with top_p true", b'{"top_p": true}'),
    ("profile with too many stops", b'{"stop": ["a", "b", "c", "d", "e"]}'),
    ("profile with an empty stop", b'{"stop": [""]}'),
    ("profile with keys that are no list", b'{"allowed_keys": "*"}'),
)
# found by trying the adapter out: (what, code, config fields, factor for every matrix)
_EFFECTS: tuple[tuple[str, str, dict[str, Any], float], ...] = (
    ("an effect too small for a float", "zero_effect", {"lora_alpha": 1e-300}, 1.0),
    ("matrices whose product is infinite", "effect_not_finite", {}, 1e30),
)


def _edit_config(fields: dict[str, Any]) -> Callable[[Path], object]:
    def spoil(folder: Path) -> None:
        path = folder / CONFIG
        path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))

    return spoil


def _rewrite(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(change((folder / name).read_bytes()))


def _effect(fields: dict[str, Any], factor: float) -> Callable[[Path], object]:
    def spoil(folder: Path) -> None:
        _edit_config(fields)(folder)
        _rewrite(WEIGHTS, lambda good: save({key: t * factor for key, t in load(good).items()}))(folder)

    return spoil


def _beyond_the_limit(folder: Path) -> None:
    """Everything is as it should be, but the rank is more than the server allows."""
    make_adapter(folder, {"layers.0.self_attn.q_proj": (64, 64)}, 65)


def _all() -> Iterable[BadAdapter]:
    for title, code, fields in _config_fields():
        yield BadAdapter(title, code, _edit_config(fields))
    for title, code, in_config in _config_bytes():
        yield BadAdapter(title, code, _rewrite(CONFIG, in_config))
    for title, code, in_header in header_cases():
        yield BadAdapter(title, code, _rewrite(WEIGHTS, lambda good, change=in_header: change(*split(good))))  # type: ignore[misc]
    for title, code, tensors in tensor_cases():
        yield BadAdapter(title, code, _rewrite(WEIGHTS, lambda good, change=tensors: save(change(load(good)))))  # type: ignore[misc]
    for title, code, spoil in file_cases():
        yield BadAdapter(title, code, spoil, 404 if code == "not_found" else 400)
    for title, code, source, status in _SOURCES:
        yield BadAdapter(title, code, status=status, source=source)
    for title, code, name, status in _NAMES:
        yield BadAdapter(title, code, status=status, name=name)
    for title, profile in _PROFILES:
        yield BadAdapter(title, "bad_profile", lambda folder, text=profile: (folder / PROFILE).write_bytes(text))  # type: ignore[misc]
    yield BadAdapter("profile a pipe", "not_a_file", lambda folder: os.mkfifo(folder / PROFILE))
    yield BadAdapter("profile in the request", "bad_profile", fields={"profile": {"temperature": 3}})
    yield BadAdapter("rank beyond the server's limit", "rank_too_large", _beyond_the_limit)
    for title, code, fields, factor in _EFFECTS:
        yield BadAdapter(title, code, _effect(fields, factor), proof=True)


CASES: tuple[BadAdapter, ...] = tuple(_all())
