"""The reports treat answers and names as hostile, and open without a network. The folder survives a kill."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from guanaco.server.errors import CommandError
from guanaco.server.judging.checks import check_answers, read_check
from guanaco.server.judging.contestants import Answer, Answers, Contestant
from guanaco.server.judging.endpoints import Endpoint
from guanaco.server.judging.folder import WorkFolder
from guanaco.server.judging.judges import Judged
from guanaco.server.judging.page_report import html_report
from guanaco.server.judging.prompts import Prompt
from guanaco.server.judging.report import markdown
from guanaco.server.judging.stored import Verdict
from guanaco.server.judging.study import Plan, add_judgements

EVIL = (
    "</pre></title><script>alert(1)</script><img src=http://evil.example/x onerror=alert(1)>\u202e|`*_[x](http://evil)"
)
PROMPTS = tuple(Prompt(str(i), (("user", f"{i} {EVIL}"),), category=EVIL if i % 2 else "a") for i in range(30))
ENDPOINT = Endpoint("http://127.0.0.1:1")
CONTESTANTS = (Contestant(f"one{EVIL}", ENDPOINT, "one"), Contestant("two", ENDPOINT, "two"))
ANSWERS: Answers = {(c.name, p.id): Answer(f"{c.model} {p.id} {EVIL}") for c in CONTESTANTS for p in PROMPTS}


@pytest.fixture
def result() -> dict[str, Any]:
    plan = Plan(CONTESTANTS, PROMPTS, f"mine{EVIL}")
    told: dict[str, Any] = {
        "benchmark": plan.benchmark,
        "created": "2026-11-29T09:00:00+00:00",
        "prompts": {"count": 30, "sha256": "0" * 64},
        "sampling": {"temperature": 0.7, "top_p": 0.9, "max_tokens": 512, "seed": 0},
        "contestants": [{"name": c.name} for c in CONTESTANTS],
        "checks": check_answers(CONTESTANTS, PROMPTS, ANSWERS, [read_check("json")]),
        "perplexity": {"two": {"perplexity": None, "reason": EVIL}},
        "benchmarks": {}, "breakdown": {}, "in_words": [], "judge": None, "warnings": [EVIL],
    }  # fmt: skip
    names = [c.name for c in CONTESTANTS]
    verdicts = [Verdict(plan.benchmark, *pair, p.id, 1) for p in PROMPTS for pair in (names, names[::-1])]
    add_judgements(told, plan, Judged(verdicts, []), judge=EVIL, answers=ANSWERS)
    return told


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))


def test_the_html_holds_no_script_and_loads_nothing(result: dict[str, Any]) -> None:
    page = html_report(result, PROMPTS, ANSWERS)
    parser = Tags()
    parser.feed(page)
    names = {tag for tag, _ in parser.tags}
    assert not names & {"script", "img", "iframe", "object", "link", "form", "a", "base", "embed", "video"}
    assert names >= {"svg", "circle", "rect", "table", "details", "pre"}
    for tag, attributes in parser.tags:
        assert not any(name.startswith("on") or name in ("src", "href", "style", "action") for name in attributes), tag
    policy = next(a["content"] for t, a in parser.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    assert policy.startswith("default-src 'none'; style-src 'sha256-")
    assert "unsafe" not in policy
    assert "&lt;script&gt;alert(1)" in page


def test_the_markdown_holds_no_markup_of_others(result: dict[str, Any]) -> None:
    text = markdown(result)
    assert "<script" not in text
    assert "<img" not in text
    assert not re.search(r"(?<!\\)\[x", text)
    for line in text.splitlines():
        if line.startswith("|"):
            cells = len(re.findall(r"(?<!\\)\|", line)) - 1
            assert cells in (2, 4, 6, 8, 9), line


def test_long_texts_and_many_prompts_are_cut_and_said(result: dict[str, Any]) -> None:
    prompts = [Prompt(str(i), (("user", "hi"),)) for i in range(205)]
    answers = {(c.name, p.id): Answer("x" * 9000 if p.id == "0" else "y") for c in CONTESTANTS for p in prompts}
    page = html_report(result, prompts, answers)
    assert "The first 200 of 205 prompts" in page
    assert "(1,000 more characters)" in page


def test_figures_of_answers() -> None:
    prompts = [Prompt(str(i), (("user", "hi"),), reference="yes") for i in range(4)]
    one = [
        Answer('{"a": 1}', "stop", 5),
        Answer("yes ", "length", 7),
        Answer("a\n### Human: b", "stop"),
        Answer("", error="x"),
    ]
    answers = {("one", str(i)): answer for i, answer in enumerate(one)} | {
        ("two", str(i)): Answer("yes ") for i in range(4)
    }
    pair = [Contestant(name, ENDPOINT, name) for name in ("one", "two")]
    checks = [read_check(text) for text in ("json", "equals", "regex:a.*b")]
    told = check_answers(pair, prompts, answers, checks)
    figures = told["contestants"]["one"]
    assert (figures["answers"], figures["failed"], figures["mean_tokens"]) == (3, 1, 6.0)
    assert figures["run_on_rate"] == round(2 / 3, 4)  # cut at the limit, and a turn of the other side
    shares = {name: (check["passed"], check["of"]) for name, check in figures["checks"].items()}
    assert shares == {"json": (1, 3), "equals": (1, 3), "regex a.*b": (1, 3)}
    assert told["identical"][0]["share"] == round(1 / 3, 4)


def test_the_folder_survives_a_kill_in_the_middle_of_a_line(tmp_path: Path) -> None:
    with WorkFolder(tmp_path / "w") as folder:
        folder.answers.put("a", {"text": "é\n"})
    with (tmp_path / "w" / "answers.jsonl").open("ab") as file:
        file.write(b'{"key": "b", "rec')
    with WorkFolder(tmp_path / "w") as folder:
        assert folder.answers.get("a") == {"text": "é\n"}
        assert folder.answers.get("b") is None
        folder.answers.put("b", {"text": "2"})
    with WorkFolder(tmp_path / "w") as folder:
        assert folder.answers.get("b") == {"text": "2"}
        with pytest.raises(CommandError, match="another guanaco compare is at work there"):
            WorkFolder(tmp_path / "w")


def test_a_foreign_line_in_the_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "answers.jsonl").write_text(json.dumps({"other": 1}) + "\n")
    with pytest.raises(CommandError, match=r"answers.jsonl, line 1: not a record"):
        WorkFolder(tmp_path)
