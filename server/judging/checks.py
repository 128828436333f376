"""Figures without a judge: identical answers, lengths, run-on answers, exact checks, perplexity of the references."""

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from typing import Any

from guanaco.server.errors import CommandError
from guanaco.server.judging.contestants import Answer, Answers, Contestant, run_all
from guanaco.server.judging.endpoints import RequestRefused
from guanaco.server.judging.folder import Records, digest
from guanaco.server.judging.prompts import Prompt

# The start of another turn inside an answer: the answer runs on and writes the next speaker's part too.
_OTHER_TURN = re.compile(
    r"^\s*(###\s*(Human|Assistant)\b|<\|im_start\|>|\[INST\]|(Human|User|Assistant):)", re.MULTILINE
)


@dataclass(frozen=True)
class Check:
    """An exact check of an answer: `json`, `equals` (the reference answer), or a regex that must be found in it."""

    kind: str
    pattern: "re.Pattern[str] | None" = None

    @property
    def name(self) -> str:
        """The name in reports."""
        return self.kind if self.pattern is None else f"regex {self.pattern.pattern}"

    def passes(self, answer: str, reference: str | None) -> bool | None:
        """Whether an answer passes; None if it must equal the reference and there is none."""
        if self.pattern is not None:
            return self.pattern.search(answer) is not None
        if self.kind == "equals":
            return None if reference is None else answer.strip() == reference.strip()
        try:
            json.loads(answer)
        except (ValueError, RecursionError):
            return False
        return True


def read_check(text: str) -> Check:
    """The check that `json`, `equals` or `regex:PATTERN` names. Raises CommandError for any other text."""
    kind, separator, pattern = text.partition(":")
    if kind in ("json", "equals") and not separator:
        return Check(kind)
    if kind == "regex" and pattern:
        return Check("regex", compiled(pattern, "--check"))
    raise CommandError(f"--check {text}: write json, equals (the reference answer), or regex:PATTERN")


def compiled(pattern: str, flag: str) -> "re.Pattern[str]":
    """Compile a regex of the command line; its `.` matches line ends too. Raises CommandError if it is invalid. flag:
    the option, for the error."""
    try:
        return re.compile(pattern, re.DOTALL)
    except re.error as error:
        raise CommandError(f"{flag}: {pattern!r} is no regular expression ({error})") from None


def check_answers(
    contestants: Sequence[Contestant], prompts: Sequence[Prompt], answers: Answers, checks: Sequence[Check]
) -> dict[str, Any]:
    """Figures of each contestant's answers, and the share of identical answers of each pair."""
    told: dict[str, Any] = {"contestants": {}, "identical": []}
    for contestant in contestants:
        own = [(p, answers[contestant.name, p.id]) for p in prompts]
        told["contestants"][contestant.name] = _figures(own, checks)
    for one, other in combinations([c.name for c in contestants], 2):
        both = [(answers[one, p.id], answers[other, p.id]) for p in prompts]
        both = [(a, b) for a, b in both if a.error is None and b.error is None]
        same = sum(a.text == b.text for a, b in both)
        told["identical"].append({"player": one, "other": other, "share": _share(same, len(both))})
    return told


def _figures(own: Sequence[tuple[Prompt, Answer]], checks: Sequence[Check]) -> dict[str, Any]:
    there = [(p, a) for p, a in own if a.error is None]
    tokens = [a.tokens for _, a in there if a.tokens is not None]
    run_on = sum(a.finish_reason == "length" or bool(_OTHER_TURN.search(a.text)) for _, a in there)
    results = {}
    for check in checks:
        passed = [check.passes(a.text, p.reference) for p, a in there]
        counted = [p for p in passed if p is not None]
        results[check.name] = {"passed": sum(counted), "of": len(counted), "share": _share(sum(counted), len(counted))}
    return {
        "answers": len(there),
        "failed": len(own) - len(there),
        "errors": sorted({a.error for _, a in own if a.error is not None})[:5],
        "empty": sum(not a.text.strip() for _, a in there),
        "mean_characters": round(sum(len(a.text) for _, a in there) / len(there), 1) if there else None,
        "mean_tokens": round(sum(tokens) / len(tokens), 1) if tokens else None,
        "run_on_rate": _share(run_on, len(there)),
        "checks": results,
    }


def _share(part: int, whole: int) -> float | None:
    return round(part / whole, 4) if whole else None


class _NotOffered(RequestRefused):
    """The endpoint does not return the log-probabilities of any prompt."""

    def __init__(self, origin: str) -> None:
        super().__init__(f"{origin} does not return the log-probabilities of a prompt")


async def perplexities(
    contestants: Sequence[Contestant], prompts: Sequence[Prompt], records: Records
) -> dict[str, dict[str, Any]]:
    """Each contestant's perplexity of the reference answers: exp of the mean negative log-probability of their tokens.

    Only endpoints that return the log-probabilities of a prompt (guanaco, vLLM) can be measured; for the others the
    perplexity is None, with a `reason`. If one contestant refuses a reference (it may be too long), that reference is
    left out for all, so that all are measured on the same texts.
    """
    known = [p for p in prompts if p.reference]
    scored: dict[str, dict[str, dict[str, Any]]] = {c.name: {} for c in contestants}
    reasons: dict[str, str] = {}

    async def of(contestant: Contestant) -> None:
        for prompt in known:
            try:
                scored[contestant.name][prompt.id] = await _scored(contestant, prompt, records)
            except _NotOffered as error:
                reasons[contestant.name] = str(error)
                return
            except RequestRefused as error:
                reasons[contestant.name] = str(error)

    if not known:
        return {}
    await run_all([partial(of, c) for c in contestants], parallel=8)
    measured = [own for own in scored.values() if own]
    common = set.intersection(*(set(own) for own in measured)) if measured else set()
    return {name: _perplexity(own, common, reasons.get(name, "")) for name, own in scored.items()}


def _perplexity(own: dict[str, dict[str, Any]], common: set[str], reason: str) -> dict[str, Any]:
    kept = [own[prompt] for prompt in common if prompt in own]
    total, count = sum(record["sum"] for record in kept), sum(record["tokens"] for record in kept)
    if not count:
        return {"perplexity": None, "reason": reason}
    value = math.exp(min(700.0, -total / count))
    return {"perplexity": round(value, 4), "tokens": count, "answers": len(kept)}


async def _scored(contestant: Contestant, prompt: Prompt, records: Records) -> dict[str, Any]:
    """The sum of the log-probabilities of the reference's tokens, and their number.

    The tokens of the reference are those of the whole conversation that follow the tokens of the prompt alone.
    """
    endpoint, messages = contestant.endpoint, prompt.body()
    whole = [*messages, {"role": "assistant", "content": prompt.reference}]
    key = digest("perplexity", endpoint.origin, contestant.model, contestant.version, whole)
    record = records.get(key)
    if record is not None:
        return record
    body = {"model": contestant.model, "messages": whole, "max_tokens": 1, "temperature": 0, "prompt_logprobs": 0}
    body |= {"continue_final_message": True, "add_generation_prompt": False, "return_token_ids": True}
    try:
        start, _ = await endpoint.call("POST", "/tokenize", {"model": contestant.model, "messages": messages})
        answer, _ = await endpoint.chat(body)
        own, ids, given = start["tokens"], answer["prompt_token_ids"], answer["prompt_logprobs"]
        begin = next((i for i, (a, b) in enumerate(zip(own, ids, strict=False)) if a != b), min(len(own), len(ids)))
        values = [float(given[i][str(ids[i])]["logprob"]) for i in range(max(1, begin), len(ids))]
    except (KeyError, TypeError, IndexError, ValueError):
        raise _NotOffered(endpoint.origin) from None
    except RequestRefused:
        raise
    except CommandError:  # no such route
        raise _NotOffered(endpoint.origin) from None
    record = {"sum": sum(values), "tokens": len(values)}
    records.put(key, record)
    return record
