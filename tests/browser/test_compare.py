"""Compare: columns at once, word differences, blind votes by key, the downloaded file."""

import csv
import json
import math
from pathlib import Path

from playwright.sync_api import expect
from typer.testing import CliRunner

from guanaco.server.commands.main import app
from guanaco.server.judging.prompts import read_prompts
from support.server.api_server import BASE, PIRATE, TERSE


def ask(tab, text: str) -> None:
    tab.page.locator("#prompt").fill(text)
    tab.page.locator("#prompt").press("Enter")


def test_columns_side_by_side(server, visit) -> None:
    tab = visit(server).go("compare")
    columns = tab.page.locator("article.column")
    names = tab.page.locator(".names select")
    expect(names).to_have_count(3)
    bodies = []
    tab.page.on(
        "request",
        lambda request: (
            bodies.append(json.loads(request.post_data)) if "chat" in request.url and request.post_data else None
        ),
    )
    ask(tab, "How do I boil an egg?")
    expect(columns).to_have_count(3)
    for index, name in enumerate((PIRATE, TERSE, BASE)):
        expect(columns.nth(index).locator("header")).to_contain_text(name)
        expect(columns.nth(index)).to_contain_text("tokens/s")
    assert {body["model"] for body in bodies} == {PIRATE, TERSE, BASE}
    assert {(body["seed"], body["messages"][0]["content"]) for body in bodies} == {(1, "How do I boil an egg?")}
    expect(columns.nth(0).locator("mark")).to_have_count(0)
    assert columns.nth(1).locator("mark").count() > 0
    tab.page.get_by_role("button", name="Add a column").click()
    expect(names).to_have_count(4)
    expect(tab.page.get_by_role("button", name="Add a column")).to_have_count(0)
    for _ in range(2):
        tab.page.get_by_role("button", name="Remove column 1").click()
    expect(names).to_have_count(2)
    expect(tab.page.get_by_role("button", name="Remove column 1")).to_have_count(0)


def test_word_differences(server, visit) -> None:
    tab = visit(server).go("compare")
    found = tab.page.evaluate(
        """async () => { const { marked } = await import('/page/compare/diff.js');
        return [marked('the old cat sat down', 'the cat sat'), marked('same words', 'same words'), marked('x '.repeat(1501), 'y')]; }"""
    )
    assert [word["word"] for word in found[0] if word["isNew"]] == ["old", "down"]
    assert not any(word["isNew"] for word in found[1])
    assert found[2] is None


def interval(share: float, total: int) -> tuple[float, float]:
    """Wilson's, 95 %, as statistics books have it."""
    z = 1.959964
    middle = (share + z * z / (2 * total)) / (1 + z * z / total)
    half = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total)) / (1 + z * z / total)
    return middle - half, middle + half


def check_replay(tab, votes: Path, questions: Path, expected: list[tuple[str, str, int, int]]) -> None:
    """`guanaco compare --replay` reads the votes, and `--prompts` the prompts, as they were downloaded."""
    done = CliRunner().invoke(app, ["compare", "--replay", str(votes), "--json"])
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout.splitlines()[-1])["benchmarks"]["page"]
    assert (told["verdicts"], told["unreadable"], set(told["players"])) == (40, 0, {PIRATE, TERSE})
    (pair,) = told["pairs"]
    winners = [None if v == 3 else first if v == 1 else second for first, second, _, v in expected]
    assert [pair[name] for name in ("prompts", "wins", "ties", "losses")] == [
        40, winners.count(pair["player"]), winners.count(None), winners.count(pair["other"]),
    ]  # fmt: skip
    with tab.page.expect_download() as downloading:
        tab.page.get_by_role("button", name="Download the prompts").click()
    downloading.value.save_as(questions)
    assert [(p.id, p.shown) for p in read_prompts(questions)] == [(str(n), f"Question, number {n}") for n in range(40)]


def test_forty_blind_votes_by_key(server, visit, tmp_path) -> None:
    tab = visit(server).go("compare")
    tab.page.get_by_role("button", name="Remove column 3").click()
    tab.page.get_by_label("Blind: names are hidden until you vote").check()
    tab.page.locator("#prompt").fill("\n".join(f"Question, number {number}" for number in range(40)))
    tab.page.get_by_role("button", name="Ask blind").click()
    expected = []
    for number in range(40):
        expect(tab.page.locator(".asked")).to_contain_text(f"number {number}”")
        expect(tab.page.get_by_role("button", name="Left is better")).to_be_enabled()
        columns = tab.page.locator("article.column")
        assert PIRATE not in columns.all_inner_texts()[0] + columns.all_inner_texts()[1]
        verdict = (1, 2, 3, 1)[number % 4]
        tab.page.keyboard.press(str(verdict))
        headers = columns.locator("header strong")
        expect(headers.nth(0)).not_to_have_text("Left")
        expected.append((*headers.all_inner_texts(), number, verdict))
        if number < 39:
            tab.page.keyboard.press("Enter")
    with tab.page.expect_download() as downloading:
        tab.page.get_by_role("button", name="Download the votes").click()
    path = tmp_path / "votes.csv"
    downloading.value.save_as(path)
    rows = list(csv.DictReader(path.open()))
    assert list(rows[0]) == ["benchmark", "first", "second", "question", "verdict"]
    assert [(r["first"], r["second"], int(r["question"]), int(r["verdict"])) for r in rows] == expected
    assert len({first for first, *_ in expected}) == 2, "the sides change"
    check_replay(tab, path, tmp_path / "questions.jsonl", expected)
    points = [0.5 if v == 3 else float((first if v == 1 else second) == PIRATE) for first, second, _, v in expected]
    low, high = interval(sum(points) / 40, 40)
    row = tab.page.locator("section.panel tbody tr")
    expect(row).to_contain_text(f"{PIRATE} against {TERSE}")
    expect(row).to_contain_text(f"{100 * low:.0f} % to {100 * high:.0f} %")
    tab.page.reload()
    expect(row).to_contain_text(f"{PIRATE} against {TERSE}")
    tab.page.get_by_role("button", name="Delete the votes").click()
    tab.page.get_by_role("dialog").get_by_role("button", name="Delete").click()
    expect(row).to_have_count(0)


def test_a_blind_comparison_needs_two_names(server, visit) -> None:
    tab = visit(server).go("compare")
    tab.page.get_by_role("button", name="Remove column 3").click()
    tab.page.locator("#column-1").select_option(PIRATE)
    tab.page.locator("#prompt").fill("Hello")
    expect(tab.page.get_by_role("button", name="Ask all")).to_be_enabled()
    tab.page.get_by_label("Blind").check()
    expect(tab.page.get_by_role("button", name="Ask blind")).to_be_disabled()
    expect(tab.page.locator("form")).to_contain_text("needs columns with different names")
    tab.page.locator("#column-1").select_option(TERSE)
    expect(tab.page.get_by_role("button", name="Ask blind")).to_be_enabled()


def test_a_column_that_fails_leaves_the_others(server, visit) -> None:
    tab = visit(server).go("compare")
    server.script(fail_after=3, failure="internal", reply="abcdef")
    ask(tab, "Hello")
    expect(tab.page.locator("article.column .failure")).to_have_count(3)
    server.script(reply="fine")
    ask(tab, "Hello")
    expect(tab.page.locator("article.column .text")).to_have_text(["fine", "fine", "fine"])
