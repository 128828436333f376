"""Writes the finished adapter: a temporary folder is filled and then renamed, so the adapter is whole or not there.

It holds PEFT's two files, a model card, the loss picture, and a profile if the adapter was trained with another prompt
format than the base's own. The metadata of the tensors' file name the base and the training. Used by `job`.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from guanaco.adapters.peft.weights import BASE_FINGERPRINT_KEY
from guanaco.adapters.versions.profile import PROFILE_NAME
from guanaco.models.error_codes import ErrorCode
from guanaco.server.training.errors import TrainingError
from guanaco.server.training.recipes import Recipe

TRAINING_KEY = "guanaco.training"  # key in the metadata of the tensors' file; its value is `Provenance.public` as JSON
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_WEIGHTS, _CONFIG = "adapter_model.safetensors", "adapter_config.json"


@dataclass(frozen=True)
class Provenance:
    """How an adapter was made."""

    name: str
    base: str  # the hub id or name that the base was made from
    base_fingerprint: str
    data_name: str  # the data file's name, without its folder
    data_sha256: str
    num_rows: int
    recipe: Recipe
    result: Mapping[str, Any]  # train_loss, eval_loss, steps, trained_tokens, tokens_per_second, seconds

    def public(self) -> dict[str, Any]:
        """The object in the metadata of the tensors' file."""
        return {
            "data": self.data_name,
            "data_sha256": self.data_sha256,
            "rows": self.num_rows,
            "seed": self.recipe.seed,
            "recipe": self.recipe.public(),
            **self.result,
        }


def write_adapter(
    model: Any, out: Path, made: Provenance, *, dtype: str, profile: Mapping[str, Any] | None, picture: Path | None
) -> None:
    """Write the adapter of a PEFT model to `out`, which must not exist or be an empty folder.

    dtype: the saved tensors', a name in DTYPES. profile: the content of guanaco.json. Raises TrainingError if a tensor
    is not finite, or if the folder can't be written; nothing is left at `out` then.
    """
    partial: Path | None = None
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}.partial-"))
        _write(model, partial, made, DTYPES[dtype], profile, picture)
        partial.chmod(0o755)
        os.rename(partial, out)  # fails where a folder with files is there
    except TrainingError:
        raise
    # safetensors wraps a full disk in an error of its own.
    except Exception as error:
        problem = getattr(error, "strerror", None) or (error.args[0] if error.args else type(error).__name__)
        raise TrainingError(
            ErrorCode.TARGET_UNWRITABLE,
            f"the adapter can't be written to {out} ({problem}): make room on the disk or choose another --out, and go "
            "on with --resume",
        ) from error
    finally:
        if partial is not None:
            shutil.rmtree(partial, ignore_errors=True)


def _write(
    model: Any, folder: Path, made: Provenance, dtype: Any, profile: Mapping[str, Any] | None, picture: Path | None
) -> None:
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        model.save_pretrained(scratch, save_embedding_layers=False)
        config = json.loads((Path(scratch) / _CONFIG).read_text(encoding="utf-8"))
        tensors = load_file(Path(scratch) / _WEIGHTS)
    if not all(bool(tensor.isfinite().all()) for tensor in tensors.values()):
        raise TrainingError(
            ErrorCode.TRAINING_DIVERGED, "the adapter holds values that are no numbers: lower --learning-rate"
        )
    config["base_model_name_or_path"] = made.base
    config["target_modules"] = list(made.recipe.targets)  # PEFT keeps a set, whose order changes from run to run
    config["inference_mode"] = True
    _write_text(folder / _CONFIG, json.dumps(config, indent=2, sort_keys=True) + "\n")
    metadata = {
        "format": "pt",
        BASE_FINGERPRINT_KEY: made.base_fingerprint,
        TRAINING_KEY: json.dumps(made.public(), sort_keys=True),
    }
    save_file({key: tensor.to(dtype).contiguous() for key, tensor in tensors.items()}, folder / _WEIGHTS, metadata)
    if profile is not None:
        _write_text(folder / PROFILE_NAME, json.dumps(profile, indent=2) + "\n")
    if picture is not None:
        shutil.copyfile(picture, folder / picture.name)
    _write_text(folder / "README.md", model_card(made, picture))
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def trained_before(out: Path) -> dict[str, Any] | None:
    """The `Provenance.public` in the adapter at `out`; None if `guanaco train` did not make it."""
    try:
        with safe_open(out / _WEIGHTS, framework="pt") as file:
            content = json.loads((file.metadata() or {})[TRAINING_KEY])
    # Whatever is wrong with the file: this training did not write it.
    except Exception:
        return None
    return content if isinstance(content, dict) else None


def model_card(made: Provenance, picture: Path | None) -> str:
    """The adapter's README.md."""
    recipe, result = made.recipe, made.result
    scale = "alpha / sqrt(rank)" if recipe.rslora else "alpha / rank"
    held_out = "none was held out" if result["eval_loss"] is None else f"{result['eval_loss']:.4f} on held-out rows"
    image = "" if picture is None else f"\n![loss]({picture.name})\n"
    return f"""---
library_name: peft
base_model: {made.base}
---
# {made.name}

A LoRA adapter that `guanaco train` made on the NF4 base {made.base} (fingerprint `{made.base_fingerprint[:16]}…`).
It belongs to exactly this base: the full fingerprint is in the metadata of `{_WEIGHTS}`.

| | |
|---|---|
| data | {made.data_name}, {made.num_rows} rows, SHA-256 `{made.data_sha256}` |
| learned | {"answers and their ends" if recipe.train_on == "answers" else "all tokens"} |
| recipe | {recipe.name}, seed {recipe.seed} |
| LoRA | rank {recipe.rank}, alpha {recipe.alpha} ({scale}), dropout {recipe.dropout:g}, {", ".join(recipe.targets)} |
| steps | {result["steps"]} of {recipe.batch_size} sequences, {recipe.schedule} from {recipe.learning_rate:g} |
| loss | {result["train_loss"]:.4f} at the end of training; {held_out} |
| tokens | {result["trained_tokens"]}, {result["tokens_per_second"]:.0f} a second |
{image}
Serve it: `guanaco serve --adapter {made.name}=PATH` with the same `--model`.
"""
