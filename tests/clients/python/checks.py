"""What the scripts of this folder share: `@check` names a check, `run_checks` runs them all.

Each check becomes one JSON line on the standard output, {check, ok, detail}, which run.py collects.
"""

import asyncio
import inspect
import json
import os
import time
import urllib.request
from collections.abc import Callable
from typing import Any

URL = os.environ["GUANACO_URL"]
MODEL = os.environ["GUANACO_MODEL"]
QUESTION = "How do I boil an egg?"

_checks: list[tuple[str, Callable[[], Any]]] = []


def check(name: str) -> Callable[[Callable[[], Any]], Callable[[], Any]]:
    """Register a function, or a coroutine function, as a check. It asserts; what it returns is shown as the detail."""

    def register(function: Callable[[], Any]) -> Callable[[], Any]:
        _checks.append((name, function))
        return function

    return register


def run_checks() -> None:
    """Run every check, whatever the others found."""
    for name, function in _checks:
        try:
            found = asyncio.run(function()) if inspect.iscoroutinefunction(function) else function()
            ok, detail = True, "" if found is None else str(found)
        except Exception as error:
            ok, detail = False, f"{type(error).__name__}: {error}"
        print("\n" + json.dumps({"check": name, "ok": ok, "detail": " ".join(detail.split())[:300]}), flush=True)


def requests_in_work() -> int:
    """How many requests the server's engine runs now."""
    with urllib.request.urlopen(URL + "/metrics") as reply:
        lines = reply.read().decode().splitlines()
    return int(sum(float(line.split()[-1]) for line in lines if line.startswith("vllm:num_requests_running")))


def becomes_idle(seconds: float = 30) -> bool:
    """Whether the engine has nothing left to do, within some time."""
    end = time.monotonic() + seconds
    while requests_in_work():
        if time.monotonic() > end:
            return False
        time.sleep(0.1)
    return True
