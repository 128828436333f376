"""`guanaco bench rows`: the time of a step by its number of rows and by the instruction set of the CPU kernels.

A row is one token of one sequence in a step. All row counts and instruction sets take turns, so that a machine whose
speed changes meanwhile favours none. The shortest time of each counts, since a disturbance only makes a step longer.
"""

import json
import time
from collections.abc import Callable, Sequence
from itertools import pairwise

from rich.console import Console
from rich.table import Table

from guanaco.models.architectures.kv_cache import PagedKVCache
from guanaco.server.bootstrap.runtime import Runtime, build_runtime
from guanaco.server.config import Settings
from guanaco.server.engine.model_runner import ModelRunner
from guanaco.server.errors import CommandError

_NOISE = 1.02  # times that differ by less count as equal

RunRows = Callable[[int], None]
Times = dict[str, dict[int, float]]  # instruction set → rows → seconds


def measure_rows(settings: Settings, *, most: int, rounds: int, isas: str, as_json: bool) -> None:
    """Measure, and print one JSON line or a table.

    most: the largest number of rows. rounds: timed steps for each number. isas: instruction sets, comma-separated;
    empty: that of the settings. Raises CommandError if two of them are the same, and an OperatorError for one that this
    machine lacks.
    """
    runs: dict[str, RunRows] = {}
    for isa in [name.strip() for name in isas.split(",") if name.strip()] or [settings.cpu_isa]:
        chosen = Settings.model_validate({**settings.model_dump(), "cpu_isa": isa, "speculation": "off"})
        runtime = build_runtime(chosen, Console(stderr=True))
        name = getattr(runtime.ops, "isa", runtime.ops.name)
        if name in runs:
            raise CommandError(f"--isas {isas}: {name} is named twice")
        runs[name] = _runner(runtime, chosen, most).probe
    times = time_rows(runs, range(1, most + 1), rounds)
    if as_json:
        print(json.dumps({"model": settings.model or runtime.base.name, "threads": runtime.num_threads, "s": times}))
        return
    Console(highlight=False).print(_table(times))


def _runner(runtime: Runtime, settings: Settings, most: int) -> ModelRunner:
    """A runner with a KV cache of its own, for `most` tokens."""
    model = runtime.base.loaded.model
    num_blocks = -(-most // settings.block_size)
    kv = PagedKVCache(model.config, num_blocks, settings.block_size, runtime.kv_dtype, runtime.ops.device)
    return ModelRunner(model, kv, runtime.registry, runtime.slots, runtime.base.eos_ids)


def time_rows(
    runs: dict[str, RunRows], counts: Sequence[int], rounds: int, clock: Callable[[], float] = time.perf_counter
) -> Times:
    """The shortest seconds of a step for each instruction set and each number of rows."""
    best = {name: dict.fromkeys(counts, float("inf")) for name in runs}
    for run in runs.values():
        for rows in counts:
            run(rows)  # not timed: it allocates memory and fills caches
    for _ in range(rounds):
        for rows in counts:
            for name, run in runs.items():
                started = clock()
                run(rows)
                best[name][rows] = min(best[name][rows], clock() - started)
    return best


def remarks(times: Times) -> list[str]:
    """A sentence for each surprise: a step that takes longer than a step with more rows, and an instruction set that is
    slower than the one named before it."""
    found = []
    for name, seconds in times.items():
        for rows, value in seconds.items():
            quicker = [more for more, other in seconds.items() if more > rows and value > other * _NOISE]
            if quicker:
                found.append(f"{name}: {rows} rows take longer than {quicker[0]}")
    for first, second in pairwise(times):
        slower = [rows for rows, value in times[second].items() if value > times[first][rows] * _NOISE]
        if slower:
            found.append(f"{second} is slower than {first} at {', '.join(map(str, slower))} rows")
    return found


def _table(times: Times) -> Table:
    table = Table(box=None, pad_edge=False, caption="\n".join(remarks(times)) or None, caption_justify="left")
    table.add_column("rows", justify="right")
    for name in times:
        for title in (f"{name} ms", "of 1 row", "ms a row"):
            table.add_column(title, justify="right")
    for rows in next(iter(times.values())):
        cells = [str(rows)]
        for seconds in times.values():
            value = seconds[rows]
            cells += [f"{value * 1e3:.2f}", f"{value / seconds[1]:.2f}", f"{value * 1e3 / rows:.2f}"]
        table.add_row(*cells)
    return table
