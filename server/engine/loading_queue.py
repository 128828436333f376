"""Requests whose adapters are not in host memory yet wait here, apart from the main queue, until these are read.

No clock, no threads, no tensors, as in the scheduler that owns it. A request leaves when all of its adapters are in
host memory, when it has waited too long, when one of them could not be read, or when its client leaves.
"""

from guanaco.adapters.residency.ledger import ResidencyLedger
from guanaco.adapters.residency.moves import Move, Moves
from guanaco.server.engine.request import Sequence, Status

# A request that finds no room in host memory does not block later ones. After this many steps without room it does.
MAX_STEPS_WITHOUT_ROOM = 32


class LoadingQueue:
    """Sequences in order of arrival. Each holds all of its adapters in host memory, or none of them."""

    def __init__(self, residency: ResidencyLedger, timeout_seconds: float) -> None:
        """timeout_seconds: how long after its arrival a request may still wait here; 0: for ever."""
        self.sequences: list[Sequence] = []
        self._residency = residency
        self._timeout_seconds = timeout_seconds

    def add(self, sequence: Sequence) -> None:
        sequence.status = Status.LOADING
        self.sequences.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Take an ending sequence out of the queue. The caller gives back the adapters that it holds."""
        self.sequences.remove(sequence)

    def take_ready(self, *, is_step: bool) -> tuple[list[Sequence], Moves]:
        """Start to read adapters as far as there is room, and take out the sequences whose adapters are all there.

        Returns those sequences, in order of arrival, and the moves of adapters.

        is_step: a step begins, so a sequence that finds no room now counts one more step without room.
        """
        ready: list[Sequence] = []
        moves: list[Move] = []
        is_blocked = False  # a sequence has waited too long for room: the later ones get none
        for sequence in self.sequences:
            if not sequence.holds_adapters:
                made = None if is_blocked else self._residency.hold(sequence.versions)
                if made is None:
                    sequence.num_passed_over += is_step
                    is_blocked = is_blocked or self._blocks_others(sequence)
                    continue
                sequence.holds_adapters = True
                moves += made
            if self._residency.is_ready(sequence.versions):
                ready.append(sequence)
        for sequence in ready:
            self.sequences.remove(sequence)
            sequence.num_passed_over = 0
        return ready, tuple(moves)

    def _blocks_others(self, sequence: Sequence) -> bool:
        """Whether later sequences must leave all room to this one. It must have waited long enough, and fit beside the
        versions that are pinned or being read now: otherwise, as while a read hangs, blocking would not help it."""
        has_waited = sequence.num_passed_over > MAX_STEPS_WITHOUT_ROOM
        return has_waited and self._residency.host.can_ever_fit(sequence.versions, beside_others=True)

    def late(self, now: float) -> list[Sequence]:
        """The sequences that have waited too long at monotonic time `now` (seconds)."""
        limit = self._timeout_seconds
        return [s for s in self.sequences if limit and now - s.request.arrival_seconds > limit]

    def seconds_left(self, now: float) -> float | None:
        """Seconds from `now` until the first sequence has waited too long; negative if it has already. None if no
        sequence waits, or if there is no limit."""
        if not self._timeout_seconds or not self.sequences:
            return None
        return min(s.request.arrival_seconds for s in self.sequences) + self._timeout_seconds - now
