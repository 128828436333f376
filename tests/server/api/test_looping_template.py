"""A server process whose model has a template that loops: its chats are answered, others go on, and signals end it."""

import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx

from support.children import environment
from support.server.api_server import BASE, PIRATE, WAIT, chat_body

GOOD = "{{ messages[0].content }}"
# It takes a plain question, so that trying it once finds nothing.
TRAP = GOOD + (
    "{% if 'loop' in messages[0].content %}{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}"
    "{% endfor %}{% elif 'print' in messages[0].content %}{% for i in range(99999) %}{{ 'x' * 99999 }}{% endfor %}"
    "{% elif 'memory' in messages[0].content %}{{ 'x'.ljust(999999999) }}{% endif %}"
)


class Server:
    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self.process = process
        self._lines = process.stdout
        assert self._lines is not None
        port = int(self._lines.readline())
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=WAIT, verify=False)

    def chat(self, text: str, model: str = BASE) -> httpx.Response:
        return self.client.post("/v1/chat/completions", json=chat_body(text, model=model, max_tokens=2))

    def pids(self) -> tuple[int, ...]:
        assert self.process.stdin is not None
        assert self._lines is not None
        self.process.stdin.write("?\n")
        self.process.stdin.flush()
        return tuple(map(int, self._lines.readline().split()))


@contextmanager
def serving(seconds: float, **options: Any) -> Iterator[Server]:
    arguments = json.dumps({"template": GOOD, "adapter_template": TRAP, "seconds": seconds, **options})
    with subprocess.Popen(
        [sys.executable, "-m", "support.server.serve_template", arguments],
        env=environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as process:
        try:
            yield Server(process)
        finally:
            process.kill()


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except FileNotFoundError:
        return False


def wait_until_gone(pids: tuple[int, ...]) -> None:
    deadline = time.monotonic() + WAIT
    while any(map(alive, pids)):
        assert time.monotonic() < deadline, "a process remains"
        time.sleep(0.01)


def test_bad_templates_get_400_others_go_on_and_a_signal_ends_it_all() -> None:
    with serving(seconds=0.5) as server:
        for word, code in (
            ("print", "template_too_large"),
            ("memory", "template_too_large"),
            ("loop", "template_timeout"),
        ):
            response = server.chat(word, PIRATE)
            assert (response.status_code, response.json()["error"]["code"]) == (400, code)
            assert "chat template" in response.json()["error"]["message"]
            assert server.chat("hello").status_code == 200
        assert server.chat("hello", PIRATE).status_code == 200
        loops = [threading.Thread(target=_ignore_errors, args=(server,), daemon=True) for _ in range(4)]
        for thread in loops:
            thread.start()
        while not (pids := server.pids()):
            time.sleep(0.01)
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(WAIT) == 0
        wait_until_gone(pids)


def _ignore_errors(server: Server) -> None:
    with suppress(httpx.HTTPError):
        server.chat("loop", PIRATE)
