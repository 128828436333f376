"""People as judges: a blind page on loopback. Sides are random, no names are shown, and every vote is kept at once.

The page works with plain forms. Its one script turns the keys 1, 2, 3, u and Enter into clicks. Its address holds a
random token, and requests with another Host are refused, so that no other page in the browser can reach it.
"""

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from random import Random
from urllib.parse import parse_qs

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response
from starlette.routing import Route

from guanaco.server.judging.contestants import Answers
from guanaco.server.judging.folder import Records, digest
from guanaco.server.judging.people_page import page_of, policy
from guanaco.server.judging.prompts import Prompt
from guanaco.server.judging.stored import Verdict

_MAX_BODY = 4096  # bytes of a form
_CHOICES = {"1": 1, "2": 2, "3": 3}


@dataclass(frozen=True)
class Item:
    """Two answers to one prompt, as a person sees them. left, right: the contestants' names, which are never shown."""

    prompt: Prompt
    left: str
    right: str
    texts: tuple[str, str]

    @property
    def key(self) -> str:
        """The key of the vote's record. It does not depend on the sides."""
        return digest("vote", self.prompt.messages, sorted([(self.left, self.texts[0]), (self.right, self.texts[1])]))


def items_of(
    pairs: Sequence[tuple[str, str]], prompts: Sequence[Prompt], answers: Answers, seed: int
) -> tuple[list[Item], list[Verdict]]:
    """(items to judge, in random order and with random sides, which the seed decides; ties of identical answers)."""
    random = Random(seed)  # noqa: S311 (a repeatable order: a run that goes on shows the same sides)
    items, ties = [], []
    for prompt in prompts:
        for pair in pairs:
            left, right = random.sample(pair, 2)
            both = answers[left, prompt.id], answers[right, prompt.id]
            if any(answer.error is not None for answer in both):
                continue
            if both[0].text == both[1].text:
                ties.append(Verdict("", left, right, prompt.id, 3))
            else:
                items.append(Item(prompt, left, right, (both[0].text, both[1].text)))
    random.shuffle(items)
    return items, ties


class Session:
    """One person's votes, kept in records: gives the next item, takes a vote, takes the last one back."""

    def __init__(self, items: Sequence[Item], records: Records) -> None:
        self.items = items
        self._records = records
        self._done = [i for i, item in enumerate(items) if self.vote_of(item) is not None]
        self.is_finished = False

    def vote_of(self, item: Item) -> int | None:
        """1 for the left answer, 2 for the right one, 3 for a tie; None without a vote."""
        record = self._records.get(item.key)
        if record is None or record["better"] is None:
            return None
        return 3 if record["better"] == "" else 1 if record["better"] == item.left else 2

    @property
    def num_done(self) -> int:
        """How many items have a vote."""
        return len(self._done)

    @property
    def current(self) -> int | None:
        """The number of the first item without a vote; None when all have one."""
        done = set(self._done)
        return next((i for i in range(len(self.items)) if i not in done), None)

    def vote(self, number: int, choice: int) -> None:
        """Keep a vote for the current item. A vote for another one (a second click, an old page) changes nothing."""
        if number == self.current:
            item = self.items[number]
            self._records.put(item.key, {"better": {1: item.left, 2: item.right, 3: ""}[choice]})
            self._done.append(number)

    def undo(self) -> None:
        """Take the last vote back; its item comes again."""
        if self._done:
            self._records.put(self.items[self._done.pop()].key, {"better": None})
            self.is_finished = False

    def verdicts(self) -> list[Verdict]:
        """All votes so far; the left answer is the first one."""
        voted = [(item, self.vote_of(item)) for item in self.items]
        return [Verdict("", item.left, item.right, item.prompt.id, vote) for item, vote in voted if vote is not None]


def blind_page(session: Session, port: int, token: str) -> Starlette:
    """The application: the page at /TOKEN/ and its forms below that. Other paths get 404, another Host gets 421."""
    hosts = {f"127.0.0.1:{port}", f"localhost:{port}"}
    headers = {
        "Content-Security-Policy": policy(),
        "Cache-Control": "no-store",
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
        "X-Frame-Options": "DENY",
        "Cross-Origin-Resource-Policy": "same-origin",
    }

    def refused(request: Request) -> Response | None:
        if request.headers.get("host", "").lower() not in hosts:
            return Response("this page answers on loopback only\n", 421, headers)
        if not secrets.compare_digest(request.path_params["token"].encode(), token.encode()):
            return Response("not found\n", 404, headers)
        return None

    async def show(request: Request) -> Response:
        number = session.current
        item = None if number is None else session.items[number]
        shown = None if item is None else (escape(item.prompt.shown), escape(item.texts[0]), escape(item.texts[1]))
        text = page_of(shown, number=number, done=session.num_done, total=len(session.items), ended=session.is_finished)
        return refused(request) or HTMLResponse(text, headers=headers)

    async def act(request: Request) -> Response:
        if (refusal := refused(request)) is not None:
            return refusal
        fields = await _fields(request)
        match request.path_params["what"]:
            case "vote" if fields.get("choice") in _CHOICES and fields.get("number", "").isdecimal():
                session.vote(int(fields["number"][:9]), _CHOICES[fields["choice"]])
            case "undo":
                session.undo()
            case "finish":
                session.is_finished = True
            case _:
                return Response("not found\n", 404, headers)
        return RedirectResponse(f"/{token}/", 303, headers)

    return Starlette(
        routes=[Route("/{token}/", show, methods=["GET"]), Route("/{token}/{what}", act, methods=["POST"])]
    )


async def _fields(request: Request) -> dict[str, str]:
    """The fields of a form; empty if the body is larger than any form of ours."""
    body = b""
    async for piece in request.stream():
        body += piece
        if len(body) > _MAX_BODY:
            return {}
    return {name: values[0] for name, values in parse_qs(body.decode("ascii", "replace")).items()}
