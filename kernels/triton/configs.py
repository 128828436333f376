"""Tile configurations of the Triton kernels, per compute capability, in one table.

Chosen by counting machine code (`guanaco bench kernels`) and by computing bytes in flight; none was timed on a GPU.
Knows no kernel's code. A tensor on the CPU means Triton's interpreter, which gets the tiles of sm_80.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache

import torch

# Compute capabilities that the kernels are compiled for.
TARGETS = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")
# Gives a thread all registers that it can have: with fewer, ptxas would spill some to fit more threads.
NO_SPILLS = {"maxnreg": 255}
_INTERPRETED = "sm_80"
# A low number, so that the tests' small shapes cover both cases: split along k, and not split.
_INTERPRETED_MULTIPROCESSORS = 4


@dataclass(frozen=True)
class DotConfig:
    """A tile of `nf4_dot`: `block_n` weight rows times `columns` rows of the batch, `groups` groups of 64 weights per
    loop turn."""

    columns: int  # the batch is padded to this many rows
    block_n: int
    groups: int  # 1, 2 or 4; 1 if the number of groups in a row is no multiple of it
    num_warps: int
    num_stages: int  # loop turns of weights in flight, plus one


# With four warps Triton 3.9 uses warp-group products on sm_90 (a fence each: 5.5 issue slots a weight, not 3.6) and, on
# sm_100, products from tensor memory, which pass the decoded weights through shared memory. So those have two warps.
# Every program reads all activations of its part of k, so tiles are large. Shared memory: 25 to 50 KiB per program.
_AMPERE = (
    DotConfig(8, 128, 2, 2, 4),
    DotConfig(16, 128, 2, 4, 3),
    DotConfig(32, 128, 2, 4, 3),
    DotConfig(64, 128, 1, 4, 3),
)
_HOPPER = (
    DotConfig(8, 128, 2, 2, 4),
    DotConfig(16, 128, 2, 2, 3),
    DotConfig(32, 64, 2, 2, 3),
    DotConfig(64, 64, 1, 2, 3),
)
# With the tile of 128 x 8 ptxas spills a few registers here.
_BLACKWELL_CONSUMER = (DotConfig(8, 64, 2, 2, 4), *_AMPERE[1:])
_DOT = {
    "sm_80": _AMPERE,
    "sm_86": _AMPERE,
    "sm_89": _AMPERE,
    "sm_90": _HOPPER,
    "sm_100": _HOPPER,
    "sm_120": _BLACKWELL_CONSUMER,
}
COLUMNS = (8, 16, 32, 64)
DOT_MAX_ROWS = COLUMNS[-1]
Tiles = dict[tuple[int, int], DotConfig]  # (columns, k)
# The fewest groups along k for one program. With fewer it would spend most of its time on filling the pipeline.
_LEAST_GROUPS = 8
_MOST_SPLITS = 16
_PROGRAMS_PER_MULTIPROCESSOR = 2


def dot_config(target: str, rows: int, k: int) -> DotConfig:
    """The tile for 1 to 64 rows. KeyError for targets without tensor-core code in Triton 3.9 (sm_75)."""
    config = next(c for c in _DOT[target] if rows <= c.columns)
    if _pretended is None and (config.columns, k) in _tuned:
        return _tuned[config.columns, k]
    if k // 64 % config.groups == 0:
        return config
    # With one group per turn the tile of 128 x 8 spills on sm_90 and sm_100, too.
    block_n = 64 if config.columns == 8 else config.block_n
    return DotConfig(config.columns, block_n, 1, config.num_warps, config.num_stages)


def dot_splits(config: DotConfig, n: int, k: int, num_multiprocessors: int) -> int:
    """The number of programs that split k, a power of two: enough to fill the device, but none with too little work."""
    tiles, splits = -(-n // config.block_n), 1
    wanted = num_multiprocessors * _PROGRAMS_PER_MULTIPROCESSOR
    while tiles * splits < wanted and splits < _MOST_SPLITS and k // 64 >= 2 * splits * _LEAST_GROUPS:
        splits *= 2
    return splits


def target_of(device: torch.device) -> str:
    """The device's compute capability as Triton names targets (sm_80), or the next lower one that is listed. Raises
    ValueError for a GPU that is older than all of them."""
    return (_pretended or _device(device.type, device.index))[0]


def multiprocessors(device: torch.device) -> int:
    """How many multiprocessors the device has."""
    return (_pretended or _device(device.type, device.index))[1]


_pretended: tuple[str, int] | None = None
_tuned: Tiles = {}


def use_tuned(tiles: Tiles) -> None:
    """Use these tiles from now on, for this process's own GPU. Inside `pretending` the usual tiles stay in use."""
    _tuned.update(tiles)


@contextmanager
def tuned(tiles: Tiles) -> Iterator[None]:
    """Use these tiles inside a `with` block, beside those in use before it."""
    before = dict(_tuned)
    use_tuned(tiles)
    try:
        yield
    finally:
        _tuned.clear()
        use_tuned(before)


@contextmanager
def pretending(target: str, num_multiprocessors: int) -> Iterator[None]:
    """Treat any device as a GPU of this target, to compile ahead of time. Not safe with several threads."""
    global _pretended
    before, _pretended = _pretended, (target, num_multiprocessors)
    try:
        yield
    finally:
        _pretended = before


@lru_cache(maxsize=16)
def _device(kind: str, index: int | None) -> tuple[str, int]:
    if kind != "cuda":
        return _INTERPRETED, _INTERPRETED_MULTIPROCESSORS
    properties = torch.cuda.get_device_properties(index if index is not None else torch.cuda.current_device())
    return nearest_target(10 * properties.major + properties.minor), properties.multi_processor_count


def nearest_target(capability: int) -> str:
    """The target for a compute capability: 87 → sm_86. Raises ValueError for one below all targets."""
    known = [int(t.removeprefix("sm_")) for t in TARGETS if int(t.removeprefix("sm_")) <= capability]
    if not known:
        raise ValueError(f"compute capability {capability / 10} is too old: {TARGETS[0]} is the oldest")
    return f"sm_{max(known)}"
