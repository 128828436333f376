"""Requests whose adapters are not in host memory yet: they wait here, in nobody's way, until those have been read.

Pure, as the scheduler that owns it. A request leaves when all of its adapters are there, when it has waited too long,
when one of them cannot be had, or when its client does.
"""

from guanaco.adapters.residency.ledger import ResidencyLedger
from guanaco.adapters.residency.moves import Move, Moves
from guanaco.server.engine.request import Sequence, Status

# After so many steps of waiting for room in host memory, a request lets nobody behind it take any.
MAX_STEPS_WITHOUT_ROOM = 32


class LoadingQueue:
    """Sequences in order of arrival. Each holds all of its adapters in host memory, or none of them."""

    def __init__(self, residency: ResidencyLedger, timeout_seconds: float) -> None:
        """timeout_seconds: how long a request may wait here from its arrival; 0: for ever."""
        self.sequences: list[Sequence] = []
        self._residency = residency
        self._timeout_seconds = timeout_seconds

    def add(self, sequence: Sequence) -> None:
        sequence.status = Status.LOADING
        self.sequences.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Its client has left, or it ended otherwise; what it holds is not given back here."""
        self.sequences.remove(sequence)

    def take_ready(self, *, is_step: bool) -> tuple[list[Sequence], Moves]:
        """Have adapters read as far as there is room, and let those go whose adapters are all there; in order.

        Returns the sequences that go, and the moves of adapters.

        is_step: a step begins, so whoever finds no room now was passed over once more.
        """
        ready: list[Sequence] = []
        moves: list[Move] = []
        is_blocked = False  # somebody has waited too long for room: whoever is behind gets none
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
        """It has waited long enough, and letting nobody else in would help: not against a read that hangs."""
        has_waited = sequence.num_passed_over > MAX_STEPS_WITHOUT_ROOM
        return has_waited and self._residency.host.can_ever_fit(sequence.versions, beside_others=True)

    def late(self, now: float) -> list[Sequence]:
        """Who has waited too long at monotonic time `now`."""
        limit = self._timeout_seconds
        return [s for s in self.sequences if limit and now - s.request.arrival_seconds > limit]

    def seconds_left(self, now: float) -> float | None:
        """Until the first of them has waited too long; None where none ever will. Negative: it has."""
        if not self._timeout_seconds or not self.sequences:
            return None
        return min(s.request.arrival_seconds for s in self.sequences) + self._timeout_seconds - now
