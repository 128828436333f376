"""Statistics from verdicts and scores, for `guanaco compare --replay` and for every report."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from guanaco.server.errors import CommandError
from guanaco.server.judging.pairs import Agreement, in_words, pair_result
from guanaco.server.judging.ratings import ORDERS, REPLICATES, Matches, mean_elo, rate, resampled
from guanaco.server.judging.stored import Scores, Verdict

MAX_PLAYERS = 200


def benchmark_statistics(
    verdicts: Sequence[Verdict], *, orders: int = ORDERS, replicates: int = REPLICATES, seed: int = 0
) -> dict[str, dict[str, Any]]:
    """Benchmark → players, pairs, order agreement, verdicts and warnings, as the JSON report holds them.

    Raises CommandError for more than MAX_PLAYERS players in one benchmark.
    """
    names = dict.fromkeys(v.benchmark for v in verdicts)
    return {
        name: _statistics([v for v in verdicts if v.benchmark == name], orders=orders, replicates=replicates, seed=seed)
        for name in names
    }


def _statistics(verdicts: Sequence[Verdict], *, orders: int, replicates: int, seed: int) -> dict[str, Any]:
    matches = matches_of(verdicts)
    elo, spread = mean_elo(matches, orders=orders, seed=seed)
    ratings, intervals = rate(matches, replicates=replicates, seed=seed)
    players = {
        name: {
            "elo": round(float(elo[i]), 2),
            "elo_spread_over_orders": round(float(spread[i]), 2),
            "bradley_terry": round(float(ratings[i]), 2),
            "interval": [round(float(x), 2) for x in intervals[i]] if len(matches) else None,
        }
        for i, name in enumerate(matches.players)
    }
    pairs, agreement, warnings = [], Agreement(), []
    for (one, other), own in _by_pair(verdicts).items():
        result = pair_result(own, one, other, replicates=replicates, seed=seed)
        agreement.couples += result.couples
        agreement.same += round((result.agreement or 0) * result.couples)
        shown = {k: round(x, 4) if isinstance(x, float) else x for k, x in asdict(result).items()}
        shown["interval"] = [round(x, 4) for x in result.interval]
        pairs.append(shown | {"is_better": result.is_better, "is_worse": result.is_worse, "in_words": in_words(result)})
        if not result.both_orders:
            warnings.append(
                f"{one} and {other} were judged in one order only: the judge's bias by place is not visible"
            )
        elif result.one_order:
            warnings.append(
                f"{one} and {other}: {result.one_order} prompts were judged in one order only, and are ties"
            )
    return {
        "players": players,
        "order_agreement": None if agreement.share is None else round(agreement.share, 4),
        "unreadable": sum(v.verdict is None for v in verdicts),
        "verdicts": len(verdicts),
        "pairs": pairs,
        "warnings": warnings,
    }


def matches_of(verdicts: Sequence[Verdict]) -> Matches:
    """Every readable verdict as one match. Players are in the order of their first verdict, readable or not.

    Raises CommandError for more than MAX_PLAYERS players.
    """
    players = tuple(dict.fromkeys(name for v in verdicts for name in (v.first, v.second)))
    if len(players) > MAX_PLAYERS:
        raise CommandError(f"{len(players)} players in one benchmark: at most {MAX_PLAYERS} can be rated together")
    number = {name: i for i, name in enumerate(players)}
    prompt = {key: i for i, key in enumerate(dict.fromkeys(v.question for v in verdicts))}
    read = [v for v in verdicts if v.verdict is not None]
    points = {1: 1.0, 2: 0.0, 3: 0.5}
    return Matches(
        players=players,
        first=np.array([number[v.first] for v in read], dtype=np.intp),
        second=np.array([number[v.second] for v in read], dtype=np.intp),
        score=np.array([points[v.verdict] for v in read if v.verdict is not None], dtype=np.float64),
        prompt=np.array([prompt[v.question] for v in read], dtype=np.intp),
    )


def _by_pair(verdicts: Iterable[Verdict]) -> dict[tuple[str, str], list[Verdict]]:
    pairs: dict[tuple[str, str], list[Verdict]] = {}
    for v in verdicts:
        key = (v.second, v.first) if (v.second, v.first) in pairs else (v.first, v.second)
        pairs.setdefault(key, []).append(v)
    return pairs


def percent_of_reference(
    scores: Sequence[Scores], reference: str | None = None, *, replicates: int = REPLICATES, seed: int = 0
) -> dict[str, Any]:
    """Each player's points as a percentage of the reference's: the ratio of the sums, then the mean of both orders.

    reference: a player; None: the one player that is in every pair. Returns `reference`, `percent_of_reference`,
    `percent_interval` (95 %, bootstrap over prompts), `unreadable_scores` and `warnings`. Raises CommandError if the
    reference is not in the scores or can't be told from them.
    """
    reference = _reference(scores, reference)
    percent, intervals, warnings = {}, {}, []
    unreadable = sum(s.first_score is None for s in scores)
    players = dict.fromkeys(name for s in scores for name in (s.first, s.second) if name != reference)
    for player in players:
        own = [s for s in scores if {s.first, s.second} == {player, reference} and s.first_score is not None]
        sums = _sums_by_prompt(own, player)
        if not own:
            warnings.append(f"{player} has no readable scores beside {reference}: no percentage")
            continue
        total = sums.sum(axis=0)
        is_there = np.array([any(s.first == player for s in own), any(s.second == player for s in own)])
        if (total[is_there, 1] == 0).any():
            warnings.append(f"{reference} has no points beside {player}: no percentage")
            continue
        if not is_there.all():
            warnings.append(
                f"{player} and {reference} were scored in one order only: the judge's bias is in the number"
            )
        percent[player] = round(100 * float((total[is_there, 0] / total[is_there, 1]).mean()), 2)
        drawn = []
        for counts in resampled(len(sums), replicates, seed, cells=4 * len(sums)):
            both = np.tensordot(counts, sums, axes=1)[:, is_there]
            drawn.append((both[..., 0] / np.maximum(both[..., 1], 1e-9)).mean(axis=1))
        intervals[player] = [round(100 * float(x), 2) for x in np.quantile(np.concatenate(drawn), [0.025, 0.975])]
    return {
        "reference": reference,
        "percent_of_reference": percent,
        "percent_interval": intervals,
        "unreadable_scores": unreadable,
        "warnings": warnings,
    }


def _sums_by_prompt(scores: Sequence[Scores], player: str) -> Any:
    """Points [prompts, order, (player, reference)]; order 0 has the player first."""
    sums: dict[str, Any] = defaultdict(lambda: np.zeros((2, 2)))
    for s in scores:
        is_first = s.first == player
        points = (s.first_score, s.second_score) if is_first else (s.second_score, s.first_score)
        sums[s.question][0 if is_first else 1] += np.array(points, dtype=float)
    return np.array(list(sums.values()))


def _reference(scores: Sequence[Scores], wanted: str | None) -> str:
    pairs = {frozenset((s.first, s.second)) for s in scores}
    if wanted is not None:
        if not any(wanted in pair for pair in pairs):
            raise CommandError(f"--reference {wanted}: no player of that name is in the scores")
        return wanted
    in_every = sorted(frozenset.intersection(*pairs)) if pairs else []
    if len(in_every) != 1:
        why = f"{' and '.join(in_every)} are" if in_every else "no player is"
        raise CommandError(
            f"the scores do not say who the reference is ({why} in every pair): name it with --reference"
        )
    return in_every[0]


def rank(players: dict[str, dict[str, Any]]) -> list[str]:
    """The players' names, the highest Bradley-Terry rating first."""
    return sorted(players, key=lambda name: -players[name]["bradley_terry"])
