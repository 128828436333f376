"""What `make clients` keeps: the table of the page is that of the newest results, and nothing that failed is hidden."""

import json
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).parents[1]
CLIENTS = ROOT / "tests/clients"


@pytest.fixture(scope="module")
def results() -> SimpleNamespace:
    return SimpleNamespace(**runpy.run_path(str(CLIENTS / "results.py")))


@pytest.fixture(scope="module")
def runner() -> SimpleNamespace:
    """The runner's own functions. Its folder is importable only while it is read."""
    kept, known = list(sys.path), set(sys.modules)
    sys.path.insert(0, str(CLIENTS))
    try:
        return SimpleNamespace(**runpy.run_path(str(CLIENTS / "run.py")))
    finally:
        sys.path[:] = kept
        for name in {"catalogue", "environments", "results"} - known:
            sys.modules.pop(name, None)


def one(name: str, *oks: bool, not_run: str = "") -> dict:
    checks = [{"check": f"check {number}", "ok": ok, "detail": ""} for number, ok in enumerate(oks)]
    return {"client": name, "title": name, "versions": {}, "date": "2026-01-01", "not_run": not_run, "checks": checks}


def test_the_table_of_the_page_is_that_of_the_newest_results(results: SimpleNamespace) -> None:
    newest = results.newest(ROOT / "loadtest/results")
    kept = json.loads(newest.read_text())["clients"]
    page = (ROOT / "docs/clients.md").read_text()
    assert results.with_table(page, kept) == page
    for client in kept:
        assert client["checks"] or client["not_run"], client["client"]


def test_every_client_has_a_script_and_pinned_packages(runner: SimpleNamespace) -> None:
    for client in runner.CLIENTS:
        assert client.path.is_file(), client.path
        for package in client.packages:
            assert ("==" if client.language == "python" else "@") in package[1:], package
    scripts = {path.name for kind in ("python", "node") for path in (CLIENTS / kind).glob("*_client.*")}
    assert scripts == {client.script for client in runner.CLIENTS}


def test_a_failure_and_a_client_that_did_not_run_are_told(results: SimpleNamespace) -> None:
    assert results.passed(one("a", True, True))
    assert results.outcome(one("a", True, True)) == "all 2 passed"
    assert not results.passed(one("a", True, False))
    assert results.outcome(one("a", True, False)) == "1 of 2 failed: check 1"
    assert not results.passed(one("a", not_run="no node"))
    assert results.outcome(one("a", not_run="no node")) == "not run: no node"


def test_clients_that_were_not_asked_for_keep_their_results(results: SimpleNamespace) -> None:
    old, new = [one("a", False), one("b", True), one("gone", True)], [one("a", True)]
    assert results.merged(old, new, ["b", "a"]) == [one("b", True), one("a", True)]


def test_only_the_text_between_the_markers_changes(results: SimpleNamespace) -> None:
    page = f"before\n{results.BEGIN}\nold\n{results.END}\nafter\n"
    made = results.with_table(page, [one("a|b", True)])
    assert made.startswith("before\n")
    assert made.endswith("after\n")
    assert "old" not in made
    assert "| a/b |  | check 0 | all 1 passed | 2026-01-01 |" in made
    with pytest.raises(ValueError, match="no line"):
        results.with_table("a page", [])


SCRIPT = """
import json
print("noise")
print(json.dumps({"check": "one", "ok": True, "detail": ""}))
"""


@pytest.mark.parametrize(
    ("end", "expected"),
    [("", [("one", True)]), ("raise SystemExit('broken')", [("one", True), ("the script ends", False)])],
)
def test_a_script_that_breaks_off_fails(
    runner: SimpleNamespace, tmp_path: Path, end: str, expected: list[tuple[str, bool]]
) -> None:
    checks = runner.run_script([sys.executable, "-S", "-c", SCRIPT + end], "http://127.0.0.1:1", tmp_path, 60)
    assert [(check["check"], check["ok"]) for check in checks] == expected
    assert not end or "broken" in checks[-1]["detail"]


def test_a_script_without_checks_or_without_an_end_fails(runner: SimpleNamespace, tmp_path: Path) -> None:
    silent = runner.run_script([sys.executable, "-S", "-c", ""], "", tmp_path, 60)
    endless = runner.run_script([sys.executable, "-S", "-c", "import time; time.sleep(60)"], "", tmp_path, 0.2)
    assert [(check["ok"], check["detail"]) for check in silent] == [(False, "no checks: ")]
    assert [(check["ok"], check["detail"]) for check in endless] == [(False, "not done after 0.2 s: ")]


def test_a_server_that_does_not_start_keeps_no_other_client_back(
    runner: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Server:
        url = "http://127.0.0.1:1"

        def __init__(self, flags: tuple[str, ...], _log: Path) -> None:
            self.flags = flags

        def __enter__(self) -> "Server":
            if self.flags:
                raise AssertionError("the server did not get ready:\nno such provider")
            return self

        def __exit__(self, *_: object) -> None: ...

    used = runner.run_all.__globals__
    monkeypatch.setitem(used, "BUILD", tmp_path)
    monkeypatch.setitem(used, "LiveServer", Server)
    monkeypatch.setitem(used, "run_client", lambda client, *_: one(client.name, True))
    found = {result["client"]: result for result in runner.run_all(runner.CLIENTS, "", 1.0, "2026-01-01")}
    assert found.keys() == {client.name for client in runner.CLIENTS}
    broken = {name: result["not_run"] for name, result in found.items() if result["not_run"]}
    assert broken == {"lm-eval-exact": "the server did not start: no such provider"}
