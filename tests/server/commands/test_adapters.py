"""`guanaco adapters` against a running server, as an operator types it."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from guanaco.server.commands.main import app
from support.adapters.tiny_adapters import make_adapter
from support.server.adapter_server import TARGETS, AdapterServer, make_adapter_server
from support.server.scripted_endpoint import endless_endpoint


@pytest.fixture
def server(tmp_path: Path) -> Iterator[AdapterServer]:
    with make_adapter_server(tmp_path) as made:
        yield made


def run(server: AdapterServer, *arguments: str, key: str = "sesame", group: str = "adapters") -> tuple[int, str]:
    done = CliRunner().invoke(
        app, [group, *arguments, "--url", f"{server.url}/v1"], env={"GUANACO_ADMIN_KEY": key, "COLUMNS": "200"}
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
        (["unload", ""], "sesame", "cannot be an adapter's name"),
        (["rollback", "a", "--to", ""], "sesame", "--to is empty"),
        (["load", "a", "x", "--expected-version", ""], "sesame", "--expected-version is empty"),
        (["load", "a", ""], "sesame", "SOURCE is empty"),
        (["check", "a", " "], "sesame", "SOURCE is empty"),
        (["list"], "wrong", "invalid_admin_key"),
        (["list"], "", "--admin-key"),
    ):
        code, text = run(server, *arguments, key=key)
        assert (code, said in text, text.count("\n")) == (2, True, 1), text
    with pytest.MonkeyPatch.context() as patch, endless_endpoint() as url:
        patch.setattr("guanaco.server.commands.adapter_actions._MOST_ANSWER_BYTES", 1 << 16)
        done = CliRunner().invoke(app, ["adapters", "list", "--url", url, "--admin-key", "x"])
    assert (done.exit_code, "answered with more than" in done.output) == (2, True)
    done = CliRunner().invoke(app, ["adapters", "list", "--url", "http://127.0.0.1:9", "--admin-key", "x"])
    assert (done.exit_code, "is the server running there?" in done.output) == (2, True)


def test_inspect_needs_no_server(tmp_path: Path) -> None:
    path = make_adapter(tmp_path / "x", TARGETS, 5, modules=("q_proj", "down_proj"))
    done = CliRunner().invoke(app, ["adapters", "inspect", str(path), "--json"])
    report = json.loads(done.output)
    assert (report["ranks"], report["tensors"], report["dtypes"]) == ([5], 4, ["float32"])
    done = CliRunner().invoke(app, ["adapters", "inspect", str(tmp_path)])
    assert done.exit_code == 2


def test_an_aliass_life(server: AdapterServer) -> None:
    def aliases(*arguments: str) -> tuple[int, str]:
        return run(server, *arguments, group="aliases")

    versions = [
        json.loads(run(server, "load", "a", server.source(s, n), "--json")[1])["version"] for n, s in enumerate("xy")
    ]
    assert json.loads(aliases("set", "prod", "a", "--json")[1])["split"] == {"a": 1}
    split = json.loads(
        aliases("set", "prod", f"a@{versions[0][:8]}=90", "a=10", "--expected-revision", "1", "--json")[1]
    )
    assert split["split"] == {f"a@{versions[0]}": 90, "a": 10}
    said = aliases("list")[1]
    assert (f"a@{versions[0][:12]} 90%, a 10%" in said, "ready" in said) == (True, True)
    assert "prod" in run(server, "list")[1], "adapters say which aliases lead to them"
    assert json.loads(aliases("rename", "prod", "live", "--json")[1])["name"] == "live"
    assert json.loads(aliases("rollback", "live", "--to", "1", "--json")[1])["split"] == {"a": 1}
    assert [past["revision"] for past in json.loads(aliases("show", "live", "--json")[1])["history"]] == [1, 2]
    assert aliases("remove", "live")[0] == 0
    assert json.loads(aliases("list", "--json")[1])["data"] == []
    for arguments, words in (
        (("set", "x", "a=b"), "NAME=WEIGHT"),
        (("set", "x", "a", "b"), "NAME=WEIGHT"),
        (("set", "x", "a=1", "a=2"), "there twice"),
        (("set", "x", "nope"), "target_not_found"),
        (("set", "x/y", "a"), "cannot be an adapter's name"),
        (("show", "x"), "alias_not_found"),
    ):
        code, said = aliases(*arguments)
        assert (code, words in said, said.count("\n")) == (2, True, 1), said


def test_a_profile_and_what_a_list_shows(server: AdapterServer, tmp_path: Path) -> None:
    source = server.source("a", 1)
    assert json.loads(run(server, "load", "a", source, "--profile", "guanaco", "--json")[1])["profile"]["top_p"] == 0.9
    file = tmp_path / "profile.json"
    file.write_text('{"stop": "END"}')
    assert json.loads(run(server, "load", "a", source, "--profile", str(file), "--json")[1])["profile"] == {
        "stop": ["END"]
    }
    code, said = run(server, "load", "a", source, "--profile", "vicuna")
    assert (code, "built-in profile" in said) == (2, True)
    version = server.registry.entries()[0].version
    server.registry.mark_broken(version, "version_damaged", "it was changed")
    said = run(server, "list")[1]
    assert ("broken" in said, "it was changed" in said) == (True, True)
