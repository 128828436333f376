"""The oracle server from outside: start it, ask it through `guanaco bench serve`'s client, and check every token."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any, Self

import numpy as np

from guanaco.server.commands.bench.serving.arrivals import arrival_times, choose_models
from guanaco.server.commands.bench.serving.client import Exchange, Outcome, Target
from guanaco.server.commands.bench.serving.runner import Due
from support.server.engine_server import text_of
from support.server.fake_engine import BOS

HERE = Path(__file__).resolve().parent  # `support` is a link


class Oracle:
    """`with Oracle(adapters=64, slots=8, settings={…}) as oracle:` starts the server in a process of its own."""

    def __init__(
        self, *, preload: Path | None = None, variables: Mapping[str, str] = MappingProxyType({}), **options: Any
    ) -> None:
        """options: those of `oracle_server.py`. preload: a library for LD_PRELOAD. variables: of its environment."""
        self._options = options
        self._variables = variables
        self._preload = preload
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 (closed on exit)

    def __enter__(self) -> Self:
        importable = str(HERE.parents[1] / "importable")
        env = {**os.environ, **self._variables, "PYTHONPATH": importable}
        if self._preload is not None:
            env["LD_PRELOAD"] = str(self._preload)
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "oracle_server.py"), json.dumps(self._options)],
            stdout=subprocess.PIPE, stderr=self._log, env=env, text=True,
        )  # fmt: skip
        line = self._line()
        self.versions: dict[str, str] = line["versions"]
        self.pid: int = line["pid"]
        self.port: int = line["port"]
        self.url = f"http://127.0.0.1:{self.port}"
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.process.send_signal(signal.SIGCONT)
        self.process.terminate()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(10)
        assert self.process.stdout is not None
        self.process.stdout.close()
        self.close()

    def close(self) -> None:
        """Close the log; `with` does it at its end."""
        self._log.close()

    def _line(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        text = self.process.stdout.readline()
        if not text:
            self._log.seek(0)
            raise AssertionError(f"the oracle server ended:\n{self._log.read().decode(errors='replace')[-4000:]}")
        found: dict[str, Any] = json.loads(text)
        return found

    def target(self, key: str | None = None) -> Target:
        return Target(self.url, "/v1/completions", {"Authorization": f"Bearer {key}"} if key else {})

    def left_behind(self) -> dict[str, int]:
        """What the server holds now."""
        self.process.send_signal(signal.SIGUSR1)
        return self._line()

    def until_quiet(self, seconds: float = 20) -> dict[str, int]:
        """Wait until no sequence, block, admission, stream or lease is left; what is left then."""
        deadline = time.monotonic() + seconds
        while True:
            left = self.left_behind()
            if not any(left[name] for name in ("sequences", "blocks", "admitted", "streams", "leases")):
                return left
            if time.monotonic() > deadline:
                return left
            time.sleep(0.1)

    def resident_mib(self) -> float:
        status = Path(f"/proc/{self.pid}/status").read_text()
        return int(status.split("VmRSS:")[1].split()[0]) / 1024

    def freeze_after(self, wait: float, seconds: float) -> threading.Thread:
        """Stop the whole process (SIGSTOP) for a while, once `wait` seconds are over."""

        def stop() -> None:
            time.sleep(wait)
            self.process.send_signal(signal.SIGSTOP)
            time.sleep(seconds)
            self.process.send_signal(signal.SIGCONT)

        thread = threading.Thread(target=stop)
        thread.start()
        return thread

    def plan(
        self,
        count: int,
        *,
        rate: float,
        tokens: int,
        burstiness: float = 1.0,
        zipf: float = 1.0,
        cancel_share: float = 0.0,
        seed: int = 0,
        ramp: Any = None,
        models: Sequence[str] | None = None,
    ) -> list[Due]:
        """Requests of one prompt each, all different, over the adapters or `models`."""
        rng = np.random.default_rng(seed)
        times = arrival_times(count, rate=rate, burstiness=burstiness, rng=rng, ramp=ramp)
        names = choose_models(models or list(self.versions), count, zipf=zipf, rng=rng)
        leaves = rng.random(count) < cancel_share
        return [
            Due(at, name, body(name, f"{seed}.{i} what now?", tokens), float(rng.uniform(0.0, 0.3)) if left else None)
            for i, (at, name, left) in enumerate(zip(times, names, leaves, strict=True))
        ]

    def wrong(self, plan: Sequence[Due], exchanges: Sequence[Exchange]) -> list[str]:
        """Every whole answer that is not, token for token, what its adapter says to its prompt."""
        found = []
        for due, exchange in zip(plan, exchanges, strict=True):
            if exchange.outcome is not Outcome.COMPLETED:
                continue
            ids = (BOS, *str(due.body["prompt"]).encode())
            right = text_of(ids, self.versions[due.model], due.body["max_tokens"])
            if exchange.text != right or exchange.completion_tokens != len(right):
                found.append(f"{due.model}: {exchange.text!r}, not {right!r}")
        return found


def body(model: str, prompt: str, tokens: int) -> dict[str, Any]:
    return {
        "model": model, "prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True, "stream": True,
        "stream_options": {"include_usage": True},
    }  # fmt: skip


async def get(port: int, path: str) -> tuple[float, int, bytes]:
    """(seconds, status, body) of a GET on a connection of its own."""
    began = time.perf_counter()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n".encode())
        data = await reader.read(-1)
    finally:
        writer.close()
    head, _, content = data.partition(b"\r\n\r\n")
    return time.perf_counter() - began, int(head.split()[1]), content


def outcomes(exchanges: Sequence[Exchange]) -> dict[str, int]:
    return dict(Counter(str(e.outcome) for e in exchanges))


def p99_ms(seconds: Sequence[float]) -> float:
    return round(float(np.percentile(seconds, 99)) * 1000, 1) if len(seconds) else 0.0
