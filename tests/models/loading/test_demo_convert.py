"""The demo's quantisation: bitsandbytes' numbers, on any CPU and thread count; what the fingerprint sees."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import bitsandbytes.functional as bnb
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from guanaco.kernels import nf4
from guanaco.models.loading.demo_convert import checkpoint_fingerprint, quantize_reproducibly

# Of three matrices through `digest`, on an AMD Zen 3. Of the third, torch's mean is not the exact one.
KNOWN = ["d0830af6", "f69d7101", "695b0774"]


def make_matrix(seed: int) -> Tensor:
    """float32 [192, 576], made of integers only, so that no library's random numbers matter."""
    index = torch.arange(192 * 576, dtype=torch.int64)
    mixed = (index * 2654435761 + seed * 40503) % 65521
    mixed = (mixed * mixed) % 65521
    return (mixed.double() / 65521 - 0.5).mul((index % 7 + 1).double()).to(torch.float32).view(192, 576)


def digests() -> list[str]:
    return [digest(quantize_reproducibly(make_matrix(seed))) for seed in (1, 2, 3)]


def digest(weight: nf4.Nf4Weight) -> str:
    parts = (weight.packed, weight.absmax, weight.nested_absmax, weight.nested_map, torch.tensor(weight.nested_offset))
    return hashlib.sha256(b"".join(part.numpy().tobytes() for part in parts if part is not None)).hexdigest()[:8]


@pytest.mark.parametrize("seed", range(20))
def test_bitsandbytes_numbers_apart_from_the_mean(seed: int) -> None:
    """Codes are equal; the offset is the mean rounded once, at most two steps from torch's; if it is equal, all is."""
    matrix = make_matrix(seed)
    packed, state = bnb.quantize_4bit(matrix, blocksize=64, compress_statistics=True, quant_type="nf4")
    weight = quantize_reproducibly(matrix)
    assert torch.equal(weight.packed, packed.view(-1))
    ours, theirs = torch.tensor(weight.nested_offset), state.offset
    assert abs(ours - theirs) <= 2 * torch.finfo(torch.float32).eps * theirs.abs()
    if ours == theirs:
        assert torch.equal(weight.absmax, state.absmax)
        assert weight.nested_absmax is not None
        assert torch.equal(weight.nested_absmax, state.state2.absmax)
    exact = weight.dequantize().double() - nf4.quantize(matrix).dequantize().double()
    assert exact.abs().max() <= 1e-2 * matrix.abs().max()


def test_bitsandbytes_own_bytes_where_the_mean_is_the_same() -> None:
    """That is the usual case, so that the comparison above is not an empty one."""
    equal = sum(
        quantize_reproducibly(m).nested_offset == nf4.quantize(m).nested_offset for m in map(make_matrix, range(20))
    )
    assert equal >= 5


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_the_same_bytes_on_any_number_of_threads(threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert digests() == KNOWN
    finally:
        torch.set_num_threads(before)


def test_the_same_bytes_without_vector_instructions(tmp_path: Path) -> None:
    """torch's code for any x86 CPU rounds some of its tables and sums differently; none of that may show."""
    script = "import test_demo_convert as t; print(*t.digests(), t.torch.backends.cpu.get_cpu_capability())"
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": "default", "PYTHONPATH": str(Path(__file__).parent)}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, cwd=tmp_path,
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    assert done.stdout.split() == [*KNOWN, "DEFAULT"]


def test_the_fingerprint_is_of_names_dtypes_shapes_and_bytes(tmp_path: Path) -> None:
    tensors = {"a": torch.arange(6, dtype=torch.float16), "b": torch.zeros(2, 3, dtype=torch.uint8)}

    def of(changed: dict[str, Tensor], metadata: dict[str, str] | None = None) -> str:
        save_file(changed, tmp_path / "model.safetensors", metadata=metadata)
        return checkpoint_fingerprint(tmp_path)

    expected = of(tensors)
    assert of(dict(reversed(tensors.items())), {"x": "y"}) == expected
    assert len(load_file(tmp_path / "model.safetensors")) == 2
    others = [
        {**tensors, "a": torch.arange(1, 7, dtype=torch.float16)},
        {**tensors, "a": tensors["a"].view(torch.int16)},
        {**tensors, "b": torch.zeros(3, 2, dtype=torch.uint8)},
        {"a": tensors["a"], "c": tensors["b"]},
        {"a": tensors["a"]},
    ]
    assert len({expected, *map(of, others)}) == 1 + len(others)


def test_the_demos_sampling_defaults_end_an_answer(demo_model_dir: Path) -> None:
    generation = json.loads((demo_model_dir / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [2]
    assert 0 < generation["temperature"] < 1
