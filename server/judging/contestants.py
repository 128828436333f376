"""Contestants, and their answers: all side by side, with the same seed, each kept as soon as it is there."""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from guanaco.server.errors import CommandError
from guanaco.server.judging.endpoints import Endpoint, RequestRefused, origin_of
from guanaco.server.judging.folder import Records, digest
from guanaco.server.judging.prompts import Prompt

MAX_CONTESTANTS = 16
GUANACO_STOPS = ("### Human", "### Assistant")

Progress = Callable[[str, int, int], None]  # what is done, how many of them, of how many


@dataclass(frozen=True)
class Sampling:
    """How answers are sampled. The defaults are those of the Guanaco work."""

    temperature: float = 0.7
    top_p: float = 0.9
    max_tokens: int = 512
    stop: tuple[str, ...] = GUANACO_STOPS
    seed: int = 0

    def body(self) -> dict[str, Any]:
        """The fields of a chat request."""
        fields = {"temperature": self.temperature, "top_p": self.top_p, "max_tokens": self.max_tokens}
        return {**fields, "seed": self.seed, **({"stop": list(self.stop)} if self.stop else {})}


@dataclass(frozen=True)
class Contestant:
    """One that answers. name: as reports show it; model: as the endpoint knows it; version: of its adapter, if that is
    known; family: names of what it is made of, which are compared with a judge's name; is_base: no adapter answers."""

    name: str
    endpoint: Endpoint = field(compare=False, repr=False)
    model: str
    version: str | None = None
    family: tuple[str, ...] = ()
    is_base: bool = False


@dataclass(frozen=True)
class Answer:
    """One answer, or why there is none (`error`)."""

    text: str
    finish_reason: str | None = None
    tokens: int | None = None
    version: str | None = None
    error: str | None = None


Answers = dict[tuple[str, str], Answer]  # contestant's name, prompt's id


def split_address(text: str) -> tuple[str | None, str]:
    """`URL#MODEL` → (URL, MODEL); a name alone → (None, name). CommandError for an address without a model."""
    if "://" not in text:
        return None, text
    url, _, model = text.partition("#")
    origin_of(url, text)
    if not model:
        raise CommandError(f"{text}: name the model behind it, as URL#MODEL")
    return url, model


async def find_model(endpoint: Endpoint, model: str) -> dict[str, Any]:
    """The endpoint's card of a model; `base` is its first one. An empty card where the endpoint tells nothing."""
    try:
        if model == "base":
            cards, _ = await endpoint.call("GET", "/v1/models")
            return next(iter(cards.get("data") or ()), {}) or {}
        card, _ = await endpoint.call("GET", f"/v1/models/{model}")
        return card
    except CommandError:  # many endpoints have no such route; a request for an answer says what is wrong
        return {}


async def collect_answers(
    contestants: Sequence[Contestant],
    prompts: Sequence[Prompt],
    sampling: Sampling,
    records: Records,
    progress: Progress = lambda *_: None,
) -> Answers:
    """Every contestant's answer to every prompt. What the records hold already is not generated again.

    A prompt that an endpoint refuses gets an answer with its error. CommandError where no request can work.
    """
    answers: Answers = {}
    total = len(contestants) * len(prompts)

    async def one(contestant: Contestant, prompt: Prompt) -> None:
        body = {"model": contestant.model, "messages": prompt.body(), **sampling.body()}
        key = digest("answer", contestant.endpoint.origin, contestant.version, body)
        record = records.get(key)
        if record is None:
            record, is_final = await _ask(contestant, body)
            if is_final:
                records.put(key, record)
        answers[contestant.name, prompt.id] = Answer(**record)
        progress("answers", len(answers), total)

    # Prompt by prompt, so that the contestants' requests are in one batch of a server.
    await run_all([partial(one, c, p) for p in prompts for c in contestants], parallel=32)
    return answers


async def _ask(contestant: Contestant, body: dict[str, Any]) -> tuple[dict[str, Any], bool]:
    """The record of an answer, and whether it is final: a failure that may pass is asked again in the next run."""
    try:
        answer, headers = await contestant.endpoint.chat(body)
    except RequestRefused as error:
        return {"text": "", "error": str(error)}, False
    try:
        choice = answer["choices"][0]
        text, reason = choice["message"]["content"], choice.get("finish_reason")
    except (KeyError, IndexError, TypeError, AttributeError):
        return {"text": "", "error": f"{contestant.endpoint.origin}: an answer without choices"}, False
    usage = answer.get("usage")
    tokens = usage.get("completion_tokens") if isinstance(usage, dict) else None
    record = {
        "text": text if isinstance(text, str) else "",
        "finish_reason": reason if isinstance(reason, str) else None,
        "tokens": tokens if isinstance(tokens, int) else None,
        "version": headers.get("x-adapter-version"),
    }
    return record, True


async def run_all(jobs: Sequence[Callable[[], Any]], *, parallel: int) -> None:
    """Run jobs in their order, `parallel` at a time. The first error ends the others and is raised."""
    waiting = iter(jobs)

    async def work() -> None:
        for job in waiting:
            await job()

    tasks = [asyncio.create_task(work()) for _ in range(min(parallel, len(jobs)))]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
