"""The token ids that begin and end a text, put together from the tokenizer and the checkpoint's configs.

Knows nothing of files. Called once, when a model is loaded.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from guanaco.models.errors import ModelError
from guanaco.models.formats.shown import shown
from guanaco.models.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class SpecialIds:
    """The ids that begin and end a text. `notes` tell an operator where the files contradict each other."""

    bos_id: int | None
    eos_ids: tuple[int, ...]
    notes: tuple[str, ...]


def reconcile_special_ids(
    config_bos: int | None,
    config_eos: int | Sequence[int] | None,
    generation_eos: Any,
    tokenizer: Tokenizer,
    num_rows: int,
) -> SpecialIds:
    """The ids that begin and end a text. BOS is the tokenizer's; if it has none, config.json's, provided that the
    tokenizer has it as a control token. The ends are the tokenizer's eos and every id that a config names.

    An id that a config names ends generation even if the tokenizer disagrees, as in transformers' `generate`. An id
    beyond the model's `num_rows` embedding rows is left out: the model never samples it.
    Raises ModelError if generation_config.json holds anything but ids.
    """
    notes: list[str] = []

    def name(index: int) -> str:
        return shown(tokenizer.token_text(index)) if 0 <= index < tokenizer.vocab_size else "not in the vocabulary"

    bos_id = tokenizer.bos_id
    if bos_id is None and config_bos is not None and config_bos in tokenizer.special_ids:
        bos_id = config_bos
    elif config_bos is not None and config_bos >= 0 and config_bos != bos_id:
        ours = "none" if bos_id is None else f"{bos_id}, {name(bos_id)}"
        notes.append(f"config.json says bos {config_bos} ({name(config_bos)}); the tokenizer's is used: {ours}")
    if bos_id is not None and bos_id >= num_rows:
        text = f"bos is {bos_id} ({name(bos_id)}), and the model has {num_rows} embedding rows"
        notes.append(f"{text}: texts that begin with it are refused; get the tokenizer that belongs to the model")
    eos_ids = [index for index in tokenizer.eos_ids if index < num_rows]
    for index in set(tokenizer.eos_ids).difference(eos_ids):
        text = f"the tokenizer says eos {index} ({name(index)}), and the model has {num_rows} tokens"
        notes.append(f"{text}: it cannot end a text")
    for source, stated in (("config.json", config_eos), ("generation_config.json", generation_eos)):
        for index in _listed(source, stated):
            if index < 0 or index in eos_ids:  # -1 means none
                continue
            if index >= num_rows:
                notes.append(f"{source} says eos {index}, and the model has {num_rows} tokens: it cannot end a text")
                continue
            eos_ids.append(index)
            if index not in tokenizer.special_ids or index in (tokenizer.bos_id, tokenizer.unk_id):
                notes.append(f"{source} says eos {index} ({name(index)}): it ends a text, though the tokenizer differs")
    if not eos_ids:
        notes.append("nothing names an end of text: an answer ends at its stop strings or its length")
    return SpecialIds(bos_id, tuple(eos_ids), tuple(dict.fromkeys(notes)))


def missing_rows_note(tokenizer: Tokenizer, num_rows: int) -> tuple[str, ...]:
    """A note for the operator if the tokenizer has ids beyond the model's `num_rows` embedding rows."""
    beyond = tokenizer.vocab_size - num_rows
    if beyond <= 0:
        return ()
    names = ", ".join(shown(tokenizer.token_text(i)) for i in range(num_rows, num_rows + min(beyond, 3)))
    more = ", …" if beyond > 3 else ""
    return (
        f"the tokenizer has {beyond} tokens more than the model's {num_rows} embedding rows ({names}{more}): "
        "a prompt that holds one is refused",
    )


def _listed(source: str, stated: Any) -> list[int]:
    """One id, several or none, as a list."""
    listed = [] if stated is None else stated if isinstance(stated, list | tuple) else [stated]
    if not all(type(index) is int for index in listed):
        raise ModelError(f"{source}: eos_token_id must be a token id or a list of them; fix the file")
    return list(listed)
