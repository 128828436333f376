"""A program: the real server process with real scheduler, adapters and store over the made-up model, whose every token
can be worked out. Prints its port and its adapters' versions as a JSON line once it takes requests.

python oracle_server.py '{"adapters": 64, "slots": 8, "step_seconds": 0.01, "settings": {"max_num_seqs": 64}}'

step_seconds: what a step takes besides; Python's interpreter lock is free meanwhile, as in a native forward pass.
num_blocks: KV blocks of 16 positions. sources: adapters s0, s1, … below the root, to be loaded. SIGUSR1 prints a line
with what a request or a load may have left behind.
"""

import json
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from guanaco.adapters.versions.holds import Holder
from guanaco.server.api.http.access_log import start_logging
from guanaco.server.api.server import serve
from guanaco.server.engine.block_manager import BlockManager
from guanaco.server.engine.request import SampledToken, ScheduledBatch
from support.adapters.tiny_adapters import make_adapter
from support.server.adapter_server import TARGETS, AdapterServer, make_adapter_server
from support.server.engine_server import BLOCK_SIZE


def say(**fields: Any) -> None:
    print(json.dumps(fields), flush=True)


def slow_down(server: AdapterServer, seconds: float) -> None:
    real = server.model.run

    def run(batch: ScheduledBatch, begin: Callable[[], None]) -> tuple[SampledToken, ...]:
        tokens = real(batch, begin)
        time.sleep(seconds)
        return tokens

    server.model.run = run  # type: ignore[method-assign]


def left_behind(server: AdapterServer) -> dict[str, int]:
    """Zero, or as at the start, once nothing is asked any more."""
    scheduler = server.scheduler
    return {
        "sequences": len(scheduler.running) + len(scheduler.waiting),
        "blocks": scheduler.blocks.num_blocks - scheduler.blocks.num_free_blocks,
        "admitted": server.state.lifecycle.num_admitted,
        "streams": server.num_in_engine,
        "leases": len(server.registry.holds.held(Holder.REQUEST)),
        "files": len(os.listdir("/proc/self/fd")),
        "threads": threading.active_count(),
    }


def main() -> int:
    options = json.loads(sys.argv[1])
    stop_logging = start_logging("info")
    with tempfile.TemporaryDirectory() as folder:
        given = {f"a{i}": Path(folder, "given", f"a{i}") for i in range(options.get("adapters", 0))}
        for seed, path in enumerate(given.values()):
            make_adapter(path, TARGETS, 2, seed=seed, modules=("q_proj", "down_proj"))
        server = make_adapter_server(
            Path(folder),
            num_slots=options.get("slots", 8),
            command_line=given,
            keys=options.get("keys", ()),
            **options.get("settings", {}),
        )
        server.scheduler.blocks = BlockManager(options.get("num_blocks", 4096), BLOCK_SIZE)
        for number in range(options.get("sources", 0)):
            server.source(f"s{number}", seed=1000 + number)
        slow_down(server, options.get("step_seconds", 0.0))
        versions = {name: version for version, name in server.registry.names_by_version().items()}
        signal.signal(signal.SIGUSR1, lambda *_: say(**left_behind(server)))
        code = serve(
            server.state, server.sock, on_started=lambda: say(port=server.port, pid=os.getpid(), versions=versions)
        )
    stop_logging()
    return code


if __name__ == "__main__":
    sys.exit(main())
