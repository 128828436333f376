"""Metrics of adapters, with a limited number of series.

Only `max_labels` names have series of their own: the first ones that get traffic. A name that was removed, or had no
traffic for an hour, loses its series to another name. All others share one label. Choosing the busiest names instead
would change often, and each change would end one series and begin another at zero.

Doesn't know adapters, only their names and versions. A part of `metrics`.
"""

import time
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from copy import copy

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

DEFAULT_ADAPTER_LABELS = 64  # adapters with series of their own
IDLE_SECONDS = 3600.0  # after this time without traffic, another name may take the series
LOAD_RESULTS = ("ok", "refused", "failed")  # failed: not the adapter's fault
# fetch: download from the hub. read: copy the source. ingest: check, hash and keep the copy. probe: run probe requests
# in the engine. publish: let the name stand for the version, and save that.
LOAD_STAGES = ("fetch", "read", "ingest", "probe", "publish")
# No adapter can have these names: served names hold no brackets.
BASE_LABEL = "(base)"
MIXTURE_LABEL = "(mixture)"
OTHER_LABEL = "(other)"

_NAME_LISTS = frozenset({"running_lora_adapters", "waiting_lora_adapters"})  # labels with several names each

ByTier = dict[str, Callable[[], float]]  # tier → a function that is called at every scrape

_TTFT_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_LOAD_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 600.0)


def without_names(families: Iterable[Metric], hidden: Container[str]) -> Iterator[Metric]:
    """The families without the series of hidden adapters, and without their names in lists of names."""
    for family in families:
        shown = copy(family)
        shown.samples = []
        for sample in family.samples:
            if sample.labels.get("adapter") in hidden:
                continue
            lists = {
                label: ",".join(name for name in text.split(",") if name not in hidden)
                for label, text in sample.labels.items()
                if label in _NAME_LISTS
            }
            shown.samples.append(sample._replace(labels={**sample.labels, **lists}) if lists else sample)
        yield shown


class AdapterMetrics:
    """The series about adapters in one registry. All methods except `observe_stage` are for one thread."""

    def __init__(
        self, registry: CollectorRegistry, *, num_slots: int, max_labels: int, clock: Callable[[], float] = time.time
    ) -> None:
        self._registry = registry
        self._num_slots = num_slots
        self._max_labels = max_labels
        self._clock = clock
        self._labels: dict[str, float] = {}  # name with series of its own → when it was last counted
        self._served: frozenset[str] = frozenset()
        self._name_of: dict[str, str] = {}  # version → name
        self._names_on_device: Callable[[], Iterable[str]] = tuple
        self._waiting: Sequence[str] = ()  # versions of waiting requests
        self._has_stepped = False  # whether a step was observed since the last scrape
        self._lora_shown: tuple[str, str, str] | None = None
        self._by_adapter: list[Counter | Histogram] = []
        self._make_series_by_adapter()
        self._make_load_series()
        self._sequences = Gauge(
            "guanaco_adapter_running_sequences", "Sequences that run, by adapter.", ["adapter"], registry=registry
        )
        slots = Gauge("guanaco_adapter_slots", "Adapter places on the device.", ["state"], registry=registry)
        slots.labels("total").set(num_slots)
        self._slots_running = slots.labels("running")
        self._lora_info = Gauge(
            "vllm:lora_requests_info",
            "Adapters on the device, and those of waiting requests; the value is the time of the last change of state.",
            ["max_lora", "running_lora_adapters", "waiting_lora_adapters"],
            registry=registry,
        )

    def _make_series_by_adapter(self) -> None:
        def counter(name: str, text: str) -> Counter:
            made = Counter(name, text, ["adapter"], registry=self._registry)
            self._by_adapter.append(made)
            return made

        self._requests = counter("guanaco_adapter_requests", "Requests that ended, by adapter.")
        self._prompt = counter("guanaco_adapter_prompt_tokens", "Prompt tokens, by adapter.")
        self._generation = counter("guanaco_adapter_generation_tokens", "Tokens out, by adapter.")
        self._drafted = counter("guanaco_adapter_draft_tokens", "Draft tokens that were verified, by adapter.")
        self._accepted = counter("guanaco_adapter_accepted_draft_tokens", "Draft tokens that were right, by adapter.")
        self._mixed = counter("guanaco_adapter_mixture_requests", "Requests that ended and had it in a mixture.")
        self._ttft = Histogram(
            "guanaco_adapter_time_to_first_token_seconds",
            "Arrival to the first token, by adapter.",
            ["adapter"],
            buckets=_TTFT_BUCKETS,
            registry=self._registry,
        )
        self._by_adapter.append(self._ttft)

    def _make_load_series(self) -> None:
        self._loads = Counter(
            "guanaco_adapter_loads", "Adapter loads, by how they ended.", ["result"], registry=self._registry
        )
        for result in LOAD_RESULTS:
            self._loads.labels(result)
        self._load_seconds = Histogram(
            "guanaco_adapter_load_seconds",
            "From an operator's request to the published version.",
            buckets=_LOAD_BUCKETS,
            registry=self._registry,
        )
        stages = Histogram(
            "guanaco_adapter_load_stage_seconds",
            "The parts of loads, of those that were refused too.",
            ["stage"],
            buckets=_LOAD_BUCKETS,
            registry=self._registry,
        )
        self._stages = {stage: stages.labels(stage) for stage in LOAD_STAGES}

    def set_tiers(self, *, sizes: ByTier, evictions: ByTier, counts: ByTier) -> None:
        """Set the functions that are called at every scrape. `sizes`: tier → bytes. `evictions`: tier → evictions from
        it. `counts`: tier → adapter versions there. Call once. On a CPU the device uses the host's copies, so no byte
        counts twice."""
        self._registry.register(_Tiers(sizes, evictions, counts))

    def observe_load(self, result: str, seconds: float) -> None:
        """Count a load that has ended. result: one of LOAD_RESULTS."""
        assert result in LOAD_RESULTS, result
        self._loads.labels(result).inc()
        if result == "ok":
            self._load_seconds.observe(seconds)

    def observe_stage(self, stage: str, seconds: float) -> None:
        """Record the seconds of one part of a load. stage: one of LOAD_STAGES."""
        self._stages[stage].observe(seconds)

    def set_names(self, name_of: dict[str, str], names: Iterable[str] = ()) -> None:
        """Set the served names, which may have labels. Removed names lose theirs to others.

        name_of: version → name. names: all served names: several may stand for one version.
        """
        self._name_of, self._served = dict(name_of), frozenset((*name_of.values(), *names))
        for gone in self._labels.keys() - self._served:
            self._give_up(gone)

    def count_request(self, adapter: str | None, mixed: Sequence[str]) -> None:
        """Count a request that ended. mixed: the names of its adapters, if it combined several."""
        self._requests.labels(self._label(adapter)).inc()
        for name in mixed:
            self._mixed.labels(self._label(name)).inc()

    def count_prompt(self, adapter: str | None, num_tokens: int) -> None:
        self._prompt.labels(self._label(adapter)).inc(num_tokens)

    def count_generation(self, adapter: str | None, num_tokens: int) -> None:
        self._generation.labels(self._label(adapter)).inc(num_tokens)

    def count_draft(self, versions: tuple[str, ...], num_drafted: int, num_accepted: int) -> None:
        """Count a draft of a sequence: its adapters' versions, none for the base, several for a mixture."""
        label = self._label(self._name(versions))
        self._drafted.labels(label).inc(num_drafted)
        self._accepted.labels(label).inc(num_accepted)

    def _name(self, versions: tuple[str, ...]) -> str | None:
        if len(versions) > 1:
            return MIXTURE_LABEL
        return self._name_of.get(versions[0], OTHER_LABEL) if versions else None

    def observe_first_token(self, adapter: str | None, seconds: float) -> None:
        self._ttft.labels(self._label(adapter)).observe(seconds)

    def set_device(self, names: Callable[[], Iterable[str]]) -> None:
        """Set the function that is called at every scrape: the names whose current version is on the device."""
        self._names_on_device = names

    def observe_step(self, running: Sequence[str], waiting: Sequence[str]) -> None:
        """Set the versions of the requests that run and wait after the latest step."""
        self._slots_running.set(len(set(running)))
        self._waiting = waiting
        self._has_stepped = True

    def observe_sequences(self, versions: Sequence[tuple[str, ...]]) -> None:
        """Set the sequences that run after the latest step. versions: of each one's adapters: none, one, or those of a
        mixture."""
        counts: dict[str, int] = {}
        for own in versions:
            label = self._label(self._name(own))
            counts[label] = counts.get(label, 0) + 1
        self._sequences.clear()
        for label, count in counts.items():
            self._sequences.labels(label).set(count)

    def show(self, now: float) -> None:
        """Publish the adapters on the device and those of waiting requests, in the labels of one series.

        A series for each past combination would grow without end, so the old one is removed, after the new one is
        there. Routers send a request to a server whose running adapters include the request's. So all adapters on the
        device count as running: otherwise routers would forget them whenever traffic pauses.
        """
        waiting = {self._name_of.get(version, OTHER_LABEL) for version in self._waiting}
        on_device = ",".join(sorted(set(self._names_on_device())))
        labels = (str(self._num_slots), on_device, ",".join(sorted(waiting)))
        if self._has_stepped or labels != self._lora_shown:
            self._lora_info.labels(*labels).set(now)
        if self._lora_shown not in (None, labels):
            self._lora_info.remove(*self._lora_shown)
        self._lora_shown, self._has_stepped = labels, False

    def _label(self, adapter: str | None) -> str:
        if adapter is None:
            return BASE_LABEL
        if adapter == MIXTURE_LABEL:
            return adapter
        now = self._clock()
        if adapter not in self._labels and (adapter not in self._served or not self._has_room(now)):
            return OTHER_LABEL
        is_new = adapter not in self._labels
        self._labels[adapter] = now
        if is_new:
            for series in self._by_adapter:  # all at once, since they are also removed together
                series.labels(adapter)
        return adapter

    def _has_room(self, now: float) -> bool:
        """Whether one more name may have series. If all are taken, a name without traffic for long loses its own."""
        if len(self._labels) < self._max_labels:
            return True
        idle = min(self._labels, key=self._labels.__getitem__)
        if now - self._labels[idle] < IDLE_SECONDS:
            return False
        self._give_up(idle)
        return True

    def _give_up(self, name: str) -> None:
        del self._labels[name]
        for series in self._by_adapter:
            series.remove(name)


class _Tiers(Collector):
    def __init__(self, sizes: ByTier, evictions: ByTier, counts: ByTier) -> None:
        self._sizes, self._evictions, self._counts = sizes, evictions, counts

    def collect(self) -> Iterator[GaugeMetricFamily | CounterMetricFamily]:
        sizes = GaugeMetricFamily("guanaco_adapter_bytes", "Bytes of adapters, by where they are.", labels=["tier"])
        counts = GaugeMetricFamily(
            "guanaco_adapter_versions", "Adapter versions, by where they are; stored: known at all.", labels=["tier"]
        )
        evictions = CounterMetricFamily(
            "guanaco_adapter_evictions", "Adapters that lost their place, by where it was.", labels=["tier"]
        )
        for family, by_tier in ((sizes, self._sizes), (counts, self._counts), (evictions, self._evictions)):
            for tier, value in by_tier.items():
                family.add_metric([tier], value())
            yield family
