"""The AVX-512 kernels on a processor without AVX-512: the same source, made of plain vectors, must give the bits of the
portable kernels, and the machine code that is shipped must have the instructions that it is written for. Neither says
that it ever ran on such a processor.
"""

import importlib.util
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from guanaco.kernels import load_ops, nf4
from guanaco.kernels.cpu import library as cpu_native

SOURCES = Path(__file__).resolve().parents[3] / "kernels/cpu/native"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The native library built with GUANACO_EMULATE_AVX512, in place of the installed one."""
    folder = tmp_path_factory.mktemp("emulated")
    flags = ["-std=c++17", "-O1", "-fPIC", "-ffp-contract=off", "-Wno-psabi", "-DGUANACO_EMULATE_AVX512"]
    builds = [
        subprocess.Popen(["g++", *flags, "-c", str(source), "-o", str(folder / f"{source.stem}.o")])
        for source in sorted(SOURCES.glob("*.cpp"))
        if source.stem != "isa_avx2"
    ]
    assert [build.wait(timeout=300) for build in builds] == [0] * len(builds)
    library = folder / "emulated.so"
    objects = [str(path) for path in sorted(folder.glob("*.o"))]
    subprocess.run(["g++", "-shared", "-o", str(library), *objects, "-pthread"], check=True, timeout=60)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu_native.importlib.util, "find_spec", lambda _: SimpleNamespace(origin=str(library)))
        cpu_native.library.cache_clear()
        assert cpu_native.available_isas()[:2] == ("avx512vnni", "avx512")
    yield
    cpu_native.library.cache_clear()


def ops_of(isa: str) -> Any:
    return load_ops("cpu", device=CPU, dtype=torch.float32, threads=2, cpu_isa=isa)


@pytest.mark.parametrize("isa", ["avx512vnni", "avx512"])
@pytest.mark.parametrize(("n", "k"), [(16, 64), (40, 192), (300, 256)])
def test_products_have_the_bits_of_the_portable_kernels(emulated: None, isa: str, n: int, k: int) -> None:
    generator = torch.Generator().manual_seed(n)
    weight = nf4.quantize(torch.randn(n, k, generator=generator), double_quant=True)
    ours, portable = ops_of(isa), ops_of("portable")
    mine, theirs = ours.prepare(ours.pack(weight), None), portable.prepare(portable.pack(weight), None)
    assert ours.pack(weight).data.tolist() != portable.pack(weight).data.tolist()  # another order, so not by accident
    for rows in (*range(1, 20), 31, 130):
        x = torch.randn(rows, k, generator=generator) * torch.rand(rows, 1, generator=generator) * 50
        got = ours.linear(x, mine, None, 0)
        assert torch.equal(got, portable.linear(x, theirs, None, 0)), f"{rows} rows"
        oracle = x.double() @ weight.dequantize().double().T
        assert ((got - oracle).norm() / oracle.norm()).item() < 3e-4


@pytest.mark.parametrize("isa", ["avx512vnni", "avx512"])
def test_what_is_not_finite_is_not_lost(emulated: None, isa: str) -> None:
    ops = ops_of(isa)
    handle = ops.prepare(nf4.quantize(torch.randn(32, 128), double_quant=True), None)
    x = torch.randn(6, 128)
    x[1, 5], x[3, 70] = float("nan"), float("inf")
    y = ops.linear(x, handle, None, 0)
    assert y.isfinite().all(dim=1).tolist() == [True, False, True, False, True, True]


def test_the_shipped_code_has_the_instructions() -> None:
    spec = importlib.util.find_spec("guanaco.kernels.cpu._native")
    assert spec is not None
    assert spec.origin is not None
    command = ["objdump", "-d", "--no-show-raw-insn", "-C", spec.origin]
    text = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    many = re.compile(r"^[0-9a-f]+ <guanaco::(\w+)::[^>\n]*multiply_many.*>:\n((?:.+\n)+)", re.MULTILINE)
    functions = dict(many.findall(text))
    for isa, wanted, absent in (
        ("avx512vnni", ("vpermw", "vpdpwssd"), ("vpmaddwd",)),
        ("avx512", ("vpermw", "vpmaddwd"), ("vpdpwssd",)),
        ("avx2", ("vpshufb", "vpmaddwd"), ("zmm",)),
        ("portable", ("pmaddwd",), ("ymm", "zmm")),
    ):
        code = functions[isa]
        assert all(word in code for word in wanted), isa
        assert not any(word in code for word in absent), isa
