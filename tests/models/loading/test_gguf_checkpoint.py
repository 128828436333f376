"""GGUF: written as llama.cpp's converter writes it, it loads as the very model that it was made from."""

from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from guanaco.models.architectures.config import LinearRope, Llama3Rope
from guanaco.models.architectures.config_json import read_config
from guanaco.models.errors import ModelError
from guanaco.models.loading.checkpoint import open_checkpoint
from guanaco.models.loading.gguf_checkpoint import GgufCheckpoint
from guanaco.models.loading.loader import load_model
from support.models.gguf_files import write_gguf
from support.models.oracles import PagedRun, oracle_logits, reference_ops, relative_error, transformers_oracle
from support.models.tiny_models import KINDS, make_tiny_llama

TYPES = gguf.GGMLQuantizationType
DECODABLE = sorted(
    (t for t in gguf.quants._type_traits if t not in (TYPES.F32, TYPES.F16)), key=lambda t: t.value
)  # every type that gguf.dequantize knows


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    root = tmp_path_factory.mktemp("sources")
    return lambda kind: root / kind if (root / kind).exists() else make_tiny_llama(root / kind, kind=kind)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "llama3_rope"])
@pytest.mark.parametrize("qtype", [TYPES.F32, TYPES.BF16], ids=["F32", "BF16"])
def test_a_lossless_round_trip_is_the_same_model_bit_for_bit(
    kind: str, qtype: Any, source: Callable[[str], Path], tmp_path: Path
) -> None:
    path = write_gguf(tmp_path / "m.gguf", source(kind), qtype)
    ours, original = load_model(path, reference_ops()), load_model(source(kind), reference_ops())
    assert ours.fingerprint == original.fingerprint
    assert ours.notes == ()
    assert ours.config.eos_token_ids == (2,)


@pytest.mark.parametrize("architecture", ["qwen2", "qwen3"])
def test_qwen_is_stored_without_another_row_order(architecture: str, tmp_path: Path) -> None:
    original = make_tiny_llama(tmp_path / "hf", model_type=architecture, head_dim=16, tie_word_embeddings=True)
    path = write_gguf(tmp_path / "m.gguf", original, architecture=architecture)
    ours = load_model(path, reference_ops())
    assert ours.fingerprint == load_model(original, reference_ops()).fingerprint
    assert ours.notes == ()
    assert (ours.config.model_type, ours.config.eos_token_ids) == (architecture, (2,))


def test_a_mistral_is_stored_as_a_llama(tmp_path: Path) -> None:
    original = make_tiny_llama(tmp_path / "hf", model_type="mistral", sliding_window=None)
    ours = load_model(write_gguf(tmp_path / "m.gguf", original), reference_ops())
    assert ours.config.model_type == "llama"
    ids = list(range(5, 300, 7))
    logits = PagedRun(ours.model).step([(0, ids)], every_row=True)
    assert relative_error(logits, oracle_logits(transformers_oracle(original), ids)) < 1e-4


@pytest.mark.parametrize("qtype", [TYPES.F16, TYPES.Q8_0, TYPES.Q4_1], ids=lambda t: t.name)
def test_logits_are_those_of_transformers_over_the_same_weights(
    qtype: Any, source: Callable[[str], Path], tmp_path: Path
) -> None:
    path = write_gguf(tmp_path / "m.gguf", source("gqa"), qtype)
    ids = list(range(5, 300, 7))
    logits = PagedRun(load_model(path, reference_ops()).model).step([(0, ids)], every_row=True)
    assert relative_error(logits, oracle_logits(transformers_oracle(path), ids)) < 1e-4


def test_a_wrong_row_order_makes_another_model(source: Callable[[str], Path], tmp_path: Path) -> None:
    """The planted bug: q and k left in llama.cpp's order."""
    right = load_model(write_gguf(tmp_path / "m.gguf", source("gqa")), reference_ops())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GgufCheckpoint, "_rows_by_halves", lambda self, name, stored: stored)
        wrong = load_model(tmp_path / "m.gguf", reference_ops())
    logits = [PagedRun(m.model).step([(0, [3, 1, 4, 1, 5])], every_row=True) for m in (right, wrong)]
    assert relative_error(logits[1], logits[0]) > 0.05


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # random bytes make infinite scales
@pytest.mark.parametrize("qtype", DECODABLE, ids=lambda t: t.name)
def test_any_type_that_the_gguf_package_decodes(qtype: Any, source: Callable[[str], Path], tmp_path: Path) -> None:
    """Random bytes of every type come out as gguf.dequantize has them, and in float16 where they stay dense."""
    rng = np.random.default_rng(qtype.value)
    shape = (16, 256)
    raw = rng.integers(0, 256, size=gguf.quant_shape_to_byte_shape(shape, qtype), dtype=np.uint8)
    path = tmp_path / "m.gguf"
    original = make_tiny_llama(tmp_path / "wide", hidden_size=256, num_hidden_layers=1, vocab_size=16 + 270)
    writer = gguf.GGUFWriter(str(path), "llama")
    config = read_config(original)
    for key, value in {
        "block_count": 1, "context_length": 64, "embedding_length": 256, "feed_forward_length": 16,
        "attention.head_count": config.num_heads,
    }.items():  # fmt: skip
        writer.add_uint32(f"llama.{key}", value)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-6)
    for name in ("blk.0.ffn_up.weight", "token_embd.weight"):
        writer.add_tensor(name, raw, raw_dtype=qtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    expected = torch.from_numpy(gguf.dequantize(raw, qtype))
    with closing(GgufCheckpoint(path)) as checkpoint:
        projection = checkpoint.matrix("layers.0.mlp.up_proj.weight", shape)
        table = checkpoint.tensor("embed_tokens.weight", shape)
    assert torch.equal(projection.float().nan_to_num(), expected.nan_to_num())
    assert table.dtype == (torch.bfloat16 if qtype == TYPES.BF16 else torch.float16)
    assert torch.equal(table.float().nan_to_num(), expected.to(table.dtype).float().nan_to_num())


def llama3_factors(head_dim: int, theta: float, factor: float, original: int = 8192) -> np.ndarray:
    """The converter's rope_freqs tensor for LLaMA 3.1: what each frequency is divided by."""
    frequencies = 1.0 / theta ** (np.arange(0, head_dim, 2) / head_dim)
    factors = []
    for frequency in frequencies:
        wavelength = 2 * np.pi / frequency
        if wavelength < original / 4:
            factors.append(1.0)
        elif wavelength > original / 1:
            factors.append(factor)
        else:
            smooth = (original / wavelength - 1) / (4 - 1)
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(factors, dtype=np.float32)


class TestRopeScaling:
    @pytest.mark.parametrize(("head_dim", "factor"), [(16, 8.0), (32, 32.0)])
    def test_llama3_is_recovered_from_its_factors(self, head_dim: int, factor: float, tmp_path: Path) -> None:
        scaling = {"rope_type": "llama3", "rope_theta": 5e5, "factor": factor, "low_freq_factor": 1.0,
                   "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}  # fmt: skip
        original = make_tiny_llama(tmp_path / "original", head_dim=head_dim, rope_parameters=scaling)
        factors = llama3_factors(head_dim, 5e5, factor)
        path = write_gguf(tmp_path / "m.gguf", original, extra={"rope_freqs.weight": factors})
        ours = load_model(path, reference_ops())
        assert ours.config.rope_scaling == Llama3Rope(factor, 1.0, 4.0, 8192)
        assert ours.fingerprint == load_model(original, reference_ops()).fingerprint

    @pytest.mark.parametrize(
        "factors",
        [np.full(8, 2.0, np.float32), np.ones(4, np.float32), llama3_factors(16, 5e5, 8.0, original=4096)],
        ids=["constant", "short", "another original length"],
    )
    def test_other_tables_are_refused(self, factors: np.ndarray, source: Callable[[str], Path], tmp_path: Path) -> None:
        metadata = {"rope.freq_base": 5e5}
        path = write_gguf(tmp_path / "m.gguf", source("gqa"), metadata=metadata, extra={"rope_freqs.weight": factors})
        with pytest.raises(ModelError, match=r"rope_freqs\.weight does not follow"):
            open_checkpoint(path)

    def test_linear_in_the_old_spelling(self, source: Callable[[str], Path], tmp_path: Path) -> None:
        drop = {"rope.scaling.type": None, "rope.scaling.factor": None, "rope.scale_linear": 2.0}
        path = write_gguf(tmp_path / "m.gguf", source("linear_rope"), metadata=drop)
        with closing(open_checkpoint(path)) as checkpoint:
            assert checkpoint.config.rope_scaling == LinearRope(2.0)


def test_a_directory_with_one_gguf_file_is_that_file(source: Callable[[str], Path], tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", source("tied"))
    with closing(open_checkpoint(tmp_path)) as checkpoint:
        assert checkpoint.path == path
        assert checkpoint.config.tie_word_embeddings


def test_the_metadata_are_there_for_others(source: Callable[[str], Path], tmp_path: Path) -> None:
    with closing(GgufCheckpoint(write_gguf(tmp_path / "m.gguf", source("gqa")))) as checkpoint:
        assert checkpoint.metadata["tokenizer.ggml.eos_token_id"] == 2
        assert checkpoint.metadata["general.architecture"] == "llama"


def test_a_gguf_goes_through_the_model_cache(source: Callable[[str], Path], tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", source("gqa"), TYPES.Q8_0)
    loads = [load_model(path, reference_ops(), cache_dir=tmp_path / "cache") for _ in range(2)]
    assert [loaded.origin for loaded in loads] == ["quantized", "cache"]
    assert loads[0].fingerprint == loads[1].fingerprint


class TestRefusals:
    @pytest.mark.parametrize(
        ("options", "said"),
        [
            (
                {"architecture": "gemma2"},
                "'gemma2' is not supported: only llama, qwen2, qwen3 are",
            ),
            ({"metadata": {"split.count": 3}}, "llama-gguf-split --merge"),
            ({"metadata": {"expert_count": 8}}, r"llama\.expert_count = 8"),
            ({"metadata": {"attention.value_length": 8}}, r"llama\.attention\.value_length = 8"),
            ({"metadata": {"rope.dimension_count": 8}}, r"llama\.rope\.dimension_count = 8"),
            ({"metadata": {"rope.scaling.type": "yarn"}}, "'yarn'"),
            ({"metadata": {"embedding_length": None}}, r"lack llama\.embedding_length"),
            ({"metadata": {"block_count": 3}}, r"blk\.2\..* is missing"),
            ({"metadata": {"feed_forward_length": 96}}, r"\[160, 64\], the metadata make it \[96, 64\]"),
            ({"drop": ("blk.1.ffn_norm.weight",)}, r"blk\.1\.ffn_norm\.weight is missing"),
            ({"drop": ("token_embd.weight",), "metadata": {"vocab_size": 384}}, r"token_embd\.weight is missing"),
        ],
    )
    def test_what_cannot_run(self, options: Any, said: str, source: Callable[[str], Path], tmp_path: Path) -> None:
        path = write_gguf(tmp_path / "m.gguf", source("gqa"), **options)
        with pytest.raises(ModelError, match=rf"m\.gguf.*{said}"):
            load_model(path, reference_ops())

    def test_a_type_that_the_package_cannot_decode(self, source: Callable[[str], Path], tmp_path: Path) -> None:
        path = write_gguf(tmp_path / "m.gguf", source("gqa"), TYPES.Q8_0)
        with pytest.MonkeyPatch.context() as patch:
            patch.delitem(gguf.quants._type_traits, TYPES.Q8_0)
            with pytest.raises(
                ModelError, match=r"token_embd\.weight is stored as Q8_0, which the gguf package cannot"
            ):
                load_model(path, reference_ops())

    @pytest.mark.parametrize("share", [0.0, 0.001, 0.02, 0.05, 0.3, 0.7, 0.99])
    def test_a_truncated_file(self, share: float, source: Callable[[str], Path], tmp_path: Path) -> None:
        path = write_gguf(tmp_path / "m.gguf", source("gqa"))
        whole = path.read_bytes()
        path.write_bytes(whole[: int(share * len(whole))])
        with pytest.raises(ModelError, match=r"m\.gguf is damaged: .*; delete it and download"):
            open_checkpoint(path)

    def test_a_file_that_is_something_else(self, tmp_path: Path) -> None:
        (tmp_path / "m.gguf").write_bytes(b"PK\3\4" * 100)
        with pytest.raises(ModelError, match=r"m\.gguf is damaged"):
            open_checkpoint(tmp_path / "m.gguf")

    def test_a_file_that_shrinks_while_it_is_read(self, source: Callable[[str], Path], tmp_path: Path) -> None:
        path = write_gguf(tmp_path / "m.gguf", source("gqa"))
        with closing(open_checkpoint(path)) as checkpoint:
            with path.open("r+b") as file:
                file.truncate(5000)
            with pytest.raises(ModelError, match="ends at byte 5000"):
                checkpoint.matrix("lm_head.weight", (384, 64))


def test_progress_ends_at_the_whole(source: Callable[[str], Path], tmp_path: Path) -> None:
    """The file has fewer bytes than its tensors have once they are decoded."""
    path, seen = write_gguf(tmp_path / "m.gguf", source("gqa"), TYPES.Q8_0), []
    load_model(path, reference_ops(), progress=lambda _, done, total: seen.append((done, total)))
    assert len(seen) > 10
    assert all(0 < done <= total for done, total in seen)
    assert seen[-1][0] == seen[-1][1]
