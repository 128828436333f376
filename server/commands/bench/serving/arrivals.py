"""When each request of a load is due, and which model it asks. The same seed gives the same load."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from guanaco.server.errors import CommandError

LINEAR, EXPONENTIAL = "linear", "exponential"
RAMPS = (LINEAR, EXPONENTIAL)
RANDOM, ROUND_ROBIN = "random", "round-robin"
ASSIGNMENTS = (RANDOM, ROUND_ROBIN)


@dataclass(frozen=True)
class Ramp:
    """A rate that grows from `start` to `end` requests/s during the run, linearly or exponentially in time.

    Raises CommandError for another kind, or if the rates don't grow.
    """

    kind: str
    start: float
    end: float

    def __post_init__(self) -> None:
        if self.kind not in RAMPS:
            raise CommandError(f"--ramp-up-strategy {self.kind}: there are {' and '.join(RAMPS)}")
        lowest = 0.0 if self.kind == LINEAR else 1e-9
        if not (lowest <= self.start < self.end < math.inf):
            least = "0 or more" if self.kind == LINEAR else "above 0"
            raise CommandError(f"--ramp-up-start-rps must be {least}, and below --ramp-up-end-rps")

    @property
    def mean(self) -> float:
        """Requests/s over the whole run."""
        if self.kind == LINEAR:
            return (self.start + self.end) / 2
        return (self.end - self.start) / math.log(self.end / self.start)

    def times(self, shares: np.ndarray, count: int) -> np.ndarray:
        """The seconds [n] from the start at which each of the shares [n] (0 to 1) of `count` requests has arrived."""
        seconds = count / self.mean
        if self.kind == LINEAR:
            start, slope = self.start, (self.end - self.start) / seconds
            return np.asarray((np.sqrt(start**2 + 2 * slope * shares * count) - start) / slope)
        growth = self.end / self.start
        return np.asarray(seconds * np.log1p(shares * (growth - 1)) / math.log(growth))


def arrival_times(
    count: int, *, rate: float, burstiness: float, rng: np.random.Generator, ramp: Ramp | None = None
) -> list[float]:
    """Seconds from the start at which each of `count` requests is due, ascending.

    The gaps have a gamma distribution with shape `burstiness` (1: a Poisson process; below 1: bursts, whose coefficient
    of variation is 1 / sqrt(burstiness); infinite: even gaps). They are scaled so that the last request is due at
    count / rate: the offered rate is then exact in each run, as in `vllm bench serve`. With an infinite rate all
    requests are due at once.
    """
    if math.isinf(rate) and ramp is None:
        return [0.0] * count
    gaps = np.ones(count) if math.isinf(burstiness) else rng.gamma(burstiness, 1.0, count)
    total = np.cumsum(gaps)
    shares = total / total[-1] if total[-1] > 0 else np.arange(1, count + 1) / count
    times = shares * (count / rate) if ramp is None else ramp.times(shares, count)
    return [float(t) for t in times]


def choose_models(
    models: Sequence[str], count: int, *, zipf: float, rng: np.random.Generator, assignment: str = RANDOM
) -> list[str]:
    """The model of each of `count` requests.

    zipf: the model at position r (from 1) has weight r ** -zipf; 0: equal weights. Round robin ignores it.
    """
    if assignment == ROUND_ROBIN:
        return [models[i % len(models)] for i in range(count)]
    weights = np.arange(1, len(models) + 1, dtype=float) ** -zipf
    return [models[i] for i in rng.choice(len(models), size=count, p=weights / weights.sum())]
