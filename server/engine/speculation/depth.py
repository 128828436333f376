"""How many draft tokens a step should compute: the number with the most expected tokens per second, by measured costs.

A draft token adds to the expected tokens the chance that it and all before it are right, and costs one row. This chance
falls from token to token of a draft. So the best division is found by adding the likeliest token of all sequences next.
"""

import heapq
from collections.abc import Sequence

from guanaco.server.engine.speculation.costs import StepCosts

# A step may take this much longer for a sequence that gains nothing from the drafts.
MOST_SLOWDOWN = 1.05
# Drafts must promise this many times the tokens per second of no drafts, since costs and chances are estimates.
_LEAST_GAIN = 1.03
_LEAST_CHANCE = 0.05  # a draft token with a smaller chance to be accepted is not tried


def depths(chances: Sequence[Sequence[float]], num_rows: int, has_others: bool, costs: StepCosts) -> list[int]:
    """How many draft tokens each sequence gets.

    chances: for each sequence with a draft, each token's chance to be right if those before it are. num_rows: the
    step's rows without drafts. has_others: the step also computes sequences that have no draft. The tokens of all
    sequences count: drafts gain little in a step of many rows and make it longer, so such a step gets none.
    """
    depth, best = [0] * len(chances), [0] * len(chances)
    gains = [1.0] * len(chances)  # the tokens that each sequence may expect
    heap = [(-own[0], place) for place, own in enumerate(chances) if own]
    heapq.heapify(heap)
    alone = costs.seconds(num_rows)
    expected, best_rate = float(num_rows), _LEAST_GAIN * num_rows / alone
    for num_drafted in range(1, sum(map(len, chances)) + 1):
        chance, place = heapq.heappop(heap)
        if -chance < _LEAST_CHANCE:
            break
        expected -= chance
        gains[place] -= chance
        depth[place] += 1
        seconds = costs.seconds(num_rows + num_drafted)
        least = 1.0 if has_others else min(gains)
        if expected / seconds > best_rate and least * MOST_SLOWDOWN * alone >= seconds:
            best, best_rate = depth.copy(), expected / seconds
        if depth[place] < len(chances[place]):
            heapq.heappush(heap, (chance * chances[place][depth[place]], place))
    return best
