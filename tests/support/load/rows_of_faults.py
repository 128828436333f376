"""The rows about fairness, clocks, long runs, the real engine and its overhead. Each returns a `Finding`."""

import asyncio
import json
import random
import shutil
import subprocess
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from guanaco.adapters.residency.ledger import ResidencyLedger
from guanaco.adapters.residency.slot_table import SlotTable
from guanaco.server.commands.bench.serving.client import Exchange, Target
from guanaco.server.commands.bench.serving.metrics import seconds_of
from guanaco.server.commands.bench.serving.runner import Due, run_load
from guanaco.server.engine.awake_clock import awake_seconds
from guanaco.server.engine.block_manager import BlockManager
from guanaco.server.engine.engine import Engine
from guanaco.server.engine.request import Request, SampledToken, SamplingParams, ScheduledBatch, Submit
from guanaco.server.engine.scheduler import Limits, Scheduler
from support.load.oracle import HERE, Oracle, body, outcomes
from support.load.rows_of_load import Finding, nothing_stays

ADMIN = {"Authorization": "Bearer sesame", "Content-Type": "application/json"}


def fairness(*, streams: int = 64, tokens: int = 400, step_seconds: float = 0.005) -> Finding:
    """F-l: one adapter has 64 streams and another one; then both have as many and share the places.

    The server divides by adapter. Two keys on one adapter are not told apart, which the counts show.
    """
    finding = Finding("F-l")
    seqs = streams // 2
    settings = {"max_num_seqs": seqs, "max_queued_requests": 4 * streams, "max_queued_tokens": 1 << 22}
    with Oracle(
        adapters=2, slots=2, step_seconds=step_seconds, num_blocks=seqs * (tokens // 16 + 8), settings=settings
    ) as oracle:
        solo = run_load(oracle.target(), [Due(0.0, "a1", body("a1", f"s{i}", 4)) for i in range(5)], timeout=60,
                        max_concurrency=1)  # fmt: skip
        alone = sorted((e.pieces[0] - (e.sent or 0.0)) for e in solo.exchanges)[2]
        flood = [Due(0.0, "a0", body("a0", f"f{i}", tokens // 4)) for i in range(streams)]
        guest = [Due(0.2, "a1", body("a1", "guest", 4))]
        run = run_load(oracle.target(), [*flood, *guest], timeout=120)
        finding.problems += oracle.wrong([*flood, *guest], run.exchanges)[:5]
        waits = seconds_of(run.exchanges[-1], "ttft")
        both = [Due(0.0, f"a{i % 2}", body(f"a{i % 2}", f"b{i}", tokens)) for i in range(2 * seqs)]
        shared = run_load(oracle.target(), both, timeout=240)
        finding.problems += oracle.wrong(both, shared.exchanges)[:5]
        finding.must(outcomes(run.exchanges) == {"completed": streams + 1}, f"outcomes {outcomes(run.exchanges)}")
        finding.must(outcomes(shared.exchanges) == {"completed": 2 * seqs}, f"outcomes {outcomes(shared.exchanges)}")
        share = _share_of_tokens(shared.exchanges, "a1")
        finding.must(0.45 <= share <= 0.55, f"the second of two equal adapters had {100 * share:.1f} % of the tokens")
        finding.must(not any(oracle.until_quiet()[n] for n in ("sequences", "blocks", "leases")), "something is left")
    finding.counts = {"token share of one of two equal adapters": round(share, 4)}
    finding.times = {
        "first token alone": round(1000 * alone, 1),
        "first token beside the flood": round(1000 * waits, 1),
    }
    finding.targets = {"first token beside the flood": round(3000 * alone, 1)}
    return finding


def _share_of_tokens(exchanges: list[Exchange], model: str) -> float:
    """A model's share of the tokens that came before the first request of either ended: both are backlogged then."""
    until = min(e.ended for e in exchanges)
    counts = Counter(e.model for e in exchanges for t in e.pieces if t <= until)
    return counts[model] / counts.total()


def clock(*, jumps: int = 20, rate: float = 30.0, tokens: int = 16) -> Finding:
    """F-i: the clock of the day jumps by an hour, back and forth, while requests run. Nobody notices but `created`."""
    finding = Finding("F-i")
    with tempfile.TemporaryDirectory() as folder:
        library, offset = Path(folder, "jump.so"), Path(folder, "offset")
        compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("g++")
        assert compiler is not None, "a C compiler is needed for the library that shifts the clock"
        source = HERE / "jumping_clock.c"
        subprocess.run([compiler, "-O1", "-shared", "-fPIC", "-x", "c", str(source), "-o", str(library)], check=True)
        offset.write_bytes((0).to_bytes(8, "little", signed=True))
        settings = {"max_num_seqs": 16, "max_queued_requests": 256, "queue_timeout": 30, "request_timeout": 60}
        with Oracle(
            adapters=4, slots=4, step_seconds=0.005, settings=settings, preload=library, variables={"JUMP": str(offset)}
        ) as oracle:
            ended = threading.Event()

            def jump() -> None:
                for number in range(jumps):
                    time.sleep(0.2)
                    seconds = (3600, -3600, 0)[number % 3]
                    with offset.open("r+b") as file:  # in place: the server has it mapped
                        file.write(seconds.to_bytes(8, "little", signed=True))
                ended.set()

            jumping = threading.Thread(target=jump)
            jumping.start()
            plan = oracle.plan(int(rate * (0.2 * jumps + 1)), rate=rate, tokens=tokens)
            run = run_load(oracle.target(), plan, timeout=60, watch=lambda: _created(oracle))
            jumping.join()
            shifts = {round((created - now) / 3600) for _, (created, now) in run.samples}
            finding.problems += oracle.wrong(plan, run.exchanges)[:5]
            counts = outcomes(run.exchanges)
            finding.must(counts == {"completed": len(plan)}, f"outcomes {counts}")
            finding.must({-1, 1} <= shifts, f"the clock did not jump in the server: {shifts}")
            finding.must(
                not any(oracle.until_quiet()[n] for n in ("sequences", "blocks", "leases")), "something is left"
            )
    finding.counts = {**counts, "jumps": jumps, "hours that the server saw": sorted(shifts)}
    return finding


async def _created(oracle: Oracle) -> tuple[float, float]:
    """(the server's time of the day, ours), by an answer's `created`."""

    def post() -> float:
        given = {"model": "a0", "prompt": "x", "max_tokens": 1}
        return float(request(oracle, "POST", "/v1/completions", given)[1]["created"])

    return await asyncio.to_thread(post), time.time()


def request(oracle: Oracle, method: str, path: str, given: Any = None) -> tuple[int, Any]:
    """(status, answer) of a request by the operator."""
    data = None if given is None else given if isinstance(given, bytes) else json.dumps(given).encode()
    asked = urllib.request.Request(oracle.url + path, data, ADMIN, method=method)
    try:
        with urllib.request.urlopen(asked, timeout=30) as reply:
            return reply.status, json.loads(reply.read() or b"null")
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.loads(error.read() or b"null")


def soak(*, seconds: float = 600.0, rate: float = 20.0, tokens: int = 16) -> Finding:
    """L6: hours in small: cancelled and malformed requests and changing adapters beside ordinary ones.

    Nothing else than the documented statuses comes, and nothing stays at the end."""
    finding = Finding("L6", targets={"memory slope, MiB/min": 1.0})
    settings = {"max_num_seqs": 32, "max_queued_requests": 512, "max_queued_tokens": 1 << 22}
    with Oracle(adapters=8, slots=4, step_seconds=0.005, sources=4, settings=settings) as oracle:
        run_load(oracle.target(), oracle.plan(64, rate=50, tokens=4, seed=9), timeout=60)
        before = oracle.until_quiet()
        ended, statuses = threading.Event(), Counter[str]()
        beside = [
            threading.Thread(target=_churn, args=(oracle, ended, statuses)),
            threading.Thread(target=_malformed, args=(oracle, ended, statuses, rate * 0.05)),
        ]
        for thread in beside:
            thread.start()
        memory: list[tuple[float, float]] = []

        async def look() -> None:
            memory.append((time.monotonic(), oracle.resident_mib()))

        plan = oracle.plan(int(seconds * rate), rate=rate, tokens=tokens, cancel_share=0.2)
        run = run_load(oracle.target(), plan, timeout=60, watch=look)
        ended.set()
        for thread in beside:
            thread.join()
        finding.problems += oracle.wrong(plan, run.exchanges)[:5]
        counts = outcomes(run.exchanges)
        finding.must(counts.keys() <= {"completed", "cancelled"}, f"outcomes {counts}")
        wrong = {name: n for name, n in statuses.items() if not name.endswith((" 200", " 201", " 204", " 400"))}
        finding.must(not wrong, f"unexpected statuses {wrong}")
        nothing_stays(finding, before, oracle.until_quiet())
    later = memory[len(memory) // 2 :]
    minutes = max(1 / 60, (later[-1][0] - later[0][0]) / 60)
    finding.times = {"memory slope, MiB/min": round((later[-1][1] - later[0][1]) / minutes, 2)}
    finding.counts = {**counts, "beside": dict(statuses), "seconds": seconds}
    return finding


def _churn(oracle: Oracle, ended: threading.Event, statuses: Counter[str]) -> None:
    """Load, replace and remove an adapter that no request asks for, once a second."""
    number = 0
    while not ended.wait(1.0):
        number += 1
        status, _ = request(oracle, "PUT", "/v1/adapters/changing", {"source": f"s{number % 4}", "replace": True})
        statuses[f"put {status}"] += 1
        if number % 3 == 0:
            status, _ = request(oracle, "DELETE", "/v1/adapters/changing")
            statuses[f"delete {status}"] += 1


def _malformed(oracle: Oracle, ended: threading.Event, statuses: Counter[str], rate: float) -> None:
    rng = random.Random(0)
    bodies = (b"{", b"[]", b'{"model": "a0"}', b'{"model": "a0", "prompt": "x", "max_tokens": -1}',
              b'{"model": "a0", "prompt": "x", "top_p": 1e400}')  # fmt: skip
    while not ended.wait(1 / rate):
        status, _ = request(oracle, "POST", "/v1/completions", rng.choice(bodies))
        statuses[f"malformed {status}"] += 1


def real_engine(*, streams: int = 256, tokens: int = 64, adapters: int = 4) -> Finding:
    """L2: a tiny LLaMA with real kernels and adapters. Each of many streams at once says what it says alone."""
    from guanaco.models.architectures.config_json import read_config
    from guanaco.models.architectures.registry import projection_shapes
    from support.adapters.tiny_adapters import make_adapter
    from support.models.tiny_models import make_tiny_llama
    from support.server.live_server import LiveServer

    finding = Finding("L2")
    with tempfile.TemporaryDirectory() as folder:
        model = make_tiny_llama(Path(folder, "tiny"))
        config = read_config(model)
        targets = {
            f"layers.{i}.{name}": (k, n)
            for i in range(config.num_layers)
            for name, (n, k) in projection_shapes(config).items()
        }
        flags = ["--model", str(model), "--cache", str(Path(folder, "cache")), "--threads", "1", "--offline"]
        flags += ["--max-num-seqs", "64", "--max-queued-requests", str(streams), "--kv-cache-memory", "64MiB"]
        names = ["tiny"]
        for seed in range(adapters):
            path = make_adapter(Path(folder, f"a{seed}"), targets, 4, 8, seed=seed)
            flags += ["--adapter", f"a{seed}={path}"]
            names.append(f"a{seed}")
        with LiveServer(flags, Path(folder, "log")) as server:
            target = Target(server.url, "/v1/completions", {})
            plan = [
                Due(0.0, name, body(name, f"Request {i} asks", tokens))
                for i, name in ((i, names[i % len(names)]) for i in range(streams))
            ]
            alone = run_load(target, plan, timeout=120, max_concurrency=1)
            together = run_load(target, plan, timeout=240)
        for run in (alone, together):
            finding.must(outcomes(run.exchanges) == {"completed": streams}, f"outcomes {outcomes(run.exchanges)}")
        different = sum(a.text != b.text for a, b in zip(alone.exchanges, together.exchanges, strict=True))
        finding.must(different == 0, f"{different} of {streams} answers differ from those of a request alone")
        texts = {e.text for e in alone.exchanges}
        finding.must(len(texts) > streams // 2, "the answers are too much alike to tell anything")
    finding.counts = {"streams": streams, "different from alone": different, "most at once": 64}
    return finding


class _Constant:
    """A model that takes no time: each token is 1."""

    def load_adapter(self, slot: int, version: str) -> None:
        pass

    def run(self, batch: ScheduledBatch, begin: Callable[[], None]) -> tuple[SampledToken, ...]:
        begin()
        return tuple(SampledToken(1 if item.needs_sample else None) for item in batch.sequences)


def scheduling(*, sequences: int = 256, steps: int = 400) -> Finding:
    """L8: what a step of so many running sequences costs besides the model's run: schedule, update, free."""
    finding = Finding("L8", targets={"step without the model, median": 1.0})
    blocks = BlockManager(sequences * (steps // 16 + 4), 16)
    limits = Limits(sequences, max(512, sequences), 16 * (steps // 16 + 3), 0.0)
    scheduler = Scheduler(limits, blocks, ResidencyLedger(SlotTable(2)), frozenset())
    engine = Engine(scheduler, _Constant())  # type: ignore[arg-type]
    for number in range(sequences):
        params = SamplingParams(max_tokens=steps, temperature=0.0, ignore_eos=True)
        engine.handle(Submit(Request(f"r{number}", (number, 5, 7), params, (), arrival_seconds=awake_seconds())))
    for _ in range(8):
        engine.step()
    took, tokens = [], 0
    while len(took) < steps - 16:
        began = time.perf_counter()
        tokens += len(engine.step().outputs)
        took.append(1000 * (time.perf_counter() - began))
    finding.must(tokens == sequences * len(took), f"{tokens} tokens in {len(took)} steps of {sequences} sequences")
    took.sort()
    finding.times = {
        "step without the model, median": round(took[len(took) // 2], 3),
        "step without the model, p99": round(took[len(took) * 99 // 100], 3),
    }
    finding.counts = {"sequences": sequences, "steps": len(took)}
    return finding
