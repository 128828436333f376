"""The order of requests: adapters take turns, and the requests of one adapter go in order of arrival.

The base model counts as an adapter here, and so does each combination of adapters.

Prompts: the oldest prompt of each adapter goes first, then the second one of each, and so on. Among equals, the adapter
whose prompts were last computed the longest ago goes first. If a request arrived after that, its arrival counts.

Running sequences (at most `max_num_seqs`) and KV blocks: a request's *rank* is the number of requests of its adapter
before it, running ones first. A sequence that finds no room preempts the running sequence with the highest rank,
provided that rank is higher than its own. So room is divided evenly among the adapters that want it, and none is kept
free. The oldest request of each adapter has rank 0 and is never preempted for a newcomer, so every request finishes.

No clock, no randomness. Used by the scheduler.
"""

from collections import Counter
from collections.abc import Collection, Iterable

from guanaco.server.engine.request import Sequence, Status

LAST = 1 << 30  # rank of background requests: they start after all others, and preempt none
_FORGET_EVERY = 256  # steps between two times that adapters without open requests are forgotten


class Turns:
    """Counts steps, and remembers in which step each adapter's prompts were last computed."""

    def __init__(self) -> None:
        self.num_steps = 0
        self.num_open: Counter[tuple[str, ...]] = Counter()  # versions → sequences in the last call of `in_order`
        self._served: dict[tuple[str, ...], int] = {}  # versions → the step in which their prompts were last computed

    def begin_step(self, sequences: Collection[Sequence]) -> None:
        """Count a step. sequences: all unfinished ones; adapters without any are forgotten after a while."""
        self.num_steps += 1
        if self.num_steps % _FORGET_EVERY == 0:
            alive = {sequence.versions for sequence in sequences}
            self._served = {versions: step for versions, step in self._served.items() if versions in alive}

    def serve(self, sequence: Sequence) -> None:
        """Record that tokens of a sequence's prompt are computed in this step."""
        self._served[sequence.versions] = self.num_steps

    def in_order(
        self, running: Iterable[Sequence], waiting: Iterable[Sequence], last: Collection[Sequence]
    ) -> list[tuple[int, Sequence]]:
        """(rank, sequence) of all sequences with prompts to compute, in the order of their turns; those in `last` come
        after the others. A preempted sequence computes its output again: that counts as a prompt, too."""
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
        """The versions of adapters that had at least `num_seqs` unfinished requests in the last `in_order`."""
        return frozenset(versions for versions, count in self.num_open.items() if count >= num_seqs)

    @staticmethod
    def newcomers(
        turns: Iterable[tuple[int, Sequence]], floods: frozenset[tuple[str, ...]]
    ) -> list[tuple[int, Sequence]]:
        """The entries of `turns` that get a step of their own while adapters flood: the oldest sequence of each adapter
        that does not flood, if its prompt is not computed yet.

        The scheduler gives them at most every other step, within the prompts' share, so that decoding sequences wait no
        longer than for prompts in an ordinary step.
        """
        return [(rank, sequence) for rank, sequence in turns if rank == 0 and sequence.versions not in floods]

    @staticmethod
    def put_out_first(running: Iterable[Sequence]) -> tuple[int, Sequence]:
        """(rank, sequence) of the running sequence that is preempted first: the youngest of the highest rank. The
        oldest running sequence is chosen only if it runs alone."""
        ranks: Counter[tuple[str, ...]] = Counter()
        found = None
        for sequence in running:  # in order of arrival
            rank = ranks[sequence.versions]
            ranks[sequence.versions] += 1
            if found is None or rank >= found[0]:
                found = (rank, sequence)
        assert found is not None, "nothing runs"
        return found
