"""What activations and the KV cache are kept in: chosen by the settings, shown, or refused with what to do instead."""

import re
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from guanaco.kernels import load_ops
from guanaco.models.architectures.kv_cache import block_bytes
from guanaco.server.bootstrap.dtypes import cache_dtype, compute_dtype, expected_cache_dtype
from guanaco.server.bootstrap.gpu import Gpu
from guanaco.server.bootstrap.runtime import build_runtime
from guanaco.server.commands.doctor import run_doctor
from guanaco.server.commands.serve import _show_banner
from guanaco.server.config import SettingsError, load_settings
from guanaco.server.errors import CommandError
from support.models.tiny_models import make_tiny_llama

T4 = Gpu("Tesla T4", (7, 5), 16 << 30, 15 << 30)


class FakeOps:
    def __init__(self, name: str, *cache_dtypes: torch.dtype) -> None:
        self.name, self.dtype, self.cache_dtypes = name, torch.bfloat16, cache_dtypes


def chosen(text: str, *ops: Any) -> torch.dtype:
    return cache_dtype(load_settings({"kv_cache_dtype": text}), FakeOps(*ops))  # type: ignore[arg-type]


def test_float16_is_for_the_gpu() -> None:
    settings = load_settings({"dtype": "float16"})
    assert compute_dtype(settings, "triton", T4) == torch.float16
    with pytest.raises(CommandError, match="--dtype float16 is for the triton provider; cpu has"):
        compute_dtype(settings, "cpu", None)


def test_the_cache_follows_the_activations_or_has_8_bits() -> None:
    assert chosen("auto", "cpu") == torch.bfloat16
    both = ("triton", torch.int8, torch.float8_e4m3fn)
    assert (chosen("int8", *both), chosen("fp8", *both)) == (torch.int8, torch.float8_e4m3fn)
    assert load_settings({}).kv_cache_dtype == "auto"
    with pytest.raises(SettingsError, match=r"--kv-cache-dtype: Input should be 'auto', 'int8' or 'fp8'"):
        load_settings({"kv_cache_dtype": "int4"})


def test_what_cannot_be_is_refused_with_what_to_do_instead() -> None:
    with pytest.raises(CommandError, match=r"--kv-cache-dtype fp8 needs .* 8\.9 or later: use int8"):
        chosen("fp8", "triton", torch.int8)
    with pytest.raises(CommandError, match="--kv-cache-dtype int8 is for the triton and reference providers; cpu"):
        chosen("int8", "cpu")
    cpu = load_ops("cpu", device=torch.device("cpu"), dtype=torch.bfloat16)
    with pytest.raises(CommandError, match="cpu keeps K and V in --dtype"):
        cache_dtype(load_settings({"kv_cache_dtype": "fp8"}), cpu)


def test_a_refusal_comes_before_the_model_is_loaded(tmp_path: Path) -> None:
    settings = load_settings({"model": str(tmp_path / "none"), "provider": "cpu", "kv_cache_dtype": "int8"})
    with pytest.raises(CommandError, match="--kv-cache-dtype int8"):
        build_runtime(settings, Console(file=StringIO()))


def test_8_bits_are_planned_served_and_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = make_tiny_llama(tmp_path / "model")
    fields = {"model": str(model), "provider": "reference", "kv_cache_memory": "64KiB", "cache": str(tmp_path)}
    tokens = {}
    for kind, dtype in (("auto", torch.float32), ("int8", torch.int8), ("fp8", torch.float8_e4m3fn)):
        settings, text = load_settings({**fields, "kv_cache_dtype": kind}), StringIO()
        runtime = build_runtime(settings, Console(file=text))
        config = runtime.base.loaded.config
        assert runtime.kv_dtype == expected_cache_dtype(settings) == dtype
        assert runtime.plan.kv_bytes == runtime.plan.num_blocks * block_bytes(config, 16, dtype)
        tokens[kind] = runtime.plan.kv_tokens
        _show_banner(Console(file=text, width=160), settings, runtime, 8000, has_keys=False)
        name = str(dtype).removeprefix("torch.")
        assert f"KV cache {runtime.plan.kv_bytes / 1024:.1f} KiB" in text.getvalue()
        assert re.search(rf"KV cache +{name}, ", text.getvalue())
        run_doctor(settings, as_json=True)
        assert f"a token in {name}" in capsys.readouterr().out
    # Heads of 16 elements: 64 bytes in float32; 16 with a scale of 4 in 8 bits.
    assert tokens["int8"] == tokens["fp8"] == pytest.approx(tokens["auto"] * 64 / 20, rel=0.1)
