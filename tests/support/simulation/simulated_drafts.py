"""Drafts of the simulated world: right, wrong, and right at first, as chance has it.

A part of `simulator`.
"""

from collections.abc import Callable, Sequence
from random import Random

from guanaco.server.engine.request import Sequence as EngineSequence
from guanaco.server.engine.speculation.speculator import Wish


class SimulatedDrafts:
    """Guesses with knowledge of what will come. `will_come(request id, count)` is that knowledge."""

    def __init__(
        self, random: Random, chance: float, vocab_size: int, will_come: Callable[[str, int], list[int]]
    ) -> None:
        self._random = random
        self._chance = chance
        self._vocab_size = vocab_size
        self._will_come = will_come
        self._known: set[int] = set()

    def drafts(self, wishes: Sequence[Wish], num_rows: int, num_others: int) -> list[tuple[int, ...]]:
        self._known.update(wish.sequence.arrival_number for wish in wishes)
        return [self._draft(wish) for wish in wishes]

    def forget(self, sequence: EngineSequence) -> None:
        self._known.discard(sequence.arrival_number)

    def check_all_forgotten(self) -> None:
        assert not self._known, "records of requests that have ended"

    def _draft(self, wish: Wish) -> tuple[int, ...]:
        random = self._random
        if random.random() > self._chance:
            return ()
        count = random.randint(1, wish.most)
        tokens = self._will_come(wish.sequence.request.request_id, count)
        num_right = random.choice((0, random.randrange(count + 1), count))
        return (*tokens[:num_right], *(random.randrange(self._vocab_size) for _ in range(count - num_right)))
