"""The two kinds of LLaMA tokenizer as the content of a `tokenizer.json`: byte-level BPE, and SentencePiece's BPE.

Knows vocabularies, not the files they come from. Called by `sentencepiece` and `gguf_tokenizer`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from guanaco.models.errors import ModelError

# Text is cut into pieces before BPE merges tokens, by the patterns with which the merges were learned. The names are
# llama.cpp's (`tokenizer.ggml.pre`), the patterns are those of the models with these names.
GPT2_SPLIT = "gpt-2"
SMOLLM_SPLIT = "smollm"
LLAMA3_SPLIT = "llama-bpe"


def _cl100k(numbers: str) -> str:
    """OpenAI's cl100k pattern, as LLaMA 3 and Qwen have it; `numbers` says how digits are grouped."""
    return (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|" + numbers + r"| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    )


_GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# DeepSeek's first tokenizer has a list of cased letters of its own, without some alphabets.
_CASED = (
    r"[\p{Lu}\p{Ll}\p{Lt}&&[^\u0560-\u0588\u10c7-\u10ff\u1c80-\u1c8f\u2d00-\u2d2d\ua790-\ua7ff\uab30-\uab6f"
    r"\x{10570}-\x{105bf}\x{16e40}-\x{16e7f}\x{1d400}-\x{1d7cb}\x{1df00}-\x{1df2f}]]+"
)
_CJK = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"


@dataclass(frozen=True)
class Split:
    """How text is cut before BPE: each of `patterns` cuts the pieces of the one before."""

    patterns: tuple[str, ...]
    ignore_merges: bool = False  # a piece that is in the vocabulary becomes one token, even if no merges lead to it
    adds_bos: bool = False  # llama.cpp's default for files that don't say


# By llama.cpp's names (`tokenizer.ggml.pre`), for LLaMA-like models in the wild. "default" is what llama.cpp takes for
# files from before the key existed.
_LLAMA3 = Split((_cl100k(r"\p{N}{1,3}"),), ignore_merges=True, adds_bos=True)
_SMAUG = Split((_cl100k(r"\p{N}{1,3}"),))
_QWEN2 = Split((_cl100k(r"\p{N}"),))
_GPT2 = Split((_GPT2_PATTERN,))
_DIGITS = Split((r"\p{N}", _GPT2_PATTERN))
_DEFAULT = Split((r"[\p{P}\$\+<=>\^~\|]+", _GPT2_PATTERN, r"\p{N}+", r"[0-9][0-9][0-9]"))
_DEEPSEEK_CODER = Split((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _CJK, r"\p{N}"))
_DEEPSEEK_LLM = Split(
    (
        r"[\r\n]",
        rf"\s?{_CASED}",
        r"\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+",
        r"\s+$",
        _CJK,
        r"\p{N}+",
    )
)
_DEEPSEEK3 = Split(
    (
        r"\p{N}{1,3}",
        "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
        r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
        r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    )
)
_WORDS = r" ?[^(\s|.,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c)]+"
_PORO, _VIKING = Split((_WORDS,)), Split((_WORDS, r"\p{N}"))
_MINICPM5 = Split((r"\p{N}{1,3}", _cl100k(r"\p{N}+")), ignore_merges=True)
_CASES = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_GPT4O = Split(
    (
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+" + _CASES + "|"
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*" + _CASES + "|"
        r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    )
)
_SEED_CODER = Split(
    (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1}| ?[^\s\p{L}\p{N}\r\n]+|\s*[\r\n]+"
        r"|\s+(?!\S)|\s+",
    )
)
_TEKKEN = Split(
    (
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
        r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
        r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    ),
    ignore_merges=True,
    adds_bos=True,
)
SPLITS: Mapping[str, Split] = {
    **dict.fromkeys(
        (LLAMA3_SPLIT, "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"), _LLAMA3
    ),
    **dict.fromkeys(("smaug-bpe", "dbrx"), _SMAUG),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "megrez", "kormo", "f2llmv2", "stablelm2", "hunyuan"), _QWEN2),
    **dict.fromkeys((GPT2_SPLIT, "phi-2", "mpt", "olmo", "jais", "trillion", "exaone4", "mellum", "gigachat"), _GPT2),
    **dict.fromkeys(("a.x-4.0", "granite-docling"), _GPT2),
    **dict.fromkeys((SMOLLM_SPLIT, "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"), _DIGITS),
    **dict.fromkeys(("gpt-4o", "llama4", "kanana2"), _GPT4O),
    **dict.fromkeys(("deepseek-v3", "hunyuan-dense"), _DEEPSEEK3),
    "deepseek-llm": _DEEPSEEK_LLM,
    "deepseek-coder": _DEEPSEEK_CODER,
    "minicpm5": _MINICPM5,
    "poro-chat": _PORO,
    "viking": _VIKING,
    "seed-coder": _SEED_CODER,
    "tekken": _TEKKEN,
    "default": _DEFAULT,
}
_MAX_CUT_CHARS = 1 << 29  # characters copied when every piece is cut at every place; 2 million for LLaMA 2
SPACE = "\u2581"  # SentencePiece's visible space


@dataclass(frozen=True)
class AddedToken:
    """A token that is found in a text before the text is cut into pieces for BPE."""

    id: int
    content: str
    special: bool  # a control token: text that a user typed must not become it


def byte_level_json(
    vocab: Mapping[str, int],
    merges: Sequence[tuple[str, str]],
    added: Sequence[AddedToken],
    *,
    split: str,
    bos: AddedToken | None,
) -> dict[str, Any]:
    """The tokenizer.json of a byte-level BPE. split: a name in SPLITS. bos: put before every text, unless None."""
    rule = SPLITS[split]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    if rule is _GPT2:  # as in the models' own files
        steps = [{**byte_level, "use_regex": True}]
    elif rule is _DIGITS:
        steps = [{"type": "Digits", "individual_digits": True}, {**byte_level, "use_regex": True}]
    else:
        steps = [
            {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
            for pattern in rule.patterns
        ]
        steps.append({**byte_level, "use_regex": False})
    return _tokenizer_json(
        added,
        bos,
        normalizer=None,
        pre_tokenizer={"type": "Sequence", "pretokenizers": steps},
        decoder={**byte_level, "use_regex": True},
        model={"byte_fallback": False, "ignore_merges": rule.ignore_merges, "vocab": vocab, "merges": merges},
    )


def sentencepiece_json(
    pieces: Sequence[str],
    scores: Sequence[float],
    plain: Sequence[bool],
    added: Sequence[AddedToken],
    *,
    add_prefix_space: bool,
    bos: AddedToken | None,
) -> dict[str, Any]:
    """The tokenizer.json of a SentencePiece BPE with byte fallback. Piece i has id i.

    plain: whether text can become the piece (no control, unknown, unused or byte piece).
    """
    space = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    prefix = [{"type": "Prepend", "prepend": SPACE}] if add_prefix_space else []
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if add_prefix_space else []
    decoders = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
        *strip,
    ]
    return _tokenizer_json(
        added,
        bos,
        normalizer={"type": "Sequence", "normalizers": [*prefix, space]},
        pre_tokenizer=None,
        decoder={"type": "Sequence", "decoders": decoders},
        model={
            "byte_fallback": True,
            "fuse_unk": True,
            "ignore_merges": False,
            "vocab": {piece: index for index, piece in enumerate(pieces)},
            "merges": merges_from_scores(pieces, scores, plain),
        },
    )


def merges_from_scores(pieces: Sequence[str], scores: Sequence[float], plain: Sequence[bool]) -> list[tuple[str, str]]:
    """BPE merges, best first, that do what SentencePiece does with its scores: merge the pair with the best result.

    Every way to cut a piece into two other pieces is a merge. The cuts of one piece are ranked by the longest left
    part, as other converters do; SentencePiece itself merges the leftmost pair among equals. Raises ModelError for
    pieces that are too long.
    """
    ids = {piece: index for index, piece in enumerate(pieces) if plain[index]}
    if sum(len(piece) ** 2 for piece in ids) > _MAX_CUT_CHARS:
        raise ModelError(f"the vocabulary has pieces of {max(map(len, ids))} characters, as no tokenizer learns them")
    ranked: list[tuple[float, int, str, str]] = []
    for piece, index in ids.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in ids and right in ids:
                ranked.append((-scores[index], -cut, left, right))
    # A stable sort: pieces of equal score stay in the vocabulary's order.
    return [(left, right) for _, _, left, right in sorted(ranked, key=lambda entry: entry[:2])]


def _tokenizer_json(
    added: Sequence[AddedToken],
    bos: AddedToken | None,
    *,
    normalizer: dict[str, Any] | None,
    pre_tokenizer: dict[str, Any] | None,
    decoder: dict[str, Any],
    model: dict[str, Any],
) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": t.id, "content": t.content, **flags, "special": t.special} for t in added],
        "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": None if bos is None else _bos_first(bos),
        "decoder": decoder,
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "fuse_unk": False} | model,
    }


def _bos_first(bos: AddedToken) -> dict[str, Any]:
    def special(type_id: int) -> dict[str, Any]:
        return {"SpecialToken": {"id": bos.content, "type_id": type_id}}

    first, second = {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}
    return {
        "type": "TemplateProcessing",
        "single": [special(0), first],
        "pair": [special(0), first, special(1), second],
        "special_tokens": {bos.content: {"id": bos.content, "ids": [bos.id], "tokens": [bos.content]}},
    }
