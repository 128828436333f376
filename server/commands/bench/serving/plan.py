"""The options of `guanaco bench serve`, checked before anything is sent, and the requests that they describe."""

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

from guanaco.server.commands.bench.serving import arrivals
from guanaco.server.commands.bench.serving.client import Target
from guanaco.server.commands.bench.serving.metrics import METRICS
from guanaco.server.commands.bench.serving.prompts import CUSTOM, RANDOM, Ask, read_dataset
from guanaco.server.commands.bench.serving.runner import Due
from guanaco.server.commands.common import bearer, server_root
from guanaco.server.errors import CommandError

CHAT, COMPLETIONS = "openai-chat", "openai"
PATHS = {CHAT: "/v1/chat/completions", COMPLETIONS: "/v1/completions"}
DEFAULT_REQUESTS, DEFAULT_OUTPUT_TOKENS = 1000, 128
MAX_REQUESTS = 1_000_000
MAX_RATE = 100_000.0


@dataclass(frozen=True)
class Options:
    """The command's options by their names. A method raises CommandError for an option that it can't read."""

    base_url: str
    backend: str = CHAT
    endpoint: str | None = None
    api_key: str | None = field(default=None, repr=False)
    header: list[str] | None = None
    insecure: bool = False
    model: str | None = None
    models: str | None = None
    zipf: float = 0.0
    lora_assignment: str = arrivals.RANDOM
    dataset_name: str | None = None
    dataset_path: Path | None = None
    num_prompts: int | None = None
    duration: float | None = None
    random_input_len: int = 1024
    random_range_ratio: float = 0.0
    output_len: int | None = None
    ignore_eos: bool = False
    shared_prompts: bool = False
    temperature: float | None = None
    extra_body: str | None = None
    request_rate: str = "inf"
    burstiness: float = 1.0
    ramp_up_strategy: str | None = None
    ramp_up_start_rps: float | None = None
    ramp_up_end_rps: float | None = None
    self_timed: bool = False
    max_concurrency: int | None = None
    request_cancellation_rate: float = 0.0
    request_cancellation_delay: float = 0.5
    timeout: float = 600.0
    num_warmups: int = 0
    ready_check_timeout_sec: float = 0.0
    percentile_metrics: str = "ttft,tpot,itl,e2el"
    metric_percentiles: str = "50,90,99"
    goodput: list[str] | None = None
    save_result: bool = False
    save_detailed: bool = False
    result_dir: Path = Path()
    result_filename: str | None = None
    report: Path | None = None
    label: str = "guanaco"
    metadata: list[str] | None = None
    seed: int = 0
    as_json: bool = False

    def check_all(self) -> None:
        """Raises CommandError for the first option that can't be read or contradicts another."""
        if self.backend not in PATHS:
            raise CommandError(f"--backend {self.backend}: there are {' and '.join(PATHS)}")
        if self.endpoint is not None and not self.endpoint.startswith("/"):
            raise CommandError(f"--endpoint {self.endpoint}: expected a path such as {PATHS[CHAT]}")
        if self.model is not None and self.models is not None:
            raise CommandError("give --model or --models, not both")
        if self.lora_assignment not in arrivals.ASSIGNMENTS:
            raise CommandError(f"--lora-assignment {self.lora_assignment}: there are {arrivals.ASSIGNMENTS}")
        if self.num_prompts is not None and self.duration is not None:
            raise CommandError("give --num-prompts or --duration, not both")
        if self.num_prompts is not None and self.num_prompts > MAX_REQUESTS:
            raise CommandError(f"--num-prompts {self.num_prompts}: at most {MAX_REQUESTS:,}")
        if not self.burstiness > 0:
            raise CommandError(f"--burstiness {self.burstiness:g}: it must be above 0; below 1 makes bursts")
        if self.self_timed and (self.request_rate != "inf" or self.ramp_up_strategy):
            raise CommandError(
                "--self-timed takes the times of the data: leave out --request-rate and --ramp-up-strategy"
            )
        if self.ramp_up_strategy is not None and self.request_rate != "inf":
            raise CommandError("--ramp-up-strategy says the rate: leave out --request-rate")
        if self.ramp_up_strategy is None and (self.ramp_up_start_rps is not None or self.ramp_up_end_rps is not None):
            raise CommandError("--ramp-up-start-rps and --ramp-up-end-rps go with --ramp-up-strategy")
        for check in (self.rates, self.ramp, self.goals, self.percentiles, self.shown, self.body_fields, self.notes):
            check()
        self.target()
        if self.duration is not None and (self.self_timed or any(math.isinf(rate) for rate in self.rates())):
            raise CommandError("--duration needs a rate: --request-rate or --ramp-up-strategy")

    def chosen(self) -> dict[str, Any]:
        """The options that are not the defaults, for the result. Keys and headers are left out."""
        secret = ("api_key", "header")
        values = {option.name: (getattr(self, option.name), option.default) for option in fields(self)}
        return {
            name: value if isinstance(value, bool | int | float | list) else str(value)
            for name, (value, default) in values.items()
            if name not in secret and value != default
        }

    def rates(self) -> list[float]:
        """The rates of --request-rate; the mean of a ramp, which is one run."""
        if (ramp := self.ramp()) is not None:
            return [ramp.mean]
        rates = _numbers(self.request_rate, "--request-rate", "rates such as 4 or 1,2,4,8")
        if not all(0 < rate <= MAX_RATE or math.isinf(rate) for rate in rates) or len(set(rates)) < len(rates):
            raise CommandError(f"--request-rate {self.request_rate}: different rates above 0, at most {MAX_RATE:,.0f}")
        return sorted(rates)

    def ramp(self) -> arrivals.Ramp | None:
        """The ramp, if one was asked for."""
        if self.ramp_up_strategy is None:
            return None
        if self.ramp_up_start_rps is None or self.ramp_up_end_rps is None:
            raise CommandError("--ramp-up-strategy needs --ramp-up-start-rps and --ramp-up-end-rps")
        return arrivals.Ramp(self.ramp_up_strategy, self.ramp_up_start_rps, self.ramp_up_end_rps)

    def goals(self) -> dict[str, float]:
        """Metric → most milliseconds. A text may hold several, with spaces between them."""
        goals: dict[str, float] = {}
        for pair in " ".join(self.goodput or ()).replace(",", " ").split():
            name, _, value = pair.partition(":")
            try:
                goals[name] = float(value)
            except ValueError:
                goals[name] = -1.0
            if name not in METRICS or not goals[name] >= 0:
                raise CommandError(f"--goodput {pair}: write NAME:MILLISECONDS; names are {', '.join(METRICS)}")
        return goals

    def percentiles(self) -> list[float]:
        """The percentiles of --metric-percentiles."""
        found = _numbers(self.metric_percentiles, "--metric-percentiles", "percentiles such as 50,90,99")
        if not all(0 <= p <= 100 for p in found):
            raise CommandError(f"--metric-percentiles {self.metric_percentiles}: from 0 to 100")
        return sorted(set(found))

    def shown(self) -> list[str]:
        """The metrics of the table."""
        names = [name.strip() for name in self.percentile_metrics.split(",") if name.strip()]
        if wrong := [name for name in names if name not in METRICS]:
            raise CommandError(f"--percentile-metrics {wrong[0]}: there are {', '.join(METRICS)}")
        return names

    def body_fields(self) -> dict[str, Any]:
        """The fields of every request's body."""
        fields: dict[str, Any] = {"stream": True, "stream_options": {"include_usage": True}}
        if self.ignore_eos:
            fields["ignore_eos"] = True
        if self.temperature is not None:
            fields["temperature"] = self.temperature
        try:
            more = json.loads(self.extra_body or "{}")
        except (ValueError, RecursionError):
            more = None
        if not isinstance(more, dict):
            raise CommandError('--extra-body: expected a JSON object such as {"top_k": 20}')
        return fields | more

    def notes(self) -> dict[str, str]:
        """The entries of --metadata."""
        return _pairs(self.metadata, "--metadata")

    def target(self, path: str | None = None) -> Target:
        """The server and the path of the requests."""
        root = server_root(self.base_url, "--base-url")
        headers = _pairs(self.header, "--header")
        if self.api_key:
            headers["Authorization"] = bearer(self.api_key, "--api-key").decode("latin-1")
        return Target(root, path or self.endpoint or PATHS[self.backend], headers, insecure=self.insecure)

    def dataset(self) -> list[Ask]:
        """The prompts of the data. A run of more requests sends them again from the first."""
        name = self.dataset_name or (RANDOM if self.dataset_path is None else CUSTOM)
        most = max(self.num_requests(rate) for rate in self.rates()) if not self.self_timed else 0
        asks = read_dataset(
            name, self.dataset_path, input_tokens=self.random_input_len, range_ratio=self.random_range_ratio,
            count=most, seed=self.seed,
        )  # fmt: skip
        if self.self_timed and not (asks and all(ask.at is not None for ask in asks)):
            raise CommandError("--self-timed: each line of the data needs time or timestamp")
        return asks

    def num_requests(self, rate: float) -> int:
        """Requests of a run at this rate."""
        if self.duration is None:
            return self.num_prompts or DEFAULT_REQUESTS
        count = max(1, round(rate * self.duration))
        if count > MAX_REQUESTS:
            raise CommandError(
                f"--duration {self.duration:g} at {rate:g} requests/s is {count:,}: at most {MAX_REQUESTS:,}"
            )
        return count


class Planner:
    """Makes the requests of each run. A prompt that was sent before gets a number in front, so that no prefix cache
    helps; not with --shared-prompts."""

    def __init__(self, options: Options, asks: Sequence[Ask], models: Sequence[str]) -> None:
        """models: the models to ask for. The data's own models count only if this is one and --model is not given."""
        self._options = options
        self._asks = asks
        self._models = models
        self._times_sent: Counter[int] = Counter()
        self._num_runs = 0

    def plan(self, rate: float) -> list[Due]:
        """The requests of the next run."""
        options = self._options
        rng = np.random.default_rng([options.seed, self._num_runs])
        self._num_runs += 1
        if options.self_timed:
            asks = sorted(enumerate(self._asks), key=lambda pair: pair[1].at or 0.0)[: options.num_prompts]
            order, times = [i for i, _ in asks], [ask.at or 0.0 for _, ask in asks]
        else:
            count = options.num_requests(rate)
            order = [i % len(self._asks) for i in range(count)]
            times = arrivals.arrival_times(
                count, rate=rate, burstiness=options.burstiness, rng=rng, ramp=options.ramp()
            )
        models = arrivals.choose_models(
            self._models, len(order), zipf=options.zipf, rng=rng, assignment=options.lora_assignment
        )
        leaves = rng.random(len(order)) * 100 < options.request_cancellation_rate
        return [
            self._due(i, seconds, model, options.request_cancellation_delay if left else None)
            for i, seconds, model, left in zip(order, times, models, leaves, strict=True)
        ]

    def warmups(self, count: int) -> list[Due]:
        """Requests before the first run that are not in any result, all due at once. They count as sent prompts, so a
        run numbers those that it repeats."""
        return [self._due(i % len(self._asks), 0.0, self._models[i % len(self._models)], None) for i in range(count)]

    def _due(self, i: int, seconds: float, model: str, leave_after: float | None) -> Due:
        options, ask = self._options, self._asks[i]
        number = 0 if options.shared_prompts else self._times_sent[i]
        self._times_sent[i] += 1
        if len(self._models) == 1 and options.model is None and ask.model is not None:
            model = ask.model
        prompt: Mapping[str, Any] = {"messages": ask.chat(number)}
        if options.backend == COMPLETIONS:
            prompt = {"prompt": ask.text(number)}
        tokens = options.output_len or ask.output_tokens or DEFAULT_OUTPUT_TOKENS
        body = {"model": model, **prompt, "max_tokens": tokens, **options.body_fields()}
        return Due(seconds, model, body, leave_after)


def _numbers(text: str, flag: str, expected: str) -> list[float]:
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or any(math.isnan(n) for n in found):
        raise CommandError(f"{flag} {text}: expected {expected}")
    return found


def _pairs(texts: Sequence[str] | None, flag: str) -> dict[str, str]:
    pairs = {}
    for text in texts or ():
        name, separator, value = text.partition("=")
        if not separator or not name.strip():
            raise CommandError(f"{flag} {text}: write KEY=VALUE")
        pairs[name.strip()] = value.strip()
    return pairs
