"""Training on the base as it is served, nothing faked: the adapter belongs to it, and the server computes its loss."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from guanaco.server.bootstrap.runtime import build_runtime
from guanaco.server.config import load_settings
from guanaco.server.engine.awake_clock import awake_seconds
from guanaco.server.engine.request import LoraRef, Request, SamplingParams, Submit
from guanaco.server.training.base import find_base
from guanaco.server.training.job import TrainingRequest, prepare_data, run_training
from support.models.tiny_models import make_tiny_llama

SILENT = Console(file=open(os.devnull, "w"), stderr=False)  # noqa: SIM115


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model and forty conversations."""
    path = tmp_path_factory.mktemp("place")
    make_tiny_llama(path / "model")
    rows = [
        [{"role": "user", "content": f"Hello {n}?"}, {"role": "assistant", "content": f"Fine, thank you. {n % 7}"}]
        for n in range(40)
    ]
    (path / "chat.jsonl").write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    return path


def test_the_server_computes_the_trainers_loss_on_held_out_rows(place: Path, tmp_path: Path) -> None:
    flags: dict[str, Any] = {"model": str(place / "model"), "cache": str(tmp_path / "cache"), "offline": True}
    settings = load_settings({**flags, "threads": 1, "dtype": "float32"})
    given = {"epochs": 2.0, "rank": 4, "learning_rate": 2e-3}
    request = TrainingRequest(place / "chat.jsonl", "a", tmp_path / "out", tmp_path / "work", given)
    answer = run_training(settings, request, SILENT)
    held_out = prepare_data(request, find_base(settings, SILENT)).held_out.items
    served = load_settings(
        {**flags, "adapter": (f"a={request.out}",), "strict_base": True, "provider": "reference", "dtype": "float32"}
    )
    runtime = build_runtime(served, SILENT)
    losses = {}
    for name in ("a", None):
        entry = runtime.adapter(name)
        loras = () if entry is None else (LoraRef(entry.version),)
        found: list[float] = []
        for number, item in enumerate(held_out):
            params = SamplingParams(max_tokens=0, prompt_logprobs=0)
            asked = Request(f"{name} {number}", item.ids, params, loras, arrival_seconds=awake_seconds())
            runtime.engine.handle(Submit(asked))
            scores: list[Any] = []
            while runtime.engine.has_work:
                for output in runtime.engine.step().outputs:
                    scores += output.prompt_logprobs
            assert len(scores) == len(item.ids) - 1
            found += [-score.logprob for score, learned in zip(scores, item.learned[1:], strict=True) if learned]
        losses[name] = sum(found) / len(found)
    assert answer["eval_loss"] == pytest.approx(losses["a"], abs=1e-3)
    assert losses[None] > answer["eval_loss"] + 0.5, "the adapter has learned something"


def start(place: Path, out: Path, *more: str) -> subprocess.Popen[bytes]:
    """The command as a job runs it."""
    script = "from guanaco.server.commands.entry import main; main()"
    flags = "--name a --epochs 3 --rank 4 --eval-every 2 --save-every 2 --patience 0 --threads 1 --json --offline"
    where = [
        "--model",
        str(place / "model"),
        "--data",
        str(place / "chat.jsonl"),
        "--out",
        str(out / "a"),
        "--work",
        str(out / "work"),
    ]
    return subprocess.Popen(
        [sys.executable, "-c", script, "train", *flags.split(), *where, "--cache", str(place / "cache"), *more],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )


@pytest.mark.accept
@pytest.mark.timeout(1800)
def test_killed_at_up_to_twenty_moments_it_comes_to_the_same_tensors(place: Path, tmp_path: Path) -> None:
    whole = start(place, tmp_path / "whole")
    assert "adapter" in json.loads((whole.communicate(timeout=240)[0]).splitlines()[-1])
    expected = load_file(tmp_path / "whole" / "a" / "adapter_model.safetensors")
    rng = random.Random(0)
    killed, log = 0, tmp_path / "killed" / "work" / "train.jsonl"
    while killed < 20:
        process = start(place, tmp_path / "killed", "--resume")
        # Somewhere in the start or within the steps that it takes.
        begun = time.monotonic()
        lines = len(log.read_text().splitlines()) if log.exists() else 0
        while process.poll() is None and (not log.exists() or len(log.read_text().splitlines()) <= lines):
            if time.monotonic() - begun > 240:
                break
            time.sleep(0.002)
        time.sleep(rng.random() * 0.3)
        if process.poll() is not None:
            break
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=60)
        killed += 1
    last = start(place, tmp_path / "killed", "--resume")
    assert "adapter" in json.loads((last.communicate(timeout=240)[0]).splitlines()[-1])
    assert killed >= 5
    found = load_file(tmp_path / "killed" / "a" / "adapter_model.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)
