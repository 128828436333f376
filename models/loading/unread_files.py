"""Notes on files beside a model's weights that are not read, although another program might read them instead.

Looks at names only. Called by `checkpoint`, when a model is opened.
"""

import re
from collections.abc import Collection
from pathlib import Path

from guanaco.models.formats.shown import listed

ADAPTER_WEIGHTS = "adapter_model.safetensors"
# Weights in other formats, as transformers, Meta and older tools name them. Other pickles are a trainer's state.
_PICKLED_WEIGHTS = re.compile(r"(pytorch_model|consolidated|model)(-\d+-of-\d+|\.\d+)?\.(bin|pth|pt|ckpt)")
# Files that are read beside the GGUF file if the operator names the directory, but not if the GGUF file itself is
# named.
_BESIDE_GGUF = (
    *("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("chat_template.jinja", "chat_template.json", "generation_config.json"),
)


def notes_beside_weights(directory: Path, used: Collection[str]) -> list[str]:
    """Notes on weights in a model's directory that are not read, and on an adapter there. used: names of the files that
    are read."""
    names = sorted(file.name for file in directory.iterdir() if file.is_file())
    unread = [name for name in names if _is_weights(name) and name not in used]
    notes = []
    if unread:
        first = listed(sorted(used))
        notes.append(f"weights are read from {first}, not from {listed(unread)} beside: remove those that are wrong")
    if "adapter_config.json" in names:
        notes.append("the LoRA adapter in the model's directory is not applied: name it with --adapter NAME=DIRECTORY")
    return notes


def notes_beside_gguf(file: Path, *, is_named: bool) -> list[str]:
    """Notes on the files beside a GGUF file that are not read. is_named: the operator named the file, not the
    directory."""
    if not is_named:
        notes = notes_beside_weights(file.parent, {file.name})
        if (file.parent / "config.json").is_file():
            notes.append(f"config.json beside {listed([file.name])} is not read: the metadata of the GGUF file count")
        return notes
    beside = [name for name in _BESIDE_GGUF if (file.parent / name).is_file()]
    if not beside:
        return []
    return [
        f"{listed(beside)} beside {listed([file.name])} are not read: to use them, give a directory that "
        "holds them and no other GGUF file"
    ]


def _is_weights(name: str) -> bool:
    if name.endswith((".safetensors", ".safetensors.index.json")):
        return name != ADAPTER_WEIGHTS
    return name.endswith(".gguf") or _PICKLED_WEIGHTS.fullmatch(name) is not None
