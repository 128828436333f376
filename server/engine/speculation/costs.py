"""The time of a step by its number of rows. `server.bootstrap.speculation` measures it when the server starts."""

from bisect import bisect_left
from collections.abc import Iterable
from itertools import pairwise


class StepCosts:
    """The seconds of a step, between and beyond the row counts that were timed."""

    def __init__(self, seconds: Iterable[tuple[int, float]]) -> None:
        """seconds: (rows, seconds of a step), at least two, in any order.

        Disturbances only make a measured time longer. So a step's time is lowered to that of any larger step, and to
        that of smaller steps in proportion to their rows, where one of these is shorter.
        """
        points = sorted(seconds)
        assert len(points) > 1, "a line needs two points"
        assert points[0] >= (1, 0.0), points[0]
        self.points: list[tuple[int, float]] = []
        for place, (rows, value) in enumerate(points):
            shortest = min([value, *(later for _, later in points[place + 1 :])])
            self.points.append((rows, min([shortest, *(s * rows / r for r, s in self.points)])))
        assert all(a[0] < b[0] for a, b in pairwise(self.points)), "each count once"
        self._rows = [rows for rows, _ in self.points]

    def seconds(self, rows: int) -> float:
        """The seconds of a step with this many rows: on straight lines between the points, and on the last line beyond
        them."""
        place = min(max(1, bisect_left(self._rows, rows)), len(self.points) - 1)
        (r0, s0), (r1, s1) = self.points[place - 1 : place + 1]
        if rows <= r0:
            return s0
        return s0 + (s1 - s0) * (rows - r0) / (r1 - r0)


# A step's length relative to one row's: TinyLlama's shape on two threads of a Zen 4 server (2026-11-26). Used where
# nothing was measured.
TYPICAL = StepCosts(((1, 1.0), (4, 2.06), (8, 3.28), (16, 5.50)))
