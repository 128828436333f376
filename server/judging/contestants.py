"""Contestants and their answers: all are asked side by side with the same seed, and each answer is kept at once."""

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

Progress = Callable[[str, int, int], None]  # (name of the work, number done, number in all)


@dataclass(frozen=True)
class Sampling:
    """How answers are sampled. The defaults are those of the QLoRA paper's evaluation of Guanaco."""

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
    """A model that answers the prompts, at one endpoint.

    name: in reports. model: the name that the endpoint knows. version: digest of the adapter and fingerprint of the
    base, if known. family: names of the base and the adapter, which are compared with a judge's name. is_base: whether
    the base answers, without an adapter.
    """

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
    """`URL#MODEL` → (URL, MODEL); a name alone → (None, name). Raises CommandError for an address without a model."""
    if "://" not in text:
        return None, text
    url, _, model = text.partition("#")
    origin_of(url, text)
    if not model:
        raise CommandError(f"{text}: name the model behind it, as URL#MODEL")
    return url, model


async def find_model(endpoint: Endpoint, model: str) -> dict[str, Any]:
    """The endpoint's card of a model; `base` is the first model that it lists. Empty if the endpoint gives no card."""
    try:
        if model == "base":
            cards, _ = await endpoint.call("GET", "/v1/models")
            return next(iter(cards.get("data") or ()), {}) or {}
        card, _ = await endpoint.call("GET", f"/v1/models/{model}")
        return card
    except CommandError:  # many endpoints lack this route; a later request for an answer shows real problems
        return {}


async def collect_answers(
    contestants: Sequence[Contestant],
    prompts: Sequence[Prompt],
    sampling: Sampling,
    records: Records,
    progress: Progress = lambda *_: None,
) -> Answers:
    """Every contestant's answer to every prompt. Answers that the records hold are not generated again.

    A prompt that an endpoint refuses gets an answer with the error. Raises CommandError if no request can work.
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

    # Prompt by prompt, so that a server gets all contestants' requests together and computes them in one batch.
    await run_all([partial(one, c, p) for p in prompts for c in contestants], parallel=32)
    return answers


async def _ask(contestant: Contestant, body: dict[str, Any]) -> tuple[dict[str, Any], bool]:
    """(the record of an answer, whether it is final). A failure is not final: the next run asks again."""
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
