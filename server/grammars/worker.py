"""The restricted process in which grammars are compiled first, one after another, until its parent ends.

llguidance overflows its stack on some grammars, which would end the server. Here it ends only this process. Runs as
`python -I -m guanaco.server.grammars.worker LIFELINE MEMORY_BYTES SECONDS`, started by `compiler`. The first message is
the packed vocabulary; its answer is `ready`. Each further message is a JSON object {"kind", "text"}. Its answer is one,
too: {"lark"}, the grammar in llguidance's own language, or {"problem"}, the reason why it can't be compiled.
"""

import gc
import json
import resource
import sys

import llguidance.gbnf_to_lark  # noqa: F401 - imported here: after `restrict` no file can be opened

from guanaco.models.formats.restricted_process import (
    Budget,
    follow_parent,
    limit_cpu_from_now,
    read_frame,
    restrict,
    write_frame,
)
from guanaco.server.grammars.building import build, lark_of, try_out
from guanaco.server.grammars.errors import GrammarError
from guanaco.server.grammars.spec import Grammar, json_object
from guanaco.server.grammars.vocabulary import Vocabulary

# Less than any thread of the server has: a grammar that compiles here also compiles there.
_STACK_BYTES = 1 << 20


def answer(vocabulary: Vocabulary, message: bytes) -> dict[str, str]:
    """The answer to a request: {"lark": …} or {"problem": …}."""
    request = json.loads(message)
    grammar = Grammar(request["kind"], request["text"])
    try:
        lark = lark_of(grammar)
        try_out(build(lark, vocabulary, grammar.kind), vocabulary, grammar.kind)
        return {"lark": lark}
    except GrammarError as error:
        return {"problem": str(error)}
    except (MemoryError, RecursionError):
        return {"problem": "it is too large or too deeply nested for this server: simplify it"}


def main() -> None:
    lifeline, memory_bytes, seconds = map(int, sys.argv[1:])
    follow_parent(lifeline)
    requests, answers = sys.stdin.buffer, sys.stdout.buffer
    packed = read_frame(requests)
    if packed is None:
        return
    vocabulary = Vocabulary.unpacked(packed)
    del packed
    first = json_object()
    answer(vocabulary, json.dumps({"kind": first.kind, "text": first.text}).encode())
    gc.freeze()
    restrict(Budget(memory_bytes))
    resource.setrlimit(resource.RLIMIT_STACK, (_STACK_BYTES, _STACK_BYTES))
    write_frame(answers, b"ready")
    while (message := read_frame(requests)) is not None:
        limit_cpu_from_now(seconds)
        write_frame(answers, json.dumps(answer(vocabulary, message)).encode())


if __name__ == "__main__":
    main()
