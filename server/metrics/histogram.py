"""Histograms for numbers of every step or token: plain counts, which are put into Prometheus' form at a scrape.

prometheus_client's own histograms need a lock and several calls for each number. For one thread. A part of `metrics`.
"""

from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate

from prometheus_client import CollectorRegistry
from prometheus_client.core import HistogramMetricFamily
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString


class HotHistogram(Collector):
    """One histogram, with one set of labels."""

    def __init__(
        self, registry: CollectorRegistry, names: Mapping[str, str], edges: Sequence[float], labels: Mapping[str, str]
    ) -> None:
        """names: each name under which it is published → the help text there."""
        self._names = names
        self._edges = list(edges)
        self._labels = labels
        self._counts = [0] * (len(edges) + 1)  # the last one counts values beyond all edges
        self._sum = 0.0
        registry.register(self)

    def observe(self, value: float) -> None:
        self._counts[bisect_left(self._edges, value)] += 1
        self._sum += value

    def collect(self) -> Iterator[HistogramMetricFamily]:
        edges = [*map(floatToGoString, self._edges), "+Inf"]
        buckets = list(zip(edges, map(float, accumulate(self._counts)), strict=True))
        for name, text in self._names.items():
            family = HistogramMetricFamily(name, text, labels=list(self._labels))
            family.add_metric(list(self._labels.values()), buckets, self._sum)
            yield family
