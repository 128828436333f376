"""The proof of a decode's text: every one of the 65,536 patterns of four nibbles, in every place of a word.

Knows what NF4 is and how a packed word is read (nibble i is weight i, through a permutation of the codes); the asm is
any text that ptx_interpreter evaluates. Called by the tests of the Triton kernels.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from guanaco.kernels import nf4
from support.kernels.ptx_arithmetic import from_double, to_double
from support.kernels.ptx_interpreter import evaluate

_PATTERNS = np.arange(1 << 16, dtype=np.uint32)


def nearest(values: npt.NDArray[np.float64], kind: str) -> npt.NDArray[np.float64]:
    """The nearest value of f16 or bf16, as float64, ties to even."""
    return to_double(from_double(values, kind), kind)


def prove_decode(
    asm: str,
    constraints: str,
    *,
    code_of_level: Sequence[int],
    gain: float,
    kind: str,
    order: Sequence[int] = tuple(range(8)),
    copies: int = 1,
) -> None:
    """AssertionError unless the asm makes, of every word, the nearest 16-bit values of gain · NF4 level.

    code_of_level: NF4 index 0 … 15 → nibble in the packed word. kind: "f16" or "bf16". order: output place, counted
    in 16-bit halves over the outputs → nibble of the word. The other half of the word varies with the one that is
    walked through, so that a selector that reads too far is seen. copies: in how many inputs the asm gets the word.
    """
    assert sorted(code_of_level) == list(range(16)), "not a permutation of the codes"
    table = np.empty(16)
    table[list(code_of_level)] = nearest(np.array(nf4.LEVELS) * gain, kind)
    for low, high in ((_PATTERNS, _PATTERNS * 40503 & 0xFFFF), (_PATTERNS * 40503 & 0xFFFF, _PATTERNS)):
        words = low | high << 16
        outputs = evaluate(asm, constraints, [words] * copies)
        halves = [h for o in outputs for h in _halves(o)]
        assert len(halves) == 8, f"{len(halves)} weights come out of a word of 8"
        for place, bits in enumerate(halves):
            codes = words >> np.uint32(4 * order[place]) & np.uint32(15)
            found, expected = to_double(bits, kind), table[codes]
            wrong = np.flatnonzero(found != expected)
            assert not wrong.size, (
                f"word {words[wrong[0]]:#010x}, place {place}: {found[wrong[0]]} instead of {expected[wrong[0]]}"
            )


def _halves(bits: npt.NDArray[np.uint32]) -> list[npt.NDArray[np.uint16]]:
    if bits.itemsize == 2:
        return [bits]
    return [(bits & 0xFFFF).astype(np.uint16), (bits >> 16).astype(np.uint16)]
