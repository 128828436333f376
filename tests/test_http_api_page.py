"""docs/http-api.md says what there is: every route of clients, every field of the bodies, and the numbers of limits."""

import re
from pathlib import Path

from guanaco.server.api.app import create_app
from guanaco.server.api.generation import protocol
from guanaco.server.api.http.auth import OPEN_PATHS, is_admin_path
from guanaco.server.api.tools import definitions
from guanaco.server.api.tools.formats.registry import FORMATS
from guanaco.server.api.tools.history import MAX_ARGUMENT_PARTS, MAX_CALLS
from guanaco.server.api.values import template_variables, tokens
from guanaco.server.config import Settings
from support.server.api_server import make_state

PAGE = (Path(__file__).parents[1] / "docs" / "http-api.md").read_text()


def quoted(text: str) -> set[str]:
    return set(re.findall(r"`([^`]+)`", text))


def section(title: str) -> str:
    return PAGE.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def first_column(title: str) -> set[str]:
    """The words in backticks in the first column of a section's table."""
    rows = [line.split("|")[1] for line in section(title).splitlines() if line.startswith("| ")]
    return {word for row in rows for word in quoted(row)}


def test_every_route_of_clients_is_in_the_table() -> None:
    paths = create_app(make_state()).openapi()["paths"]
    routes = {
        f"{method.upper()} {path}".replace("{name:path}", "{name}")
        for path, methods in paths.items()
        if not is_admin_path(path)
        for method in methods
    }
    assert first_column("Routes") == routes
    assert len(routes) >= 12


def test_every_field_is_in_the_table() -> None:
    fields = set(protocol.ChatBody.model_fields) | set(protocol.CompletionBody.model_fields)
    # `model` has a section of its own.
    assert fields - {"model"} <= first_column("Fields of a request")


def test_open_routes_are_named() -> None:
    assert quoted(section("Keys")) >= OPEN_PATHS


def test_numbers_are_those_of_the_code() -> None:
    fields = section("Fields of a request")
    for text in (
        f"at most {protocol.MAX_TOP_K}",
        f"1 to {protocol.MAX_CHOICES}",
        f"up to {tokens.MAX_STOP_STRINGS} strings of up to {tokens.MAX_STOP_CHARS} characters",
        f"up to {tokens.MAX_STOP_TOKEN_IDS} token ids",
        f"up to {tokens.MAX_LOGIT_BIAS} token ids",
        f"up to {tokens.MAX_BAD_WORDS} words of up to {tokens.MAX_BAD_WORD_CHARS} characters",
        f"up to {protocol.MAX_MESSAGES};",
        f"up to {template_variables.MAX_VARIABLES} variables",
        f"{template_variables.MAX_VARIABLES_BYTES >> 10} KiB as JSON",
        f"up to {protocol.MAX_SALT_CHARS} characters",
    ):
        assert text in fields, text


def test_limits_name_settings_that_exist() -> None:
    flags = {word for word in quoted(section("Limits of one request")) if word.startswith("--")}
    assert flags
    assert flags <= {"--" + name.replace("_", "-") for name in Settings.model_fields}


def test_tools_have_the_limits_and_formats_of_the_code() -> None:
    text = section("Tools")
    for words in (
        f"up to {definitions.MAX_TOOLS} tools",
        f"1 to {definitions.MAX_NAME_CHARS} letters",
        f"up to {definitions.MAX_DESCRIPTION_CHARS:,} characters",
        f"up to {definitions.MAX_PARAMETERS_BYTES:,} bytes",
        f"up to {MAX_CALLS} calls",
        f"up to {MAX_ARGUMENT_PARTS:,} commas",
    ):
        assert words in text, words
    assert first_column("Tools") >= {*FORMATS, "none"}
