"""One request for each client route with a JSON body. The tests send each of them: the demo server takes them as they
are."""

from collections.abc import Mapping
from typing import Any

_QUESTION = [{"role": "user", "content": "How do I boil an egg?"}]
_INPUT = {"model": "pirate", "input": "How do I boil an egg?", "max_output_tokens": 60}

EXAMPLES: Mapping[str, dict[str, Any]] = {
    "/v1/chat/completions": {"model": "pirate", "messages": _QUESTION, "max_tokens": 60},
    "/v1/completions": {"model": "pirate", "prompt": "To boil an egg,", "max_tokens": 60},
    "/v1/responses": _INPUT,
    "/v1/responses/input_tokens": _INPUT,
    "/v1/messages": {"model": "pirate", "messages": _QUESTION, "max_tokens": 60},
    "/v1/messages/count_tokens": {"model": "pirate", "messages": _QUESTION},
    "/tokenize": {"model": "pirate", "prompt": "To boil an egg,"},
    "/detokenize": {"tokens": [72, 105]},
}
