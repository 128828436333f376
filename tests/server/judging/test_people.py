"""The blind page: what it shows and hides, votes and undo, and who is refused."""

import re
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from guanaco.server.judging.contestants import Answer, Answers
from guanaco.server.judging.folder import Records
from guanaco.server.judging.pairs import pair_result
from guanaco.server.judging.people import Session, blind_page, items_of
from guanaco.server.judging.people_page import SCRIPT, STYLE, policy
from guanaco.server.judging.prompts import Prompt

PORT, TOKEN = 4711, "a-random-token"
PROMPTS = [Prompt(str(i), (("user", f"<b>question {i}</b>"),)) for i in range(40)]
ANSWERS: Answers = {
    **{("secret-name-one", p.id): Answer(f"first kind {p.id} <script>alert(1)</script>") for p in PROMPTS},
    **{("secret-name-two", p.id): Answer(f"second kind {p.id}") for p in PROMPTS},
}
PAIRS = [("secret-name-one", "secret-name-two")]


@pytest.fixture
def session(tmp_path: Path) -> Session:
    items, _ = items_of(PAIRS, PROMPTS, ANSWERS, seed=3)
    return Session(items, Records(tmp_path / "votes.jsonl"))


@pytest.fixture
def client(session: Session) -> TestClient:
    return TestClient(blind_page(session, PORT, TOKEN), base_url=f"http://127.0.0.1:{PORT}")


def vote(client: TestClient, choice: str) -> str:
    page = client.get(f"/{TOKEN}/").text
    number = re.search(r'name="number" value="(\d+)"', page)[1]  # type: ignore[index]
    return client.post(f"/{TOKEN}/vote", data={"number": number, "choice": choice}).text


def test_the_page_is_blind_and_escaped(client: TestClient) -> None:
    page = client.get(f"/{TOKEN}/")
    assert "secret-name" not in page.text + str(page.headers)
    assert "&lt;script&gt;alert(1)" in page.text
    assert "<script>alert" not in page.text
    assert "&lt;b&gt;question" in page.text
    assert page.text.count("<script>") == 1
    assert f"<script>{SCRIPT}</script>" in page.text
    assert f"<style>{STYLE}</style>" in page.text
    assert page.headers["content-security-policy"] == policy()
    assert "unsafe" not in policy()
    assert page.headers["cache-control"] == "no-store"


def test_sides_are_random_and_the_same_in_the_next_run(session: Session) -> None:
    left = [item.left for item in session.items]
    assert 10 <= left.count("secret-name-one") <= 30
    assert items_of(PAIRS, PROMPTS, ANSWERS, seed=3)[0] == session.items
    assert items_of(PAIRS, PROMPTS, ANSWERS, seed=4)[0] != session.items


def test_votes_undo_and_progress(client: TestClient, session: Session) -> None:
    assert "0 of 40" in client.get(f"/{TOKEN}/").text
    assert "1 of 40" in vote(client, "1")
    assert "2 of 40" in vote(client, "3")
    assert [v.verdict for v in session.verdicts()] == [1, 3]
    assert "1 of 40" in client.post(f"/{TOKEN}/undo").text
    assert "2 of 40" in vote(client, "2")
    assert [v.verdict for v in session.verdicts()] == [1, 2]


def test_a_second_click_on_an_old_page_changes_nothing(client: TestClient, session: Session) -> None:
    vote(client, "1")
    client.post(f"/{TOKEN}/vote", data={"number": "0", "choice": "2"})
    assert [v.verdict for v in session.verdicts()] == [1]


def test_a_killed_session_goes_on_where_it_was(client: TestClient, session: Session, tmp_path: Path) -> None:
    for choice in "123":
        vote(client, choice)
    again = Session(session.items, Records(tmp_path / "votes.jsonl"))
    assert again.current == 3
    assert again.verdicts() == session.verdicts()


def test_a_person_who_prefers_one_kind_makes_it_the_winner(client: TestClient, session: Session) -> None:
    for _ in PROMPTS:
        assert session.current is not None
        item = session.items[session.current]
        vote(client, "1" if item.texts[0].startswith("first kind") else "2")
    assert "That was the last one" in client.get(f"/{TOKEN}/").text
    result = pair_result(session.verdicts(), *PAIRS[0])
    assert (result.wins, result.one_order, result.is_better) == (40, 0, True)
    assert "Thank you. 40 of 40" in client.post(f"/{TOKEN}/finish").text
    assert session.is_finished


def test_identical_answers_are_ties_and_failed_ones_are_left_out() -> None:
    answers = dict(ANSWERS)
    answers["secret-name-one", "0"] = answers["secret-name-two", "0"]
    answers["secret-name-one", "1"] = Answer("", error="refused")
    items, ties = items_of(PAIRS, PROMPTS, answers, seed=3)
    assert (len(items), [v.question for v in ties]) == (38, ["0"])


@pytest.mark.parametrize("host", ["evil.example", "evil.example:4711", "127.0.0.1", "127.0.0.1:4712", ""])
def test_another_host_is_refused(client: TestClient, session: Session, host: str) -> None:
    for answer in (
        client.get(f"/{TOKEN}/", headers={"Host": host}),
        client.post(f"/{TOKEN}/vote", data={"number": "0", "choice": "1"}, headers={"Host": host}),
    ):
        assert answer.status_code == 421
        assert "question" not in answer.text
    assert session.verdicts() == []


def test_without_the_token_there_is_nothing(client: TestClient, session: Session) -> None:
    for path in ("/", "/wrong/", f"/{TOKEN}x/", "/é/"):
        assert client.get(path).status_code == 404
    assert client.post("/wrong/vote", data={"number": "0", "choice": "1"}).status_code == 404
    assert client.post(f"/{TOKEN}/vote", data={"number": "0", "choice": "4"}).status_code == 404
    assert client.post(f"/{TOKEN}/vote", content=b"number=0&choice=1&x=" + b"x" * 5000).status_code == 404
    assert session.verdicts() == []
