"""`guanaco chat` in a terminal of its own: what is typed, what is sent, what is shown and kept."""

import io
import json
import os
import pty
import re
import select
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from guanaco.server.commands.chat import session as session_module
from guanaco.server.commands.chat.client import AnswerFigures, ChatClient
from guanaco.server.commands.chat.conversation import HELP, Conversation, run_command
from guanaco.server.commands.chat.screen import MarkdownStream, finished_blocks
from guanaco.server.commands.chat.session import ChatSession
from guanaco.server.errors import CommandError
from support.children import environment

ANSWER = ["# Eggs\n\n", "Boil **", "them**.\n\n```python\nx = 1\n\n", "y = 2\n```\n\nDone \x1b[31mnow."]


class _Server(BaseHTTPRequestHandler):
    """Two models; every chat gets the same answer, with usage and a version."""

    asked: ClassVar[list[dict]] = []

    def do_GET(self) -> None:
        self._send(json.dumps({"data": [{"id": "base"}, {"id": "pirate"}]}))

    def do_POST(self) -> None:
        self.asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        events = [{"choices": [{"delta": {"content": piece}}]} for piece in ANSWER]
        events.append({"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 42}})
        self._send("".join(f"data: {json.dumps(event)}\n\n" for event in events) + "data: [DONE]\n\n")

    def _send(self, text: str) -> None:
        self.send_response(200)
        self.send_header("X-Adapter-Version", "3f2c9a")
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def url() -> Iterator[str]:
    _Server.asked.clear()
    with HTTPServer(("127.0.0.1", 0), _Server) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def _read_until(terminal: int, expected: str, seen: str = "") -> str:
    deadline = time.monotonic() + 30
    while re.search(expected, seen, re.DOTALL) is None:
        ready, _, _ = select.select([terminal], [], [], max(0, deadline - time.monotonic()))
        assert ready, f"{expected!r} did not come: {seen[-2000:]!r}"
        got = os.read(terminal, 65536).decode(errors="replace")
        if "\x1b[6n" in got:  # prompt_toolkit asks where the cursor is
            os.write(terminal, b"\x1b[1;1R")
        seen += re.sub(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b[=>]", "", got)
    return seen


def test_a_conversation_in_a_terminal(url: str, tmp_path: Path) -> None:
    """Two lines in one message, Markdown, figures, an adapter, a file, history, and the end."""
    saved, state = tmp_path / "talk.jsonl", tmp_path / "state"
    process, terminal = pty.fork()
    if process == 0:
        env = {**environment(), "XDG_STATE_HOME": str(state), "TERM": "xterm", "COLUMNS": "100", "LINES": "40"}
        code = "from guanaco.server.commands.entry import main; main()"
        os.execve(sys.executable, [sys.executable, "-c", code, "chat", "--url", url], env)
    try:
        _read_until(terminal, "base ›")
        os.write(terminal, b"How do I\x1b\rboil an egg?\r")
        seen = _read_until(terminal, "version 3f2c9a.*›")
        assert "42 tokens" in seen
        assert "first after" in seen
        assert "Boil them." in seen, "Markdown is shown, not its marks"
        assert "Done \ufffd[31mnow." in seen, "what a terminal would take as a command is not passed on"
        os.write(terminal, b"/adapter pirate\r")
        _read_until(terminal, "pirate answers now.*›")
        os.write(terminal, b"/adapter nobody\r")
        _read_until(terminal, "it has: base, pirate.*›")
        os.write(terminal, b"again\r")
        _read_until(terminal, "version 3f2c9a.*›")
        os.write(terminal, f"/save {saved}\r".encode())
        _read_until(terminal, "written to.*pirate ›")
        os.write(terminal, b"\x04")
        assert os.waitpid(process, 0)[1] == 0
    finally:
        os.close(terminal)
    first, second = _Server.asked
    assert first["messages"] == [{"role": "user", "content": "How do I\nboil an egg?"}]
    assert (first["model"], second["model"]) == ("base", "pirate")
    assert len(second["messages"]) == 3
    assert [json.loads(line)["role"] for line in saved.read_text().splitlines()] == ["user", "assistant"] * 2
    history = state / "guanaco" / "chat_history"
    assert "boil an egg?" in history.read_text()
    assert history.stat().st_mode & 0o077 == 0, "nobody else may read what was typed"


def run(line: str, conversation: Conversation) -> tuple[str | None, str]:
    said: list[str] = []
    again = run_command(line, conversation, lambda: ["base", "pirate"], said.append)
    return again, "\n".join(said)


def test_commands_change_the_conversation(tmp_path: Path) -> None:
    talk = Conversation("base")
    run("/system Be brief.", talk)
    talk.turns += [{"role": "user", "content": "one"}, {"role": "assistant", "content": "1"}]
    assert [message["role"] for message in talk.messages()] == ["system", "user", "assistant"]
    run(f"/save {tmp_path}/a.jsonl", talk)
    assert run("/retry", talk) == ("one", "")
    assert talk.turns == []
    run(f"/load {tmp_path}/a.jsonl", talk)
    assert (talk.system, len(talk.turns)) == ("Be brief.", 2)
    assert run("/undo", talk)[1] == "the last message is forgotten"
    assert run("/models", talk)[1] == "* base\n  pirate"
    run("/model pirate", talk)
    run("/system", talk)
    assert (talk.model, talk.system) == ("pirate", None)
    assert run("/help", talk)[1] == HELP
    with pytest.raises(EOFError):
        run("/quit", talk)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("/save", "needs the name of a file"),
        ("/save /nope/x", "can't be written"),
        ("/save {used}", "exists"),
        ("/load /nope", "can't be read"),
        ("/load {used}", "line 1"),
        ("/undo", "no message yet"),
        ("/adapter nobody", "it has: base, pirate"),
        ("/nonsense", "/help lists them"),
    ],
)
def test_a_command_that_can_not_be_done_changes_nothing(line: str, words: str, tmp_path: Path) -> None:
    used = tmp_path / "used"
    used.write_text('{"role": "tool", "content": 1}\n')
    talk = Conversation("base", "s", [])
    with pytest.raises(CommandError, match=words):
        run(line.format(used=used), talk)
    assert talk == Conversation("base", "s", [])


def test_ctrl_c_stops_an_answer_and_keeps_what_came(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    client = ChatClient(url, api_key=None, options={})
    talk, out = Conversation("base"), Console(file=io.StringIO())

    def interrupted(*_: object) -> Iterator[str]:
        yield "half"
        raise KeyboardInterrupt

    monkeypatch.setattr(client, "stream", interrupted)
    ChatSession(client, system=None, plain=False, history=None)._answer(talk, "hello", out)
    assert talk.turns[-1] == {"role": "assistant", "content": "half"}
    assert "stopped" in out.file.getvalue()  # type: ignore[attr-defined]


def test_square_brackets_are_no_markup(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name or a server's message that looks like rich's markup is printed as it is."""
    client = ChatClient(url, api_key=None, options={})
    monkeypatch.setattr(client, "models", lambda: ["m[/x]", "n[/y]"])
    lines = iter(["/models", "hello", "/adapter n[/y]"])

    def read(_: str) -> str:
        return next(lines, "/quit")

    def refuse(*_: object) -> Iterator[str]:
        raise CommandError("bad [/red] words")

    monkeypatch.setattr(client, "stream", refuse)
    out = Console(file=io.StringIO(), width=200)
    ChatSession(client, system=None, plain=True, history=None)._talk(Conversation("m[/x]"), out, read)
    for expected in ("m[/x] at", "n[/y]", "bad [/red] words", "n[/y] answers now"):
        assert expected in out.file.getvalue()  # type: ignore[attr-defined]


MARKDOWN = st.lists(
    st.sampled_from(["# A\n", "text\n", "\n", "\n\n", "- item\n", "1. one\n", "```\n", "    code\n", "~~~~\n"])
)


@given(MARKDOWN, st.integers(1, 5))
def test_blocks_are_complete_and_nothing_is_lost(parts: list[str], size: int) -> None:
    """However the text is cut on its way: the printed blocks and the rest are the text, and no fence is cut."""
    text = "".join(parts)
    printed, tail = "", ""
    for at in range(0, len(text), size):
        done, tail = finished_blocks(tail + text[at : at + size])
        printed += done
        assert done.count("```") % 2 == 0 or "~~~~" in done
    assert printed + tail == text


def test_finished_blocks_are_printed_before_the_end() -> None:
    out = Console(file=io.StringIO(), width=60, force_terminal=True)
    with MarkdownStream(out) as screen:
        screen.write("First paragraph.\n\nSecond")
        assert "First paragraph." in out.file.getvalue()  # type: ignore[attr-defined]
    assert "Second" in out.file.getvalue()  # type: ignore[attr-defined]


def test_figures_of_an_answer() -> None:
    figures = AnswerFigures(10.0, 10.5, 12.5, 5, 41, "3f", "length")
    assert figures.line().startswith("41 tokens · 20.0 tokens/s · first after 0.50 s · version 3f · cut off at")
    assert AnswerFigures(10.0).line() == ""


def test_a_history_that_can_not_be_written_stops_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    client = ChatClient("http://127.0.0.1:9", api_key=None, options={})
    assert callable(session_module._line_editor(client, tmp_path / "file" / "history"))
