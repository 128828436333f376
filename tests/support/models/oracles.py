"""transformers as the oracle of a served model: the same weights, decoded by our decoder to dense float32.

Greedy decoding is compared by the continuation rule of the acceptance issue. Used by the tests of the tiny models and
of the demo.
"""

import random
from contextlib import closing
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from guanaco.kernels import load_ops
from guanaco.kernels.layer_cache import Sequences
from guanaco.kernels.lora_batch import LoraBatch
from guanaco.kernels.nf4 import Nf4Weight
from guanaco.models.architectures.decoder import DecoderModel
from guanaco.models.architectures.forward_batch import ForwardBatch
from guanaco.models.architectures.kv_cache import PagedKVCache
from guanaco.models.architectures.registry import build_model
from guanaco.models.loading.checkpoint import open_checkpoint
from guanaco.models.loading.served_weights import ServedWeights


def reference_ops(dtype: torch.dtype = torch.float32, decoded_weights_bytes: int = 0) -> Any:
    """The reference provider on the CPU."""
    return load_ops("reference", device=torch.device("cpu"), dtype=dtype, decoded_weights_bytes=decoded_weights_bytes)


def served_state(path: Path) -> dict[str, Tensor]:
    """Every weight of the model at `path` as it is served, NF4 decoded: float32, under transformers' names."""
    with closing(open_checkpoint(path)) as checkpoint:
        recorder = _Recorder(ServedWeights(checkpoint, progress=None))
        build_model(checkpoint.config, recorder, reference_ops())
    return {name if name.startswith("lm_head.") else f"model.{name}": t for name, t in recorder.state.items()}


def transformers_oracle(path: Path) -> Any:
    """A dense float32 LlamaForCausalLM that holds `served_state(path)`; its config is read by transformers itself."""
    from transformers import AutoConfig, AutoModelForCausalLM

    if path.is_dir():
        config = AutoConfig.from_pretrained(path)
    else:
        with closing(open_checkpoint(path)) as checkpoint:
            config = AutoConfig.for_model(**checkpoint.config.to_json())
    config.quantization_config = None
    del config.quantization_config
    config._attn_implementation = "eager"
    model = AutoModelForCausalLM.from_config(config).float().eval()
    missing, unexpected = model.load_state_dict(served_state(path), strict=False)
    assert not unexpected
    assert set(missing) <= ({"lm_head.weight"} if config.tie_word_embeddings else set())
    return model


class _Recorder:
    """A `WeightSource` that keeps a decoded copy of what passes."""

    def __init__(self, weights: ServedWeights) -> None:
        self.weights = weights
        self.state: dict[str, Tensor] = {}

    def matrix(self, name: str, shape: tuple[int, int]) -> Nf4Weight | Tensor:
        weight = self.weights.matrix(name, shape)
        self.state[name] = weight.dequantize() if isinstance(weight, Nf4Weight) else weight.float()
        return weight

    def tensor(self, name: str, shape: tuple[int, ...]) -> Tensor:
        stored = self.weights.tensor(name, shape)
        self.state[name] = stored.float()
        return stored


@dataclass
class PagedRun:
    """Sequences of a model in one paged cache, their blocks handed out in a shuffled order as an engine would."""

    model: DecoderModel
    num_blocks: int = 256
    block_size: int = 4
    seed: int = 0
    dtype: torch.dtype = torch.float32
    lengths: dict[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.kv = PagedKVCache(self.model.config, self.num_blocks, self.block_size, self.dtype, torch.device("cpu"))
        self.free = list(range(self.num_blocks))
        random.Random(self.seed).shuffle(self.free)
        self.tables: dict[int, list[int]] = {}

    def step(
        self,
        work: list[tuple[int, list[int]]],
        *,
        every_row: bool = False,
        rows: list[int] | None = None,
        lora: LoraBatch | None = None,
    ) -> Tensor:
        """Append new tokens to sequences, (sequence, tokens) each; logits of their last rows, of all, or of `rows`."""
        token_ids: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        ends = [0]
        for sequence, tokens in work:
            start = self.lengths.get(sequence, 0)
            table = self.tables.setdefault(sequence, [])
            while len(table) * self.block_size < start + len(tokens):
                table.append(self.free.pop())
            token_ids += tokens
            new = range(start, start + len(tokens))
            positions += new
            slots += [table[p // self.block_size] * self.block_size + p % self.block_size for p in new]
            ends.append(ends[-1] + len(tokens))
            self.lengths[sequence] = start + len(tokens)
        if rows is None:
            rows = list(range(ends[-1])) if every_row else [end - 1 for end in ends[1:]]
        width = max(len(self.tables[s]) for s, _ in work)
        batch = ForwardBatch(
            token_ids=torch.tensor(token_ids, dtype=torch.int64),
            positions=torch.tensor(positions, dtype=torch.int64),
            slot_mapping=torch.tensor(slots, dtype=torch.int64),
            sequences=Sequences(
                torch.tensor(
                    [self.tables[s] + [0] * (width - len(self.tables[s])) for s, _ in work], dtype=torch.int32
                ),
                torch.tensor([self.lengths[s] for s, _ in work], dtype=torch.int32),
                torch.tensor(ends, dtype=torch.int32),
            ),
            logit_rows=torch.tensor(rows, dtype=torch.int64),
            lora=lora,
        )
        with torch.inference_mode():
            return self.model.forward(batch, self.kv)


def relative_error(ours: Tensor, oracle: Tensor) -> float:
    """Largest difference over the largest value."""
    return float((ours - oracle).abs().max() / oracle.abs().max())


@dataclass(frozen=True)
class GreedyReport:
    """How closely greedy decoding followed the oracle."""

    num_tokens: int
    num_mismatches: int
    largest_gap: float  # between the two candidates of a mismatch, in either model, over the oracle's largest logit
    largest_error: float  # `relative_error` of the logits over all steps


def follow_greedy(
    model: DecoderModel,
    oracle: Any,
    prompts: list[list[int]],
    num_tokens: int,
    *,
    chunk: int = 7,
    dtype: torch.dtype = torch.float32,
) -> GreedyReport:
    """Decode all prompts greedily in one paged batch, and the same with the oracle, one prompt at a time.

    The continuation rule: at a mismatch both go on with the oracle's token, and the gap between the two candidates is
    reported. Prompts enter `chunk` tokens a step, so that steps mix decoding rows with pieces of longer prompts.
    """
    expected = [oracle_greedy(oracle, prompt, num_tokens) for prompt in prompts]
    blocks = sum(-(-(len(p) + num_tokens) // 4) for p in prompts)
    run = PagedRun(model, num_blocks=blocks, dtype=dtype)
    pending = dict(enumerate([list(p) for p in prompts]))
    done = [0] * len(prompts)
    mismatches, gap, error = 0, 0.0, 0.0
    while pending:
        work = [(i, tokens[:chunk]) for i, tokens in pending.items()]
        logits = run.step(work)
        for (i, tokens), row in zip(work, logits, strict=True):
            del pending[i][: len(tokens)]
            if pending[i]:
                continue
            reference, token = expected[i][0][done[i]], expected[i][1][done[i]]
            scale = float(reference.abs().max())
            error = max(error, relative_error(row, reference))
            ours = int(row.argmax())
            if ours != token:
                mismatches += 1
                gaps = (float(reference[token] - reference[ours]), float(row[ours] - row[token]))
                gap = max(gap, *(g / scale for g in gaps))
            done[i] += 1
            if done[i] == num_tokens:
                del pending[i]
            else:
                pending[i].append(token)
    return GreedyReport(num_tokens * len(prompts), mismatches, gap, error)


@torch.inference_mode()
def oracle_greedy(oracle: Any, prompt: list[int], num_tokens: int) -> tuple[Tensor, list[int]]:
    """float32 logits [num_tokens, vocab] and the tokens that they choose, eos or not."""
    rows: list[Tensor] = []
    tokens: list[int] = []
    past = None
    feed = prompt
    for _ in range(num_tokens):
        output = oracle(torch.tensor([feed]), past_key_values=past, use_cache=True)
        past = output.past_key_values
        rows.append(output.logits[0, -1].float())
        tokens.append(int(rows[-1].argmax()))
        feed = [tokens[-1]]
    return torch.stack(rows), tokens


@torch.inference_mode()
def oracle_logits(oracle: Any, token_ids: list[int]) -> Tensor:
    """float32 [n, vocab] of one sequence."""
    return oracle(torch.tensor([token_ids])).logits[0].float()


@cache
def plain_bitsandbytes() -> None:
    """On processors with AVX-512, its own PyTorch decoder in place of bitsandbytes' native ones, for this process.

    Those of 0.50.2 are wrong where rows are no multiple of 64, and refuse to pack such rows; with AVX512-BF16 they
    compute in bfloat16 whatever they are told.
    """
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        return
    import bitsandbytes
    from bitsandbytes.backends.default.ops import _dequantize_4bit_compute
    from bitsandbytes.backends.utils import _get_4bit_code

    def decode(codes: Any, absmax: Any, blocksize: int, quant_type: str, shape: Any, dtype: torch.dtype) -> Tensor:
        code = _get_4bit_code(quant_type, codes.device)
        return _dequantize_4bit_compute(codes.view(torch.uint8).reshape(-1), absmax, code, blocksize, shape, dtype)

    _LIBRARY.impl("dequantize_4bit", decode, "CPU", allow_override=True)
    bitsandbytes.nn.modules.has_avx512bf16 = lambda: False


_LIBRARY = torch.library.Library("bitsandbytes", "IMPL")  # what it holds lasts as long as it does
