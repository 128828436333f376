"""docs/adapters.md says what there is: every route, setting, field and series about adapters, and no others."""

import ast
import re
from pathlib import Path

import pytest
from typer.main import get_command

from guanaco.adapters.versions.profile import _FIELDS
from guanaco.models.error_codes import ErrorCode
from guanaco.server.api.app import create_app
from guanaco.server.api.http.auth import is_admin_path
from guanaco.server.commands.main import app
from guanaco.server.config import Settings
from guanaco.server.metrics.adapters import LOAD_RESULTS, LOAD_STAGES
from guanaco.server.metrics.server import Metrics
from support.server.adapter_client import put
from support.server.adapter_server import ADMIN, FINGERPRINT, make_adapter_server
from support.server.api_server import BASE, make_state

PAGE = (Path(__file__).parents[1] / "docs" / "adapters.md").read_text()


def section(title: str) -> str:
    return PAGE.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def quoted(text: str) -> set[str]:
    return set(re.findall(r"`([^`]+)`", text))


def first_column(text: str) -> set[str]:
    """What the tables of a section have in backticks in their first column."""
    rows = [line.split("|")[1] for line in text.splitlines() if line.startswith("| `")]
    return {word for row in rows for word in quoted(row)}


def test_routes() -> None:
    paths = create_app(make_state()).openapi()["paths"]
    routes = {f"{m.upper()} {path}" for path, methods in paths.items() if is_admin_path(path) for m in methods}
    assert first_column(section("Routes")) == routes
    assert len(routes) >= 14


def test_settings() -> None:
    about_adapters = {name for name in Settings.model_fields if "adapter" in name or "lora" in name}
    flags = {
        "--" + name.replace("_", "-") for name in about_adapters | {"admin_key", "strict_base", "flood_step_tokens"}
    }
    assert first_column(section("Settings")) == flags


@pytest.mark.parametrize(
    "row", [line for line in section("Settings").splitlines() if re.match(r"\| `--.* \| [\d.]+( s| GiB)? \|", line)]
)
def test_defaults_that_are_numbers(row: str) -> None:
    flag, shown = (cell.strip() for cell in row.split("|")[1:3])
    number, _, unit = shown.partition(" ")
    default = Settings.model_fields[flag.strip("`-").replace("-", "_")].get_default()
    assert default == float(number) * {"GiB": 1 << 30}.get(unit, 1)


def test_fields_of_cards(tmp_path: Path) -> None:
    with make_adapter_server(tmp_path) as server, server.client(headers=ADMIN) as client:
        card = put(client, "a", server.source("a", 1))
        alias = client.put("/v1/aliases/x", json={"target": "a"}).json()
    text = section("Routes").partition("The card of an adapter:")[2]
    of_adapter, _, of_alias = text.partition("Of an alias:")
    assert card.keys() - {"object"} <= quoted(of_adapter)
    assert alias.keys() - {"object"} <= quoted(of_alias)


def test_what_clients_are_told() -> None:
    """Every code of the API with an adapter or an alias in it, with its status; those of admin routes are elsewhere."""
    found = {}
    for path in (Path(__file__).parents[1] / "server" / "api").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "ApiError" and len(node.args) > 1:
                status, code = node.args[:2]
                for name in (n.attr for n in ast.walk(code) if isinstance(n, ast.Attribute)):
                    if re.match("ADAPTER_|ALIAS_|ADMIN_|MODEL_NOT", name):
                        found[ErrorCode[name].value] = status.value if isinstance(status, ast.Constant) else 404
    told = {}
    for line in section("What clients are told").splitlines():
        if line.startswith("| `"):
            _, codes, status, *_ = line.split("|")
            told |= dict.fromkeys(quoted(codes), int(status))
    assert told == {code: status for code, status in found.items() if code != "alias_not_found"}


def test_the_card_of_a_model(tmp_path: Path) -> None:
    with make_adapter_server(tmp_path) as server, server.client(headers=ADMIN) as client:
        version = put(client, "a", server.source("a", 1))["version"]
        client.put("/v1/aliases/x", json={"target": "a"})
        cards = {card["id"]: card for card in client.get("/v1/models").json()["data"]}
    assert {card["base_fingerprint"] for card in cards.values()} == {FINGERPRINT}
    assert [cards[name]["version"] for name in (BASE, "a", "x")] == [None, version, None]


def test_fields_of_profiles() -> None:
    assert first_column(section("Profiles")) == set(_FIELDS)


def test_series() -> None:
    metrics = Metrics("base", max_model_len=64)
    metrics.adapters.set_tiers(sizes={"host": float}, evictions={"host": float}, counts={"host": float})
    names = {family.name for family in metrics.registry.collect() if "adapter" in family.name or "lora" in family.name}
    assert first_column(section("Metrics")) == names
    assert {*LOAD_STAGES, *LOAD_RESULTS} <= quoted(section("Metrics"))


def test_commands() -> None:
    text = section("Command line")
    for group in ("adapters", "aliases"):
        lines = " | ".join(line.partition("#")[0] for line in text.splitlines() if line.startswith(f"guanaco {group}"))
        shown = {part.split()[0] for part in lines.replace(f"guanaco {group}", "").split("|") if part.strip()}
        assert shown == set(get_command(app).commands[group].commands)  # type: ignore[attr-defined]
