"""Logits → tokens, many rows at once. Each row's token depends only on its own logits, parameters and seed.

Sampling is counter-based: one uniform number per token, a function of the request's seed and of how many tokens it has
written. So neither the other rows of the batch nor a preemption changes a token. Called by the model runner.
"""

import hashlib
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from guanaco.kernels import Draw
from guanaco.models.error_codes import ErrorCode
from guanaco.server.engine.constraints import StepMasks, Words, words_of
from guanaco.server.engine.request import SampledToken, SamplingParams, TokenLogprob

FloatArray = NDArray[np.float32]

# How many of the likeliest tokens are sorted first. top_p and min_p mostly keep fewer; otherwise the whole row is
# sorted.
_NUM_CANDIDATES = 1024


_FLOAT32 = np.finfo(np.float32)
_LARGEST = float(_FLOAT32.max)


class Drawing(Protocol):
    """The one op of `kernels.Ops` that is used here: a kernel provider may sample in place of this code."""

    def draw(self, logits: Tensor, draws: Sequence[Draw]) -> list[int] | None: ...


@dataclass(frozen=True)
class SamplingRow:
    """One row to sample. The number of `output_ids` is always read: it is the row's position. The ids themselves, and
    `prompt_ids`, are only read if a penalty or a bad word is set."""

    params: SamplingParams
    prompt_ids: tuple[int, ...]
    output_ids: list[int]

    @property
    def position(self) -> int:
        return len(self.output_ids)  # how many tokens the request has written


def uniform(seed: int, position: int) -> float:
    """The random number of a request's token at a position of its output, in [0, 1): 53 bits of BLAKE2b."""
    digest = hashlib.blake2b(struct.pack("<qq", seed, position), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53


def sample(
    logits: Tensor,
    rows: list[SamplingRow],
    eos_ids: frozenset[int],
    ops: Drawing | None = None,
    masks: StepMasks | None = None,
) -> list[SampledToken]:
    """Sample one token per row of float32 logits [r, vocab]. A row that is not finite, or whose mask failed, gets an
    error instead.

    ops: a kernel provider that may sample in place of the code here, which is its specification.
    """
    assert logits.shape[0] == len(rows)
    if not rows:
        return []
    finite = _finite(logits)
    adjusted = _adjust(logits, rows, eos_ids, masks)
    ids = _ids(adjusted, rows, finite, ops)
    # A wrong id of a provider must neither reach a client nor index the embedding in the next step.
    finite = [ok and 0 <= token < logits.shape[1] for ok, token in zip(finite, ids, strict=True)]
    reported = [i for i, row in enumerate(rows) if row.params.logprobs is not None and finite[i]]
    logprobs: list[TokenLogprob | None] = [None] * len(rows)
    if reported:
        found = token_logprobs(
            logits[reported], [ids[i] for i in reported], [rows[i].params.logprobs or 0 for i in reported]
        )
        for i, logprob in zip(reported, found, strict=True):
            logprobs[i] = logprob
    tokens = [
        SampledToken(token, logprob) if ok else SampledToken(None, error=ErrorCode.NUMERICAL_ERROR)
        for token, logprob, ok in zip(ids, logprobs, finite, strict=True)
    ]
    for index, error in masks.errors.items() if masks is not None else ():
        tokens[index] = SampledToken(None, error=error)
    return tokens


def _finite(logits: Tensor) -> list[bool]:
    """For each row, whether all its numbers are finite. A finite sum proves it; only if it is not, each is checked."""
    finite: list[bool] = torch.isfinite(logits.sum(dim=-1)).tolist()
    return [ok or bool(torch.isfinite(row).all()) for ok, row in zip(finite, logits, strict=True)]


def _float32(number: float) -> float:
    """A temperature or probability as every provider stores it, in float32: 7e-46 becomes 0, and just below 1 becomes
    1."""
    return float(np.float32(min(number, _LARGEST)))


def _ids(logits: Tensor, rows: list[SamplingRow], finite: list[bool], ops: Drawing | None) -> list[int]:
    if ops is not None and all(finite):
        found = ops.draw(logits, [_draw_of(row, logits.shape[1]) for row in rows])
        if found is not None:
            return found
    tokens = logits.argmax(dim=-1)  # on the CPU, the lowest id among equal logits
    drawn = [i for i, row in enumerate(rows) if _float32(row.params.temperature) > 0 and finite[i]]
    if drawn:
        tokens[drawn] = _draw(logits[drawn], [rows[i] for i in drawn])
    ids: list[int] = tokens.tolist()
    return ids


def _draw_of(row: SamplingRow, vocab: int) -> Draw:
    params, temperature = row.params, _float32(row.params.temperature)
    noise = 0.0
    if temperature > 0:
        assert params.seed is not None, "the engine gives every request a seed"
        noise = uniform(params.seed, row.position)
    top_k = max(0, min(params.top_k, vocab))
    return Draw(temperature, top_k, _float32(params.top_p), _float32(params.min_p), noise)


def token_logprobs(
    logits: Tensor, token_ids: list[int], num_top: list[int], *, with_ranks: bool = False
) -> list[TokenLogprob]:
    """Log-probabilities of one given token and of the likeliest tokens, for each row of logits [r, vocab].

    logits: the model's own, before temperature, penalties and filters.
    token_ids: the given token of each row. num_top: how many of the likeliest tokens each row gets, 0 for none.
    with_ranks: also count the given token's rank, 1 for the likeliest; without it every rank is 0.
    """
    logprobs = torch.log_softmax(logits.float(), dim=-1)
    own = logprobs.gather(1, torch.tensor(token_ids, device=logits.device).unsqueeze(1))
    ranks = ((logprobs > own).sum(dim=-1) + 1).tolist() if with_ranks else [0] * len(token_ids)
    chosen = own.squeeze(1).tolist()
    most = max(num_top)
    values, indexes = (t.tolist() for t in logprobs.topk(most, dim=-1)) if most else ([[]] * len(chosen),) * 2
    return [
        TokenLogprob(token, value, tuple(zip(ids[:n], tops[:n], strict=True)), rank)
        for token, value, n, ids, tops, rank in zip(token_ids, chosen, num_top, indexes, values, ranks, strict=True)
    ]


def _adjust(logits: Tensor, rows: list[SamplingRow], eos_ids: frozenset[int], masks: StepMasks | None) -> Tensor:
    """The logits [r, vocab] with penalties, biases and forbidden tokens applied. Returns the input itself if no row
    asks for any of them.

    In a row of finite logits, only forbidden tokens become infinite, and at least one token stays finite.
    """
    out, vocab = logits, logits.shape[1]
    limits = _limits(rows, masks, vocab)
    for index, row in enumerate(rows):
        params = row.params
        banned = [] if index in limits else _banned(row, eos_ids, vocab)
        if not (_has_penalty(params) or params.logit_bias or banned):
            continue
        if out is logits:
            out = logits.clone()
        if _has_penalty(params):
            _penalise(out[index], row)
        if params.logit_bias:
            ids, biases = zip(*params.logit_bias, strict=True)
            out[index, list(ids)] += torch.tensor(biases, dtype=out.dtype, device=out.device)
        out[index].clamp_(-_LARGEST, _LARGEST)  # a tiny repetition penalty makes large quotients
        if banned:
            out[index, banned] = -torch.inf
    if limits:
        out = logits.clone() if out is logits else out
        _apply_limits(out, rows, eos_ids, limits, {} if masks is None else masks.errors)
    return out


def _limits(rows: list[SamplingRow], masks: StepMasks | None, vocab: int) -> dict[int, Words]:
    """Row index → the mask words of the ids that the row may sample: its mask's ids that are also among its allowed
    tokens. If no id is in both, the mask alone counts."""
    limits = {} if masks is None else {index: masks.words[place] for place, index in enumerate(masks.rows)}
    for index, row in enumerate(rows):
        if (allowed := row.params.allowed) is None:
            continue
        words = allowed.padded(words_of(vocab))
        both = words if index not in limits else words & limits[index]
        limits[index] = both if both.any() else limits.get(index, words)
    return limits


def _apply_limits(
    out: Tensor, rows: list[SamplingRow], eos_ids: frozenset[int], limits: dict[int, Words], errors: Mapping[int, Any]
) -> None:
    """Set forbidden logits to −infinity: ids outside the row's limits, and banned ids if another id is left. errors:
    the rows whose mask failed; they have no limit, since their token is discarded."""
    vocab = out.shape[1]
    words = np.stack(list(limits.values()))
    for place, index in enumerate(limits):
        left = words[place].copy()
        for token in _banned(rows[index], eos_ids, vocab):
            left[token // 32] &= ~np.int32(np.uint32(1 << (token % 32)).view(np.int32))
        if left.any():
            words[place] = left
        if index in errors:
            words[place] = -1  # all ids: sampling needs at least one
    # Bits are copied to a GPU and unpacked there: one byte per token would be eight times as much to copy.
    bits = torch.from_numpy(words).to(out.device).unsqueeze(-1)
    allowed = (bits >> torch.arange(32, device=out.device, dtype=torch.int32)) & 1
    forbidden = (allowed == 0).view(len(words), -1)[:, :vocab]
    limited = torch.tensor(list(limits), device=out.device)
    out[limited] = out[limited].masked_fill(forbidden, -torch.inf)


def _banned(row: SamplingRow, eos_ids: frozenset[int], vocab: int) -> list[int]:
    """The token ids that are banned now: ends before min_tokens, and the last token of a bad word whose other tokens
    were just written.

    Empty if they are the whole vocabulary: a token must be sampled, and before min_tokens none ends the request.
    """
    params = row.params
    banned = {word[-1] for word in params.bad_words if _ends_with(row.output_ids, word[:-1])}
    if row.position < params.min_tokens:
        banned |= params.stop_token_ids if params.ignore_eos else params.stop_token_ids | eos_ids
    kept = sorted(token for token in banned if token < vocab)  # a model's files may name eos ids without a logit
    return kept if len(kept) < vocab else []


def _ends_with(output_ids: list[int], token_ids: tuple[int, ...]) -> bool:
    return not token_ids or tuple(output_ids[-len(token_ids) :]) == token_ids


def _has_penalty(params: SamplingParams) -> bool:
    return bool(params.presence_penalty or params.frequency_penalty) or params.repetition_penalty != 1.0


def _penalise(logits: Tensor, row: SamplingRow) -> None:
    """Apply a row's penalties to its logits [vocab], in place.

    The repetition penalty counts prompt and output, as CTRL (Keskar et al. 2019) defines it: it divides positive logits
    and multiplies others. Presence and frequency count the output only, as the OpenAI API defines them.
    """
    params = row.params
    if params.repetition_penalty != 1.0:
        seen = torch.tensor(sorted({*row.prompt_ids, *row.output_ids}), device=logits.device)
        values = logits[seen]
        # Float32 would round a smaller penalty to 0, and 0 / 0 is NaN.
        penalty = max(params.repetition_penalty, float(_FLOAT32.tiny))
        logits[seen] = torch.where(values > 0, values / penalty, values * penalty)
    if row.output_ids and (params.presence_penalty or params.frequency_penalty):
        ids, counts = torch.tensor(row.output_ids, device=logits.device).unique(return_counts=True)
        logits[ids] -= params.frequency_penalty * counts + params.presence_penalty


def _draw(logits: Tensor, rows: list[SamplingRow]) -> Tensor:
    """Sample one token of each row; int64 [r].

    Inverse transform sampling. If a filter (top_p, top_k, min_p) is set, tokens are ordered from the likeliest to the
    least likely (equal ones by id), otherwise by id.
    """
    temperature = torch.tensor([_float32(row.params.temperature) for row in rows], device=logits.device)
    # Subtracting the maximum first keeps a tiny temperature from overflowing to infinity.
    scaled = (logits - logits.amax(dim=-1, keepdim=True)) / temperature.unsqueeze(1)
    # numpy sorts 50,000 floats in 0.2 ms where torch takes 5 (Zen 3, 2026-11-24).
    probabilities = torch.softmax(scaled, dim=-1).cpu().numpy()
    tokens = [
        _pick_filtered(p, row) if _is_filtered(row.params) else _pick(p, row)
        for p, row in zip(probabilities, rows, strict=True)
    ]
    return torch.tensor(tokens, device=logits.device)


def _is_filtered(params: SamplingParams) -> bool:
    return _float32(params.top_p) < 1.0 or params.top_k > 0 or _float32(params.min_p) > 0.0


def _pick_filtered(probabilities: FloatArray, row: SamplingRow) -> int:
    """Sample from a row with filters. Sorts probabilities, not ids: the sampled rank gives a probability, and tokens
    with that probability count in order of their ids."""
    num = min(_NUM_CANDIDATES, len(probabilities))
    top = np.sort(np.partition(probabilities, -num)[-num:])[::-1]
    kept = _num_kept(top, row.params)
    if kept == num < len(probabilities):  # the filter may end beyond the candidates
        top = np.sort(probabilities)[::-1]
        kept = _num_kept(top, row.params)
    rank = _pick(top[:kept], row)
    return int(np.flatnonzero(probabilities == top[rank])[rank - int(np.argmax(top == top[rank]))])


def _num_kept(probabilities: FloatArray, params: SamplingParams) -> int:
    """How many of the descending probabilities pass top_k, top_p and min_p; at least 1. The token with which the sum
    crosses top_p passes."""
    keep = np.ones(len(probabilities), dtype=np.bool_)
    if params.top_k > 0:
        keep[params.top_k :] = False
    top_p, min_p = _float32(params.top_p), _float32(params.min_p)
    if top_p < 1.0:
        before = probabilities.cumsum(dtype=np.float64) - probabilities
        keep &= before < top_p
    if min_p > 0.0:
        keep &= probabilities >= min_p * probabilities[0]
    return max(1, int(keep.sum()))


def _pick(probabilities: FloatArray, row: SamplingRow) -> int:
    """The index on which the row's random number falls. Sums in float64: float32 would round over 50,000 terms."""
    assert row.params.seed is not None, "the engine gives every request a seed"
    sums = probabilities.cumsum(dtype=np.float64)
    target = sums[-1] * uniform(row.params.seed, row.position)
    return min(int(np.searchsorted(sums, target, side="right")), len(sums) - 1)
