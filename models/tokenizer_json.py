"""The two kinds of LLaMA tokenizer as the content of a `tokenizer.json`: byte-level BPE, and SentencePiece's BPE.

Knows vocabularies, not where they come from. Called by `sentencepiece_model` and `gguf_tokenizer`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

# How a vocabulary's merges were learned: what text is cut into before BPE. The names are llama.cpp's
# (`tokenizer.ggml.pre`), the patterns those of the models that the names stand for.
GPT2_SPLIT = "gpt-2"
SMOLLM_SPLIT = "smollm"
LLAMA3_SPLIT = "llama-bpe"
_SPLIT_ALIASES = {"llama3": LLAMA3_SPLIT, "llama-v3": LLAMA3_SPLIT}
# OpenAI's cl100k pattern with numbers in threes, as LLaMA 3's tokenizer has it.
_LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPACE = "\u2581"  # SentencePiece's visible space


@dataclass(frozen=True)
class AddedToken:
    """A token that text is searched for before anything else."""

    id: int
    content: str
    special: bool  # a control token, which text that somebody typed must not become


def knows_split(name: str) -> bool:
    """Whether `byte_level_json` can cut text as `name` says."""
    return name in (GPT2_SPLIT, SMOLLM_SPLIT, LLAMA3_SPLIT) or name in _SPLIT_ALIASES


def byte_level_json(
    vocab: Mapping[str, int],
    merges: Sequence[tuple[str, str]],
    added: Sequence[AddedToken],
    *,
    split: str,
    bos: AddedToken | None,
) -> dict[str, Any]:
    """tokenizer.json of a byte-level BPE. `split` names the rule; `bos` goes before every text unless it is None."""
    split = _SPLIT_ALIASES.get(split, split)
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    if split == LLAMA3_SPLIT:
        first = {"type": "Split", "pattern": {"Regex": _LLAMA3_PATTERN}, "behavior": "Isolated", "invert": False}
        steps = [first, {**byte_level, "use_regex": False}]
    elif split == SMOLLM_SPLIT:
        steps = [{"type": "Digits", "individual_digits": True}, {**byte_level, "use_regex": True}]
    else:
        assert split == GPT2_SPLIT, split
        steps = [{**byte_level, "use_regex": True}]
    return _tokenizer_json(
        added,
        bos,
        normalizer=None,
        pre_tokenizer={"type": "Sequence", "pretokenizers": steps},
        decoder={**byte_level, "use_regex": True},
        # LLaMA 3 takes a piece that is in the vocabulary as it is, even where no merges lead to it.
        model={"byte_fallback": False, "ignore_merges": split == LLAMA3_SPLIT, "vocab": vocab, "merges": merges},
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
    """tokenizer.json of a SentencePiece BPE with byte fallback; piece i has id i.

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
    """The ranked merges that SentencePiece's scores stand for: at each step the pair with the best-scored result.

    Every way to cut a piece into two others is a merge. SentencePiece merges the leftmost of equals; ranks must order
    the cuts of one piece instead, the longest left part first, which is what other converters chose.
    """
    ids = {piece: index for index, piece in enumerate(pieces) if plain[index]}
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
