"""Drafts for tests: made from the answers that are to come, and spoilt as a test wants."""

from collections.abc import Callable, Sequence
from random import Random

from guanaco.server.engine.request import Sequence as EngineSequence
from guanaco.server.engine.speculation.speculator import Wish

Spoil = Callable[[list[int], Random], list[int]]


def always_right(tokens: list[int], random: Random) -> list[int]:
    return tokens


def always_wrong(tokens: list[int], random: Random) -> list[int]:
    return [token + 1 for token in tokens]


def right_at_first(tokens: list[int], random: Random) -> list[int]:
    cut = random.randrange(len(tokens) + 1)
    return [*tokens[:cut], *(token + 1 for token in tokens[cut:])]


def any_tokens(tokens: list[int], random: Random) -> list[int]:
    """Some of them right, some wrong, in any order; ends of text among them."""
    return [random.choice((token, token, random.randrange(3, 300), 2, 0)) for token in tokens]


SPOILS: dict[str, Spoil] = {f.__name__: f for f in (always_right, always_wrong, right_at_first, any_tokens)}


class OracleDrafts:
    """Knows the answers of requests by their ids; beyond an answer's end it guesses 5."""

    def __init__(self, answers: dict[str, list[int]], spoil: Spoil, *, seed: int = 0, least: int = 0) -> None:
        """least: a draft has at least so many tokens where it may."""
        self.answers, self.spoil, self.least = answers, spoil, least
        self.random = Random(seed)
        self.forgotten: list[int] = []

    def drafts(self, wishes: Sequence[Wish], num_rows: int, num_others: int) -> list[tuple[int, ...]]:
        found = []
        for wish in wishes:
            answer, done = self.answers[wish.sequence.request.request_id], wish.sequence.num_output_tokens
            count = self.random.randint(min(self.least, wish.most), min(wish.most, 9))
            right = [*answer[done : done + count], *[5] * count][:count]
            found.append(tuple(self.spoil(right, self.random)))
        return found

    def forget(self, sequence: EngineSequence) -> None:
        self.forgotten.append(sequence.arrival_number)
