"""Reads the next weight and writes earlier ones on other threads, while the caller works on the present one.

Files and hashes need no interpreter, so a first start is as long as the slowest of the three and not as their sum.
Knows neither formats nor caches. Called by `served_weights`.
"""

import math
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

from torch import Tensor

from guanaco.kernels.nf4 import Nf4Weight

_MOST_BEHIND = 2  # weights that wait to be written: each keeps its memory until then

Shapes = Iterable[tuple[str, tuple[int, ...]]]


class StoredWeights(Protocol):
    """Weights as a checkpoint has them."""

    def matrix(self, name: str, shape: tuple[int, int]) -> Nf4Weight | Tensor: ...

    def tensor(self, name: str, shape: tuple[int, ...]) -> Tensor: ...


class ReadAhead:
    """Stored weights. While the caller works on one matrix, the next one in the expected order is read.

    The two together hold at most as many values as the largest matrix alone, so reading ahead needs no more memory at
    the peak. A weight that is asked for out of order is read when it is asked for.
    """

    def __init__(self, source: StoredWeights, expected: Shapes, thread: ThreadPoolExecutor) -> None:
        self._source = source
        self._thread = thread
        self._matrices = [(name, (shape[0], shape[1])) for name, shape in expected if len(shape) == 2]
        self._place = {name: number for number, (name, _) in enumerate(self._matrices)}
        self._largest = max((math.prod(shape) for _, shape in self._matrices), default=0)
        self._ahead: tuple[str, Future[Nf4Weight | Tensor]] | None = None

    def matrix(self, name: str, shape: tuple[int, int]) -> Nf4Weight | Tensor:
        """A linear layer's weight, as the source has it. Raises what the source raises."""
        (following, read), self._ahead = self._ahead or ("", None), None
        weight = self._source.matrix(name, shape) if read is None or following != name else read.result()
        self._begin_after(name, shape)
        return weight

    def tensor(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """A dense tensor, as the source has it. Raises what the source raises."""
        tensor = self._source.tensor(name, shape)
        if self._ahead is None:
            self._begin_after(name, shape)
        return tensor

    def _begin_after(self, name: str, shape: tuple[int, ...]) -> None:
        """Begin to read the matrix that follows. Other tensors are small, and are read when they are asked for."""
        number = self._place.get(name, len(self._matrices)) + 1
        if number < len(self._matrices):
            following, size = self._matrices[number]
            if math.prod(shape) + math.prod(size) <= self._largest:
                self._ahead = following, self._thread.submit(self._source.matrix, following, size)


class Behind:
    """Makes calls in order on one other thread. At most two calls are unfinished at a time."""

    def __init__(self, thread: ThreadPoolExecutor) -> None:
        self._thread = thread
        self._late: deque[Future[None]] = deque()

    def __call__(self, function: Callable[[], None]) -> None:
        """Queue a call; if two are unfinished, wait for the earlier one first. Raises the error of an earlier call."""
        while len(self._late) >= _MOST_BEHIND:
            self._late.popleft().result()
        self._late.append(self._thread.submit(function))

    def finish(self) -> None:
        """Wait for all calls. Raises the first error among them."""
        while self._late:
            self._late.popleft().result()
