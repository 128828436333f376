"""The blind page in Chromium, driven by the keyboard alone. Runs with --accept where Chromium and playwright are."""

import asyncio
import re
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from guanaco.server.commands.compare import ask_people
from guanaco.server.judging.contestants import Answer, Answers
from guanaco.server.judging.folder import Records
from guanaco.server.judging.people import Session, items_of
from guanaco.server.judging.prompts import Prompt

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine: apt install chromium")
PROMPTS = [Prompt(str(i), (("user", f"Question {i}?"),)) for i in range(4)]
EVIL = "<script>document.title = 'owned'</script><img src=x onerror=\"document.title = 'owned'\">"
ANSWERS: Answers = {
    **{("one", p.id): Answer(f"A short answer {p.id}. {EVIL}") for p in PROMPTS},
    **{("two", p.id): Answer("A much longer answer. " * 30 + p.id) for p in PROMPTS},
}


@pytest.fixture
def served(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], request: pytest.FixtureRequest
) -> Iterator[tuple[Session, str]]:
    if not request.config.getoption("--accept"):
        pytest.skip("starts a browser: run with --accept")
    session = Session(items_of([("one", "two")], PROMPTS, ANSWERS, seed=1)[0], Records(tmp_path / "votes.jsonl"))
    thread = threading.Thread(target=lambda: asyncio.run(ask_people.serve_until_finished(session)), daemon=True)
    thread.start()
    told = ""
    while "http" not in told:
        told += capsys.readouterr().err
    yield session, re.search(r"http://\S+", told)[0]  # type: ignore[index]
    session.is_finished = True
    thread.join(20)
    assert not thread.is_alive()


def test_a_person_judges_by_keyboard_alone(served: tuple[Session, str], tmp_path: Path) -> None:
    session, address = served
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page()
        problems: list[Any] = []
        page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
        page.goto(address)
        assert "Question" in page.inner_text(".prompt")

        def press(key: str, progress: str) -> None:
            page.keyboard.press(key)
            page.wait_for_selector(f"[role=status]:has-text('{progress}')")

        press("1", "1 of 4")
        press("2", "2 of 4")
        press("u", "1 of 4")
        press("3", "2 of 4")
        page.screenshot(path=tmp_path / "page.png", full_page=True)
        press("2", "3 of 4")
        for _ in range(2):  # the buttons are reached by Tab, too: left, then right is better
            page.keyboard.press("Tab")
        press("Enter", "4 of 4")
        page.keyboard.press("Enter")
        page.wait_for_selector("text=Thank you. 4 of 4")
        assert page.title() == "Which answer is better?"
        browser.close()
    assert [v.verdict for v in session.verdicts()] == [1, 3, 2, 2]
    assert problems == []
    assert session.is_finished
