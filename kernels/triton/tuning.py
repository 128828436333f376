"""Tiles of `nf4_dot` that were timed on this machine's GPU, instead of the ones that counts chose (configs.py).

Optional: `guanaco bench kernels --tune` times the candidates and writes a file. A server uses the file if it was made
for the same GPU, Triton and kernel. A tile changes the order of sums, so results differ within the kernels' tolerance.
The caller passes the clock. NEVER RUN on a GPU: tested with a made-up clock in Triton's interpreter.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields, replace
from itertools import product
from pathlib import Path

import torch
import triton

from guanaco.kernels.triton import configs as triton_configs
from guanaco.kernels.triton.configs import COLUMNS, DotConfig, Tiles
from guanaco.kernels.triton.products import nf4_dot
from guanaco.kernels.triton.products.pack import TritonNf4

# A candidate is wrong if its result differs by more than this from the usual tile's, however fast it is.
_ALLOWED = 1e-3
_CHOICES = {"block_n": (64, 128), "groups": (1, 2), "num_warps": (2, 4), "num_stages": (2, 3, 4)}
Seconds = Callable[[Callable[[], None]], float]  # times a launch


def card_key(name: str, target: str) -> dict[str, str]:
    """What a file of tiles is valid for: the GPU, and everything that changes the code of a tile."""
    sources = [Path(str(module.__file__)).read_bytes() for module in (nf4_dot, triton_configs)]
    digest = hashlib.sha256(b"".join(sources)).hexdigest()[:16]
    return {"card": name, "target": target, "triton": str(triton.__version__), "kernel": digest}


def candidates(usual: DotConfig, k: int) -> list[DotConfig]:
    """The usual tile first, then the other tiles that fit rows of k weights."""
    others = [replace(usual, **dict(zip(_CHOICES, values, strict=True))) for values in product(*_CHOICES.values())]
    return [usual, *(c for c in others if c != usual and k // 64 % c.groups == 0)]


def tune(shapes: Sequence[tuple[int, int]], device: torch.device, seconds: Seconds) -> Tiles:
    """The fastest tile for each (columns, k), over all `shapes` (n, k) of matrices. No entry where the usual tile wins.

    seconds: a function that times a launch. Tiles that don't compile, don't fit or give wrong products are left out.
    """
    found: Tiles = {}
    for k in sorted({k for _, k in shapes}):
        weights = [_random_weight(n, k, device) for n in sorted({n for n, other in shapes if other == k})]
        for columns in COLUMNS:
            usual = triton_configs.dot_config(triton_configs.target_of(device), columns, k)
            timed = [(_time(c, columns, k, weights, usual, seconds), i) for i, c in enumerate(candidates(usual, k))]
            _, best = min((time, i) for time, i in timed if time is not None)
            if best:
                found[columns, k] = candidates(usual, k)[best]
    return found


def _time(
    config: DotConfig, columns: int, k: int, weights: Sequence[TritonNf4], usual: DotConfig, seconds: Seconds
) -> float | None:
    """Seconds of all products with this tile; None if the tile can't be used."""
    total = 0.0
    for weight in weights:
        device = weight.words.device
        x = torch.randn(columns, k, generator=torch.Generator().manual_seed(0)).half().to(device)
        ones = torch.ones(columns, device=device)
        y, expected = (torch.empty(columns, weight.n, device=device) for _ in range(2))

        def launch(out: torch.Tensor, x: torch.Tensor = x, ones: torch.Tensor = ones, w: TritonNf4 = weight) -> None:
            nf4_dot.product(x, ones, w, out)

        with triton_configs.tuned({(columns, k): usual}):
            launch(expected)
        with triton_configs.tuned({(columns, k): config}):
            try:
                launch(y)
                if not float((y - expected).norm()) <= _ALLOWED * float(expected.norm()):
                    return None
                total += seconds(lambda y=y, launch=launch: launch(y))  # type: ignore[misc]
            except (RuntimeError, triton.TritonError):  # pack=2 not proven, too much shared memory
                return None
    return total


def _random_weight(n: int, k: int, device: torch.device) -> TritonNf4:
    generator = torch.Generator().manual_seed(n + k)
    words = torch.randint(-(2**31), 2**31 - 1, (n, k // 8), dtype=torch.int32, generator=generator)
    groups = n * k // 64
    absmax = torch.randint(0, 256, (groups,), dtype=torch.uint8, generator=generator)
    nested = torch.full((-(-groups // 256), 2), 0.5)
    return TritonNf4(words, absmax, nested, torch.linspace(-1, 1, 256)).to(device)


# ---- the file


def save(path: Path, key: dict[str, str], tiles: Tiles) -> None:
    """Write the file in one step, replacing an existing one."""
    entries = [{"k": k, **asdict(config)} for (_, k), config in sorted(tiles.items())]
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False) as file:
        json.dump({"key": key, "tiles": entries}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(file.name, path)


def load(path: Path, key: dict[str, str]) -> tuple[Tiles, str]:
    """(tiles, a message about them). No tiles if the file is missing, damaged or made for something else."""
    if not path.exists():
        return {}, ""
    try:
        content = json.loads(path.read_text())
        tiles = {(entry["columns"], entry["k"]): _config(entry) for entry in content["tiles"]}
        stored = content["key"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return {}, f"tuned kernels ignored: {path} is damaged ({type(error).__name__}): tune again, or remove it"
    if stored != key:
        return {}, f"tuned kernels ignored: {path} was made for another card, Triton or kernel: tune again"
    return tiles, f"{len(tiles)} tiles as they were timed on this card ({path})"


def _config(entry: dict[str, int]) -> DotConfig:
    """The tile of a file's entry. Raises ValueError if it isn't one of the candidates."""
    config = DotConfig(**{field.name: entry[field.name] for field in fields(DotConfig)})
    chosen = asdict(config)
    if config.columns not in COLUMNS or any(chosen[name] not in values for name, values in _CHOICES.items()):
        raise ValueError(f"not a tile: {entry}")
    if entry["k"] % (64 * config.groups):
        raise ValueError(f"k is no multiple of the tile's groups: {entry}")
    return config
