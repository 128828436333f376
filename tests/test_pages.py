"""The README and the pages of docs/: their links lead somewhere, their flags and commands exist."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
import typer
from typer.main import get_command

from guanaco.server.commands.main import app

ROOT = Path(__file__).parents[1]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").glob("*.md")),
    ROOT / "loadtest/README.md",
]
# Flags of other programs that the pages call.
FOREIGN = ("git", "docker", "locust", "make", "pip", "pytest", "apt", "python", "curl", "loadtest/")
pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())


def commands(command: click.Command, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    yield path, command
    for name, sub in getattr(command, "commands", {}).items():
        yield from commands(sub, (*path, name))


def flags_of(command: click.Command) -> set[str]:
    parameters = command.get_params(typer.Context(command))
    return {flag for parameter in parameters for flag in (*parameter.opts, *parameter.secondary_opts)} | {"--help"}


COMMANDS = dict(commands(get_command(app)))
FLAGS = {flag for command in COMMANDS.values() for flag in flags_of(command)}


def lines_of_code(text: str) -> list[str]:
    """The lines of all fenced blocks, continued lines joined."""
    blocks = re.findall(r"```[a-z]*\n(.*?)```", text, re.DOTALL)
    return "\n".join(blocks).replace("\\\n", " ").splitlines()


@pages
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
        if not link.startswith("http"):
            assert (page.parent / link).exists(), link


@pages
def test_named_files_exist(page: Path) -> None:
    for name in re.findall(
        r"`((?:server|models|adapters|kernels|tests|loadtest|docker)/[\w./-]+\.\w+)`", page.read_text()
    ):
        assert (ROOT / name).exists(), name


@pages
def test_commands_are_ours_and_take_these_flags(page: Path) -> None:
    for line in lines_of_code(page.read_text()):
        words = shlex.split(line.partition(" #")[0], comments=False) if line.startswith("guanaco ") else []
        if not words:
            continue
        path: tuple[str, ...] = ()
        while (*path, words[len(path) + 1] if len(words) > len(path) + 1 else "") in COMMANDS:
            path = (*path, words[len(path) + 1])
        assert path, f"no such command: {line}"
        known = flags_of(COMMANDS[path])
        for word in words:
            if word.startswith("--"):
                assert word.partition("=")[0] in known, line


@pytest.mark.parametrize("page", PAGES[:-1], ids=lambda page: page.name)  # the last one is about locust's flags
def test_flags_in_the_text_exist(page: Path) -> None:
    for code in re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)):
        if any(word in code for word in FOREIGN) or not re.match(r"(--[a-z]|guanaco )", code):
            continue
        for flag in re.findall(r"(?<!\S)--[a-z][a-z-]*", code):
            assert flag in FLAGS, f"{flag} in `{code}`"
