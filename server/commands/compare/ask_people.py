"""`guanaco compare --human`: serves the blind page on loopback until the person is done."""

import asyncio
import secrets
import socket
import sys
import webbrowser

import uvicorn

from guanaco.server.judging.contestants import Answers
from guanaco.server.judging.folder import Records, WorkFolder
from guanaco.server.judging.judges import Judged
from guanaco.server.judging.people import Session, blind_page, items_of
from guanaco.server.judging.stored import Verdict
from guanaco.server.judging.study import Plan

_LAST_PAGE_SECONDS = 1.0  # for the browser to fetch the last page


def ask_people(plan: Plan, answers: Answers, folder: WorkFolder) -> Judged:
    """Let one person judge, and return the votes; identical answers are ties. Votes of an earlier run count."""
    items, ties = items_of(plan.pairs, plan.prompts, answers, plan.seed)
    votes = Records(folder.path / "votes.jsonl")
    try:
        session = Session(items, votes)
        if session.current is not None:
            asyncio.run(serve_until_finished(session))
        verdicts = [*session.verdicts(), *ties]
    finally:
        votes.close()
    return Judged([Verdict(plan.benchmark, v.first, v.second, v.question, v.verdict) for v in verdicts], [])


async def serve_until_finished(session: Session) -> None:
    """Serve the page on a free port of loopback, say its address, and return when the person has finished.

    Raises KeyboardInterrupt if the server ends before that.
    """
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port, token = int(listening.getsockname()[1]), secrets.token_urlsafe(24)
        config = uvicorn.Config(
            blind_page(session, port, token), access_log=False, log_level="warning", lifespan="off", server_header=False
        )
        server = uvicorn.Server(config)
        serving = asyncio.create_task(server.serve(sockets=[listening]))
        address = f"http://127.0.0.1:{port}/{token}/"
        print(f"open {address} and judge {len(session.items)} pairs", file=sys.stderr, flush=True)
        if sys.stdout.isatty():
            webbrowser.open(address)
        while not session.is_finished and not serving.done():
            await asyncio.sleep(0.1)
        await asyncio.sleep(_LAST_PAGE_SECONDS)
        server.should_exit = True
        await serving
    if not session.is_finished:
        raise KeyboardInterrupt
