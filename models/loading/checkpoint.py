"""A model directory or file as a source of weights, whichever format it is in: opened, checked, read tensor by tensor.

Weights come out as they are stored: NF4 stays packed, dense stays dense. Nothing is quantised here, and nothing opens a
pickle. Called by `loader` and `quantize`.
"""

import re
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from guanaco.kernels.nf4 import SOURCE_DTYPES, Nf4Weight, dtype_name
from guanaco.kernels.nf4_state import from_state, quantized_names, state_keys
from guanaco.models.architectures.config import ModelConfig
from guanaco.models.architectures.config_json import read_config
from guanaco.models.architectures.decoder import WeightSource
from guanaco.models.errors import ModelError
from guanaco.models.formats.raw_file import FileLayout
from guanaco.models.formats.safetensors import SafetensorsFile
from guanaco.models.formats.shown import listed
from guanaco.models.formats.strict_json import read_json
from guanaco.models.loading.gguf_checkpoint import GgufCheckpoint
from guanaco.models.loading.unread_fields import config_notes
from guanaco.models.loading.unread_files import ADAPTER_WEIGHTS, notes_beside_gguf, notes_beside_weights

INDEX_FILE = "model.safetensors.index.json"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
# Buffers that old conversions store although the config determines them.
_DERIVED = re.compile(r"(.*\.)?rotary_emb\.inv_freq")


class Checkpoint(WeightSource, Protocol):
    """An open model: a `WeightSource` with its config and the layout of its files."""

    path: Path
    config: ModelConfig
    is_quantized: bool  # some weights are in NF4 already: then all weights are served as they are stored
    num_bytes: int  # of all tensors as stored
    sampling: dict[str, Any]  # sampling defaults in the weights' file, by the names of generation_config.json
    notes: list[str]  # sentences for the operator about the files: what was found, what is used, what to do

    def matrix(self, name: str, shape: tuple[int, int]) -> Nf4Weight | Tensor: ...

    def unused(self) -> tuple[str, ...]:
        """Names of stored tensors that were not read, except buffers that the config determines."""

    def layouts(self) -> list[FileLayout]:
        """The layouts of the weight files, from which the model cache makes its key."""

    def close(self) -> None: ...


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a directory of safetensors, a GGUF file, or a directory with exactly one GGUF file. The caller closes it.

    Raises ModelError that says what is wrong with `path` and what to do about it.
    """
    if path.is_file():
        if path.suffix == ".gguf":
            return _open_gguf(path, is_named=True)
        raise ModelError(f"{path} is no model: give a directory with config.json and safetensors, or a .gguf file")
    if not path.is_dir():
        raise ModelError(f"{path} does not exist: give a model directory, a .gguf file, or a hub id like org/name")
    try:
        files = sorted(file for file in path.iterdir() if file.is_file())
    except OSError as error:
        raise ModelError(f"{path} cannot be read ({error.strerror}): check its permissions") from error
    if any(file.suffix == ".safetensors" and file.name != ADAPTER_WEIGHTS for file in files):
        return SafetensorsCheckpoint(path)
    ggufs = [file for file in files if file.suffix == ".gguf"]
    if len(ggufs) == 1:
        return _open_gguf(ggufs[0], is_named=False)
    if ggufs:
        raise ModelError(f"{path} has several GGUF files: name one of them, {ggufs[0]} for example")
    if (path / "adapter_config.json").exists():
        raise ModelError(f"{path} is a LoRA adapter, not a model: give it with --adapter NAME={path}")
    if any(file.suffix in PICKLE_SUFFIXES for file in files):
        raise pickles_refused(str(path))
    if (path / INDEX_FILE).exists():
        raise ModelError(f"{path} has an index ({INDEX_FILE}) but none of its shards: download the model again")
    raise ModelError(f"{path} holds no weights: it needs safetensors files or one .gguf file")


def _open_gguf(file: Path, *, is_named: bool) -> GgufCheckpoint:
    checkpoint = GgufCheckpoint(file)
    checkpoint.notes += notes_beside_gguf(file, is_named=is_named)
    return checkpoint


def stored_table(path: Path, name: str) -> Tensor | None:
    """The embedding ("embed_tokens") or output layer ("lm_head") of the model at `path`, as it is stored. For a tied
    head, this is the embedding. None if it can't be read."""
    try:
        with closing(open_checkpoint(path)) as source:
            is_head = name == "lm_head" and not source.config.tie_word_embeddings
            shape = (source.config.vocab_size, source.config.hidden_size)
            return source.tensor("lm_head.weight" if is_head else "embed_tokens.weight", shape)
    except ModelError:
        return None


def pickles_refused(model: str) -> ModelError:
    """The refusal of a model whose only weights are pickles."""
    return ModelError(
        f"{model} has only pickled weights, which can run any code when they are opened, so they are not: convert them "
        "in another environment, with transformers: "
        "AutoModelForCausalLM.from_pretrained(SRC).save_pretrained(DST, safe_serialization=True)"
    )


class SafetensorsCheckpoint:
    """A Hugging Face directory: config.json and one or more safetensors files, dense or with bitsandbytes NF4."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = read_config(path)
        self.sampling: dict[str, Any] = {}
        self.notes = list(config_notes(read_json(path / "config.json")))
        self._files: list[SafetensorsFile] = []
        try:
            self._home = self._open_files()
            # Most checkpoints prefix the decoder's tensor names; a checkpoint of the decoder alone does not.
            self._prefix = "model." if any(name.startswith("model.") for name in self._home) else ""
            self._untie_if_contradicted()
        except BaseException:
            self.close()
            raise
        self._quantized = quantized_names(self._home)
        self.is_quantized = bool(self._quantized)
        self._note_format()
        self.num_bytes = sum(file.tensors[name].num_bytes for name, file in self._home.items())
        self._asked: set[str] = set()

    def close(self) -> None:
        for file in self._files:
            file.close()

    def matrix(self, name: str, shape: tuple[int, int]) -> Nf4Weight | Tensor:
        """A linear layer's weight [out, in], NF4 or dense as it is stored. Raises ModelError, see `tensor`."""
        stored_name = self._stored_name(name)
        if stored_name not in self._quantized:
            return self.tensor(name, shape)
        keys = state_keys(stored_name, self._home)
        self._asked.update(keys)
        try:
            weight = from_state({key: self._home[key].read(key) for key in keys}, stored_name)
        except ValueError as error:
            raise ModelError(f"{self.path}: {error}: get the model again, or its dense form") from error
        self._check_shape(stored_name, weight.shape, shape)
        return weight

    def tensor(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """A dense tensor in its stored dtype. Raises ModelError if it is missing, damaged or of another shape."""
        stored_name = self._stored_name(name)
        file = self._home.get(stored_name)
        if file is None:
            raise ModelError(f"{self.path}: the tensor {stored_name} is missing{self._hint(name)}")
        stored = file.tensors[stored_name]
        if stored_name in self._quantized or stored.dtype not in SOURCE_DTYPES:
            kind = "4 bit" if stored_name in self._quantized else dtype_name(stored.dtype)
            raise ModelError(
                f"{file.path}: {stored_name} is stored in {kind}; only fp16, bf16, fp32 and bitsandbytes NF4 "
                "projections are supported: give the model in one of these"
            )
        self._check_shape(stored_name, stored.shape, shape)
        self._asked.add(stored_name)
        return file.read(stored_name)

    def unused(self) -> tuple[str, ...]:
        derived = {name for name in self._home if _DERIVED.fullmatch(name)}
        tied = {"lm_head.weight"} if self.config.tie_word_embeddings else set()
        return tuple(sorted(self._home.keys() - self._asked - derived - tied))

    def layouts(self) -> list[FileLayout]:
        return [file.layout() for file in self._files]

    def _open_files(self) -> dict[str, SafetensorsFile]:
        """Tensor name → the file that holds it."""
        index_path = self.path / INDEX_FILE
        single = self.path / "model.safetensors"
        if index_path.exists() and not single.exists():
            home = self._open_shards(index_path)
            self.notes += notes_beside_weights(self.path, {INDEX_FILE, *(file.path.name for file in self._files)})
            return home
        names = sorted(p.name for p in self.path.glob("*.safetensors") if p.name != ADAPTER_WEIGHTS)
        if not single.exists() and len(names) > 1:
            raise ModelError(f"{self.path} has {len(names)} safetensors files and no {INDEX_FILE}: download it again")
        file = SafetensorsFile(single if single.exists() else self.path / names[0])
        self._files.append(file)
        self.notes += notes_beside_weights(self.path, {file.path.name})
        return dict.fromkeys(file.tensors, file)

    def _open_shards(self, index_path: Path) -> dict[str, SafetensorsFile]:
        weight_map = read_json(index_path).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ModelError(f"{index_path} has no weight_map: download the model again")
        shards: dict[str, SafetensorsFile] = {}
        for shard in sorted(set(map(str, weight_map.values()))):
            if Path(shard).name != shard:
                raise ModelError(
                    f"{index_path} names {shard!r}, which is no file of this directory: download the model elsewhere"
                )
            if not (self.path / shard).exists():
                raise ModelError(f"{self.path / shard} is missing, but the index needs it: download the model again")
            shards[shard] = SafetensorsFile(self.path / shard)
            self._files.append(shards[shard])
        for name, shard in weight_map.items():
            if name not in shards[str(shard)].tensors:
                raise ModelError(
                    f"{self.path / str(shard)} lacks the tensor {name} that the index promises: download both again"
                )
        home = {name: shards[str(shard)] for name, shard in weight_map.items()}
        found = [(name, file) for file in self._files for name in file.tensors]
        if forgotten := {name: file for name, file in found if name not in home}:
            self.notes.append(
                f"{len(forgotten)} tensors are in the shards and not in {INDEX_FILE}: {listed(sorted(forgotten))}; "
                "they are read all the same, as in transformers"
            )
        if twice := sorted(name for name, file in found if name in home and home[name] is not file):
            self.notes.append(
                f"{len(twice)} tensors are in several shards: {listed(twice)}; the one that {INDEX_FILE} names is used"
            )
        return forgotten | home

    def _stored_name(self, name: str) -> str:
        stored_name = name if name.startswith("lm_head.") else self._prefix + name
        if name == "embed_tokens.weight" and self.config.tie_word_embeddings and stored_name not in self._home:
            return "lm_head.weight"  # a tied checkpoint may store the matrix under either of its two names
        return stored_name

    def _untie_if_contradicted(self) -> None:
        """If the config ties head and embedding but both are stored and differ, use both, as transformers 5 does."""
        embedding, head = self._stored_name("embed_tokens.weight"), "lm_head.weight"
        if not self.config.tie_word_embeddings or embedding == head or head not in self._home:
            return
        first, second = self._home[embedding].read(embedding), self._home[head].read(head)
        if first.dtype != second.dtype or not torch.equal(first, second):
            self.config = replace(self.config, tie_word_embeddings=False)
            self.notes.append(
                f"config.json ties the head to the embedding, but {head} is stored and differs: the stored head is "
                f"used, as in transformers; remove {head} from the weights if the tie is right"
            )

    def _note_format(self) -> None:
        says_nf4 = self.config.quantization is not None
        if says_nf4 and not self.is_quantized:
            self.notes.append(
                "config.json says that the weights are in NF4, but they are dense: they are quantised at load, and the "
                "other settings of its quantization_config are not used"
            )
        elif self.is_quantized and not says_nf4:
            self.notes.append("the weights are in NF4 although config.json names no quantization: served as stored")

    def _check_shape(self, name: str, stored: tuple[int, ...], expected: tuple[int, ...]) -> None:
        if stored != expected:
            raise ModelError(
                f"{self.path}: {name} has shape {list(stored)}, config.json makes it {list(expected)}; "
                "weights and config belong to different models: download both again"
            )

    def _hint(self, name: str) -> str:
        if name == "lm_head.weight":
            return ": if the model ties its head to the embedding, config.json must say tie_word_embeddings = true"
        return "; the checkpoint is incomplete: download it again"
