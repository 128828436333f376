"""Whatever a loader notices in a model's directory or GGUF file and does not use is told in the model's notes."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from guanaco.models.architectures.config import LinearRope
from guanaco.models.architectures.config_json import parse_config
from guanaco.models.errors import ModelError
from guanaco.models.loading.checkpoint import open_checkpoint
from guanaco.models.loading.loader import load_model
from guanaco.models.loading.unread_fields import config_notes
from support.models.oracles import reference_ops
from support.models.tiny_models import make_tiny_llama

LAYER = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("model") / "m")


def notes_of(path: Path) -> tuple[str, ...]:
    return load_model(path, reference_ops()).notes


def shard(path: Path, *, forget: str = "", twice: str = "") -> None:
    """The model in two shards with an index that leaves out the tensor `forget`; `twice` is in both shards."""
    tensors = load_file(path / "model.safetensors")
    first = {name: tensor for name, tensor in tensors.items() if "layers.1" in name}
    second = {name: tensor for name, tensor in tensors.items() if name not in first or name == twice}
    where = dict.fromkeys(second, "b.safetensors") | dict.fromkeys(first, "a.safetensors")
    where.pop(forget, None)
    save_file(first, path / "a.safetensors", metadata={"format": "pt"})
    save_file(second, path / "b.safetensors", metadata={"format": "pt"})
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    (path / "model.safetensors").unlink()


def edit_config(path: Path, **fields: Any) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | fields))


def untie(path: Path) -> None:
    edit_config(path, tie_word_embeddings=True)


def empty(name: str) -> Callable[[Path], object]:
    return lambda path: (path / name).write_text("{}")


DIRECTORY: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "second weights": (empty("other.safetensors"), ("read from model.safetensors, not from other.safetensors",)),
    "an index": (empty("model.safetensors.index.json"), ("model.safetensors.index.json", "remove those")),
    "a GGUF file": (empty("m.gguf"), ("not from m.gguf",)),
    "pickles": (empty("pytorch_model-00001-of-00002.bin"), ("pytorch_model-00001",)),
    "an adapter": (empty("adapter_config.json"), ("--adapter",)),
    "hostile name": (empty("\x1b[2J\n" + "x" * 200 + ".gguf"), ("\\x1b[2J\\n",)),
    "forgotten in the index": (lambda path: shard(path, forget=LAYER), (LAYER, "are read all the same")),
    "in two shards": (lambda path: shard(path, twice=LAYER), (LAYER, "index.json names is used")),
    "a tied head that differs": (untie, ("lm_head.weight is stored and differs", "the stored head is used")),
    "says NF4": (lambda path: edit_config(path, quantization_config={"load_in_4bit": True}), ("but they are dense",)),
    "several bos": (lambda path: edit_config(path, bos_token_id=[1, 5]), ("2 ids as bos_token_id", "the first, 1,")),
    "code": (lambda path: edit_config(path, auto_map={"AutoModel": "x.Y"}), ("auto_map", "never run")),
    "unknown field": (lambda path: edit_config(path, **{"\n" * 90: 1}), ("unknown here", "\\n")),
}


@pytest.mark.parametrize("case", DIRECTORY)
def test_a_models_directory(case: str, original: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(original, tmp_path / "m"))
    change, parts = DIRECTORY[case]
    change(path)
    (note,) = notes_of(path)
    assert all(part in note for part in parts), note
    assert len(note) < 500
    assert note.isprintable()


def test_tensors_that_the_index_forgot_are_read_as_transformers_does(original: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(original, tmp_path / "m"))
    shard(path, forget=LAYER)
    assert load_model(path, reference_ops()).fingerprint == load_model(original, reference_ops()).fingerprint


def test_what_trainers_leave_beside_weights_is_not_told(original: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(original, tmp_path / "m"))
    for name in ("training_args.bin", "optimizer.pt", "rng_state.pth", "README.md", "generation_config.json"):
        (path / name).write_text("{}")
    assert notes_of(path) == notes_of(original) == ()


def test_notes_are_those_of_the_files_as_they_are_now(original: Path, tmp_path: Path) -> None:
    """A model from the cache has the notes of its directory, too."""
    path = Path(shutil.copytree(original, tmp_path / "m"))
    assert load_model(path, reference_ops(), cache_dir=tmp_path / "cache").notes == ()
    (path / "m.gguf").write_text("")
    again = load_model(path, reference_ops(), cache_dir=tmp_path / "cache")
    assert (again.origin, len(again.notes)) == ("cache", 1)


LINEAR = {"type": "linear", "factor": 2}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
ROPE: dict[str, tuple[dict[str, Any], str | None]] = {
    "differ": (
        {"rope_scaling": {"type": "linear", "factor": 2}, "rope_parameters": {"rope_type": "default"}},
        "differ",
    ),
    "other base": (
        {
            "rope_scaling": {"type": "linear", "factor": 2},
            "rope_parameters": {"type": "linear", "factor": 2, "rope_theta": 5},
        },
        "differ",
    ),
    "the same": (
        {"rope_scaling": {"type": "linear", "factor": 2}, "rope_parameters": {"rope_type": "linear", "factor": 2.0}},
        None,
    ),
    "theta": ({"rope_theta": 5.0, "rope_parameters": {"rope_type": "default", "rope_theta": 7.0}}, "7.0 is used"),
    "length": (
        {"original_max_position_embeddings": 9, "rope_scaling": {**LLAMA3, "original_max_position_embeddings": 8}},
        "9 is used",
    ),
    "two types": ({"rope_scaling": {"type": "yarn", "rope_type": "linear", "factor": 2}}, "rope_type is used"),
    "unused": ({"rope_scaling": {"type": "linear", "factor": 2, "beta_fast": 32}}, "does not use: beta_fast"),
    "a factor without a type": ({"rope_scaling": {"factor": 2}}, "does not use: factor"),
    "llama3": ({"rope_scaling": {**LLAMA3, "original_max_position_embeddings": 8}, "rope_theta": 5.0}, None),
    "none": ({"rope_scaling": None, "rope_theta": 5.0}, None),
}


@pytest.mark.parametrize("case", ROPE)
def test_spellings_of_rotary_scaling(case: str) -> None:
    fields, part = ROPE[case]
    parse_config(fields, "config.json")  # all of these are served
    notes = config_notes(fields)
    assert len(notes) == (part is not None)
    assert part is None or part in notes[0]


class TestGguf:
    @pytest.fixture
    def write(self, tmp_path: Path) -> Callable[..., Path]:
        def write(**metadata: Any) -> Path:
            """A GGUF file that opens: its tensors are not complete. Dots in keys are written as two underscores."""
            writer = gguf.GGUFWriter(str(tmp_path / "m.gguf"), "llama")
            shape = {"embedding_length": 8, "block_count": 1, "feed_forward_length": 8, "context_length": 64}
            keys: dict[str, Any] = {f"llama__{key}": value for key, value in shape.items()}
            keys |= {"llama__attention__head_count": 1, "llama__attention__layer_norm_rms_epsilon": 1e-5}
            for key, value in (keys | metadata).items():
                add = {int: writer.add_uint32, float: writer.add_float32, bool: writer.add_bool, str: writer.add_string}
                add[type(value)](key.replace("__", "."), value)
            writer.add_tensor("token_embd.weight", np.zeros((4, 8), np.float32))
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
            writer.close()
            return tmp_path / "m.gguf"

        return write

    @staticmethod
    def opened(path: Path) -> tuple[list[str], Any]:
        checkpoint = open_checkpoint(path)
        checkpoint.close()
        return checkpoint.notes, checkpoint.config.rope_scaling

    CASES: dict[str, tuple[dict[str, Any], str | None]] = {
        "nothing": ({"llama__rope__scaling__finetuned": True, "llama__vocab_size": 4}, None),
        "unknown": ({"llama__attention__scale": 0.5, "llama__made_up": 1}, "llama.attention.scale, llama.made_up"),
        "hostile": ({"llama.\x1b[2J" + "x" * 999: 1}, "\\x1b[2J"),
        "sampling": (
            {"general__sampling__mirostat": 2, "general__sampling__temp": 0.5},
            "not used here: general.sampling.miro",
        ),
        "sampling that is used": ({"general__sampling__temp": 0.5}, None),
        "rows": ({"llama__vocab_size": 5}, "its embedding's 4 rows are used"),
        "two factors": (
            {
                "llama__rope__scaling__type": "linear",
                "llama__rope__scaling__factor": 4.0,
                "llama__rope__scale_linear": 2.0,
            },
            "factor 4.0",
        ),
        "type none": ({"llama__rope__scaling__type": "none", "llama__rope__scaling__factor": 4.0}, "not scaled"),
    }

    @pytest.mark.parametrize("case", CASES)
    def test_keys_that_are_not_used(self, case: str, write: Callable[..., Path]) -> None:
        metadata, part = self.CASES[case]
        notes, _ = self.opened(write(**metadata))
        assert len(notes) == (part is not None)
        if part is not None:
            assert part in notes[0]
            assert notes[0].isprintable()
            assert len(notes[0]) < 500

    @pytest.mark.parametrize(
        ("kind", "factor", "old", "scaling"),
        [
            (None, None, None, None),
            (None, 4.0, None, LinearRope(4.0)),
            (None, None, 2.0, LinearRope(2.0)),
            ("linear", None, 2.0, LinearRope(2.0)),
            ("linear", 4.0, 2.0, LinearRope(4.0)),
            ("linear", None, None, None),
            ("linear", 0.0, None, None),
            ("none", 4.0, 2.0, None),
        ],
    )
    def test_scaling_is_llama_cpps(
        self, kind: str | None, factor: float | None, old: float | None, scaling: Any, write: Callable[..., Path]
    ) -> None:
        """llama-model.cpp: the type is linear unless one is named; the old key counts where the new one is absent."""
        keys = {"scaling__type": kind, "scaling__factor": factor, "scale_linear": old}
        metadata = {f"llama__rope__{key}": value for key, value in keys.items() if value is not None}
        assert self.opened(write(**metadata))[1] == scaling

    def test_sampling_defaults_are_llama_cpps(self, write: Callable[..., Path]) -> None:
        checkpoint = open_checkpoint(write(general__sampling__temp=0.6, general__sampling__top_k=20))
        checkpoint.close()
        assert checkpoint.sampling == {"temperature": 0.6, "top_k": 20}

    def test_attention_to_what_comes_later_is_refused(self, write: Callable[..., Path]) -> None:
        with pytest.raises(ModelError, match=r"llama\.attention\.causal"):
            open_checkpoint(write(llama__attention__causal=False))

    def test_files_beside_one(self, write: Callable[..., Path]) -> None:
        """What a directory gives besides the metadata is not read where the file itself is named."""
        path = write()
        for name in ("generation_config.json", "tokenizer.json", "config.json", "README.md"):
            (path.parent / name).write_text("{}")
        (note,) = self.opened(path)[0]
        assert "tokenizer.json, generation_config.json beside m.gguf are not read" in note
        (note,) = self.opened(path.parent)[0]
        assert "config.json beside m.gguf is not read" in note


def test_a_model_without_peculiarities_has_no_notes(tmp_path: Path) -> None:
    for kind, options in (("tied", {}), ("gqa", {"quantized": True}), ("gqa", {"dtype": torch.bfloat16})):
        path = make_tiny_llama(tmp_path / f"{kind}{len(options)}{list(options)}", kind=kind, **options)  # type: ignore[arg-type]
        assert notes_of(path) == ()
