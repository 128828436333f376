"""Ratings from matches: the QLoRA paper's Elo over random orders, and Bradley-Terry with an interval by bootstrap.

Both are on Elo's scale with a mean of 1,000: 400 points are odds of ten to one. Elo with K = 32 depends on the order of
the matches, so it is averaged over many orders. Bradley-Terry does not depend on the order. The bootstrap resamples
prompts and not matches, because the matches on one prompt depend on each other.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

START = 1000.0
K = 32.0  # most points that one match moves, as in the QLoRA paper
ORDERS = 10_000  # random orders of the matches, as in the QLoRA paper
REPLICATES = 1000  # resamples of the bootstrap
_SCALE = np.log(10) / 400  # natural log-odds of one point
_CHUNK_BYTES = 96 << 20  # of shuffled matches at a time
_CHUNK_ORDERS = 2000
_CHUNK_CELLS = 4_000_000  # of replicates times prompts, or replicates times pairs, at a time
# A tie of this weight between players that met: a player who never lost gets a finite rating.
_PSEUDO_TIES = 0.1

Floats = NDArray[np.float64]
Ints = NDArray[np.intp]


@dataclass(frozen=True)
class Matches:
    """Matches between `players`.

    first, second: [matches], int, indices into players. prompt: [matches], int. score: [matches], float64, the first
    player's result (1, 0.5 or 0).
    """

    players: tuple[str, ...]
    first: Ints
    second: Ints
    score: Floats
    prompt: Ints

    def __len__(self) -> int:
        return len(self.score)


def mean_elo(matches: Matches, *, orders: int = ORDERS, seed: int = 0) -> tuple[Floats, Floats]:
    """Each player's Elo (K 32, 1,000 at the start), averaged over random orders of the matches, and its spread.

    Returns two arrays [players]: the mean, and the standard deviation over the orders. All orders of a chunk are
    played at once, one match of each per step.
    """
    rng = np.random.default_rng(seed)
    table = np.stack([matches.first, matches.second, np.round(2 * matches.score).astype(np.intp)])
    kinds, kind_of = np.unique(table, axis=1, return_inverse=True)
    width = np.uint8 if kinds.shape[1] <= 256 else np.uint16 if kinds.shape[1] <= 65_536 else np.uint32
    kind_of = kind_of.reshape(-1).astype(width)
    count = len(matches.players)
    chunk = max(1, min(_CHUNK_ORDERS, _CHUNK_BYTES // max(1, kind_of.nbytes)))
    total, squares = np.zeros(count), np.zeros(count)
    for begin in range(0, orders, chunk):
        ratings = _play(kind_of, kinds, count, min(chunk, orders - begin), rng)
        total += ratings.sum(axis=0)
        squares += np.square(ratings - START).sum(axis=0)
    mean = total / orders
    return mean, np.sqrt(np.maximum(0.0, squares / orders - np.square(mean - START)))


def _play(kind_of: NDArray[Any], kinds: Ints, players: int, orders: int, rng: np.random.Generator) -> Floats:
    """The ratings [orders, players] after every match, in `orders` random orders."""
    shuffled = rng.permuted(np.broadcast_to(kind_of, (orders, len(kind_of))), axis=1).T.copy()
    ratings = np.full(orders * players, START)
    row = np.arange(orders, dtype=np.intp) * players
    first, second, score = kinds[0], kinds[1], kinds[2] / 2
    for kind in shuffled:
        a, b = row + first[kind], row + second[kind]
        of_a, of_b = ratings[a], ratings[b]
        change = K * (score[kind] - 1 / (1 + np.exp((of_b - of_a) * _SCALE)))
        ratings[a] = of_a + change
        ratings[b] = of_b - change
    return ratings.reshape(orders, players)


def bradley_terry(wins: Floats) -> Floats:
    """Ratings [..., players] by maximum likelihood from wins [..., players, players], a tie half a win for both.

    wins[i, j] counts what i won against j. Newton's method on all leading dimensions at once. Players that never met,
    not even through others, cannot be compared: each such group gets a mean of 1,000.
    """
    met = (wins + np.swapaxes(wins, -1, -2)) > 0
    wins = wins + met * (_PSEUDO_TIES / 2)
    games = wins + np.swapaxes(wins, -1, -2)
    count = wins.shape[-1]
    strength: Floats = np.zeros(wins.shape[:-1])
    eye = np.eye(count)
    ridge = 1e-9 * (1 + games.sum(axis=(-1, -2)))[..., None, None] * eye
    for _ in range(200):
        odds = 1 / (1 + np.exp(np.clip(strength[..., None, :] - strength[..., :, None], -60, 60)))
        slope = (wins - games * odds).sum(axis=-1)
        weight = games * odds * (1 - odds)
        curve = weight.sum(axis=-1)[..., None] * eye - weight + ridge
        step = np.linalg.solve(curve, slope[..., None])[..., 0]
        step -= step.mean(axis=-1, keepdims=True)
        largest = np.abs(step).max(axis=-1, keepdims=True)
        strength = strength + step / np.maximum(1.0, largest)
        if largest.max() < 1e-9:
            break
    ratings: Floats = START + strength / _SCALE
    return ratings


def rate(matches: Matches, *, replicates: int = REPLICATES, seed: int = 0) -> tuple[Floats, Floats]:
    """Bradley-Terry ratings [players], and their 95 % intervals [players, 2] by bootstrap over prompts."""
    count = len(matches.players)
    _, prompt = np.unique(matches.prompt, return_inverse=True)
    prompts = int(prompt.max()) + 1 if len(matches) else 0
    by_prompt = np.zeros((prompts, count * count))
    np.add.at(by_prompt, (prompt, matches.first * count + matches.second), matches.score)
    np.add.at(by_prompt, (prompt, matches.second * count + matches.first), 1 - matches.score)
    ratings = bradley_terry(by_prompt.sum(axis=0).reshape(count, count))
    drawn = []
    for counts in resampled(prompts, replicates, seed, cells=max(prompts, count * count)):
        drawn.append(bradley_terry((counts @ by_prompt).reshape(-1, count, count)))
    spread = np.quantile(np.concatenate(drawn), [0.025, 0.975], axis=0).T if drawn else np.empty((count, 2))
    return ratings, spread


def resampled(prompts: int, replicates: int, seed: int, *, cells: int) -> Iterator[Floats]:
    """How often each prompt is sampled in each replicate: arrays [some replicates, prompts]; a row sums to `prompts`.

    cells: how many numbers the caller holds for one replicate; it limits the replicates in one array.
    """
    if not prompts:
        return
    rng = np.random.default_rng(seed)
    chunk = max(1, min(replicates, _CHUNK_CELLS // max(1, cells)))
    for begin in range(0, replicates, chunk):
        size = min(chunk, replicates - begin)
        yield rng.multinomial(prompts, np.full(prompts, 1 / prompts), size=size).astype(float)
