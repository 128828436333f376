"""Graphics cards by published figures, and whether memory or instruction issue limits a kernel on them.

Arithmetic on published figures only: nothing here has been measured, and no card need be present. Called by
`guanaco bench kernels` and by the tests of the budgets.
"""

from dataclasses import dataclass

# On every card listed, a multiprocessor has four schedulers, and each issues one instruction per clock for 32 lanes.
_LANE_SLOTS_PER_CLOCK = 4 * 32


@dataclass(frozen=True)
class Card:
    """One model of card, with the figures of NVIDIA's data sheet or architecture paper."""

    name: str
    target: str  # compute capability: "sm_80"
    bandwidth_bytes: float  # per second, of its memory
    multiprocessors: int
    clock_hz: float  # boost

    @property
    def slots_per_second(self) -> float:
        """Instructions times lanes that all multiprocessors together issue in a second."""
        return self.multiprocessors * self.clock_hz * _LANE_SLOTS_PER_CLOCK

    def slots_per_unit(self, bytes_per_unit: float) -> float:
        """Issue slots that a unit (a weight) may cost before issue slots, not memory, are the limit."""
        return self.slots_per_second * bytes_per_unit / self.bandwidth_bytes

    def floor_seconds(self, num_bytes: float) -> float:
        return num_bytes / self.bandwidth_bytes

    def issue_seconds(self, units: float, slots_per_unit: float) -> float:
        return units * slots_per_unit / self.slots_per_second


# A100, RTX 3090, RTX 4090, L4 and H100: NVIDIA's data sheets and architecture papers; of the H100's two clocks the
# lower, which makes the harder budget. T4: sysrqmts.com/en/gpus/nvidia/tesla/t4; RTX 5090: Linux Format's review of May
# 2025 (pocketmags.com); both repeat NVIDIA's figures, and agree on L4, A100 and H100. B200: several such pages for
# multiprocessors and bandwidth; they give 1.85 to 2.1 GHz as its clock. A10: from memory.
CARDS = (
    Card("T4", "sm_75", 320e9, 40, 1.59e9),
    Card("A100 80 GB SXM", "sm_80", 2039e9, 108, 1.41e9),
    Card("RTX 3090", "sm_86", 936e9, 82, 1.70e9),
    Card("A10", "sm_86", 600e9, 72, 1.70e9),
    Card("RTX 4090", "sm_89", 1008e9, 128, 2.52e9),
    Card("L4", "sm_89", 300e9, 58, 2.04e9),
    Card("H100 SXM", "sm_90", 3350e9, 132, 1.76e9),
    Card("B200", "sm_100", 8000e9, 148, 1.85e9),
    Card("RTX 5090", "sm_120", 1792e9, 170, 2.41e9),
)


def hardest_card(target: str) -> Card:
    """The card of this compute capability that has the fewest issue slots for each byte. KeyError if none is listed."""
    cards = [card for card in CARDS if card.target == target]
    if not cards:
        raise KeyError(f"no card with compute capability {target} is listed")
    return min(cards, key=lambda card: card.slots_per_second / card.bandwidth_bytes)


def predicted_bound(target: str, *, num_bytes: float, units: float, slots_per_unit: float) -> str:
    """ "memory" or "issue": what limits a launch that moves `num_bytes`, on the target's hardest card."""
    card = hardest_card(target)
    return "memory" if card.floor_seconds(num_bytes) >= card.issue_seconds(units, slots_per_unit) else "issue"
