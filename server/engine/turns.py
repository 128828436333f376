"""Whose turn it is: adapters take turns, and each one's own requests go in order of arrival.

The base is an adapter like any other here, and so is each mixture. Prompts: first the oldest of each adapter that has
any, then the second ones, and so on; among equals, the adapter goes first whose prompts were computed least recently,
and what is new counts from when it came. Places and KV blocks: a request's *rank* is how many of its adapter's are
before it, running ones first; who finds no room gets that of the highest rank, if that is higher than its own. So what
there is is divided evenly among the adapters that want it, whoever came first and with how many, and nothing is kept
free for those that want none. Each adapter's oldest request has rank 0 and is not put out by newcomers, so everybody
gets on.

Pure: no clock, no randomness. Used by the scheduler.
"""

from collections import Counter
from collections.abc import Collection, Iterable

from guanaco.server.engine.request import Sequence, Status

LAST = 1 << 30  # rank of background work: it starts after everybody else's, and puts nobody out
_FORGET_EVERY = 256  # steps between two looks for adapters that nobody uses any more


class Turns:
    """Counts steps, and remembers when each adapter's prompts were computed last."""

    def __init__(self) -> None:
        self.num_steps = 0
        self.num_open: Counter[tuple[str, ...]] = Counter()  # by versions, of those that `in_order` was told of last
        self._served: dict[tuple[str, ...], int] = {}  # by versions

    def begin_step(self, sequences: Collection[Sequence]) -> None:
        """sequences: all that are unfinished; of adapters without any, nothing is remembered for long."""
        self.num_steps += 1
        if self.num_steps % _FORGET_EVERY == 0:
            alive = {sequence.versions for sequence in sequences}
            self._served = {versions: step for versions, step in self._served.items() if versions in alive}

    def serve(self, sequence: Sequence) -> None:
        """Tokens of its prompt are computed in this step."""
        self._served[sequence.versions] = self.num_steps

    def in_order(
        self, running: Iterable[Sequence], waiting: Iterable[Sequence], last: Collection[Sequence]
    ) -> list[tuple[int, Sequence]]:
        """(rank, sequence) of all whose prompts are not computed yet, whose turn it is first; those in `last` after
        the others. A sequence that recomputes what it wrote has a prompt, too."""
        ranks: Counter[tuple[str, ...]] = Counter()
        num_prompts: Counter[tuple[str, ...]] = Counter()
        turns = []
        for sequence in (*running, *waiting):
            versions = sequence.versions
            rank = LAST if sequence in last else ranks[versions]
            ranks[versions] += 1
            if sequence.status is Status.RUNNING and sequence.num_tokens - sequence.num_computed_tokens == 1:
                continue
            number = LAST if sequence in last else num_prompts[versions]
            num_prompts[versions] += 1
            served = self._served.get(versions, 0)
            since = max(served, sequence.arrival_step)
            turns.append(((number, since, served > sequence.arrival_step, sequence.arrival_number), rank, sequence))
        self.num_open = ranks
        turns.sort(key=lambda turn: turn[0])
        return [(rank, sequence) for _, rank, sequence in turns]

    def floods(self, num_seqs: int) -> frozenset[tuple[str, ...]]:
        """Versions of the adapters with so many open requests or more, as of the last `in_order`."""
        return frozenset(versions for versions, count in self.num_open.items() if count >= num_seqs)

    @staticmethod
    def newcomers(
        turns: Iterable[tuple[int, Sequence]], floods: frozenset[tuple[str, ...]]
    ) -> list[tuple[int, Sequence]]:
        """Of what `in_order` said, who gets a step without the others while there are floods: the first of each other
        adapter. Every other step at most, and within the prompts' share: those who decode wait no longer than for
        prompts in a step of their own."""
        return [(rank, sequence) for rank, sequence in turns if rank == 0 and sequence.versions not in floods]

    @staticmethod
    def put_out_first(running: Iterable[Sequence]) -> tuple[int, Sequence]:
        """The rank and the sequence whose blocks and place others get first: the youngest of the highest rank. It is
        the oldest of all only where that is alone."""
        ranks: Counter[tuple[str, ...]] = Counter()
        found = None
        for sequence in running:  # in order of arrival
            rank = ranks[sequence.versions]
            ranks[sequence.versions] += 1
            if found is None or rank >= found[0]:
                found = (rank, sequence)
        assert found is not None, "nothing runs"
        return found
