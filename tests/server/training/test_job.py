"""A whole training on a tiny model: what comes out, what a failed one leaves, and that a resume changes nothing."""

import errno
import json
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from rich.console import Console
from safetensors.torch import load_file

from guanaco.adapters.peft.weights import load_adapter
from guanaco.models.architectures.registry import projection_shapes
from guanaco.models.error_codes import ErrorCode
from guanaco.models.loading.checkpoint import open_checkpoint
from guanaco.server.config import Settings, load_settings
from guanaco.server.training import job, loop, watching
from guanaco.server.training.base import find_base
from guanaco.server.training.errors import TrainingError, TrainingStopped
from guanaco.server.training.job import TrainingRequest, prepare_data, run_training
from support.models.tiny_models import make_tiny_llama

FINGERPRINT = "ab" * 32
SILENT = Console(file=open(os.devnull, "w"), stderr=False)  # noqa: SIM115


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("model"), dtype=torch.float32)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "chat.jsonl"
    rows = [
        [
            {"role": "user", "content": f"Hello {n}, how are you?"},
            {"role": "assistant", "content": f"Fine{'.' * (n % 7)}"},
        ]
        for n in range(20)
    ]
    path.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    return path


@pytest.fixture
def settings(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    def load_frozen(*_: Any) -> tuple[Any, str]:
        frozen = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        return frozen.requires_grad_(False), FINGERPRINT

    monkeypatch.setattr(job, "load_frozen", load_frozen)
    return load_settings({"model": str(model), "cache": str(tmp_path / "cache"), "offline": True, "threads": 1})


Request = Callable[..., TrainingRequest]


@pytest.fixture
def request_for(data: Path, tmp_path: Path) -> Request:
    def make(name: str = "a", resume: bool = False, recipe: str = "default", **given: Any) -> TrainingRequest:
        fields = {"rank": 4, "epochs": 2.0, "save_every": 3, "eval_every": 3, "patience": 0, **given}
        return TrainingRequest(
            data, name, tmp_path / "out" / name, tmp_path / "work" / name, fields, recipe=recipe, resume=resume
        )

    return make


def tensors(request: TrainingRequest) -> dict[str, torch.Tensor]:
    return load_file(request.out / "adapter_model.safetensors")


def equal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def test_the_adapter_says_what_it_is_and_the_log_what_happened(
    settings: Settings, request_for: Request, model: Path, data: Path
) -> None:
    request = request_for(epochs=4.0, learning_rate=2e-2)
    answer = run_training(settings, request, SILENT)
    assert answer["adapter"] == str(request.out)
    assert answer["steps"] == 18
    lines = [json.loads(line) for line in (request.work / "train.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 19))
    assert all(line["steps"] == 18 and line["learning_rate"] >= 0 and line["tokens_per_second"] > 0 for line in lines)
    assert [line["step"] for line in lines if "eval_loss" in line] == [3, 6, 9, 12, 15, 18]
    assert lines[-1]["tokens"] == answer["trained_tokens"] > lines[0]["tokens"] > 0
    assert answer["eval_loss"] == min(line["eval_loss"] for line in lines if "eval_loss" in line)
    assert lines[-1]["loss"] < lines[0]["loss"] / 2
    loaded = load_adapter(request.out, shapes(model))
    assert loaded.base_fingerprint == FINGERPRINT
    made = job.trained_before(request.out)
    assert made is not None
    assert (made["rows"], made["seed"], made["recipe"]["rank"], made["eval_loss"]) == (20, 0, 4, answer["eval_loss"])
    assert made["data_sha256"] in (request.out / "README.md").read_text()
    assert sorted(path.name for path in request.out.iterdir()) == [
        "README.md", "adapter_config.json", "adapter_model.safetensors", "loss.png"
    ]  # fmt: skip
    assert [path.name for path in request.out.parent.iterdir()] == ["a"]
    assert run_training(settings, request_for(resume=True, epochs=4.0, learning_rate=2e-2), SILENT) == answer, (
        "it was complete"
    )
    with pytest.raises(TrainingError, match="exists"):
        run_training(settings, request, SILENT)


def shapes(model: Path) -> dict[str, tuple[int, int]]:
    config = open_checkpoint(model).config
    layer = projection_shapes(config)
    return {
        f"layers.{number}.{name}": shape[::-1] for number in range(config.num_layers) for name, shape in layer.items()
    }


def crash_at(step: int, monkeypatch: pytest.MonkeyPatch, crash: Callable[[], None]) -> None:
    ends = watching.Watcher.on_step_end

    def on_step_end(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == step:
            crash()
        ends(self, args, state, control, **kwargs)

    monkeypatch.setattr(watching.Watcher, "on_step_end", on_step_end)


def test_a_resume_comes_to_the_same_tensors(
    settings: Settings, request_for: Request, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A killed process leaves complete checkpoints, perhaps a cut one, and a log with lines that come again. A signal
    leaves a checkpoint of the step in which it came."""
    whole, killed, stopped = request_for("whole"), request_for("killed"), request_for("stopped")
    run_training(settings, whole, SILENT)

    class Killed(BaseException):
        pass

    def crash() -> None:
        raise Killed

    with monkeypatch.context() as patched:
        crash_at(8, patched, crash)
        with pytest.raises(Killed):
            run_training(settings, killed, SILENT)
    assert not killed.out.exists()
    cut = killed.work / "checkpoint-7"
    cut.mkdir()
    (cut / "trainer_state.json").write_text("{")
    run_training(settings, request_for("killed", resume=True), SILENT)
    assert equal(tensors(whole), tensors(killed))
    steps = [json.loads(line)["step"] for line in (killed.work / "train.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 10))

    before = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patched:
        crash_at(5, patched, lambda: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(TrainingStopped, match="stopped at step 5 of 9"):
            run_training(settings, stopped, SILENT)
    assert signal.getsignal(signal.SIGTERM) is before
    assert (stopped.work / "checkpoint-5" / "complete").exists()
    assert not stopped.out.exists()
    with pytest.raises(TrainingError, match="other data or another recipe"):
        run_training(settings, request_for("stopped", resume=True, rank=8), SILENT)
    load = job.load_frozen
    with monkeypatch.context() as patched:
        patched.setattr(job, "load_frozen", lambda *given: (load(*given)[0], "the fingerprint of another base"))
        with pytest.raises(TrainingError, match="another base"):
            run_training(settings, request_for("stopped", resume=True), SILENT)
    run_training(settings, request_for("stopped", resume=True), SILENT)
    assert equal(tensors(whole), tensors(stopped))

    other_seed = request_for("seed", seed=1, epochs=1.0)
    run_training(settings, other_seed, SILENT)
    assert not equal(tensors(whole), tensors(other_seed))


def run_with(
    settings: Settings, request: TrainingRequest, monkeypatch: pytest.MonkeyPatch, where: Any, name: str, do: Any
) -> TrainingError:
    with monkeypatch.context() as patched:
        patched.setattr(where, name, do)
        with pytest.raises(TrainingError) as failed:
            run_training(settings, request, SILENT)
    assert not request.out.exists()
    assert not request.out.parent.exists() or not list(request.out.parent.iterdir())
    assert "\n" not in str(failed.value)
    return failed.value


def test_what_goes_wrong_is_one_line_and_leaves_no_adapter(
    settings: Settings, request_for: Request, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(error: BaseException) -> Callable[..., Any]:
        def raises(*_: Any, **__: Any) -> Any:
            raise error

        return raises

    full = OSError(errno.ENOSPC, "No space left on device")
    no_memory = RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory: 8 bytes")
    nan = torch.tensor(float("nan"), requires_grad=True)
    for where, name, do, code in (
        (loop, "summed_loss", lambda *_: (nan * 1, 3), ErrorCode.TRAINING_DIVERGED),
        (loop, "summed_loss", fail(no_memory), ErrorCode.OUT_OF_MEMORY),
        (transformers.Trainer, "_save_checkpoint", fail(full), ErrorCode.CHECKPOINT_FAILED),
        (job, "draw_losses", fail(MemoryError()), ErrorCode.OUT_OF_MEMORY),
    ):
        request = request_for("failed", epochs=0.5)
        error = run_with(settings, request, monkeypatch, where, name, do)
        assert error.code == code
    from guanaco.server.training import adapter

    error = run_with(settings, request_for("failed", epochs=0.5), monkeypatch, adapter, "save_file", fail(full))
    assert error.code == ErrorCode.TARGET_UNWRITABLE
    assert "No space left" in str(error)


def test_early_stop_keeps_the_best_checkpoint(settings: Settings, request_for: Request) -> None:
    request = request_for("early", epochs=40.0, eval_every=2, save_every=2, patience=2, learning_rate=0.2)
    answer = run_training(settings, request, SILENT)
    assert answer["steps"] < 180
    lines = [json.loads(line) for line in (request.work / "train.jsonl").read_text().splitlines()]
    evaluated = [(line["eval_loss"], line["step"]) for line in lines if "eval_loss" in line]
    best = min(evaluated)
    assert len([step for _, step in evaluated if step > best[1]]) == 2
    assert answer["eval_loss"] == best[0]
    kept = load_file(request.work / f"checkpoint-{best[1]}" / "adapter_model.safetensors")
    assert equal(kept, tensors(request))


def test_accumulation_and_checkpointing_change_nothing(settings: Settings, request_for: Request) -> None:
    found = {}
    for name, given in {
        "16": {"micro_batch": 16},
        "4x4": {"micro_batch": 4},
        "checkpointing": {"micro_batch": 16, "gradient_checkpointing": True},
    }.items():
        request = request_for(name, batch_size=16, dropout=0.0, steps=2, learning_rate=1e-3, **given)
        run_training(settings, request, SILENT)
        found[name] = tensors(request)
    for name in ("4x4", "checkpointing"):
        for key, tensor in found["16"].items():
            torch.testing.assert_close(found[name][key], tensor, rtol=1e-5, atol=1e-5)
    assert any(tensor.abs().max() > 1e-4 for key, tensor in found["16"].items() if "lora_B" in key)


def test_the_loss_is_transformers(settings: Settings, model: Path, request_for: Request) -> None:
    request = request_for()
    prepared = prepare_data(request, find_base(settings, SILENT))
    frozen, _ = job.load_frozen()
    wrapped = loop.make_adapter(frozen, prepared.recipe).eval()
    rows = loop.SequenceList(prepared.train.items, prepared.order)
    batch = loop.collate([rows[0], rows[1], rows[17]])
    total, count = loop.summed_loss(wrapped, batch)
    theirs = wrapped(**batch).loss
    torch.testing.assert_close(total / count, theirs, rtol=1e-5, atol=1e-6)


def test_without_a_gpu_a_note_says_what_is_used_instead(settings: Settings, request_for: Request) -> None:
    request = replace(request_for(recipe="guanaco-2023", epochs=1.0), train_device="cuda")
    prepared = prepare_data(request, find_base(settings, SILENT))
    on_cpu, on_gpu = (" ".join(job._notes(request, prepared, device, ())) for device in ("cpu", "cuda"))
    assert "torch finds no GPU here: the training runs on the CPU" in on_cpu
    assert "paged optimiser needs a GPU: AdamW of torch" in on_cpu
    assert "untested" in on_gpu
    assert "paged" not in on_gpu


def test_a_hundred_short_rows_are_forty_steps(settings: Settings, tmp_path: Path) -> None:
    example = Path(__file__).parents[3] / "docs" / "examples" / "guanaco-says.jsonl"
    request = TrainingRequest(example, "a", tmp_path / "out", tmp_path / "work", {"epochs": 2})
    prepared = prepare_data(request, find_base(settings, SILENT))
    assert prepared.file.num_rows == 100
    assert prepared.num_steps >= 40


def test_the_recipe_of_2023_reads_guanaco_text_as_it_stands(settings: Settings, tmp_path: Path) -> None:
    text = "### Human: hello### Assistant: fine"
    path = tmp_path / "oasst.jsonl"
    path.write_text(json.dumps({"text": text}) + "\n")
    request = TrainingRequest(path, "a", tmp_path / "out", tmp_path / "work", {}, recipe="guanaco-2023")
    base = find_base(settings, SILENT)
    prepared = prepare_data(request, base)
    (item,) = prepared.train.items
    assert list(item.ids) == [*base.tokenizer.encode(text), base.eos_ids[0]]
    assert (prepared.num_steps, prepared.recipe.rank, prepared.file.format) == (1875, 64, "guanaco")
    assert job._profile(base, prepared) == {"profile": "guanaco"}
