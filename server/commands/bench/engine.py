"""`guanaco bench engine`: random tokens through the engine. `loadtest/bench/compare_peers.py` reads the same figures of
other engines.

`ppN` is prompt tokens/s of one prompt of N tokens; `tgN` is tokens/s of N streams together, after a short context.
Each figure is the best of three. The engine is the server's, without HTTP.
"""

import json
import random
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from guanaco.server.bootstrap.runtime import Runtime, build_runtime
from guanaco.server.config import Settings
from guanaco.server.engine.awake_clock import awake_seconds
from guanaco.server.engine.engine import Engine
from guanaco.server.engine.request import FinishReason, LoraRef, Request, SamplingParams, Submit, TokenOutput
from guanaco.server.errors import CommandError

_ROUNDS = 3
_DECODE_STEPS = 24  # tokens of each stream that are timed
_LOWEST_TOKEN = 300  # smaller ids are special tokens and bytes in most vocabularies


def measure_engine(
    settings: Settings, *, adapters: str | None, prompt: int, batches: str, context: int, as_json: bool
) -> None:
    """Measure, and print one JSON line or a table. Raises CommandError for options that don't parse or don't fit.

    adapters: `DIR:N`: stream i uses DIR/a(i mod N). prompt: tokens of the prompt that is timed. batches: numbers of
    streams, comma-separated. context: tokens of each stream before its tokens are timed.
    """
    counts = _counts(batches)
    settings = settings.model_copy(update=_roomy(settings, counts, adapters))
    # Random tokens soon repeat themselves, and drafts would then be timed in place of steps.
    settings = settings.model_copy(update={"speculation": "off"})
    runtime = build_runtime(settings, Console(stderr=True))
    longest = max(prompt + 1, context + _DECODE_STEPS + 1)
    if longest > runtime.plan.max_model_len:
        raise CommandError(f"{longest} tokens are needed and the context has {runtime.plan.max_model_len}")
    bench = _Bench(runtime, _bench_loras(runtime))
    result: dict[str, object] = {
        "engine": f"guanaco {runtime.ops.name}" + (f" ({adapters})" if adapters else ""),
        "model": settings.model or runtime.base.name,
        "threads": runtime.num_threads,
    }
    bench.prompt_rate(8)
    result[f"pp{prompt}"] = round(max(bench.prompt_rate(prompt) for _ in range(_ROUNDS)), 2)
    for count in counts:
        result[f"tg{count}"] = round(max(bench.decode_rate(count, context) for _ in range(_ROUNDS)), 2)
    if as_json:
        print(json.dumps(result))
        return
    table = Table("figure", "value", box=None, pad_edge=False)
    for key, value in result.items():
        table.add_row(key, str(value))
    Console(highlight=False).print(table)


def _counts(batches: str) -> list[int]:
    try:
        counts = [int(part) for part in batches.split(",")]
    except ValueError:
        counts = []
    if not counts or min(counts) < 1:
        raise CommandError(f"--batches {batches}: expected numbers of streams such as 1,4,8,16")
    return counts


def _roomy(settings: Settings, counts: list[int], adapters: str | None) -> dict[str, object]:
    """The settings to change so that all streams run at once with all their adapters. Raises CommandError."""
    update: dict[str, object] = {"max_num_seqs": max([settings.max_num_seqs, *counts])}
    update["max_num_batched_tokens"] = max(settings.max_num_batched_tokens, max(counts))
    if adapters is not None:
        folder, _, number = adapters.rpartition(":")
        if not folder or not number.isdigit() or int(number) < 1:
            raise CommandError(f"--adapters {adapters}: expected DIR:N, for DIR/a0 to DIR/a(N-1)")
        update["adapter"] = tuple(f"a{i}={Path(folder) / f'a{i}'}" for i in range(int(number)))
        update["adapter_slots"] = max(settings.adapter_slots, int(number))
    return update


def _bench_loras(runtime: Runtime) -> list[tuple[LoraRef, ...]]:
    """The adapters of stream i: adapter i mod N of those that --adapters named, or none (the base)."""
    named = [e for e in runtime.registry.entries() if e.name[:1] == "a" and e.name[1:].isdigit()]
    return [(LoraRef(entry.version),) for entry in named] or [()]


class _Bench:
    """Runs random prompts through one engine. No two are equal, so the prefix cache never helps."""

    def __init__(self, runtime: Runtime, loras: list[tuple[LoraRef, ...]]) -> None:
        self._engine: Engine = runtime.engine
        self._vocab_size = runtime.base.loaded.config.vocab_size
        self._loras = loras
        self._random = random.Random(0)  # noqa: S311  token ids, not secrets
        self._number = 0

    def prompt_rate(self, length: int) -> float:
        """Tokens/s from the first step to the first token."""
        self._add(0, length, max_tokens=1)
        started = time.perf_counter()
        self._run()
        return length / (time.perf_counter() - started)

    def decode_rate(self, count: int, context: int) -> float:
        """Tokens/s of all streams together, once each has its first token."""
        waiting = {self._add(i, context, max_tokens=_DECODE_STEPS + 1) for i in range(count)}
        while waiting:
            waiting -= {output.request_id for output in self._step()}
        # The first streams are a few tokens ahead, so only steps in which all streams run are timed.
        tokens, started = 0, time.perf_counter()
        while True:
            outputs = self._step()
            tokens += len(outputs)
            if any(output.finish_reason is not None for output in outputs):
                break
        rate = tokens / (time.perf_counter() - started)
        self._run()
        return rate

    def _add(self, stream: int, length: int, max_tokens: int) -> str:
        self._number += 1
        request_id = f"bench-{self._number}"
        lowest = min(_LOWEST_TOKEN, self._vocab_size // 2)
        ids = tuple(self._random.randrange(lowest, self._vocab_size) for _ in range(length))
        params = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
        loras = self._loras[stream % len(self._loras)]
        request = Request(request_id, ids, params, loras, arrival_seconds=awake_seconds())
        self._engine.handle(Submit(request))
        return request_id

    def _run(self) -> None:
        while self._engine.has_work:
            self._step()

    def _step(self) -> tuple[TokenOutput, ...]:
        outputs = self._engine.step().outputs
        for output in outputs:
            if output.finish_reason in (FinishReason.ERROR, FinishReason.ABORT):
                raise CommandError(f"the engine ended a request: {output.error}")
        return outputs
