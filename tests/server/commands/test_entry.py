"""The `guanaco` program itself: Ctrl-C while it loads, terminals that are narrow or not UTF-8, and what people read."""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_origin

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from guanaco.server.commands import adapter_actions, entry
from guanaco.server.commands.main import app
from guanaco.server.commands.setting_options import setting_options
from guanaco.server.config import SECTIONS, Settings, load_settings

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


def _every_command(command: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    yield path
    for name, below in getattr(command, "commands", {}).items():
        yield from _every_command(below, (*path, name))


@pytest.mark.parametrize("columns", [40, 80])
@pytest.mark.parametrize("path", list(_every_command(get_command(app))), ids=" ".join)
def test_help_fits_and_cuts_no_name_off(path: tuple[str, ...], columns: int) -> None:
    done = CliRunner().invoke(app, [*path, "--help"], env={"COLUMNS": str(columns)})
    assert done.exit_code == 0
    lines = done.stdout.splitlines()
    assert max(map(len, lines)) <= columns
    assert not [line for line in lines if re.match(r" *-\S*…", line)]
    found = get_command(app)
    for name in path:
        found = found.commands[name]  # type: ignore[attr-defined]
    for parameter in found.params:
        names = (
            [parameter.metavar or parameter.name.upper()] if parameter.param_type_name == "argument" else parameter.opts
        )
        assert all(name.lstrip("-") in done.stdout for name in names)


def test_help_has_every_setting_in_its_panel_with_its_exact_default() -> None:
    shown = {option.name: option.show_default for option in setting_options()[2:]}
    assert list(shown) == list(Settings.model_fields)
    for name, field in Settings.model_fields.items():
        default = field.get_default()
        if default in (None, ()):
            assert shown[name] is True, f"{name}: nothing is a default"
        else:
            assert getattr(load_settings({name: shown[name]}), name) == default
    told = CliRunner().invoke(app, ["serve", "--help"], env={"COLUMNS": "110"}).stdout
    assert [line for line in told.splitlines() if line in SECTIONS] == list(SECTIONS)
    assert re.search(r"--adapter-host-memory SIZE .*\n?.*\[default: 4 GiB\]", told)


def test_help_leaves_out_panels_that_do_not_matter_and_the_command_takes_them() -> None:
    told = CliRunner().invoke(app, ["generate", "--help"]).stdout
    assert "--admin-key" not in told
    assert "--adapter-slots" in told
    done = CliRunner().invoke(app, ["generate", "hi", "--print-config", "--port", "77"])
    assert json.loads(done.stdout)["port"] == 77


@pytest.mark.parametrize("words", ["--help", "--version", "chat --help", "doctor --help", "serve --help"])
def test_help_imports_nothing_heavy(words: str) -> None:
    code = f"{RUN.removesuffix('main()')}\ntry: main()\nexcept SystemExit: print('modules', *sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, *words.split()], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.partition("\nmodules ")[2].split())
    assert "guanaco.server.commands.main" in loaded
    heavy = {"torch", "transformers", "fastapi", "numpy", "tokenizers", "huggingface_hub", "httpx2", "jinja2"}
    if words.startswith("-"):  # pydantic reads the options of a command, and some are made of the settings
        heavy |= {"pydantic", "yaml", "guanaco.server.config"}
    assert not loaded & heavy


LISTS = {  # every setting that an option may give more than once, with a value that is not its default
    "adapter": "a=/b",
    "adapter_profile": "a=guanaco",
    "allow_origin": "https://chat.example",
    "allowed_host": "other.example",
    "api_key": "secret",
    "train_key": "0123abcd",
}


@pytest.mark.parametrize("source", ["variable", "file", "flag"])
def test_a_command_line_without_a_list_leaves_the_other_sources_alone(source: str, tmp_path: Path) -> None:
    """An option that was not given is an empty tuple to typer; taken for a flag, it hid GUANACO_API_KEY."""
    assert set(LISTS) == {
        name for name, field in Settings.model_fields.items() if get_origin(field.annotation) is tuple
    }
    config = tmp_path / "settings.yaml"
    config.write_text(json.dumps(LISTS if source == "file" else {}))
    variables = {f"GUANACO_{name.upper()}": value for name, value in LISTS.items() if source == "variable"}
    flags = [part for name, value in LISTS.items() for part in (f"--{name.replace('_', '-')}", value)]
    given = flags if source == "flag" else []
    done = CliRunner().invoke(app, ["serve", "--config", str(config), "--print-config", *given], env=variables)
    told = json.loads(done.stdout)
    assert {name: told[name] for name in LISTS} == {
        name: ["**********" if name == "api_key" else value] for name, value in LISTS.items()
    }
