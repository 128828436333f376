"""`guanaco adapters` against a running server, as an operator types it."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from adapter_server import TARGETS, AdapterServer, make_adapter_server
from tiny_adapters import make_adapter
from typer.testing import CliRunner

from guanaco.server.cli import app


@pytest.fixture
def server(tmp_path: Path) -> Iterator[AdapterServer]:
    with make_adapter_server(tmp_path) as made:
        yield made


def run(server: AdapterServer, *arguments: str, key: str = "sesame") -> tuple[int, str]:
    done = CliRunner().invoke(
        app, ["adapters", *arguments, "--url", f"{server.url}/v1"], env={"GUANACO_ADMIN_KEY": key, "COLUMNS": "200"}
    )
    return done.exit_code, done.output


def test_an_adapters_life(server: AdapterServer) -> None:
    source = server.source("one", 1)
    code, text = run(server, "check", "a", source, "--json")
    report = json.loads(text)
    assert (code, report["rank"]) == (0, 2)
    first = json.loads(run(server, "load", "a", source, "--json")[1])["version"]
    assert first == report["version"]
    second = json.loads(run(server, "load", "a", server.source("two", 2), "--expected-version", first, "--json")[1])
    assert first[:12] not in run(server, "list")[1]
    assert second["version"][:12] in run(server, "list")[1]
    assert json.loads(run(server, "rollback", "a", "--json")[1])["version"] == first
    assert json.loads(run(server, "rollback", "a", "--to", second["version"][:8], "--json")[1]) != first
    assert json.loads(run(server, "pin", "a", "--json")[1])["pinned"] is True
    assert json.loads(run(server, "pin", "a", "--off", "--json")[1])["pinned"] is False
    code, text = run(server, "unload", "a", "--force", "--timeout", "1")
    assert (code, "drained  True" in text) == (0, True)
    assert json.loads(run(server, "list", "--json")[1])["data"] == []


def test_what_goes_wrong_is_one_line(server: AdapterServer) -> None:
    for arguments, key, said in (
        (["load", "a", "nope"], "sesame", "not_found"),
        (["load", "a/b", "x"], "sesame", "cannot be an adapter's name"),
        (["unload", "a"], "sesame", "adapter_not_found"),
        (["list"], "wrong", "invalid_admin_key"),
        (["list"], "", "--admin-key"),
    ):
        code, text = run(server, *arguments, key=key)
        assert (code, said in text, text.count("\n")) == (2, True, 1), text
    done = CliRunner().invoke(app, ["adapters", "list", "--url", "http://127.0.0.1:9", "--admin-key", "x"])
    assert (done.exit_code, "is the server running there?" in done.output) == (2, True)


def test_inspect_needs_no_server(tmp_path: Path) -> None:
    path = make_adapter(tmp_path / "x", TARGETS, 5, modules=("q_proj", "down_proj"))
    done = CliRunner().invoke(app, ["adapters", "inspect", str(path), "--json"])
    report = json.loads(done.output)
    assert (report["ranks"], report["tensors"], report["dtypes"]) == ([5], 4, ["float32"])
    done = CliRunner().invoke(app, ["adapters", "inspect", str(tmp_path)])
    assert done.exit_code == 2
