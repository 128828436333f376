"""The `guanaco` program itself: Ctrl-C while it loads, terminals that are narrow or not UTF-8, and what people read."""

import subprocess
import sys

import pytest
from typer.main import get_command

from guanaco.server.commands import adapter_actions, entry
from guanaco.server.commands.main import app

RUN = "import sys; from guanaco.server.commands.entry import main; sys.argv = ['guanaco', *sys.argv[1:]]; main()"


def test_ctrl_c_while_it_loads_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("guanaco.server.commands.main.main", interrupted)
    with pytest.raises(SystemExit) as ended:
        entry.main()
    assert ended.value.code == 130
    assert capsys.readouterr().err == "guanaco: interrupted\n"


def test_nothing_breaks_on_a_narrow_terminal_without_utf_8() -> None:
    """All commands' help in one process, and text that ASCII does not have."""
    names = [*get_command(app).commands]  # type: ignore[attr-defined]
    code = (
        "import sys; from guanaco.server.commands import entry, main\n"
        f"main.main = lambda: [main.app([name, '--help'], standalone_mode=False) for name in {names!r}]\n"
        "entry.main()\n"
        "from guanaco.server.commands.terminal import write_text; write_text('caf\\u00e9 \\U0001f999 \\u2026')"
    )
    environment = {"PATH": "/usr/bin:/bin", "PYTHONIOENCODING": "ascii", "COLUMNS": "40", "LANG": "C"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, timeout=120, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.endswith(b"caf? ? ...")


@pytest.mark.parametrize(
    ("key", "value", "shown"),
    [
        ("changed_at", 1_764_374_400, "2025-11-29 00:00:00 UTC"),
        ("tier", "device", "ready to use"),
        ("split", {"a@" + "f" * 64: 90, "b": 10}, "a@ffffffffffff 90, b 10"),
        ("history", [{"revision": 1, "changed_at": 0.0}], "revision 1, changed_at 1970-01-01 00:00:00 UTC"),
    ],
)
def test_cards_are_shown_for_people(key: str, value: object, shown: str) -> None:
    assert adapter_actions._shown(key, value) == shown
