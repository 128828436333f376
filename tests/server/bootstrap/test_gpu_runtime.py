"""Which provider is taken where, and what is said of the Triton kernels: that they have never run on a GPU."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from support.models.tiny_models import make_tiny_llama

pytest.importorskip("triton")

import guanaco.kernels.triton.ops  # noqa: F401  while kernels are made for the interpreter: a test switches that off
from guanaco.kernels import NativeUnavailable
from guanaco.server.bootstrap import gpu
from guanaco.server.bootstrap import gpu_runtime as gpu_wiring
from guanaco.server.bootstrap import runtime as wiring
from guanaco.server.bootstrap.gpu import Gpu, device_of, no_gpu_text
from guanaco.server.bootstrap.runtime import _load_provider
from guanaco.server.commands import doctor
from guanaco.server.commands.main import app
from guanaco.server.config import load_settings
from guanaco.server.errors import CommandError

T4 = Gpu("Tesla T4", (7, 5), 16 << 30, 15 << 30)
L4 = Gpu("NVIDIA L4", (8, 9), 24 << 30, 20 << 30)


class FakeOps:
    name = "triton"


def test_auto_takes_a_gpu_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, object]] = []

    def load(name: str, **options: object) -> FakeOps:
        asked.append({"name": name, **options})
        return FakeOps()

    monkeypatch.setattr(wiring, "load_ops", load)
    monkeypatch.setattr(wiring, "find_gpu", lambda: L4)
    _, why = _load_provider(load_settings({}), 2)
    assert why == "NVIDIA L4, sm_89"
    assert (asked[0]["name"], asked[0]["device"], asked[0]["dtype"]) == (
        "triton",
        torch.device("cuda", 0),
        torch.bfloat16,
    )
    monkeypatch.setattr(wiring, "find_gpu", lambda: T4)
    _load_provider(load_settings({"cuda_graphs": False}), 2)
    assert (asked[1]["dtype"], asked[1]["side_stream"]) == (torch.float16, False)
    _load_provider(load_settings({"provider": "cpu"}), 2)
    assert asked[2]["name"] == "cpu"


def test_a_gpu_that_cannot_be_used_is_the_reason_for_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(name: str, **options: object) -> FakeOps:
        if name == "triton":
            raise NativeUnavailable("Triton is not installed")
        return FakeOps()

    monkeypatch.setattr(wiring, "load_ops", load)
    monkeypatch.setattr(wiring, "find_gpu", lambda: L4)
    assert "the GPU is not used: Triton is not installed" in _load_provider(load_settings({}), 2)[1]
    with pytest.raises(CommandError, match="Triton is not installed"):
        _load_provider(load_settings({"provider": "triton"}), 2)


def test_without_a_gpu_the_provider_is_refused_with_advice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import triton

    model = make_tiny_llama(tmp_path / "model", intermediate_size=192)
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    done = CliRunner().invoke(app, ["generate", "hello", "--model", str(model), "--provider", "triton"])
    assert done.exit_code == 2
    assert "needs an NVIDIA GPU" in done.output
    assert "--provider cpu" in done.output
    assert done.output.count("\n") == 1, "one line"


@pytest.mark.parametrize(
    ("cuda", "error", "reason", "driver"),
    [
        (None, None, "is built without CUDA", "580"),
        (
            "13.0",
            "Found no NVIDIA driver on your system. Please check",
            "Found no NVIDIA driver",
            "580",
        ),
        (
            "12.8",
            "The NVIDIA driver is too old (found version 11040). Please",
            "too old (found",
            "525.60",
        ),
        ("13.0", None, "the driver shows no device", "580"),
    ],
)
def test_why_there_is_no_gpu(
    cuda: str | None, error: str | None, reason: str, driver: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch's own words where it has some; the driver's version and what a container needs in each case."""

    def init() -> None:
        if error is not None:
            raise RuntimeError(error)

    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.cuda, "init", init)
    text = no_gpu_text()
    assert reason in text
    assert f"driver {driver} or newer" in text
    assert "`--gpus all`" in text
    assert "Please" not in text


def test_what_the_kernels_run_on(monkeypatch: pytest.MonkeyPatch) -> None:
    class Ops:
        device = torch.device("cuda", 0)

    class Native:
        device, isa = torch.device("cpu"), "avx2"

    monkeypatch.setattr(gpu, "find_gpu", lambda: L4)
    assert device_of(Ops()) == "NVIDIA L4, sm_89"  # type: ignore[arg-type]
    assert device_of(Native()) == "CPU, avx2"  # type: ignore[arg-type]


def test_it_generates_and_says_that_it_never_ran_on_a_gpu(tmp_path: Path) -> None:
    """The interpreter, taught inline PTX by the tests, is good enough for a token."""
    model = make_tiny_llama(tmp_path / "model", intermediate_size=192)
    options = ["--model", str(model), "--max-tokens", "1", "--temperature", "0", "--cache", str(tmp_path / "cache")]
    tokens = {}
    for provider in ("triton", "reference"):
        done = CliRunner().invoke(app, ["generate", "hello", *options, "--provider", provider])
        assert done.exit_code == 0, done.output
        tokens[provider] = done.stdout
    assert tokens["triton"].strip()
    assert tokens["triton"] == tokens["reference"]
    settings = load_settings({"provider": "triton", "model": str(model)})
    ops, why = _load_provider(settings, 1)
    assert "for tests only" in why

    class Model:
        is_fused = True

    (note,) = wiring.gpu_notes(settings, ops, Model())  # type: ignore[arg-type]
    assert "never run on a GPU" in note


def test_doctor_says_what_ran_where(monkeypatch: pytest.MonkeyPatch) -> None:
    findings = {
        f["name"]: f for f in json.loads(CliRunner().invoke(app, ["doctor", "--json", "--offline"]).stdout)["findings"]
    }
    assert "never run on a GPU" in findings["triton"]["value"]
    assert "`auto` takes cpu" in findings["kernel providers"]["value"]
    monkeypatch.setattr(doctor, "find_gpu", lambda: L4)
    findings = {
        f["name"]: f for f in json.loads(CliRunner().invoke(app, ["doctor", "--json", "--offline"]).stdout)["findings"]
    }
    assert findings["GPU"]["value"] == "NVIDIA L4, sm_89, 24.0 GiB, 20.0 GiB free"
    assert "`auto` takes triton" in findings["kernel providers"]["value"]


def test_tuned_tiles_are_used_unless_they_are_not_wanted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from guanaco.kernels.triton import configs as triton_configs
    from guanaco.kernels.triton import tuning as triton_tuning

    monkeypatch.setattr(gpu_wiring, "find_gpu", lambda: L4)
    monkeypatch.setattr(triton_configs, "_tuned", {})
    settings = load_settings({"cache": str(tmp_path)})
    ops: Any = FakeOps()
    assert gpu_wiring.use_tuned_kernels(settings, ops) == ()
    tile = triton_configs.DotConfig(8, 64, 1, 2, 3)
    path = gpu_wiring.tuned_path(settings, L4.name)
    triton_tuning.save(path, triton_tuning.card_key(L4.name, L4.target), {(8, 4096): tile})
    assert gpu_wiring.use_tuned_kernels(load_settings({"cache": str(tmp_path), "tuned_kernels": False}), ops) == ()
    assert triton_configs._tuned == {}
    (note,) = gpu_wiring.use_tuned_kernels(settings, ops)
    assert "1 tiles as they were timed on this card" in note
    assert triton_configs.dot_config("sm_89", 5, 4096) == tile


def test_tuning_needs_a_gpu() -> None:
    done = CliRunner().invoke(app, ["bench", "kernels", "--tune"])
    assert done.exit_code == 2
    assert "--tune times kernels on an NVIDIA GPU" in done.output
