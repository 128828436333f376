"""Loading: what is quantised, what is not, the fingerprint, and the peak of memory."""

import json
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from guanaco.models.errors import ModelError
from guanaco.models.loading.checkpoint import stored_table
from guanaco.models.loading.loader import LoadedModel, load_model
from guanaco.models.loading.quantize import quantize_checkpoint
from support.children import IMPORTABLE
from support.models.oracles import PagedRun, reference_ops
from support.models.tiny_models import KINDS, make_tiny_llama

PROMPT = [1, 5, 90, 300, 17, 2, 44]


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("originals")
    make_tiny_llama(root / "dense")
    make_tiny_llama(root / "tied", kind="tied")
    make_tiny_llama(root / "nf4", quantized=True)
    return root


@pytest.fixture
def copy(originals: Path, tmp_path: Path) -> Callable[[str], Path]:
    return lambda name: Path(shutil.copytree(originals / name, tmp_path / name))


def edit(path: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors")


def load(path: Path, **options: Any) -> LoadedModel:
    return load_model(path, reference_ops(), **options)


def logits(loaded: LoadedModel) -> Tensor:
    return PagedRun(loaded.model).step([(0, PROMPT)], every_row=True)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_quantised_at_load_is_what_bitsandbytes_would_have_saved(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    ours = load(make_tiny_llama(tmp_path / "dense", kind=kind, dtype=dtype))
    theirs = load(make_tiny_llama(tmp_path / "nf4", kind=kind, dtype=dtype, quantized=True))
    assert (ours.origin, theirs.origin) == ("quantized", "checkpoint")
    assert ours.fingerprint == theirs.fingerprint
    assert torch.equal(logits(ours), logits(theirs))


def test_quantised_at_load_is_what_guanaco_quantize_writes(originals: Path, tmp_path: Path) -> None:
    quantize_checkpoint(originals / "dense", tmp_path / "converted")
    assert load(tmp_path / "converted").fingerprint == load(originals / "dense").fingerprint


def test_single_quantisation_is_served_and_is_another_model(tmp_path: Path) -> None:
    single = load(make_tiny_llama(tmp_path / "single", quantized="single"))
    double = load(make_tiny_llama(tmp_path / "double", quantized="double"))
    assert single.fingerprint != double.fingerprint
    assert not torch.equal(logits(single), logits(double))


def test_an_added_padding_row_is_just_another_shape(tmp_path: Path) -> None:
    """QLoRA's trainer adds a [PAD] row: 32001 tokens, and here 385."""
    loaded = load(make_tiny_llama(tmp_path, vocab_size=385))
    assert logits(loaded).shape == (len(PROMPT), 385)


def test_a_stored_table_is_the_files_own(originals: Path, tmp_path: Path) -> None:
    dense = load_file(originals / "dense" / "model.safetensors")
    for name, key in (("embed_tokens", "model.embed_tokens.weight"), ("lm_head", "lm_head.weight")):
        assert torch.equal(stored_table(originals / "dense", name), dense[key])  # type: ignore[arg-type]
    tied = load_file(originals / "tied" / "model.safetensors")["model.embed_tokens.weight"]
    assert torch.equal(stored_table(originals / "tied", "lm_head"), tied)  # type: ignore[arg-type]
    assert stored_table(tmp_path, "lm_head") is None


def test_float32_norms_and_tables_are_kept_where_that_is_asked_for(tmp_path: Path) -> None:
    """Through the cache, too, which keeps both forms apart."""
    path, cache = make_tiny_llama(tmp_path / "full", dtype=torch.float32), tmp_path / "cache"
    rounded = load(path, cache_dir=cache)
    kept = [load(path, cache_dir=cache, keep_float32=True) for _ in range(2)]
    assert [it.origin for it in (rounded, *kept)] == ["quantized", "quantized", "cache"]
    assert kept[0].fingerprint == kept[1].fingerprint != rounded.fingerprint
    assert load(path, keep_float32=True).fingerprint == kept[0].fingerprint
    stored = load_file(path / "model.safetensors")
    for loaded in kept:
        torch.testing.assert_close(loaded.model._norm.weight, stored["model.norm.weight"], rtol=0, atol=0)
        torch.testing.assert_close(loaded.model._embedding, stored["model.embed_tokens.weight"], rtol=0, atol=0)
        assert loaded.notes == ()
    assert rounded.notes == load(path, cache_dir=cache).notes
    (note,) = rounded.notes
    assert note.startswith("7 float32 tensors that are not quantised"), "embedding, head, final norm, two in each layer"
    assert "--dtype float32 keeps them" in note
    exact = make_tiny_llama(tmp_path / "half").rename(tmp_path / "exact")
    edit(exact, lambda tensors: tensors.update({name: tensor.float() for name, tensor in tensors.items()}))
    assert load(exact).notes == (), "bfloat16 holds every one of its values"


def test_a_float32_model_is_served_with_its_table_in_bf16(tmp_path: Path) -> None:
    """As `guanaco quantize` writes it: what is not quantised takes 16 bits."""
    loaded = load(make_tiny_llama(tmp_path / "full", dtype=torch.float32))
    assert loaded.weights_bytes == load(make_tiny_llama(tmp_path / "half", dtype=torch.bfloat16)).weights_bytes


def test_the_projections_that_a_quantised_checkpoint_keeps_dense_stay_dense(
    originals: Path, copy: Callable[[str], Path]
) -> None:
    """llm_int8_skip_modules: somebody wanted them exact, and transformers serves them so."""
    path, name = copy("nf4"), "model.layers.1.mlp.down_proj.weight"
    dense = load_file(originals / "dense" / "model.safetensors")[name]

    def keep_dense(tensors: dict[str, Tensor]) -> None:
        for key in [key for key in tensors if key.startswith(name)]:
            del tensors[key]
        tensors[name] = dense

    before = load(path)
    edit(path, keep_dense)
    loaded = load(path)
    assert loaded.notes == ("1 projections are dense in the checkpoint and are served so",)
    assert loaded.weights_bytes > before.weights_bytes
    assert loaded.fingerprint != before.fingerprint


def test_a_quantised_head_is_served(tmp_path: Path) -> None:
    """bitsandbytes leaves lm_head alone unless told otherwise; told otherwise, it is one more NF4 weight."""
    path = make_tiny_llama(tmp_path / "square", vocab_size=64, quantized=True)
    before, q_proj = load(path), "model.layers.0.self_attn.q_proj.weight"  # both [64, 64]
    edit(
        path, lambda t: [t.update({k.replace(q_proj, "lm_head.weight"): t[k].clone()}) for k in list(t) if q_proj in k]
    )
    loaded = load(path)
    assert loaded.weights_bytes < before.weights_bytes
    PagedRun(loaded.model).step([(0, [1, 2, 3])])


def test_strangers_are_named_in_a_note(copy: Callable[[str], Path]) -> None:
    path = copy("dense")
    edit(path, lambda t: t.update({f"extra.{i}": torch.ones(1) for i in range(7)}))
    (note,) = load(path).notes
    assert note.startswith("7 tensors are not part of this architecture and were ignored: extra.0, ")
    assert note.endswith("extra.4, …")


class TestFingerprint:
    def test_it_is_the_same_each_time_and_for_each_layout(self, originals: Path, copy: Callable[[str], Path]) -> None:
        path = copy("dense")
        assert load(path).fingerprint == load(originals / "dense").fingerprint
        tensors = load_file(path / "model.safetensors")
        reordered = {name.removeprefix("model."): tensors[name] for name in sorted(tensors, reverse=True)}
        save_file(reordered, path / "model.safetensors")
        assert load(path).fingerprint == load(originals / "dense").fingerprint

    @pytest.mark.parametrize("name", ["dense", "nf4", "tied"])
    def test_any_tensor_changes_it(self, name: str, copy: Callable[[str], Path]) -> None:
        path = copy(name)
        seen = {load(path).fingerprint}
        whole = load_file(path / "model.safetensors")
        parts = (".quant_map", ".nested_quant_map", ".bitsandbytes__nf4")
        changed = [key for key in whole if not key.endswith(parts)]
        for key in changed:
            tensors = {k: t.clone() for k, t in whole.items()}
            raw = tensors[key].view(-1)
            raw[0] = raw[0] ^ 16 if raw.dtype == torch.uint8 else raw[0] * -3 - 1
            save_file(tensors, path / "model.safetensors")
            seen.add(load(path).fingerprint)
        assert len(seen) == 1 + len(changed)

    def test_the_config_is_part_of_it(self, copy: Callable[[str], Path]) -> None:
        path = copy("dense")
        before = load(path).fingerprint
        config = json.loads((path / "config.json").read_text())
        for change, differs in (({"rms_norm_eps": 1e-5}, True), ({"eos_token_id": [2, 3]}, False)):
            (path / "config.json").write_text(json.dumps(config | change))
            assert (load(path).fingerprint != before) == differs


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(
    "key", ["model.embed_tokens.weight", "model.norm.weight", "model.layers.1.mlp.up_proj.weight", "lm_head.weight"]
)
def test_values_that_are_not_finite_are_refused(key: str, value: float, copy: Callable[[str], Path]) -> None:
    path = copy("dense")
    edit(path, lambda t: t[key].view(-1)[3:4].fill_(value))
    with pytest.raises(ModelError, match=rf"dense: {key.removeprefix('model.')}.* not finite"):
        load(path)


def test_scales_that_are_not_finite_are_refused(copy: Callable[[str], Path]) -> None:
    path, key = copy("nf4"), "model.layers.0.self_attn.v_proj.weight.nested_absmax"
    edit(path, lambda t: t[key].fill_(float("inf")))
    with pytest.raises(ModelError, match=r"v_proj\.weight holds values that are not finite"):
        load(path)


@pytest.mark.parametrize("name", ["dense", "nf4"])
def test_progress_runs_to_the_end(name: str, originals: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    load(originals / name, progress=lambda *step: seen.append(step))
    done, (total,) = [step[1] for step in seen], {step[2] for step in seen}
    assert seen[0][0] == "embed_tokens.weight"
    assert done == sorted(done)
    # Of NF4 only codes and scales are counted, not the 200 bytes beside each.
    assert 0.7 * total < done[-1] <= total


# -- the peak of memory ----------------------------------------------------------------------------------------------

HIDDEN, INTERMEDIATE, LAYERS, VOCABULARY = 1024, 4096, 8, 8000
MIB = 1 << 20
# What may be resident at the peak besides model and largest tensor: the chunks of quantising (4 MB of float32 each,
# half a dozen of them) and the heap's holes. Measured: 32, 50 and 7 MiB; everything at once takes 300 MiB.
SLACK_BYTES = 64 * MIB

MEASURE = """
import sys, torch
from pathlib import Path
sys.path.insert(0, {support!r})
from support.models.oracles import reference_ops
from guanaco.models.loading.loader import load_model
from guanaco.models.loading.checkpoint import open_checkpoint

def high_water():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))

torch.set_num_threads(1)
load_model(Path({warm_up!r}), reference_ops())  # imports and first-use tables do not count
open("/proc/self/clear_refs", "w").write("5")   # resets the high-water mark
before = high_water()
if {naive}:
    checkpoint = open_checkpoint(Path({model!r}))
    everything = [file.read(name) for name, file in checkpoint._home.items()]
loaded = load_model(Path({model!r}), reference_ops(), cache_dir=Path({cache!r}) if {cache!r} else None)
print(high_water() - before, loaded.weights_bytes)
"""


@pytest.fixture(scope="module")
def large_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """300 MB in bf16: a random block, repeated, written without a library."""
    path = tmp_path_factory.mktemp("large")
    fields = {"vocab_size": VOCABULARY, "hidden_size": HIDDEN, "intermediate_size": INTERMEDIATE}
    config = {"model_type": "llama", **fields, "num_hidden_layers": LAYERS, "num_attention_heads": 8}
    (path / "config.json").write_text(json.dumps(config))
    shapes = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN), "lm_head.weight": (VOCABULARY, HIDDEN)}
    shapes["model.norm.weight"] = (HIDDEN,)  # type: ignore[assignment]
    for i in range(LAYERS):
        prefix = f"model.layers.{i}"
        shapes |= {f"{prefix}.self_attn.{x}_proj.weight": (HIDDEN, HIDDEN) for x in "qkvo"}
        shapes |= {f"{prefix}.mlp.{x}_proj.weight": (INTERMEDIATE, HIDDEN) for x in ("gate", "up")}
        shapes[f"{prefix}.mlp.down_proj.weight"] = (HIDDEN, INTERMEDIATE)
        shapes |= {f"{prefix}.{x}_layernorm.weight": (HIDDEN,) for x in ("input", "post_attention")}  # type: ignore[misc]
    header, offset = {}, 0
    for name, shape in shapes.items():
        size = 2 * torch.Size(shape).numel()
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    block = (
        torch.randn(4 * MIB, generator=torch.Generator().manual_seed(0)).bfloat16().view(torch.uint8).numpy().tobytes()
    )
    raw = json.dumps(header).encode()
    with (path / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(raw)) + raw)
        while offset > 0:
            file.write(block[:offset])
            offset -= len(block)
    return path


def measure(model: Path, warm_up: Path, cache: Path | None, *, naive: bool = False) -> tuple[int, int]:
    """Load in a process of its own: (bytes at the peak above what it had before, bytes of the finished model)."""
    support = str(IMPORTABLE)
    script = MEASURE.format(
        support=support, warm_up=str(warm_up), model=str(model), cache=str(cache or ""), naive=naive
    )
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=200, cwd=model, check=False
    )
    assert result.returncode == 0, result.stderr
    peak, weights = map(int, result.stdout.split())
    return peak, weights


def test_the_peak_of_memory_is_the_model_and_its_largest_tensor(
    large_model: Path, originals: Path, tmp_path: Path
) -> None:
    largest = 2 * VOCABULARY * HIDDEN
    for cache in (None, tmp_path / "cache", tmp_path / "cache"):  # without one, into it, from it
        peak, weights = measure(large_model, originals / "dense", cache)
        assert weights < 110 * MIB
        assert peak < weights + largest + SLACK_BYTES, f"{peak / MIB:.0f} MiB for a model of {weights / MIB:.0f} MiB"


def test_that_bound_would_catch_a_loader_that_reads_everything_first(large_model: Path, originals: Path) -> None:
    peak, weights = measure(large_model, originals / "dense", None, naive=True)
    assert peak > weights + 2 * VOCABULARY * HIDDEN + SLACK_BYTES
