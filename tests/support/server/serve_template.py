"""A program: the real server process over the fake engine, with a real chat template. Prints its port, then one line
with the processes that render templates whenever a line comes on standard input.

python serve_template.py '{"template": "…", "adapter_template": "…", "seconds": 0.5}'
"""

import json
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from guanaco.models.text.chat_template import ChatTemplate
from guanaco.models.text.template_renderer import TemplateLimits, TemplateRenderer
from guanaco.server.api.server import bind, serve
from support.server.api_server import PIRATE, make_state
from support.server.fake_engine import BOS, FakeTokenizer


class TemplateTokenizer(FakeTokenizer):
    """Bytes of what a real template renders."""

    def encode_chat(
        self,
        messages: list[dict[str, Any]],
        *,
        add_generation_prompt: bool = True,
        template: Any = None,
        max_chars: int = 1 << 24,
        tools: Sequence[dict[str, Any]] | None = None,
        max_tokens: int | None = None,
        continue_final_message: bool = False,
        variables: Mapping[str, Any] = MappingProxyType({}),
    ) -> list[int]:
        text = template.render(messages, add_generation_prompt=add_generation_prompt, max_chars=max_chars)
        return [BOS, *text.encode()]


def main() -> int:
    options = json.loads(sys.argv[1])
    renderer = TemplateRenderer(TemplateLimits(seconds=options["seconds"]))
    made = [ChatTemplate(options[name], renderer=renderer) for name in ("template", "adapter_template")]
    state = make_state()
    state = replace(state, tokenizer=TemplateTokenizer(), chat_template=made[0])
    # The adapter has a template of its own; the state is frozen.
    object.__setattr__(state, "template_for", lambda model: made[model.name == PIRATE])

    def tell() -> None:
        for _ in sys.stdin:
            print(*renderer.pids, flush=True)

    threading.Thread(target=tell, daemon=True).start()
    sock = bind(state.settings)
    try:
        return serve(state, sock, on_started=lambda: print(sock.getsockname()[1], flush=True))
    finally:
        renderer.close()


if __name__ == "__main__":
    sys.exit(main())
