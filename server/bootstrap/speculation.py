"""Makes the source of drafts that the settings choose, with the times of steps on this machine.

The step's costs are timed once for each machine, model and setting that change them, and kept in a file of the cache.
Used by `runtime`.
"""

import hashlib
import json
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path

from guanaco.kernels import Ops
from guanaco.models.errors import GuanacoError
from guanaco.models.formats.strict_json import read_json
from guanaco.server.bootstrap.machine import look
from guanaco.server.config import Settings
from guanaco.server.engine.speculation.costs import TYPICAL, StepCosts
from guanaco.server.engine.speculation.speculator import MAX_DRAFT_TOKENS, Speculator
from guanaco.server.engine.speculation.suffix import PastAnswers

logger = logging.getLogger(__name__)

# Row counts that are timed: the kernels differ between them. Larger steps count as on the line through the last two.
_ROWS = (1, 2, 3, 4, 5, 6, 8, 12, 16)
_LEAST_ROUNDS, _MOST_ROUNDS = 2, 8
_MOST_SECONDS = 2.0  # after this time only the first _LEAST_ROUNDS rounds still begin
_CHECKED_ROWS = (1, 4)  # row counts that each later start times again
_CLEARLY = 1.4  # stored times this many times as long as the present ones are measured again
_FORMAT = 1  # version of the file


def make_drafting(
    settings: Settings,
    ops: Ops,
    run_rows: Callable[[int], None],
    fingerprint: str,
    encode: Callable[[str], list[int]] | None = None,
) -> Speculator | None:
    """The source of drafts; None: drafts are off.

    run_rows: computes a step of so many rows. fingerprint: the base's. encode: text within an answer → token ids.

    `auto` is lookup with the `cpu` provider, whose rows have the same bits at any number of rows. On a GPU no step has
    been timed so far, so there are no drafts unless they are asked for.
    """
    method = settings.speculation
    if method == "off" or (method == "auto" and ops.name != "cpu"):
        return None
    if ops.name == "triton":
        # Timing would compile a kernel for each row count: minutes, at each new version of Triton.
        return _speculator(settings, TYPICAL, encode)
    key = _key(settings, ops, fingerprint)
    path = settings.cache_dir / "step-costs" / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"
    costs = _stored(path, key)
    if costs is None or is_disturbed(costs, run_rows):
        costs = _shorter(measure(run_rows), costs)
        _store(path, key, costs)
    return _speculator(settings, costs, encode)


def _speculator(settings: Settings, costs: StepCosts, encode: Callable[[str], list[int]] | None) -> Speculator:
    is_suffix = settings.speculation == "suffix"
    keeps = is_suffix and settings.speculation_memory > 0
    past = PastAnswers(settings.speculation_memory) if keeps else None
    return Speculator(costs, encode, weighs_places=is_suffix, past=past)


def measure(run_rows: Callable[[int], None], clock: Callable[[], float] = time.perf_counter) -> StepCosts:
    """Time steps of each row count. The shortest time counts, since disturbances only make a step longer. Each round
    times all row counts, so a disturbance of some tenths of a second spoils one round only."""
    begun, best = clock(), dict.fromkeys(_ROWS, float("inf"))
    for rows in _ROWS:
        run_rows(rows)  # memory is allocated, and caches are filled
    for number in range(_MOST_ROUNDS):
        if number >= _LEAST_ROUNDS and clock() - begun > _MOST_SECONDS:
            break
        for rows in _ROWS:
            started = clock()
            run_rows(rows)
            best[rows] = min(best[rows], clock() - started)
    return StepCosts(best.items())


def _shorter(measured: StepCosts, before: StepCosts | None) -> StepCosts:
    """For each row count the shorter of two times: the machine may be busy at either one."""
    if before is None:
        return measured
    return StepCosts((rows, min(seconds, before.seconds(rows))) for rows, seconds in measured.points)


def is_disturbed(
    costs: StepCosts, run_rows: Callable[[int], None], clock: Callable[[], float] = time.perf_counter
) -> bool:
    """Whether steps are clearly shorter now than when the costs were timed, because other programs ran then. Two small
    row counts are timed once, after one step that does not count. If other programs run now, the result is False."""
    for rows in _CHECKED_ROWS:
        run_rows(rows)
        started = clock()
        run_rows(rows)
        if (clock() - started) * _CLEARLY < costs.seconds(rows):
            return True
    return False


def _key(settings: Settings, ops: Ops, fingerprint: str) -> str:
    """Everything that a step's time depends on."""
    machine = look()
    threads = settings.threads or machine.cpu_count
    parts = (_FORMAT, machine.cpu_name, machine.cpu_flags, threads, ops.name, getattr(ops, "isa", ""))
    return json.dumps([*parts, settings.dtype, settings.block_size, fingerprint, MAX_DRAFT_TOKENS])


def _stored(path: Path, key: str) -> StepCosts | None:
    """The costs in a file that `_store` wrote; None if there is none that can be used."""
    try:
        content = read_json(path)
        points = [(int(rows), float(seconds)) for rows, seconds in content["seconds"]]
        return StepCosts(points) if content["key"] == key else None
    except (OSError, GuanacoError, KeyError, TypeError, ValueError, AssertionError):
        return None


def _store(path: Path, key: str, costs: StepCosts) -> None:
    """Keep the costs for the next start. A cache that cannot be written costs the time of measuring again, no more."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}.part")
        part.write_text(json.dumps({"key": key, "seconds": costs.points}))
        part.replace(path)
    except OSError as error:
        logger.warning("step costs could not be kept (%s): the next start measures them again", error.strerror)
