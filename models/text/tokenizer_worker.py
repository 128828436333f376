"""The restricted process that tries a `tokenizer.json`: it reads it, and encodes texts on which bad patterns take long.

Runs as `python -I -m guanaco.models.text.tokenizer_worker LIFELINE PROBE_SECONDS`, started by `tokenizer_check` alone.
The request is the file. The answer is a JSON object {"problem"}, which is null if the file is good.
"""

import json
import re
import sys
import time
from collections.abc import Iterator
from itertools import permutations
from typing import Any

from tokenizers import Tokenizer

from guanaco.models.formats.restricted_process import Budget, follow_parent, read_frame, restrict, write_frame

_BASE_MEMORY_BYTES = 1 << 30
_MEMORY_PER_BYTE = 24  # a vocabulary takes about six times its file
_CPU_SECONDS = 110
_PROBE_CHARS = 4000
_USUAL = "a 0\n_.-'/é漢"
_MAX_SINGLES, _MAX_IN_PAIRS = 24, 8


def probes(patterns: list[str]) -> Iterator[str]:
    """Texts over which a pattern with nested repetitions backtracks: long repetitions of characters in the patterns,
    with an end that no pattern expects."""
    literals = [c for pattern in patterns for c in re.sub(r"\\[pP]\{[^}]*\}|\\.|[\[\](){}?*+|^$]", "", pattern)]
    singles = list(dict.fromkeys([*_USUAL, *literals]))
    for character in singles[: len(_USUAL) + _MAX_SINGLES]:
        yield character * _PROBE_CHARS + "\x01"
    for pair in permutations(list(dict.fromkeys(literals))[:_MAX_IN_PAIRS], 2):
        yield "".join(pair) * (_PROBE_CHARS // 2) + "\x01"


def patterns_of(backend: Tokenizer) -> list[str]:
    """All regular expressions in the parts of a tokenizer that process text."""
    found: list[str] = []

    def walk(value: Any) -> None:
        if isinstance(value, dict):
            if isinstance(value.get("Regex"), str):
                found.append(value["Regex"])
            value = list(value.values())
        for item in value if isinstance(value, list) else ():
            walk(item)

    for part in (backend.normalizer, backend.pre_tokenizer, backend.decoder):
        if part is not None:
            walk(json.loads(part.__getstate__()))
    return found


def problem_of(data: bytes, probe_seconds: float) -> str | None:
    """What is wrong with a tokenizer.json, as a clause for an error message; None if nothing is."""
    what = "it cannot be read"
    try:
        backend = Tokenizer.from_buffer(data)
        backend.no_truncation()
        backend.no_padding()
        for text in probes(patterns_of(backend)):
            what = f"it fails on a text of many {text[:2]!r}"
            start = time.process_time()
            ids = backend.encode(text, add_special_tokens=False).ids
            backend.decode(ids)
            if time.process_time() - start > probe_seconds:
                return f"it takes more than {probe_seconds:g} s for a text of {len(text)} characters: many {text[:2]!r}"
            if len(ids) > 64 * len(text):
                return f"it makes {len(ids)} tokens of {len(text)} characters"
    except BaseException as error:  # a panic of the library's Rust code is not an Exception
        return f"{what} ({str(error)[:200] or type(error).__name__})"
    return None


def main() -> None:
    follow_parent(int(sys.argv[1]))
    data = read_frame(sys.stdin.buffer)
    if data is None:
        return
    memory_bytes = _BASE_MEMORY_BYTES + _MEMORY_PER_BYTE * len(data)
    restrict(Budget(memory_bytes=memory_bytes, cpu_seconds=_CPU_SECONDS))
    answer = {"problem": problem_of(data, float(sys.argv[2]))}
    write_frame(sys.stdout.buffer, json.dumps(answer).encode())


if __name__ == "__main__":
    main()
