"""Two players on many prompts: the verdicts in both orders become one result a prompt, and the results a win rate.

A judge favours one place (mostly the first), so each prompt is judged in both orders. If both verdicts name the same
winner, that is the result. If they differ, or one of them cannot be read, the result is a tie. An interval comes with
the rate.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from guanaco.server.judging.ratings import REPLICATES, resampled
from guanaco.server.judging.stored import Verdict

MIN_PROMPTS = 20  # fewer prompts never carry a statement: the bootstrap's intervals are too narrow there
MAX_UNREADABLE = 0.2  # share of unreadable verdicts above which no player is called better
_POWER_SIGMAS = 1.96 + 0.84  # a difference of this many standard errors is found in four studies of five
_MOST_ADVISED = 100_000  # prompts
_TAIL = 0.025  # probability on each side of a 95 % interval
_SHRINKAGE = 0.1  # prior precision of the length's coefficient: a few prompts cannot make it infinite
_TIE_WEIGHT = 0.1  # of an added tie at equal lengths: the rate stays below 1 for a player who wins everywhere
_NEWTON_STEPS = 30
_MOST_CHANGE = 2.0  # of a coefficient in one step
_CLOSE_ENOUGH = 1e-9  # largest change of a coefficient in the last step

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class PairResult:
    """How `player` did against `other`.

    rate: mean result over the prompts, a tie counting half. interval: its 95 % interval by bootstrap over prompts.
    deviation: standard deviation of the results. wins, ties, losses: prompts by their result. couples: pairs of
    readable verdicts, one in each order. agreement: the share of couples that say the same, None without couples.
    verdicts, unreadable: all verdicts, and those that cannot be read. one_order: prompts that were judged in one order
    although others were judged in both. both_orders: whether there are verdicts in both orders.
    """

    player: str
    other: str
    prompts: int
    rate: float
    interval: tuple[float, float]
    deviation: float
    wins: int
    ties: int
    losses: int
    couples: int
    agreement: float | None
    verdicts: int
    unreadable: int
    one_order: int
    both_orders: bool

    @property
    def is_better(self) -> bool:
        """Whether the interval says that `player` is better."""
        return self.says_something and self.interval[0] > 0.5

    @property
    def is_worse(self) -> bool:
        """Whether the interval says that `player` is worse."""
        return self.says_something and self.interval[1] < 0.5

    @property
    def says_something(self) -> bool:
        """Whether there are enough prompts, and few enough unreadable verdicts, for any statement."""
        return self.prompts >= MIN_PROMPTS and self.unreadable <= MAX_UNREADABLE * self.verdicts


@dataclass
class Agreement:
    """Couples of readable verdicts, one in each order, and how many of them say the same."""

    couples: int = 0
    same: int = 0

    @property
    def share(self) -> float | None:
        """The share that says the same; None without couples."""
        return self.same / self.couples if self.couples else None


Key = tuple[str, str]  # benchmark, question


def prompt_results(verdicts: Iterable[Verdict], player: str) -> tuple[dict[Key, float], Agreement, int]:
    """(prompt → result for `player` from 0 to 1, agreement of the orders, number of prompts with one order only).

    verdicts: of one pair. Several verdicts in one order, such as of several people, are matched in their sequence.
    """
    kept: dict[Key, tuple[list[float | None], list[float | None]]] = defaultdict(lambda: ([], []))
    for v in verdicts:
        is_first = v.first == player
        result = None if v.verdict is None else 0.5 if v.verdict == 3 else float((v.verdict == 1) == is_first)
        kept[v.benchmark, v.question][0 if is_first else 1].append(result)
    both = any(one and other for one, other in kept.values())
    agreement, one_order = Agreement(), 0
    results = {}
    for key, (one, other) in kept.items():
        of_prompt = []
        for a, b in zip(one, other, strict=False):
            if a is not None and b is not None:
                agreement.couples += 1
                agreement.same += a == b
            of_prompt.append(a if a is not None and a == b else 0.5)
        alone = (one if len(one) > len(other) else other)[len(of_prompt) :]
        one_order += bool(alone) and both
        of_prompt += [0.5 if both or a is None else a for a in alone]
        results[key] = sum(of_prompt) / len(of_prompt)
    return results, agreement, one_order


def pair_result(
    verdicts: Sequence[Verdict], player: str, other: str, *, replicates: int = REPLICATES, seed: int = 0
) -> PairResult:
    """How `player` did against `other`, by the verdicts about these two."""
    own = [v for v in verdicts if {v.first, v.second} == {player, other}]
    results, agreement, one_order = prompt_results(own, player)
    scores = np.array(list(results.values()))
    rate = float(scores.mean()) if len(scores) else 0.5
    return PairResult(
        player=player,
        other=other,
        prompts=len(scores),
        rate=rate,
        interval=interval_of_mean(scores, replicates=replicates, seed=seed),
        deviation=float(scores.std()) if len(scores) else 0.0,
        wins=int((scores > 0.5).sum()),
        ties=int((scores == 0.5).sum()),
        losses=int((scores < 0.5).sum()),
        couples=agreement.couples,
        agreement=agreement.share,
        verdicts=len(own),
        unreadable=sum(v.verdict is None for v in own),
        one_order=one_order,
        both_orders=any(v.first == player for v in own) and any(v.second == player for v in own),
    )


def interval_of_mean(scores: Floats, *, replicates: int = REPLICATES, seed: int = 0) -> tuple[float, float]:
    """The 95 % interval of a mean of results (0 to 1) by bootstrap over prompts; (0, 1) without results.

    If all results are wins or all are losses, every resample is the same, so the exact bound for a share of 1 or 0 is
    used.
    """
    count = len(scores)
    if not count:
        return 0.0, 1.0
    if scores.min() == scores.max() and scores[0] in (0.0, 1.0):
        edge = _TAIL ** (1 / count)
        return (edge, 1.0) if scores[0] else (0.0, 1 - edge)
    means = np.concatenate([counts @ scores for counts in resampled(count, replicates, seed, cells=count)]) / count
    low, high = np.quantile(means, [_TAIL, 1 - _TAIL])
    return float(low), float(high)


def length_controlled(
    scores: Floats, differences: Floats, *, replicates: int = REPLICATES, seed: int = 0
) -> tuple[float, tuple[float, float]]:
    """The win rate that a player would have if both answers were equally long, and its 95 % interval by bootstrap.

    scores: [prompts], results for the player (0 to 1). differences: [prompts], the length of its answer minus that of
    the other's. A logistic regression with one coefficient for the length, as AlpacaEval's length-controlled rate has
    it: the difference goes through tanh, in units of its standard deviation. (0.5, (0, 1)) without prompts.
    """
    count = len(scores)
    if not count:
        return 0.5, (0.0, 1.0)
    spread = float(differences.std())
    place = np.tanh(differences / spread) if spread else np.zeros(count)
    rate = _rate_at_zero(np.ones((1, count)), scores, place)[0]
    rates = [_rate_at_zero(weights, scores, place) for weights in resampled(count, replicates, seed, cells=6 * count)]
    low, high = np.quantile(np.concatenate(rates), [_TAIL, 1 - _TAIL])
    return float(rate), (float(low), float(high))


def _rate_at_zero(weights: Floats, scores: Floats, place: Floats) -> Floats:
    """The fitted rate at equal lengths for each row of weights [replicates, prompts], by Newton's method."""
    at_zero, slope = np.zeros(len(weights)), np.zeros(len(weights))
    for _ in range(_NEWTON_STEPS):
        fitted = 1 / (1 + np.exp(-(at_zero[:, None] + slope[:, None] * place)))
        tied = 1 / (1 + np.exp(-at_zero))
        error, weight = weights * (scores - fitted), weights * fitted * (1 - fitted)
        gradient = error.sum(axis=1) + _TIE_WEIGHT * (0.5 - tied), error @ place - _SHRINKAGE * slope
        a = weight.sum(axis=1) + _TIE_WEIGHT * tied * (1 - tied)
        b, c = weight @ place, weight @ np.square(place) + _SHRINKAGE
        determinant = a * c - b * b
        first = np.clip((c * gradient[0] - b * gradient[1]) / determinant, -_MOST_CHANGE, _MOST_CHANGE)
        second = np.clip((a * gradient[1] - b * gradient[0]) / determinant, -_MOST_CHANGE, _MOST_CHANGE)
        at_zero += first
        slope += second
        if max(np.abs(first).max(), np.abs(second).max()) < _CLOSE_ENOUGH:
            break
    return np.asarray(1 / (1 + np.exp(-at_zero)))


def prompts_needed(result: PairResult) -> int | None:
    """About how many prompts would show a difference as large as this one; None if more than 100,000 are needed."""
    difference = abs(result.rate - 0.5)
    if difference == 0 or result.deviation == 0:
        return None
    needed = (_POWER_SIGMAS * result.deviation / difference) ** 2
    needed = max(needed, result.prompts + 1, MIN_PROMPTS)
    if needed > _MOST_ADVISED:
        return None
    # Rounded up to two digits: more would look exact.
    unit = int(10 ** max(0, math.floor(math.log10(needed)) - 1))
    return math.ceil(needed / unit) * unit


def in_words(result: PairResult) -> str:
    """One sentence: better, worse, or not distinguishable, and then how many prompts would be enough."""
    pair = f"{result.player} against {result.other}"
    if result.unreadable > MAX_UNREADABLE * result.verdicts:
        share = result.unreadable / result.verdicts
        return f"{pair}: no statement, because {share:.0%} of the verdicts could not be read; use another judge"
    if result.prompts < MIN_PROMPTS:
        return f"{pair}: no statement with {result.prompts} prompts; at least {MIN_PROMPTS} are needed"
    if result.is_better or result.is_worse:
        return f"{result.player} is {'better' if result.is_better else 'worse'} than {result.other}"
    text = f"{pair}: not distinguishable with {result.prompts} prompts"
    needed = prompts_needed(result)
    return f"{text}; about {needed:,} would do" if needed else f"{text}; more prompts are unlikely to change that"
