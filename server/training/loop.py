"""The training loop: transformers' Trainer over PEFT's LoRA layers, fed with our sequences in our order.

The head runs on learned positions only, and the loss is the mean over all learned tokens of a step. Knows no files but
the checkpoints' folder. Used by `job`.
"""

import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from torch import Tensor
from torch.nn import functional as F

from guanaco.models.error_codes import ErrorCode
from guanaco.server.training.checkpoints import COMPLETE, PREFIX, checkpoints, is_complete
from guanaco.server.training.data.masks import Encoded
from guanaco.server.training.errors import TrainingError
from guanaco.server.training.quantized import HeadLoss, ServedLinear
from guanaco.server.training.recipes import Recipe

IGNORED = -100  # the label of a token that is not learned
_HEAD_LOSS = HeadLoss()


class SequenceList(torch.utils.data.Dataset[dict[str, list[int]]]):
    """Sequences in the order in which they are trained on."""

    def __init__(self, items: Sequence[Encoded], order: Sequence[int]) -> None:
        self._items, self._order = items, order

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        item = self._items[self._order[index]]
        learned = (False, *item.learned[1:])  # nothing comes before the first token
        labels = [token if is_learned else IGNORED for token, is_learned in zip(item.ids, learned, strict=True)]
        return {"input_ids": list(item.ids), "labels": labels}


def collate(rows: Sequence[dict[str, list[int]]]) -> dict[str, Tensor]:
    """Pad rows on the right to one length: input_ids, attention_mask and labels, each int64 [rows, length]."""
    length = max(len(row["input_ids"]) for row in rows)

    def padded(name: str, value: int) -> Tensor:
        return torch.tensor([row[name] + [value] * (length - len(row[name])) for row in rows])

    mask = torch.tensor([[1] * len(row["input_ids"]) + [0] * (length - len(row["input_ids"])) for row in rows])
    return {"input_ids": padded("input_ids", 0), "attention_mask": mask, "labels": padded("labels", IGNORED)}


def summed_loss(model: Any, inputs: dict[str, Tensor]) -> tuple[Tensor, int]:
    """(sum of the cross-entropy of all learned tokens, their number). The head runs on their positions only.

    One thread at a time: all calls share the memory of the logits.
    """
    base = model.get_base_model()
    hidden = base.model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).last_hidden_state
    labels = inputs["labels"][:, 1:]
    learned = labels != IGNORED
    known, wanted = hidden[:, :-1][learned], labels[learned]
    if isinstance(base.lm_head, ServedLinear):
        return _HEAD_LOSS(known, wanted, base.lm_head), len(wanted)
    return F.cross_entropy(base.lm_head(known).float(), wanted, reduction="sum"), len(wanted)


class AdapterTrainer(transformers.Trainer):
    """transformers' Trainer with our loss, our evaluation, and checkpoints that are complete or not there."""

    loss_is_scaled_for_ga = True  # `compute_loss` divides by the learned tokens of the whole step

    def __init__(self, *given: Any, **options: Any) -> None:
        super().__init__(*given, **options)
        self.model_accepts_loss_kwargs = True  # have the learned tokens of a step counted for `compute_loss`

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The part of a step's loss that one micro batch adds. Raises TrainingError if it is not finite."""
        total, count = summed_loss(model, inputs)
        if not math.isfinite(total.item()):
            raise TrainingError(
                ErrorCode.TRAINING_DIVERGED,
                f"the loss is not a number at step {self.state.global_step + 1}: lower --learning-rate, and look for "
                "odd rows in the data",
            )
        loss = total / (count if num_items_in_batch is None else num_items_in_batch)
        return (loss, None) if return_outputs else loss

    def evaluate(self, *_given: Any, **_options: Any) -> dict[str, float]:
        """The mean loss over all learned tokens of the rows that are held out."""
        model = self.model
        assert model is not None
        model.eval()
        total, count = 0.0, 0
        with torch.no_grad():
            for inputs in self.get_eval_dataloader():
                part, learned = summed_loss(model, inputs)
                total, count = total + part.item(), count + learned
        metrics = {"eval_loss": total / max(1, count)}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Write a checkpoint, and mark it as complete when all of it is there."""
        folder = Path(self.args.output_dir or ".") / f"{PREFIX}{self.state.global_step}"
        try:
            super()._save_checkpoint(model, trial)
            (folder / COMPLETE).touch()
        # Each library wraps a full disk in an error of its own.
        except Exception as error:
            shutil.rmtree(folder, ignore_errors=True)
            raise TrainingError(
                ErrorCode.CHECKPOINT_FAILED,
                f"the checkpoint {folder} can't be written ({error.args[0] if error.args else error}): make room on "
                "the disk, or name another folder with --work; --resume goes on from the checkpoint before",
            ) from error


def newest_checkpoint(work: Path) -> Path | None:
    """The newest complete checkpoint in a folder; None without one. Incomplete ones are removed."""
    found = checkpoints(work)
    for path in found.values():
        if not is_complete(path):
            shutil.rmtree(path, ignore_errors=True)
    complete = [step for step, path in found.items() if is_complete(path)]
    return found[max(complete)] if complete else None


def make_adapter(model: Any, recipe: Recipe) -> Any:
    """The base with new LoRA layers in float32. Raises TrainingError for targets that the base lacks."""
    torch.manual_seed(recipe.seed)
    if recipe.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    config = peft.LoraConfig(
        r=recipe.rank,
        lora_alpha=recipe.alpha,
        lora_dropout=recipe.dropout,
        target_modules=list(recipe.targets),
        use_rslora=recipe.rslora,
        bias="none",
        task_type="CAUSAL_LM",
    )
    names = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    if unknown := sorted(set(recipe.targets) - names):
        raise TrainingError(
            ErrorCode.BAD_OPTION,
            f"--targets: the model has no {unknown[0]}; it has {', '.join(sorted(_linear(model)))}",
        )
    wrapped = peft.get_peft_model(model, config)
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return wrapped


def _linear(model: Any) -> set[str]:
    return {name.rpartition(".")[2] for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)} - {
        "lm_head"
    }


def trainer_arguments(recipe: Recipe, work: Path, num_steps: int, *, has_eval: bool, device: str = "cpu") -> Any:
    """The arguments of transformers' Trainer. For the Trainer it is one long epoch, in the order of `SequenceList`.

    has_eval: whether rows are held out. device: `cpu` or `cuda`; only `cuda` can have a paged optimiser."""
    every = recipe.eval_every or min(250, max(1, num_steps // 10))
    save_every = recipe.save_every or every
    keeps_best = has_eval and recipe.keeps_best
    if keeps_best and save_every % every:
        save_every = -(-save_every // every) * every
    return transformers.TrainingArguments(
        output_dir=str(work),
        per_device_train_batch_size=recipe.micro_batch,
        per_device_eval_batch_size=2 * recipe.micro_batch,
        gradient_accumulation_steps=recipe.accumulation,
        num_train_epochs=1,
        learning_rate=recipe.learning_rate,
        lr_scheduler_type=recipe.schedule
        if not recipe.warmup or recipe.schedule == "cosine"
        else "constant_with_warmup",
        warmup_steps=math.ceil(recipe.warmup * num_steps),
        weight_decay=recipe.weight_decay,
        adam_beta2=recipe.beta2,
        max_grad_norm=recipe.max_grad_norm,
        optim="paged_adamw_32bit" if recipe.paged_optimizer and device != "cpu" else "adamw_torch",
        logging_steps=1,
        logging_nan_inf_filter=False,
        eval_strategy="steps" if has_eval else "no",
        eval_steps=every if has_eval else None,
        save_strategy="steps",
        save_steps=save_every,
        save_total_limit=2,
        load_best_model_at_end=keeps_best,
        metric_for_best_model="eval_loss" if keeps_best else None,
        greater_is_better=False if keeps_best else None,
        train_sampling_strategy="sequential",
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        disable_tqdm=True,
        report_to=[],
        seed=recipe.seed,
        use_cpu=device == "cpu",
        bf16=False,
    )
