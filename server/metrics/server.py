"""The server's metrics, as Prometheus series in a registry of its own.

Series that dashboards and routers read have vLLM's names and buckets; our own are called `guanaco_*`. Doesn't know
engines or HTTP: the API and the engine pass plain numbers. Label values come from the catalog of served models or from
a fixed list, never from a client.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
)
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from guanaco.models.error_codes import ErrorCode
from guanaco.server.engine.request import StepStats
from guanaco.server.metrics.adapters import DEFAULT_ADAPTER_LABELS, AdapterMetrics, without_names
from guanaco.server.metrics.exposition import encoder
from guanaco.server.metrics.histogram import HotHistogram
from guanaco.server.metrics.http import HttpMetrics
from guanaco.server.metrics.speculation import SpeculationMetrics
from guanaco.server.metrics.training import Numbers, TrainingCollector

FINISH_REASONS = ("stop", "length", "abort", "error")

# Bucket edges of `vllm:` series are vLLM's (vllm/v1/metrics/loggers.py), so that one dashboard reads both servers.
# The last three lists are for our own series. Times are in seconds.
_TTFT_BUCKETS = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
_ITL_BUCKETS = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
_REQUEST_BUCKETS = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0),
    *(120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)
_STEP_TOKEN_BUCKETS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
_N_BUCKETS = (1, 2, 5, 10, 20)
_STEP_SECONDS_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_ENGINE = "0"  # vLLM numbers its engines; one process has one here
_GRAMMAR_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
_LAG_BUCKETS = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0)
# Alerts ask whether these grow. Prometheus sees no growth in a series that begins at its first event.
_COUNTED_FROM_ZERO = (
    *(ErrorCode.SERVER_OVERLOADED, ErrorCode.QUEUE_TIMEOUT, ErrorCode.TOO_MANY_CONNECTIONS),
    *(ErrorCode.INTERNAL_ERROR, ErrorCode.ENGINE_DEAD),
)


@dataclass(frozen=True)
class RequestStats:
    """One finished engine request. Times are in seconds from its arrival; None: it ended before."""

    adapter: str | None  # its name, or MIXTURE_LABEL; None: the base model
    finish_reason: str  # one of FINISH_REASONS
    num_prompt_tokens: int
    num_generation_tokens: int
    max_tokens: int
    n: int  # choices for each prompt
    e2e_seconds: float
    queue_seconds: float | None = None
    first_token_seconds: float | None = None
    last_token_seconds: float | None = None
    mixed_adapters: tuple[str, ...] = ()  # the names of its adapters, if it combined several


def count_buckets(largest: int) -> tuple[int, ...]:
    """1, 2, 5, 10, 20, 50 … up to `largest`: vLLM's edges for token counts."""
    edges: list[int] = []
    scale = 1
    while True:
        for digit in (1, 2, 5):
            if digit * scale > largest:
                return tuple(edges) or (1,)
            edges.append(digit * scale)
        scale *= 10


class Metrics:
    """All series of one server. For one thread, except `observe_grammar` and `adapters.observe_stage`, which any thread
    may call."""

    def __init__(
        self,
        model_name: str,
        *,
        max_model_len: int,
        adapter_slots: int = 0,
        max_adapter_labels: int = DEFAULT_ADAPTER_LABELS,
        old_names: bool = False,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """old_names: three series also get vLLM's earlier names."""
        disable_created_metrics()  # type: ignore[no-untyped-call]  # they add a line per series, and nothing reads it
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self._clock = clock
        self._step: StepStats | None = None  # the latest step, if the series don't have it yet
        self._num_preempted = self._prefix_queries_tokens = self._prefix_hits_tokens = 0  # not in the series yet
        self._new_tokens: dict[str | None, int] = {}  # adapter → generated tokens that are not in the series yet
        self._labels = {"model_name": model_name, "engine": _ENGINE}  # the labels of vLLM's series
        self._old_names = old_names
        self.registry.register(_First(self._catch_up))
        self.adapters = AdapterMetrics(
            self.registry, num_slots=adapter_slots, max_labels=max_adapter_labels, clock=clock
        )
        self.http = HttpMetrics(self.registry)
        self._speculation = SpeculationMetrics(self.registry, self._labels)
        self._make_engine_series()
        self._make_request_series(max_model_len)
        self._make_own_series()

    def _make_engine_series(self) -> None:
        def gauge(name: str, text: str) -> Gauge:
            return Gauge(name, text, list(self._labels), registry=self.registry).labels(**self._labels)

        def gauges(name: str, text: str, old_name: str) -> list[Gauge]:
            old = [gauge(old_name, f"Old name of {name}.")] if self._old_names else []
            return [gauge(name, text), *old]

        def counters(name: str, text: str, old_name: str) -> list[Counter]:
            old = [self._counter(old_name, f"Old name of {name}.")] if self._old_names else []
            return [self._counter(name, text), *old]

        self._running = gauge("vllm:num_requests_running", "Requests that run.")
        self._waiting = gauge("vllm:num_requests_waiting", "Requests that wait to be admitted.")
        self._kv_usage = gauges(
            "vllm:kv_cache_usage_perc", "Share of the KV cache in use, 0 to 1.", "vllm:gpu_cache_usage_perc"
        )
        self._preemptions = self._counter("vllm:num_preemptions", "Sequences whose blocks were taken back.")
        self._prefix_queries = counters(
            "vllm:prefix_cache_queries",
            "Prompt tokens looked up in the prefix cache.",
            "vllm:gpu_prefix_cache_queries",
        )
        self._prefix_hits = counters(
            "vllm:prefix_cache_hits", "Prompt tokens found in the prefix cache.", "vllm:gpu_prefix_cache_hits"
        )
        self._iteration_tokens = HotHistogram(
            self.registry,
            {"vllm:iteration_tokens_total": "Tokens computed per engine step."},
            _STEP_TOKEN_BUCKETS,
            self._labels,
        )

    def _counter(self, name: str, text: str) -> Counter:
        return Counter(name, text, list(self._labels), registry=self.registry).labels(**self._labels)

    def _make_request_series(self, max_model_len: int) -> None:
        def histogram(name: str, text: str, buckets: Sequence[float]) -> Histogram:
            made = Histogram(name, text, list(self._labels), buckets=buckets, registry=self.registry)
            return made.labels(**self._labels)

        tokens = count_buckets(max_model_len)
        self._prompt_tokens = self._counter("vllm:prompt_tokens", "Prompt tokens of admitted requests.")
        self._cached_tokens = self._counter("vllm:prompt_tokens_cached", "Of these, found in the prefix cache.")
        sources = Counter(
            "vllm:prompt_tokens_by_source",
            "Prompt tokens of admitted requests: computed, or found in the prefix cache.",
            [*self._labels, "source"],
            registry=self.registry,
        )
        self._computed_prompt = sources.labels(**self._labels, source="local_compute")
        self._found_prompt = sources.labels(**self._labels, source="local_cache_hit")
        self._generation_tokens = self._counter("vllm:generation_tokens", "Tokens generated.")
        label_names = [*self._labels, "finished_reason"]
        success = Counter("vllm:request_success", "Requests that ended.", label_names, registry=self.registry)
        self._finished = {r: success.labels(**self._labels, finished_reason=r) for r in FINISH_REASONS}
        self._ttft = histogram("vllm:time_to_first_token_seconds", "Arrival to the first token.", _TTFT_BUCKETS)
        names = {
            "vllm:inter_token_latency_seconds": "Between two tokens of a request.",
            # The name of the same series before it was renamed: older dashboards still ask for it.
            "vllm:time_per_output_token_seconds": "Old name of vllm:inter_token_latency_seconds.",
        }
        self._itl = HotHistogram(self.registry, names, _ITL_BUCKETS, self._labels)
        self._tpot = histogram(
            "vllm:request_time_per_output_token_seconds", "Mean per token after the first, per request.", _ITL_BUCKETS
        )
        self._e2e = histogram("vllm:e2e_request_latency_seconds", "Arrival to the end.", _REQUEST_BUCKETS)
        self._queue = histogram("vllm:request_queue_time_seconds", "Arrival to the first step.", _REQUEST_BUCKETS)
        self._prefill = histogram(
            "vllm:request_prefill_time_seconds", "First step to the first token.", _REQUEST_BUCKETS
        )
        self._decode = histogram("vllm:request_decode_time_seconds", "First token to the last.", _REQUEST_BUCKETS)
        self._inference = histogram(
            "vllm:request_inference_time_seconds", "First step to the last token.", _REQUEST_BUCKETS
        )
        self._request_prompt = histogram("vllm:request_prompt_tokens", "Prompt tokens per request.", tokens)
        self._request_generation = histogram("vllm:request_generation_tokens", "Generated tokens per request.", tokens)
        self._request_longest = histogram(
            "vllm:request_max_num_generation_tokens", "Generated tokens of a prompt's longest choice.", tokens
        )
        self._request_max_tokens = histogram("vllm:request_params_max_tokens", "max_tokens of the requests.", tokens)
        self._request_n = histogram("vllm:request_params_n", "n of the requests.", _N_BUCKETS)

    def _make_own_series(self) -> None:
        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(name, text, labels, registry=self.registry)

        self._rejected = counter("guanaco_rejected", "Requests answered with an error status, by code.", "reason")
        for code in _COUNTED_FROM_ZERO:
            self._rejected.labels(code)
        self._ignored_fields = counter("guanaco_ignored_fields", "Fields of requests that mean nothing here.")
        self._slow_clients = counter("guanaco_slow_clients", "Connections closed because the client did not read.")
        names = {"guanaco_step_seconds": "Duration of engine steps."}
        self._step_seconds = HotHistogram(self.registry, names, _STEP_SECONDS_BUCKETS, {})
        self._lag = Histogram(
            "guanaco_event_loop_lag_seconds",
            "How late the event loop ran a timer: its stalls.",
            buckets=_LAG_BUCKETS,
            registry=self.registry,
        )
        self._grammar_seconds = Histogram(
            "guanaco_grammar_compile_seconds",
            "Compiling what a request demands of its answer: a JSON schema, a regex, choices or a grammar.",
            buckets=_GRAMMAR_BUCKETS,
            registry=self.registry,
        )
        self._grammar_hits = counter("guanaco_grammar_cache_hits", "Such demands that were kept from before.")
        self._heartbeat = Gauge(
            "guanaco_engine_heartbeat_age_seconds",
            "How long the present step has run; 0 between steps.",
            registry=self.registry,
        )

    def set_cache_config(self, *, block_size: int, num_blocks: int, **other: str | int | float | bool) -> None:
        """Publish the size of the KV cache as vLLM does, in the labels of a gauge that is always 1. Call once."""
        labels = {"block_size": str(block_size), "num_gpu_blocks": str(num_blocks), "engine": _ENGINE}
        labels |= {name: str(value) for name, value in other.items()}
        info = Gauge("vllm:cache_config_info", "The KV cache, in its labels.", list(labels), registry=self.registry)
        info.labels(**labels).set(1)

    def set_heartbeat(self, age_seconds: Callable[[], float]) -> None:
        """Read the engine's heartbeat age through `age_seconds` at every scrape."""
        self._heartbeat.set_function(age_seconds)

    def observe_step(self, step: StepStats) -> None:
        self._step = step
        self._num_preempted += step.num_preempted
        for draft in step.drafts:
            self._speculation.observe(draft.num_drafted, draft.num_accepted)
            self.adapters.count_draft(draft.versions, draft.num_drafted, draft.num_accepted)
        self._prefix_queries_tokens += step.prefix_queries_tokens
        self._prefix_hits_tokens += step.prefix_hits_tokens
        if step.num_scheduled_tokens:
            self._iteration_tokens.observe(step.num_scheduled_tokens)
            self._step_seconds.observe(step.step_seconds)

    def observe_tokens(self, adapter: str | None, count: int, gap_seconds: float | None) -> None:
        """Count new tokens of one request. gap_seconds: since its previous tokens; None: these are the first."""
        self._new_tokens[adapter] = self._new_tokens.get(adapter, 0) + count
        if gap_seconds is not None:
            self._itl.observe(gap_seconds)

    def _catch_up(self) -> None:
        """Bring the series up to date with the latest steps and tokens."""
        for adapter, count in self._new_tokens.items():
            self._generation_tokens.inc(count)
            self.adapters.count_generation(adapter, count)
        self._new_tokens.clear()
        step, self._step = self._step, None
        if step is not None:
            self._running.set(step.num_running)
            self._waiting.set(step.num_waiting)
            for gauge in self._kv_usage:
                gauge.set(step.kv_usage_ratio)
            self._preemptions.inc(self._num_preempted)
            for counter in self._prefix_queries:
                counter.inc(self._prefix_queries_tokens)
            for counter in self._prefix_hits:
                counter.inc(self._prefix_hits_tokens)
            self._num_preempted = self._prefix_queries_tokens = self._prefix_hits_tokens = 0
            running = step.running_adapters if step.num_running else ()  # after the last step no adapter runs
            self.adapters.observe_step(running, step.waiting_adapters)
            self.adapters.observe_sequences(step.sequence_versions)
        self.adapters.show(self._clock())  # an adapter can leave the device without a step

    def observe_prompt(self, adapter: str | None, count: int, num_cached: int = 0) -> None:
        """Count the prompt tokens of a request: at its first token, or at its end if it asks for none. num_cached:
        those found in the prefix cache."""
        self._prompt_tokens.inc(count)
        self._cached_tokens.inc(num_cached)
        self._computed_prompt.inc(count - num_cached)
        self._found_prompt.inc(num_cached)
        self.adapters.count_prompt(adapter, count)

    def observe_first_token(self, adapter: str | None, seconds: float) -> None:
        self._ttft.observe(seconds)
        self.adapters.observe_first_token(adapter, seconds)

    def observe_request(self, stats: RequestStats) -> None:
        """Count one engine request that has ended in any way."""
        self._finished[stats.finish_reason].inc()
        self.adapters.count_request(stats.adapter, stats.mixed_adapters)
        self._e2e.observe(stats.e2e_seconds)
        self._request_prompt.observe(stats.num_prompt_tokens)
        self._request_generation.observe(stats.num_generation_tokens)
        self._request_max_tokens.observe(stats.max_tokens)
        self._request_n.observe(stats.n)
        first, last, queue = stats.first_token_seconds, stats.last_token_seconds, stats.queue_seconds
        if queue is not None:
            self._queue.observe(queue)
        if first is None or last is None:
            return
        self._decode.observe(last - first)
        if stats.num_generation_tokens > 1:
            self._tpot.observe((last - first) / (stats.num_generation_tokens - 1))
        if queue is not None:
            self._prefill.observe(max(0.0, first - queue))
            self._inference.observe(max(0.0, last - queue))

    def observe_longest(self, num_tokens: int) -> None:
        """Record the tokens of a prompt's longest choice, when all its choices have ended."""
        self._request_longest.observe(num_tokens)

    def count_rejected(self, reason: str) -> None:
        """Count a request that was answered with an error. reason: one of our error codes, a fixed list."""
        self._rejected.labels(reason).inc()

    def count_ignored_fields(self, count: int) -> None:
        """Count ignored fields of requests. Their names come from clients, so they are no labels; the header
        X-Ignored-Fields has them."""
        if count:
            self._ignored_fields.inc(count)

    def count_slow_client(self) -> None:
        self._slow_clients.inc()

    def observe_grammar(self, seconds: float, is_hit: bool) -> None:
        """Count a request's grammar: compiled in `seconds`, or kept from before (`is_hit`)."""
        if is_hit:
            self._grammar_hits.inc()
        else:
            self._grammar_seconds.observe(seconds)

    def set_training(self, numbers: Callable[[], Numbers]) -> None:
        """Show training over the API, as `numbers` gives it at every scrape. Call once."""
        TrainingCollector(self.registry, numbers)

    def observe_loop_lag(self, seconds: float) -> None:
        self._lag.observe(seconds)

    def render(self, accept: str = "", hidden: frozenset[str] = frozenset()) -> tuple[bytes, str]:
        """(the metrics as bytes, their content type), in the format that the Accept header prefers.

        hidden: names of adapters to leave out.
        """
        encode, content_type = encoder(accept)
        return encode(_Shown(self.registry, hidden) if hidden else self.registry), content_type


class _Shown(Collector):
    """A registry without the series that an API key may not see."""

    def __init__(self, registry: CollectorRegistry, hidden: frozenset[str]) -> None:
        self._registry = registry
        self._hidden = hidden

    def collect(self) -> Iterator[Metric]:
        return without_names(self._registry.collect(), self._hidden)


class _First(Collector):
    """Calls a function before each scrape: it is registered before all other collectors, so it is read first."""

    def __init__(self, work: Callable[[], None]) -> None:
        self._work = work

    def collect(self) -> Iterator[Metric]:
        self._work()
        return iter(())
