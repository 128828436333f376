"""Drafts of the simulated world: right, wrong, and right at first, as chance has it; and suffix drafts, each of which
must come from its own text or from a past answer of the same tenant and adapters.

A part of `simulator`.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from random import Random

from guanaco.server.engine.request import Sequence as EngineSequence
from guanaco.server.engine.speculation.costs import StepCosts
from guanaco.server.engine.speculation.speculator import Speculator, Wish
from guanaco.server.engine.speculation.suffix import PastAnswers

_CHEAP_ROWS = StepCosts([(1, 1.0), (100, 1.1)])


class SimulatedDrafts:
    """Guesses with knowledge of what will come. `will_come(request id, count)` is that knowledge."""

    def __init__(
        self, random: Random, chance: float, vocab_size: int, will_come: Callable[[str, int], list[int]]
    ) -> None:
        self._random = random
        self._chance = chance
        self._vocab_size = vocab_size
        self._will_come = will_come
        self._speculator = Speculator(_CHEAP_ROWS, weighs_places=True, past=PastAnswers(1 << 20))
        self._past: dict[object, list[list[int]]] = defaultdict(list)

    def drafts(self, wishes: Sequence[Wish], num_rows: int, num_others: int) -> list[tuple[int, ...]]:
        found = self._speculator.drafts(wishes, num_rows, num_others)
        for wish, draft in zip(wishes, found, strict=True):
            assert len(draft) <= wish.most
            assert not draft or self._is_own(wish.sequence, draft), "a draft from another's text"
        if self._random.random() < 0.3:
            return found
        return [self._draft(wish) for wish in wishes]

    def forget(self, sequence: EngineSequence) -> None:
        self._speculator.forget(sequence)
        self._past[_whose(sequence)].append(sequence.token_ids[sequence.num_prompt_tokens :])

    def check_all_forgotten(self) -> None:
        assert self._speculator.num_records == 0, "records of requests that have ended"

    def _draft(self, wish: Wish) -> tuple[int, ...]:
        random = self._random
        if random.random() > self._chance:
            return ()
        count = random.randint(1, wish.most)
        tokens = self._will_come(wish.sequence.request.request_id, count)
        num_right = random.choice((0, random.randrange(count + 1), count))
        return (*tokens[:num_right], *(random.randrange(self._vocab_size) for _ in range(count - num_right)))

    def _is_own(self, sequence: EngineSequence, draft: tuple[int, ...]) -> bool:
        """Whether the draft can be read in its own text, which may repeat at its end, or in a past answer."""
        own, count = sequence.token_ids, len(draft)
        if any(all(t == own[p + i % (len(own) - p)] for i, t in enumerate(draft)) for p in range(len(own))):
            return True
        past = self._past[_whose(sequence)]
        return any(tuple(answer[p : p + count]) == draft for answer in past for p in range(len(answer)))


def _whose(sequence: EngineSequence) -> object:
    request = sequence.request
    return request.cache_salt, tuple((lora.version, lora.scale) for lora in request.loras)
