"""How often guesses of the next token are right: a moving average for each sequence, by the length of the match."""

# Matches of 2 to 3 tokens, 4 to 7, 8 to 15, 16 and more; the last class is for tokens that a grammar forces.
_NUM_CLASSES = 5
FORCED = _NUM_CLASSES - 1
_PRIOR = (0.4, 0.6, 0.8, 0.9, 0.9)  # the chances before anything was seen
_PRIOR_WEIGHT = 4.0  # the prior counts as much as this many tokens
_DECAY = 0.96  # the weight of a token relative to the token after it


def class_of(length: int) -> int:
    """The class of a match of `length` tokens."""
    return min(max(0, length.bit_length() - 2), FORCED - 1)


class Acceptance:
    """One sequence's chances that a guess is right. Learns from every guess, whether or not it was in a draft."""

    def __init__(self) -> None:
        self._right = [chance * _PRIOR_WEIGHT for chance in _PRIOR]
        self._all = [_PRIOR_WEIGHT] * _NUM_CLASSES

    def learn(self, kind: int, is_right: bool) -> None:
        """Record whether a guess was right. kind: its class by `class_of`, or FORCED."""
        self._right[kind] = self._right[kind] * _DECAY + is_right
        self._all[kind] = self._all[kind] * _DECAY + 1.0

    def chance(self, kind: int) -> float:
        return self._right[kind] / self._all[kind]
