"""A whole comparison: answers, checks, judgements, and the result from which reports are made."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from itertools import combinations
from typing import Any

import numpy as np

from guanaco.server.judging.checks import Check, check_answers, perplexities
from guanaco.server.judging.contestants import Answers, Contestant, Progress, Sampling, collect_answers
from guanaco.server.judging.folder import WorkFolder
from guanaco.server.judging.judges import Judge, Judged, judge_answers, same_family
from guanaco.server.judging.pairs import in_words, length_controlled, pair_result, prompt_results
from guanaco.server.judging.prompts import Prompt, hash_of
from guanaco.server.judging.replay import benchmark_statistics, percent_of_reference
from guanaco.server.judging.stored import Verdict, scores_csv, verdicts_csv

FORMAT = 1
DEFAULT_SAMPLING = Sampling()


@dataclass(frozen=True)
class Plan:
    """The contestants, prompts and settings of a comparison. benchmark: the prompts' name in reports and CSV files."""

    contestants: tuple[Contestant, ...]
    prompts: tuple[Prompt, ...]
    benchmark: str
    sampling: Sampling = DEFAULT_SAMPLING
    checks: tuple[Check, ...] = ()
    reference: str | None = None  # the contestant that all others are judged against; None: every pair is judged
    seed: int = 0
    prices: tuple[float, float] | None = None  # the judge's, for a million prompt and answer tokens
    with_perplexity: bool = True

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """The pairs of contestants that are judged against each other."""
        names = [c.name for c in self.contestants]
        if self.reference is not None:
            return [(name, self.reference) for name in names if name != self.reference]
        return list(combinations(names, 2))


async def answer_and_check(plan: Plan, folder: WorkFolder, progress: Progress) -> tuple[Answers, dict[str, Any]]:
    """(all answers, the result with everything that needs no judge)."""
    answers = await collect_answers(plan.contestants, plan.prompts, plan.sampling, folder.answers, progress)
    scored = plan.prompts if plan.with_perplexity else ()
    result: dict[str, Any] = {
        "format": FORMAT,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "benchmark": plan.benchmark,
        "prompts": _about(plan.prompts),
        "contestants": [
            {"name": c.name, "model": c.model, "endpoint": c.endpoint.origin, "versions": _versions(c, plan, answers)}
            for c in plan.contestants
        ],
        "sampling": asdict(plan.sampling),
        "checks": check_answers(plan.contestants, plan.prompts, answers, plan.checks),
        "perplexity": await perplexities(plan.contestants, scored, folder.answers),
        "judge": None,
        "benchmarks": {},
        "breakdown": {},
        "in_words": [],
        "usage": {c.endpoint.origin: asdict(c.endpoint.usage) for c in plan.contestants},
        "warnings": [],
    }
    for card in result["contestants"]:
        if len(card["versions"]) > 1:
            result["warnings"].append(f"{card['name']} was answered by {len(card['versions'])} versions of its adapter")
    for name, figures in result["checks"]["contestants"].items():
        if figures["failed"]:
            result["warnings"].append(f"{name} has no answer to {figures['failed']} prompts: they are not judged")
    return answers, result


async def judge_all(plan: Plan, judge: Judge, answers: Answers, folder: WorkFolder, progress: Progress) -> Judged:
    """Judge every pair on every prompt in both orders."""
    return await judge_answers(judge, plan.benchmark, plan.pairs, plan.prompts, answers, folder.verdicts, progress)


def add_judgements(
    result: dict[str, Any],
    plan: Plan,
    judged: Judged,
    *,
    judge: str,
    answers: Answers,
    usage: dict[str, Any] | None = None,
) -> None:
    """Put the statistics of judgements into `result`. judge: its name in reports. usage: the `Usage` of the judge's
    endpoint as a dict; None if the judge has none."""
    verdicts = judged.verdicts
    told = benchmark_statistics(verdicts, seed=plan.seed).get(plan.benchmark)
    if told is None:
        result["warnings"].append("nothing was judged: no prompt has two answers")
        return
    result["benchmarks"] = {plan.benchmark: told}
    for pair in told["pairs"]:
        pair["length_controlled"] = _length_controlled(pair["player"], pair["other"], verdicts, answers, plan.seed)
    result["warnings"] += told["warnings"]
    if any(s.first_score is not None for s in judged.scores):
        percent = percent_of_reference(judged.scores, plan.reference, seed=plan.seed)
        result["warnings"] += percent.pop("warnings")
        result |= percent
    result["breakdown"] = {
        "category": _by(plan, verdicts, lambda p: p.category),
        "language": _by(plan, verdicts, lambda p: p.language or "unknown"),
    }
    result["in_words"] = [pair["in_words"] for pair in told["pairs"]]
    cost = None
    if usage is not None and plan.prices is not None:
        cost = (usage["prompt_tokens"] * plan.prices[0] + usage["completion_tokens"] * plan.prices[1]) / 1e6
    result["judge"] = {
        "name": judge,
        "usage": usage,
        "cost_of_this_run": None if cost is None else round(cost, 4),
        "failed": judged.unheard,
        "bias": _bias(verdicts, answers),
    }
    if judged.unheard:
        result["warnings"].append(
            f"{judged.unheard} judgements could not be had and count as unreadable: run the command again to get them"
        )


def family_warnings(judge: str, contestants: Sequence[Contestant]) -> list[str]:
    """A warning for each contestant of the judge's own family."""
    return [
        f"the judge {judge} is of the same family as {name}: judges prefer their own family's answers"
        for name in same_family(judge, contestants)
    ]


def store(result: dict[str, Any], judged: Judged, folder: WorkFolder) -> None:
    """Write the verdicts and scores as files that `guanaco compare --replay` reads."""
    folder.write("verdicts.csv", verdicts_csv(judged.verdicts))
    if "percent_of_reference" in result:
        folder.write("scores.csv", scores_csv(judged.scores))


def _about(prompts: Sequence[Prompt]) -> dict[str, Any]:
    return {
        "count": len(prompts),
        "sha256": hash_of(prompts),
        "categories": dict(Counter(p.category for p in prompts)),
        "languages": dict(Counter(p.language or "unknown" for p in prompts)),
        "with_reference": sum(p.reference is not None for p in prompts),
    }


def _versions(contestant: Contestant, plan: Plan, answers: Answers) -> list[str]:
    seen = {answers[contestant.name, p.id].version for p in plan.prompts}
    return sorted(version for version in seen if version is not None)


def _by(plan: Plan, verdicts: Sequence[Verdict], group_of: Callable[[Prompt], str]) -> dict[str, list[dict[str, Any]]]:
    """Each pair's result within each group of prompts; empty if there is only one group."""
    group = {p.id: group_of(p) for p in plan.prompts}
    names = list(dict.fromkeys(group.values()))
    told: dict[str, list[dict[str, Any]]] = {}
    for name in names if len(names) > 1 else ():
        own = [v for v in verdicts if group[v.question] == name]
        results = [pair_result(own, *pair, seed=plan.seed) for pair in plan.pairs]
        told[name] = [
            {
                "player": r.player,
                "other": r.other,
                "prompts": r.prompts,
                "rate": round(r.rate, 4),
                "interval": [round(x, 4) for x in r.interval],
                "ties": r.ties,
                "agreement": r.agreement and round(r.agreement, 4),
                "in_words": in_words(r),
            }
            for r in results
            if r.prompts
        ]
    return told


def _length_controlled(
    player: str, other: str, verdicts: Sequence[Verdict], answers: Answers, seed: int
) -> dict[str, Any]:
    """The win rate of a pair at equal lengths, in characters."""
    results, _, _ = prompt_results([v for v in verdicts if {v.first, v.second} == {player, other}], player)
    lengths = [[float(len(answers[name, question].text)) for name in (player, other)] for _, question in results]
    differences = np.array([mine - others for mine, others in lengths])
    rate, interval = length_controlled(np.array(list(results.values())), differences, seed=seed)
    return {"rate": round(rate, 4), "interval": [round(x, 4) for x in interval]}


def _bias(verdicts: Sequence[Verdict], answers: Answers) -> dict[str, float | None]:
    """Shares of the decided verdicts that went to the first answer, and to the longer one."""
    decided = [v for v in verdicts if v.verdict in (1, 2)]
    longer = []
    for v in decided:
        first, second = (len(answers[name, v.question].text) for name in (v.first, v.second))
        if first != second:
            longer.append((v.verdict == 1) == (first > second))
    return {
        "first_wins": round(sum(v.verdict == 1 for v in decided) / len(decided), 4) if decided else None,
        "longer_wins": round(sum(longer) / len(longer), 4) if longer else None,
    }
