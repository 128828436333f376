"""What every test shares: poisoned memory, one torch thread count, and the size of the long proofs."""

import atexit
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from support.kernels import fast_interpreter, triton_patches

# Triton reads this when it is first imported (bitsandbytes does that): the kernels run on the CPU in this process.
# What compiles them, for targets that are not here, is started as its own process without it.
os.environ["TRITON_INTERPRET"] = "1"

# bitsandbytes loads Triton, which lists its own leaks on standard error when Python ends. The last thing said is to be
# pytest's summary, which is out by then; a crash at exit still shows in the exit code.
atexit.register(lambda: os.dup2(os.open(os.devnull, os.O_WRONLY), 2))

# nohup ignores SIGHUP, and a shell's background job SIGINT. Children inherit that, and a server keeps to it. A handler
# that does nothing is as good here, and the children of this process begin with the signal's default.
for _number in (signal.SIGHUP, signal.SIGINT):
    if signal.getsignal(_number) is signal.SIG_IGN:
        signal.signal(_number, lambda *_: None)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--accept", action="store_true", help="run every proof with its full count (make accept)")
    parser.addoption("--browser", action="store_true", help="run the page in Chromium (make browser)")
    parser.addoption("--proofs", metavar="FILE", help="write how often each long proof was run, as JSON")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what is marked `accept`, unless --accept asks for it."""
    if config.getoption("--accept"):
        return
    left_out = [item for item in items if item.get_closest_marker("accept") is not None]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item.get_closest_marker("accept") is None]


@pytest.fixture(scope="session", autouse=True)
def _one_torch_thread() -> None:
    """Tiny matrices on two threads only wait for each other, by a factor of thirty on a busy machine."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _ptx_in_numpy() -> None:
    """Triton's interpreter runs inline asm, and doesn't compute on the raw bits of bfloat16."""
    triton_patches.install()
    fast_interpreter.install()


@pytest.fixture(scope="session")
def demo_model_dir() -> Path:
    """The demo's checkpoint in the cache that the server uses; fetched and converted once per machine."""
    from guanaco.models.loading.demo import DemoUnavailable, ensure_demo_model
    from guanaco.server.config import load_settings

    try:
        return ensure_demo_model(load_settings({}).cache_dir)
    except DemoUnavailable as error:
        pytest.skip(str(error))


_PROOFS = pytest.StashKey[dict[str, int]]()


@pytest.fixture(scope="session")
def proof_count(request: pytest.FixtureRequest) -> Callable[[int, int], int]:
    """`proof_count(small, full)`: how long a long proof runs; `full` under --accept."""
    full_run = bool(request.config.getoption("--accept"))
    proofs = request.config.stash.setdefault(_PROOFS, {})

    def count(small: int, full: int) -> int:
        test = os.environ.get("PYTEST_CURRENT_TEST", "?").rsplit(" ", 1)[0]
        proofs[test] = full if full_run else small
        return proofs[test]

    return count


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """A worker of pytest-xdist has ended: its proofs join the others'."""
    node.config.stash.setdefault(_PROOFS, {}).update(getattr(node, "workeroutput", {}).get("proofs", {}))


def pytest_sessionfinish(session: pytest.Session) -> None:
    proofs = session.config.stash.get(_PROOFS, {})
    workeroutput = getattr(session.config, "workeroutput", None)
    path = session.config.getoption("--proofs")
    if workeroutput is not None:
        workeroutput["proofs"] = proofs
    elif path:
        Path(path).write_text(json.dumps(proofs, indent=1))


@pytest.fixture
def nan_poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """`torch.empty` and friends return NaN (or the largest integer): an op that forgets a tile cannot pass."""

    def poison(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.dtype.is_floating_point:
            return tensor.fill_(float("nan"))
        return tensor if tensor.dtype == torch.bool else tensor.fill_(torch.iinfo(tensor.dtype).max)

    for name in ("empty", "empty_like", "empty_strided"):
        original = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *a, _original=original, **k: poison(_original(*a, **k)))
    original_new = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda self, *a, **k: poison(original_new(self, *a, **k)))
