"""The base of a training: the model that a server with the same settings serves, with its tokenizer and template.

Knows no data and no adapters. Used by `job`.
"""

from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from guanaco.models.architectures.config import ModelConfig
from guanaco.models.architectures.registry import projection_shapes
from guanaco.models.formats.strict_json import read_json
from guanaco.models.loading.checkpoint import open_checkpoint
from guanaco.models.text.chat_template import TEMPLATE_NAMES, ChatTemplate
from guanaco.models.text.special_ids import reconcile_special_ids
from guanaco.models.text.tokenizer import Tokenizer
from guanaco.models.text.tokenizer_check import check_tokenizer
from guanaco.server.bootstrap.before_loading import base_root, chosen_template
from guanaco.server.bootstrap.model_path import find_model
from guanaco.server.bootstrap.progress import reporting
from guanaco.server.config import Settings


@dataclass(frozen=True)
class TrainingBase:
    """The served model's files, its config, and how it turns text into tokens."""

    path: Path
    root: str  # the hub id or name that it was made from, without the operator's folders
    config: ModelConfig
    tokenizer: Tokenizer
    template: ChatTemplate | None  # None: the tokenizer's own
    template_name: str | None  # set if it is a template of ours, which an adapter's profile can name
    eos_ids: tuple[int, ...]  # the tokenizer's own first

    @property
    def num_parameters(self) -> int:
        """Weights of the projections and of the embedding."""
        layer = sum(rows * columns for rows, columns in projection_shapes(self.config).values())
        return self.config.num_layers * layer + self.config.vocab_size * self.config.hidden_size


def find_base(settings: Settings, console: Console) -> TrainingBase:
    """Find the model as a server does, and read all but its weights. Raises ModelError or TemplateError."""
    path = find_model(settings, console)
    with closing(open_checkpoint(path)) as source:
        config, generation = source.config, dict(source.sampling)
    file = path / "generation_config.json"
    if path.is_dir() and file.exists():
        generation |= read_json(file)
    check_tokenizer(path)
    tokenizer = Tokenizer.from_directory(path)
    special = reconcile_special_ids(
        config_bos=config.bos_token_id,
        config_eos=config.eos_token_ids,
        generation_eos=generation.get("eos_token_id"),
        tokenizer=tokenizer,
        num_rows=config.vocab_size,
    )
    name = settings.chat_template
    return TrainingBase(
        path=path,
        root=base_root(settings),
        config=config,
        tokenizer=tokenizer,
        template=chosen_template(settings),
        template_name=name if name in TEMPLATE_NAMES else None,
        eos_ids=special.eos_ids,
    )


def load_frozen(
    settings: Settings, base: TrainingBase, dtype: Any, console: Console, device: str = "cpu"
) -> tuple[Any, str]:
    """(the base as a transformers model whose weights are the served NF4 bytes, its fingerprint).

    dtype: torch's, of activations and gradients. Raises ModelError.
    """
    from guanaco.server.training.quantized import base_fingerprint, load_base, load_base_on

    with reporting(console, "load") as report:
        load = load_base if device == "cpu" else partial(load_base_on, device)
        model = load(
            base.path,
            cache_dir=settings.cache_dir if settings.quantized_cache else None,
            dtype=dtype,
            keep_float32=settings.dtype == "float32",
            max_model_len=settings.max_model_len,
            progress=report,
        )
    return model, base_fingerprint(model)
