"""One training from a data file to an adapter: `run_training`. `guanaco train` runs it, also for a job of the API.

The folder `work` holds `train.jsonl` (see `watching`) and `checkpoint-N/`; a checkpoint is whole if it has a file
`complete`. After SIGINT or SIGTERM the training writes a checkpoint at the end of the step and raises TrainingStopped.
A resume goes on from the newest complete checkpoint. With the same data, recipe and seed it gives the same tensors.
"""

import fcntl
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from guanaco.models.error_codes import ErrorCode
from guanaco.server.bootstrap.progress import reporting
from guanaco.server.config import Settings
from guanaco.server.training.adapter import Provenance, trained_before, write_adapter
from guanaco.server.training.base import TrainingBase, find_base, load_frozen
from guanaco.server.training.data.masks import Encoder
from guanaco.server.training.data.reading import DataFile, read_conversations
from guanaco.server.training.dataset import Sequences, encode_rows, split, summary, training_order
from guanaco.server.training.errors import TrainingError, TrainingStopped
from guanaco.server.training.loop import (
    AdapterTrainer,
    SequenceList,
    collate,
    make_adapter,
    newest_checkpoint,
    trainer_arguments,
)
from guanaco.server.training.picture import draw_losses
from guanaco.server.training.recipes import Recipe, recipe_for
from guanaco.server.training.watching import LOG_NAME, StopSignal, Watcher, read_log

_AVERAGED_STEPS = 10  # `train_loss` is the mean loss of so many last steps
_NO_MEMORY = re.compile(r"can't allocate memory|not enough memory|out of memory", re.IGNORECASE)


@dataclass(frozen=True)
class TrainingRequest:
    """A training as the operator asks for it. given: fields of the recipe that replace its own values."""

    data: Path
    name: str
    out: Path
    work: Path
    given: dict[str, Any]
    validation_data: Path | None = None
    format: str | None = None
    recipe: str = "default"
    too_long: str = "skip"
    skip_refused: bool = False
    save_dtype: str = "float32"
    train_dtype: str = "float32"
    train_device: str = "cpu"  # or "cuda"; without a GPU the CPU is used, with a note
    resume: bool = False


@dataclass(frozen=True)
class Prepared:
    """The data of a training, its recipe and its number of steps."""

    file: DataFile
    train: Sequences
    order: list[int]  # indices into `train.items`, in the order of training
    held_out: Sequences
    recipe: Recipe
    num_steps: int

    def tokens_after(self) -> list[int]:
        """How many tokens have been read after step 0, 1, …, num_steps."""
        size = self.recipe.batch_size
        sums = [0, *accumulate(len(self.train.items[index].ids) for index in self.order)]
        return [sums[min(step * size, len(self.order))] for step in range(self.num_steps + 1)]

    def digest(self, base_fingerprint: str, train_dtype: str) -> str:
        """SHA-256 (hex) of what a resumed training must share with its checkpoint: the base and its dtype, the
        sequences, their order and the recipe."""
        sequences = [[item.ids for item in part.items] for part in (self.train, self.held_out)]
        content = [base_fingerprint, train_dtype, self.file.sha256, self.order, sequences, self.recipe.public()]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def run_training(settings: Settings, request: TrainingRequest, console: Console) -> dict[str, Any]:
    """Train and write the adapter to `request.out`. Returns adapter, train_loss, eval_loss (None without held-out
    rows), tokens_per_second, seconds, steps and trained_tokens.

    With `resume`, an adapter of ours that is already at `request.out` is not trained again: its figures are returned.
    Raises TrainingError, TrainingStopped, DataError, ModelError or TemplateError; `request.out` is unchanged then.
    """
    if os.path.lexists(request.out) and not _is_empty_folder(request.out):
        made = trained_before(request.out) if request.resume else None
        if made is None:
            raise TrainingError(ErrorCode.TARGET_EXISTS, f"{request.out} exists: remove it, or choose another --out")
        return _answer(request.out, made)
    with _folder(request.work), _memory_errors():
        base = find_base(settings, console)
        prepared = prepare_data(request, base)
        for line in summary(prepared.file, prepared.train):
            console.print(line, markup=False)
        return _train(settings, request, base, prepared, console)


def _is_empty_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink() and not any(path.iterdir())


def prepare_data(request: TrainingRequest, base: TrainingBase) -> Prepared:
    """Read, encode, split and order the data. Raises DataError, or TrainingError for tokens that the model lacks."""
    recipe = recipe_for(request.recipe, base.num_parameters, request.given)
    as_text = recipe.name == "guanaco-2023"
    longest = min(recipe.max_length, base.config.max_position_embeddings)
    encoder = Encoder(
        base.tokenizer, eos_ids=base.eos_ids, template=base.template, train_on=recipe.train_on, max_length=longest
    )

    def sequences(path: Path) -> tuple[DataFile, Sequences]:
        file = read_conversations(path, request.format, guanaco_as_text=as_text)
        found = encode_rows(file, encoder, too_long=request.too_long, skip_refused=request.skip_refused)
        return file, found

    file, train = sequences(request.data)
    if request.validation_data is not None:
        _, held_out = sequences(request.validation_data)
    else:
        train.items, drawn = split(train.items, recipe.held_out, recipe.max_held_out, recipe.data_seed)
        held_out = Sequences(drawn)
    most = max(max(item.ids) for item in (*train.items, *held_out.items))
    if most >= base.config.vocab_size:
        raise TrainingError(
            ErrorCode.INVALID_TRAINING_DATA,
            f"the data come to token {most}, and the model has {base.config.vocab_size} embedding rows: the tokenizer "
            "does not belong to the model",
        )
    steps = recipe.steps
    number = steps * recipe.batch_size if steps else max(1, round(recipe.epochs * len(train.items)))
    lengths = [len(item.ids) for item in train.items]
    order = training_order(lengths, number, recipe.batch_size, recipe.data_seed, grouped=recipe.group_by_length)
    return Prepared(file, train, order, held_out, recipe, -(-number // recipe.batch_size))


def _train(
    settings: Settings, request: TrainingRequest, base: TrainingBase, prepared: Prepared, console: Console
) -> dict[str, Any]:
    recipe, work = prepared.recipe, request.work
    torch.set_num_threads(settings.threads or torch.get_num_threads())
    device = "cuda" if request.train_device == "cuda" and torch.cuda.is_available() else "cpu"
    torch.use_deterministic_algorithms(device == "cpu")
    dtype = torch.bfloat16 if request.train_dtype == "bfloat16" else torch.float32
    frozen, fingerprint = load_frozen(settings, base, dtype, console, device)
    checkpoint = _checkpoint(request, prepared.digest(fingerprint, request.train_dtype))
    for note in _notes(request, prepared, device, getattr(frozen, "guanaco_notes", ())):
        console.print(f"note: {note}", markup=False)
    model = make_adapter(frozen, recipe)
    has_eval = bool(prepared.held_out.items)
    tokens_after, stop = prepared.tokens_after(), StopSignal()
    with stop.watched(), reporting(console, "train") as report:
        watcher = Watcher(work / LOG_NAME, tokens_after, stop, recipe.patience if has_eval else 0, report)
        trainer = AdapterTrainer(
            model=model,
            args=trainer_arguments(recipe, work, prepared.num_steps, has_eval=has_eval, device=device),
            data_collator=collate,
            train_dataset=SequenceList(prepared.train.items, prepared.order),
            eval_dataset=SequenceList(prepared.held_out.items, range(len(prepared.held_out.items)))
            if has_eval
            else None,
            callbacks=[watcher],
        )
        _silence(trainer)
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    step = trainer.state.global_step
    if stop.came and step < prepared.num_steps:
        raise TrainingStopped(f"stopped at step {step} of {prepared.num_steps}; --resume goes on from there")
    lines = read_log(work / LOG_NAME)
    result = _result(trainer, watcher, lines, tokens_after, keeps_best=recipe.keeps_best)
    picture = work / "loss.png"
    draw_losses(lines, picture, request.name)
    made = Provenance(
        name=request.name,
        base=base.root,
        base_fingerprint=fingerprint,
        data_name=request.data.name,
        data_sha256=prepared.file.sha256,
        num_rows=prepared.file.num_rows,
        recipe=recipe,
        result=result,
    )
    profile = _profile(base, prepared)
    write_adapter(model, request.out, made, dtype=request.save_dtype, profile=profile, picture=picture)
    return _answer(request.out, made.public())


def _checkpoint(request: TrainingRequest, digest: str) -> Path | None:
    """The checkpoint to go on from; None: begin anew, which removes the checkpoints and the log of an earlier training.

    digest: see `Prepared.digest`. Raises TrainingError if the checkpoints were written with another digest.
    """
    state = request.work / "training.json"
    checkpoint = newest_checkpoint(request.work) if request.resume else None
    if checkpoint is not None:
        try:
            before = json.loads(state.read_text(encoding="utf-8"))["digest"]
        except (OSError, ValueError, KeyError):
            before = None
        if before != digest:
            raise TrainingError(
                ErrorCode.INVALID_TRAINING_DATA,
                f"{request.work} has checkpoints of another base, other data or another recipe: leave --resume out to "
                "begin anew, or name another --work",
            )
        return checkpoint
    for path in request.work.glob("checkpoint-*"):
        shutil.rmtree(path, ignore_errors=True)
    (request.work / LOG_NAME).unlink(missing_ok=True)
    state.write_text(json.dumps({"digest": digest}) + "\n", encoding="utf-8")
    return None


def _result(
    trainer: Any, watcher: Watcher, lines: list[dict[str, Any]], tokens_after: list[int], *, keeps_best: bool
) -> dict[str, Any]:
    step = trainer.state.global_step
    losses = [line["loss"] for line in lines[-_AVERAGED_STEPS:]]
    held_out = [line["eval_loss"] for line in lines if line.get("eval_loss") is not None]
    eval_loss = None if not held_out else min(held_out) if keeps_best else held_out[-1]
    return {
        "train_loss": sum(losses) / max(1, len(losses)),
        "eval_loss": eval_loss,
        "tokens_per_second": round(watcher.tokens_per_second, 2),
        "seconds": round(watcher.seconds, 2),
        "steps": step,
        "trained_tokens": tokens_after[step],
    }


def _answer(out: Path, made: dict[str, Any]) -> dict[str, Any]:
    names = ("train_loss", "eval_loss", "tokens_per_second", "seconds", "steps", "trained_tokens")
    return {"adapter": str(out), **{name: made.get(name) for name in names}}


def _profile(base: TrainingBase, prepared: Prepared) -> dict[str, Any] | None:
    """The adapter's profile: the prompt format to serve it with. None if that is the base's own."""
    if prepared.recipe.name == "guanaco-2023" and prepared.file.format == "guanaco":
        return {"profile": "guanaco"}
    return None if base.template_name is None else {"chat_template": base.template_name}


def _notes(request: TrainingRequest, prepared: Prepared, device: str, of_base: tuple[str, ...]) -> list[str]:
    notes, recipe = list(of_base), prepared.recipe
    if device != request.train_device:
        notes.append("torch finds no GPU here: the training runs on the CPU")
    if device != "cpu":
        notes.append("training on a GPU is untested: no GPU was there when it was written")
    if recipe.paged_optimizer and device == "cpu":
        notes.append("the recipe's paged optimiser needs a GPU: AdamW of torch is used, which computes the same")
    epochs = len(prepared.order) / len(prepared.train.items)
    if recipe.steps and epochs > 10:
        notes.append(
            f"the recipe's {recipe.steps} steps are {epochs:.0f} epochs of these data: --epochs asks for fewer"
        )
    if not prepared.held_out.items:
        notes.append("no rows are held out, so the loss on unseen rows is not measured")
    return notes


def _silence(trainer: Any) -> None:
    from transformers import PrinterCallback

    trainer.remove_callback(PrinterCallback)  # it prints to standard output


@contextmanager
def _folder(work: Path) -> Iterator[None]:
    """Make the work folder and lock it for this process. Raises TrainingError."""
    try:
        work.mkdir(parents=True, exist_ok=True)
        lock = open(work / ".lock", "w")  # noqa: SIM115 (held for the whole training)
    except OSError as error:
        raise TrainingError(
            ErrorCode.TARGET_UNWRITABLE, f"{work} can't be written ({error.strerror}): name another folder with --work"
        ) from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise TrainingError(
                ErrorCode.TARGET_UNWRITABLE, f"another training runs in {work}: wait for it, or name another --work"
            ) from None
        yield


@contextmanager
def _memory_errors() -> Iterator[None]:
    """Turn errors that mean too little memory into a TrainingError of one line."""
    advice = "lower --batch-size, --micro-batch or --max-length, or add --gradient-checkpointing; --resume goes on"
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError):
        raise TrainingError(ErrorCode.OUT_OF_MEMORY, f"there is not enough memory: {advice}") from None
    except RuntimeError as error:
        # torch has no type of its own for a CPU without memory, only this text.
        if error.args and isinstance(error.args[0], str) and _NO_MEMORY.search(error.args[0]):
            raise TrainingError(ErrorCode.OUT_OF_MEMORY, f"there is not enough memory: {advice}") from None
        raise
