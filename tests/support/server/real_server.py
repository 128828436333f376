"""The whole server over a tiny LLaMA, in this process: every part is the real one, and all of them are within reach.

What `guanaco serve` builds, without its banner. For tests whose point is that tokens come from an adapter's tensors,
and nothing is left of a request or a load: leases, slots, files, threads.
"""

import ctypes
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console

from guanaco.adapters.versions.holds import Holder
from guanaco.adapters.versions.registry import AdapterRegistry
from guanaco.server.adapters.manager import AdapterManager
from guanaco.server.api.http.auth import KeyRing
from guanaco.server.bootstrap.runtime import Runtime, build_runtime
from guanaco.server.commands.serve import _api_state
from guanaco.server.config import load_settings
from support.models.tiny_models import make_tiny_llama
from support.server.api_server import WAIT
from support.server.engine_server import EngineServer

ADMIN = {"Authorization": "Bearer sesame"}
BASE = "tiny"
PROMPTS = ("Hello, how are you?", "Ahoy, me hearties!", "Write a checkpoint of")
NUM_TOKENS = 12


class RealServer(EngineServer):
    """`with make_real_server(directory) as server:`; sources lie in `root`."""

    root: Path
    store: Path
    manager: AdapterManager
    runtime: Runtime

    @property
    def registry(self) -> AdapterRegistry:
        return self.runtime.registry

    @property
    def targets(self) -> dict[str, tuple[int, int]]:
        return self.runtime.base.loaded.model.lora_targets

    def stored(self) -> set[str]:
        """What lies in the store, but for its lock and the list of names."""
        return {path.name for path in self.store.iterdir()} - {".lock", "registry.json"}

    def answers(self, model: str) -> tuple[str, ...]:
        """What a model says to each of PROMPTS when nobody else asks anything."""
        with self.client() as client:
            return tuple(complete(client, model, prompt) for prompt in PROMPTS)

    def holdings(self) -> dict[str, Any]:
        """What a server that does nothing holds: to be compared before and after."""
        return {
            "leases": {
                version: [self.registry.holds.count(version, holder) for holder in (Holder.REQUEST, Holder.LOAD)]
                for version in self.registry.holds.held(Holder.REQUEST, Holder.LOAD)
            },
            "names": sorted(entry.name for entry in (*self.registry.entries(), *self.registry.broken())),
            "host copies": sorted(self.registry.versions()),
            "slots of nobody": sorted(self.scheduler.residency.slots.resident.keys() - self.registry.versions()),
            "stored": sorted(self.stored()),
            "files": sorted(_open_files()),
            "locks": sorted(self.manager._locks),
            "tasks": len(self.manager._loads) + len(self.manager._retirement.tasks),
        }


def complete(client: httpx.Client, model: str, prompt: str) -> str:
    """The greedy answer; anything but a 200 is an AssertionError."""
    response = ask(client, model, prompt)
    assert response.status_code == 200, response.text
    return str(response.json()["choices"][0]["text"])


def ask(client: httpx.Client, model: str, prompt: str) -> httpx.Response:
    body = {"model": model, "prompt": prompt, "max_tokens": NUM_TOKENS, "temperature": 0, "ignore_eos": True}
    return client.post("/v1/completions", json=body)


def make_real_server(
    directory: Path, *, model: Path | None = None, thread_setup: Callable[[], None] = lambda: None, **settings: Any
) -> RealServer:
    """A server that is not started yet. model: a checkpoint; none: a tiny one, made below `directory`.

    thread_setup: runs first on the thread of the event loop, which starts all the others.
    """
    path = model or make_tiny_llama(directory / BASE)
    root = directory / "root"
    root.mkdir(exist_ok=True)
    flags = {
        "model": str(path),
        "cache": directory / "cache",
        "port": 0,
        "admin_key": "sesame",
        "adapter_root": root,
        "adapter_store": directory / "store",
        "max_lora_rank": 64,
        "adapter_slots": 3,
        "kv_cache_memory": "8MiB",
        "threads": 1,
        **settings,
    }
    options = load_settings(flags)
    with (directory / "start.log").open("w") as log:
        runtime = build_runtime(options, Console(file=log))
    state = _api_state(options, runtime, KeyRing.from_settings(options), KeyRing.admin(options))
    assert state.adapters is not None
    server = RealServer(state, None, runtime.engine.scheduler)  # type: ignore[arg-type]
    server.root, server.manager, server.runtime = root, state.adapters, runtime
    server.store = directory / "store" / runtime.base.loaded.fingerprint[:16]
    run = server._run

    def set_up_and_run() -> None:
        thread_setup()
        run()

    server._thread = threading.Thread(target=set_up_and_run, daemon=True)
    return server


class Traffic:
    """Threads that ask models for what they must say, over and over, and count what was right."""

    def __init__(
        self,
        server: RealServer,
        expected: dict[str, tuple[str, ...]],
        *,
        num_threads: int = 2,
        allowed: frozenset[str] = frozenset(),
    ) -> None:
        """allowed: codes of errors that may come instead of an answer."""
        self.num_right = 0
        self.wrong: list[str] = []
        self.refused: Counter[str] = Counter()
        self._allowed = allowed
        self._server = server
        self._expected = expected
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(n,), daemon=True) for n in range(num_threads)]

    def __enter__(self) -> "Traffic":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(WAIT)
            assert not thread.is_alive(), "a request hangs"

    def _ask(self, number: int) -> None:
        models: Sequence[str] = list(self._expected)
        with self._server.client() as client:
            turn = number
            while not self._stop.is_set():
                turn += 1
                model, prompt = models[turn % len(models)], turn % len(PROMPTS)
                try:
                    response = ask(client, model, PROMPTS[prompt])
                except httpx.HTTPError as error:
                    self.wrong.append(f"{model}: {error!r}")
                    continue
                if response.status_code != 200:
                    code = response.json()["error"]["code"]
                    self.refused[code] += 1
                    if code not in self._allowed:
                        self.wrong.append(f"{model}: {response.text}")
                    continue
                text = response.json()["choices"][0]["text"]
                if text == self._expected[model][prompt]:
                    self.num_right += 1
                else:
                    self.wrong.append(f"{model} said {text!r} to prompt {prompt}")


_POOLS = ("guanaco-prepare", "guanaco-adapter", "asyncio", "uvloop")
_CAP_DAC_OVERRIDE, _CAP_DAC_READ_SEARCH = 1, 2
_CAPABILITY_VERSION_3 = 0x20080522
_SYS_CAPGET, _SYS_CAPSET = 125, 126  # x86-64


def obey_permissions() -> None:
    """Make this thread, and those that it starts, heed the permissions of files although it runs as root."""
    if os.geteuid() != 0:
        return
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0)
    data = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable; the low 32 capabilities, then the high ones
    if libc.syscall(_SYS_CAPGET, header, data):
        raise OSError(ctypes.get_errno(), "capget")
    data[0] &= ~(1 << _CAP_DAC_OVERRIDE | 1 << _CAP_DAC_READ_SEARCH)
    if libc.syscall(_SYS_CAPSET, header, data):
        raise OSError(ctypes.get_errno(), "capset")


@contextmanager
def nothing_is_left(server: RealServer) -> Iterator[None]:
    """What a server holds must come back to what it was."""
    before, threads = server.holdings(), _threads()
    yield
    with suppress(TimeoutError):
        server.wait(lambda: server.holdings() == before)
    after = server.holdings()
    assert after == before, {name: (before[name], after[name]) for name in after if after[name] != before[name]}
    assert _threads() <= threads, _threads() - threads


def _threads() -> Counter[str]:
    """By name, without those of pools: they are bounded, and grow to their size when there is work."""
    names = (thread.name for thread in threading.enumerate())
    return Counter(name for name in names if not name.startswith(_POOLS))


def _open_files() -> Iterator[str]:
    """Where this process's descriptors lead; sockets come and go with their clients."""
    for entry in Path("/proc/self/fd").iterdir():
        try:
            target = os.readlink(entry)
        except FileNotFoundError:
            continue
        if target.startswith("/") and "/fd" not in target:
            yield target
