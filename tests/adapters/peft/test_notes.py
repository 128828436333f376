"""Whatever an adapter check notices and ignores is told in the adapter's notes; PEFT loads all of these."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from guanaco.adapters.peft.weights import load_adapter
from guanaco.adapters.versions.holds import HoldLedger
from guanaco.adapters.versions.store import VersionStore
from support.adapters.tiny_adapters import make_adapter

TARGETS = {f"layers.{layer}.self_attn.{name}": (8, 8) for layer in (0, 1) for name in ("q_proj", "v_proj")}


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_adapter(tmp_path_factory.mktemp("adapter") / "a", TARGETS, rank=2, modules=("q_proj", "v_proj"))


def notes_of(original: Path, folder: Path, files: dict[str, str] | None = None, **fields: Any) -> tuple[str, ...]:
    """The notes on a copy of the adapter with these fields and further files; both ways to load it give the same."""
    adapter = Path(shutil.copytree(original, folder / "copy"))
    config = adapter / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | fields))
    for name, text in (files or {}).items():
        (adapter / name).write_text(text)
    store = VersionStore(folder / "store", TARGETS, HoldLedger())
    try:
        ingested = store.ingest(adapter, name="default")
    finally:
        store.close()
    loaded = load_adapter(adapter, TARGETS)
    assert loaded.version == ingested.version
    assert set(loaded.notes) == set(ingested.notes)
    return loaded.notes


QV = ["q_proj", "v_proj"]
FIELDS: dict[str, tuple[Any, ...]] = {
    "target": ({"target_modules": [*QV, "lm_head", "c_attn"]}, "target_modules", "lm_head, c_attn"),
    "full name": ({"target_modules": [*QV, "model.layers.9.self_attn.q_proj"]}, "target_modules", "layers.9"),
    "exclude": ({"exclude_modules": ["k_pro"]}, "exclude_modules", "k_pro"),
    "exclude pattern": ({"exclude_modules": r".*\.layers\.7\..*"}, "exclude_modules", "layers"),
    "layers": ({"layers_to_transform": [0, 1, 31]}, "layers_to_transform", "31"),
    "layers pattern": (
        {"layers_to_transform": [0, 1], "layers_pattern": ["layers", "blocks"]},
        "layers_pattern",
        "blocks",
    ),
    "rank": ({"rank_pattern": {"k_proj": 4}}, "rank_pattern", "k_proj"),
    "rank hidden by an earlier key": ({"rank_pattern": {"q_proj": 2, "self_attn.q_proj": 2}}, "rank_pattern", "self_"),
    "alpha": ({"alpha_pattern": {r"layers\.[5-9]\..*": 4}}, "alpha_pattern", "layers"),
    "base": ({"base_model_name_or_path": ["llama"]}, "base_model_name_or_path", "is no text"),
    "unknown": ({"made_up": 1}, "made_up", "ignored"),
    "hostile": ({"target_modules": [*QV, "\x1b[31m\n" + "x" * 9000]}, "target_modules", "\\x1b[31m\\n"),
}


@pytest.mark.parametrize("case", FIELDS)
def test_a_field_without_an_effect_is_told(case: str, original: Path, tmp_path: Path) -> None:
    fields, *parts = FIELDS[case]
    (note,) = notes_of(original, tmp_path, **fields)
    assert all(part in note for part in parts), note
    assert len(note) < 500
    assert note.isprintable()


@pytest.mark.parametrize(
    ("name", "text", "part"),
    [
        ("adapter_model.bin", "", "adapter_model.bin"),
        ("chat_template.jinja", "x", "chat template"),
        ("tokenizer_config.json", '{"chat_template": "x"}', "chat template"),
    ],
)
def test_a_file_that_is_not_read_is_told(name: str, text: str, part: str, original: Path, tmp_path: Path) -> None:
    (note,) = notes_of(original, tmp_path, {name: text})
    assert part in note


def test_what_has_its_effect_is_not_told(original: Path, tmp_path: Path) -> None:
    """Excluding what is never adapted counts as an effect, since it stays as it is."""
    fields: dict[str, Any] = {
        "target_modules": [*QV, "layers.1.self_attn.q_proj"],
        "exclude_modules": ["lm_head", "embed_tokens", "norm", "q_norm", "self_attn.k_norm"],
        "layers_to_transform": [0, 1],
        "layers_pattern": "layers",
        "rank_pattern": {"layers.0.self_attn.q_proj": 2, "q_proj": 2},
        "alpha_pattern": {"v_proj": 3},
    }
    files = {"tokenizer_config.json": "{broken", "README.md": "x"}
    assert notes_of(original, tmp_path, files, **fields) == ()
