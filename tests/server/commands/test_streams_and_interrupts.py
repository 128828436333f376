"""The program around its commands: Ctrl-C, encodings, closed streams, no home directory, a narrow terminal."""

import io
import json
import os
import pwd
import re
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.main import get_command
from typer.testing import CliRunner

from guanaco.server.bootstrap.machine import resident_bytes
from guanaco.server.bootstrap.progress import reporting
from guanaco.server.commands import adapter_actions, streams
from guanaco.server.commands.chat import session
from guanaco.server.commands.common import typed_text
from guanaco.server.commands.main import app
from guanaco.server.commands.models import prune_models
from guanaco.server.config import SettingsError, load_settings
from guanaco.server.errors import CommandError
from support.models.tiny_models import make_tiny_llama

ROOT = Path(__file__).parents[3]
NO_HOME = {"PATH": "/usr/bin:/bin"}


def start(*arguments: object, code: str = "", env: dict[str, str] | None = None, **options: Any) -> Any:
    """The program as the installed script runs it; `code` runs before it."""
    script = f"{code}\nimport sys\nfrom guanaco.server.commands.entry import main\nsys.exit(main())"
    return subprocess.Popen(
        [sys.executable, "-c", script, *map(str, arguments)],
        env=NO_HOME if env is None else env, text=True, encoding="utf-8", errors="surrogateescape",
        **{"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options},
    )  # fmt: skip


def test_the_installed_script_is_the_program() -> None:
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts == {"guanaco": "guanaco.server.commands.entry:main"}


def test_ctrl_c_while_importing_is_one_line() -> None:
    """The interrupt comes in the middle of the imports, where the first library is looked for."""
    raises = (
        "import sys, builtins\n"
        "class Finder:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'typer': raise KeyboardInterrupt\n"
        "sys.meta_path.insert(0, Finder())"
    )
    done = start("version", code=raises)
    assert done.communicate(timeout=60) == ("", "guanaco: interrupted\n")
    assert done.returncode == 128 + signal.SIGINT


def test_the_first_process_of_a_container_heeds_sigterm_while_it_imports() -> None:
    slow = (
        "import os, sys, time\nos.getpid = lambda: 1\n"
        "class Finder:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'typer': print('importing', flush=True); time.sleep(60)\n"
        "sys.meta_path.insert(0, Finder())"
    )
    process = start("serve", code=slow)
    assert process.stdout.readline() == "importing\n"
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=60) == ("", "guanaco: ended by SIGTERM\n")
    assert process.returncode == 128 + signal.SIGTERM


def test_sigterm_while_the_model_loads_is_one_line() -> None:
    """The first process of a container ignores the signal unless it has a handler."""
    slow = (
        "import time\nfrom guanaco.server.commands import serve\n"
        "def load(*_, **__): print('loading', flush=True); time.sleep(60)\n"
        "serve.build_runtime = load"
    )
    process = start("serve", "--port", "0", code=slow)
    assert process.stdout.readline() == "loading\n"
    process.send_signal(signal.SIGTERM)
    # Not communicate(), which waits for the pipes' end as well: twice that took a minute after the line was written.
    assert process.wait(60) == 128 + signal.SIGTERM
    assert process.stderr.readline() == "guanaco: ended by SIGTERM\n"


@pytest.mark.parametrize(
    ("arguments", "interrupted"),
    [
        (("chat",), "guanaco.server.commands.chat.session.ChatSession.run"),
        (("generate", "hi"), "guanaco.server.bootstrap.runtime.build_runtime"),
        (("serve", "--port", "0"), "guanaco.server.commands.serve.build_runtime"),
        (("bench",), "guanaco.server.commands.bench.engine.build_runtime"),
        (("bench", "serve"), "guanaco.server.commands.bench.serving.run._wait_until_ready"),
        (("doctor",), "guanaco.server.commands.doctor.look"),
        (("quantize", "a", "b"), "guanaco.server.commands.quantize.quantize_checkpoint"),
        (("models", "list"), "guanaco.server.commands.models.list_cached_models"),
        (("adapters", "list", "--admin-key", "k"), "guanaco.server.commands.adapter_actions.AdminClient.call"),
        (("adapters", "convert", "a", "b"), "guanaco.adapters.convert.conversion.convert_adapter"),
        (("aliases", "list", "--admin-key", "k"), "guanaco.server.commands.adapter_actions.AdminClient.call"),
        (("compare", "--replay", "a.csv"), "guanaco.server.commands.compare.stored.run_replay"),
        (("version",), "guanaco.server.commands.main._installed_version"),
    ],
)
def test_ctrl_c_in_any_command_is_one_line(
    arguments: tuple[str, ...], interrupted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(interrupted, interrupt)
    monkeypatch.setattr("faulthandler.enable", lambda: None)  # it wants a real standard error
    done = CliRunner().invoke(app, list(arguments))
    assert (done.exit_code, done.stderr, done.stdout) == (130, "guanaco: interrupted\n", "")


def test_ctrl_c_while_loading_is_one_line(tmp_path: Path) -> None:
    """A real signal to a real process, while another one holds the demo's lock."""
    import fcntl

    from guanaco.models.loading.demo import demo_path

    folder = demo_path(tmp_path).parent
    folder.mkdir(parents=True)
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        process = start("generate", "hi", "--cache", tmp_path)
        first = process.stderr.readline()
        assert "wait" in first, first
        process.send_signal(signal.SIGINT)
        out, rest = process.communicate(timeout=60)
    assert (out, rest, process.returncode) == ("", "guanaco: interrupted\n", 130)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8"])
def test_every_text_can_be_printed(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("stdin", "stdout", "stderr"):
        monkeypatch.setattr(sys, name, io.TextIOWrapper(io.BytesIO(), encoding=encoding))
    streams.prepare_streams()
    print("a → b … é 漢 \udc80")
    Console(file=sys.stdout, width=40).rule("→ 漢")
    sys.stdout.flush()
    text = sys.stdout.buffer.getvalue().decode(encoding)
    shown = {"ascii": "a -> b ... ? ? ?", "latin-1": "a -> b ... é ? ?", "cp1252": "a -> b … é ? ?"}
    assert text.splitlines()[0] == shown.get(encoding, "a → b … é 漢 ?")
    assert sys.stdin.encoding == ("utf-8" if encoding == "ascii" else encoding)


def test_closed_streams() -> None:
    done = start("--version", code="import sys; sys.stdin = sys.stdout = sys.stderr = None")
    assert done.communicate(timeout=60) == ("", "")
    assert done.returncode == 0


def test_an_output_on_a_full_disk() -> None:
    with open("/dev/full", "w") as full:
        done = start("version", stdout=full, env={**NO_HOME, "PYTHONUNBUFFERED": "1"})
        _, errors = done.communicate(timeout=60)
    assert (done.returncode, errors.count("\n"), "No space left" in errors) == (1, 1, True), errors


def test_words_that_are_not_utf_8() -> None:
    assert typed_text("h\udcc3\udca9", "PROMPT") == "hé", "UTF-8 in a locale that has no encoding for it"
    with pytest.raises(CommandError, match="PROMPT is not valid UTF-8"):
        typed_text("\udcff", "PROMPT")
    for command in (["generate", "\udcff"], ["chat", "--system", "\udcff"]):
        done = CliRunner().invoke(app, command)
        assert (done.exit_code, done.stderr.count("\n")) == (2, 1), done.output
    stream = io.TextIOWrapper(io.BytesIO(b"ok\n\xff\n"), encoding="utf-8")
    with pytest.raises(CommandError, match="not valid UTF-8"):
        list(session._lines(stream))


@pytest.fixture
def nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """A user id that no account has, and no HOME."""

    def unknown(*_: object) -> None:
        raise KeyError("getpwuid(): uid not found: 54321")

    for name in [*(n for n in os.environ if n.startswith("GUANACO_")), "HOME"]:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.setattr(pwd, "getpwnam", unknown)


@pytest.mark.usefixtures("nobody")
def test_no_home_directory_is_one_line_that_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("faulthandler.enable", lambda: None)
    for command in (["generate", "hi"], ["models", "list"], ["models", "prune"], ["serve", "--port", "0"], ["bench"]):
        done = CliRunner().invoke(app, command)
        assert (done.exit_code, done.stderr.count("\n")) == (2, 1), done.output
        assert "name one with --cache (GUANACO_CACHE), or set HOME" in done.stderr
    done = CliRunner().invoke(app, ["doctor", "--json", "--offline"])
    (cache,) = (f for f in json.loads(done.stdout)["findings"] if f["name"] == "cache")
    assert (done.exit_code, cache["ok"], "set HOME" in cache["advice"]) == (1, False, True)
    assert CliRunner().invoke(app, ["serve", "--print-config"]).exit_code == 0
    assert load_settings({"cache": str(tmp_path)}).adapter_store_dir == tmp_path / "adapters"
    with pytest.raises(SettingsError, match="--adapter-store \\(GUANACO_ADAPTER_STORE\\)"):
        _ = load_settings({"adapter_store": "~/x"}).adapter_store_dir
    assert not list(tmp_path.iterdir()), "no directory that is called ~"


@pytest.mark.usefixtures("nobody")
@pytest.mark.parametrize(
    "given",
    [
        ("--model", "~/x"),
        ("--model", "~nobody-of-this-name/x"),
        ("--adapter", "a=~/x"),
        ("--adapter-root", "~/x"),
        ("--adapter", "a=/x", "--adapter-profile", "a=~/x"),
        ("--chat-template", "~/x"),
    ],
)
def test_a_path_below_an_unknown_home_is_one_line(given: tuple[str, ...], tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["generate", "hi", "--offline", "--cache", str(tmp_path), *given])
    assert (done.exit_code, done.stderr.count("\n")) == (2, 1), done.output
    assert "~" in done.stderr


def test_nobody_in_a_real_process(tmp_path: Path) -> None:
    """No HOME, ASCII, 40 columns: what needs no home works, what needs one is a line."""
    model = make_tiny_llama(tmp_path / "tiny", kind="gqa")
    env = {**NO_HOME, "PYTHONIOENCODING": "ascii", "COLUMNS": "40"}
    settings = ["--model", model, "--cache", tmp_path / "cache", "--threads", "1", "--kv-cache-memory", "4MiB"]
    runs = [start("generate", "é →", *settings, "--max-tokens", "4", env=env), start("serve", "--help", env=env)]
    for process in runs:
        out, errors = process.communicate(timeout=120)
        assert (process.returncode, "Traceback" in errors) == (0, False), errors
        assert out.isascii()


@pytest.mark.parametrize("columns", ["1", "10", "40"])
def test_a_narrow_terminal(columns: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    card = {"name": "a", "state": "ready", "leads_to": "x", "revision": 1, "num_uses": 0, "split": {"x": 1}}
    adapter_actions.show({"data": [{"object": "alias", **card}]}, as_json=False)
    adapter_actions.show({"object": "alias", **card}, as_json=False)
    for command in (["--help"], ["serve", "--help"], ["doctor", "--offline"]):
        done = CliRunner().invoke(app, command, env={"COLUMNS": columns})
        assert done.exit_code in (0, 1)
        assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    assert capsys.readouterr().out


def test_cards_are_for_people(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    was = {"revision": 1, "changed_at": 1_700_000_000.5, "split": {"a": 1}}
    card = {"object": "alias", "name": "p", "revision": 2, "changed_at": 1_700_000_060.0, "split": {"a": 9, "b@3f": 1}}
    adapter_actions.show({**card, "history": [was], "tier": "device"}, as_json=False)
    out = capsys.readouterr().out
    assert "2023-11-14 22:14:20 UTC" in out
    assert "revision 1, changed_at 2023-11-14 22:13:20 UTC, split a 1" in out
    assert "a 9, b@3f 1" in out
    assert "ready to use" in out
    assert not re.search(r"\b17000000|tier|device", out), out
    adapter_actions.show({**card, "tier": "device"}, as_json=True)
    assert json.loads(capsys.readouterr().out)["tier"] == "device", "JSON is for programs"


def test_nobody_to_ask_is_a_no(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    entry = type("Entry", (), {"key": "k", "num_bytes": 1})
    monkeypatch.setattr("guanaco.server.commands.models.list_cached_models", lambda _: [entry])
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    prune_models(tmp_path, [], yes=False)
    assert "nothing was deleted" in capsys.readouterr().out


@pytest.mark.parametrize("is_terminal", [True, False])
def test_progress_never_passes_100_percent(is_terminal: bool) -> None:
    out = io.StringIO()
    with reporting(Console(file=out, force_terminal=is_terminal, width=100), "load") as report:
        report("weights", 434, 100)
        time.sleep(0.2 if is_terminal else 0)
    assert "100" in out.getvalue()
    assert "434" not in out.getvalue()


def test_resident_memory_is_this_process(tmp_path: Path) -> None:
    assert resident_bytes() > 10 << 20
    assert resident_bytes(tmp_path) == 0


# -- the README ------------------------------------------------------------------------------------------------------


def _commands(page: str) -> list[str]:
    """What the README's blocks of code run, joined where a line goes on; comments are left out."""
    blocks = re.findall(r"^```\n(.*?)^```", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL)
    starts = re.compile(r"(make|guanaco|curl|locust|\.) ")
    return [line for block in blocks if starts.match(block) for line in block.replace("\\\n", " ").splitlines()]


def test_the_readme_says_how_to_get_the_command() -> None:
    lines = _commands("README.md")
    first = next(n for n, line in enumerate(lines) if line.startswith("guanaco "))
    assert any(line.startswith(". .venv/bin/activate") for line in lines[:first])


def test_what_looks_like_a_command_in_the_readme_is_one() -> None:
    program_commands = get_command(app)
    names = set(program_commands.commands)  # type: ignore[attr-defined]
    found = [line.partition("  #")[0].rstrip() for line in _commands("README.md")]
    assert len(found) > 8
    for line in found:
        assert "…" not in line, f"it cannot be copied: {line}"
        words = line.split()
        if words[0] == "guanaco":
            assert words[1] in names, line
            assert len([word for word in words[1:] if word in names]) == 1, f"several commands in one line: {line}"


def test_the_load_test_is_installed_by_a_step_that_is_documented() -> None:
    assert "make install EXTRAS=loadtest" in (ROOT / "loadtest/README.md").read_text()
    plan = ["make", "--dry-run", "--no-print-directory", "install"]
    done = [
        subprocess.run([*plan, *more], cwd=ROOT, capture_output=True, text=True, check=True).stdout
        for more in ([], ["EXTRAS=loadtest"])
    ]
    assert "[loadtest]" not in done[0]
    assert "--constraint constraints.txt" in done[1]
    assert ".[loadtest]" in done[1]
