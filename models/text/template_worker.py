"""The restricted process that renders chat templates: one request after another, until its parent ends.

Runs as `python -I -m guanaco.models.text.template_worker LIFELINE MEMORY_BYTES SECONDS`, started by `template_renderer`
alone. A request is a JSON object: {"digest", "source" or null, "variables" or null, "max_chars"}. An answer is the
processor time in milliseconds (4 bytes), TEXT or ERROR (1 byte), and the text or a JSON object {"code", "message"}.
"""

import gc
import json
import pprint
import struct
import sys
import textwrap
import time
import unicodedata
from typing import Any

import jinja2.debug

from guanaco.models.error_codes import ErrorCode
from guanaco.models.errors import TemplateError
from guanaco.models.formats.restricted_process import (
    Budget,
    follow_parent,
    limit_cpu_from_now,
    read_frame,
    restrict,
    write_frame,
)
from guanaco.models.text.template_sandbox import SandboxedTemplate

TEXT, ERROR = b"T", b"E"
HEAD = struct.Struct(">Ic")
MAX_TEMPLATES = 32  # how many compiled templates are kept
# jinja2 imports these modules when a filter or an error first needs them. By then the process cannot open files.
_NEEDED_LATER = (jinja2.debug, pprint, textwrap, unicodedata)
# Encoded in advance: when it is needed, there is no memory to encode it.
_NO_MEMORY = json.dumps(
    {"code": ErrorCode.TEMPLATE_TOO_LARGE, "message": "it needs more memory than it may take"}
).encode()
_WARM_UP = "{{ strftime_now('%c') }}{{ 'a b' | wordwrap(1) }}{{ {'a': [1]} | tojson(indent=1) }}{{ {} | pprint }}"


class _Templates:
    """The compiled templates by digest. The error UNKNOWN_TEMPLATE asks the parent to send a dropped one again."""

    def __init__(self) -> None:
        self._compiled: dict[str, SandboxedTemplate] = {}

    def get(self, digest: str, source: str | None) -> SandboxedTemplate:
        if digest not in self._compiled:
            if source is None:
                raise TemplateError("the template has to be sent again", ErrorCode.UNKNOWN_TEMPLATE)
            template = SandboxedTemplate(source)
            if len(self._compiled) >= MAX_TEMPLATES:
                self._compiled.pop(next(iter(self._compiled)))
            self._compiled[digest] = template
        return self._compiled[digest]


def answer(templates: _Templates, message: bytes) -> tuple[bytes, bytes]:
    """Render one request. Returns (TEXT, text) or (ERROR, a JSON object with code and message)."""
    try:
        request: dict[str, Any] = json.loads(message)
        template = templates.get(request["digest"], request["source"])
        if request["variables"] is None:
            return TEXT, b""
        text = template.render(request["variables"], request["max_chars"])
        # JSON may hold half a surrogate pair, which is no character. It is passed on as it is.
        return TEXT, text.encode("utf-8", "surrogatepass")
    except TemplateError as error:
        return ERROR, json.dumps({"code": error.code, "message": str(error)}).encode()
    except MemoryError:
        return ERROR, _NO_MEMORY


def main() -> None:
    lifeline, memory_bytes, seconds = map(int, sys.argv[1:])
    follow_parent(lifeline)
    SandboxedTemplate(_WARM_UP).render({}, 1000)
    templates = _Templates()
    requests, answers = sys.stdin.buffer, sys.stdout.buffer
    gc.freeze()
    restrict(Budget(memory_bytes))
    write_frame(answers, b"ready")
    while (message := read_frame(requests)) is not None:
        limit_cpu_from_now(seconds)
        start = time.process_time()
        kind, content = answer(templates, message)
        milliseconds = int((time.process_time() - start) * 1000)
        write_frame(answers, HEAD.pack(milliseconds, kind), content)
        del message, content


if __name__ == "__main__":
    main()
