"""Sampling in one Triton launch: temperature, top_k, top_p, min_p and the random choice, without a sort.

One program samples one row. It bisects over the bits of the weights e^((x − max) / T) instead of sorting: the weights
are in [0, 1], so their bits have the same order as their values. First it finds the smallest weight that the filters
keep, then the weight on which the noise falls. Each step adds up the weights above a level in a fixed order: in float32
for each place of a block, in float64 over the places. tests/kernels/test_draw.py runs this in Triton's interpreter and
compares with the sampler's numpy code; NEVER RUN on a GPU so far. Called by the `triton` provider.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from guanaco.kernels.ops import Draw

_BLOCK = 2048
_WARPS = 8
_COLDEST, _HOTTEST = 1.2e-38, 1e37  # temperatures with a normal float32 reciprocal, which a GPU doesn't flush to 0
# used as the reciprocal of a tiny temperature; a difference of 0 stays 0 when multiplied by it
_MOST = tl.constexpr(1e38)
_SETTINGS = tl.constexpr(5)  # numbers in a Draw
_ONE_BITS = tl.constexpr(0x3F800000)  # the bits of the largest weight, 1.0
_STEPS = tl.constexpr(30)  # steps of bisection that cover [0, 0x3f800000]
# The noise is multiplied with a sum of weights; this keeps the product below the sum in spite of rounding.
_BELOW_ONE = tl.constexpr(1.0 - 1e-15)


@triton.jit
def _weights(logits, start, vocab, largest, inverse, BLOCK: tl.constexpr):
    column = start + tl.arange(0, BLOCK)
    x = tl.load(logits + column, mask=column < vocab, other=float("-inf"))
    return tl.exp((x - largest) * inverse)


@triton.jit
def _above(logits, vocab, largest, inverse, bits, BLOCK: tl.constexpr):
    """(number, float64 sum) of the weights greater than the weight with these bits."""
    level = bits.to(tl.float32, bitcast=True)
    count = tl.zeros((BLOCK,), tl.int32)
    mass = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, vocab, BLOCK):
        weight = _weights(logits, start, vocab, largest, inverse, BLOCK)
        above = weight > level
        count += above.to(tl.int32)
        mass += tl.where(above, weight, 0.0)
    return tl.sum(count), tl.sum(mass.to(tl.float64))


@triton.jit
def _ties(logits, vocab, largest, inverse, bits, BLOCK: tl.constexpr):
    level = bits.to(tl.float32, bitcast=True)
    count = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, vocab, BLOCK):
        count += (_weights(logits, start, vocab, largest, inverse, BLOCK) == level).to(tl.int32)
    return tl.sum(count)


@triton.jit
def _nth_tie(logits, vocab, largest, inverse, bits, n, BLOCK: tl.constexpr):
    """The token id of tie number n (from 0), in ascending order of ids."""
    level = bits.to(tl.float32, bitcast=True)
    seen = tl.full((), 0, tl.int32)
    token = tl.full((), 0, tl.int32)
    for start in range(0, vocab, BLOCK):
        equal = (_weights(logits, start, vocab, largest, inverse, BLOCK) == level).to(tl.int32)
        here = (equal == 1) & (seen + tl.cumsum(equal, 0) == n + 1)
        token += tl.sum(tl.where(here, start + tl.arange(0, BLOCK), 0))
        seen += tl.sum(equal)
    return token


@triton.jit
def _filtered(logits, vocab, largest, inverse, top_k, top_p, min_p, noise, BLOCK: tl.constexpr):
    """The sampled token id of one row, if its temperature is above 0 and a filter is on.

    logits: pointer to the row's float32 [vocab]. largest: the row's largest logit. inverse: 1 / temperature. top_k: 0
    for off. top_p: 1 or more for off. min_p: relative to the likeliest token's probability; 0 for off. noise: float64
    in [0, 1).

    Tokens are ordered from likeliest to least likely, equal ones by id. Each filter keeps the first of them, top_p
    including the one that crosses it; top_p is a share of all tokens' probability, whatever the other filters keep.
    The noise is a share of the kept weights, added up in this order: the token on which it falls is the result.
    """
    zero = tl.full((), 0, tl.int32)
    _, total = _above(logits, vocab, largest, inverse, zero, BLOCK)
    room = tl.where(top_k > 0, top_k, vocab)
    share = tl.where(top_p < 1.0, top_p * total, total * 2.0)
    low, high = zero, zero + _ONE_BITS  # the smallest level with a kept token lies in between
    for _ in range(_STEPS):
        middle = (low + high) // 2
        count, mass = _above(logits, vocab, largest, inverse, middle, BLOCK)
        kept = (count < room) & (mass < share) & (middle.to(tl.float32, bitcast=True).to(tl.float64) >= min_p)
        low, high = tl.where(kept, low, middle + 1), tl.where(kept, middle, high)
    cut = high
    count, mass = _above(logits, vocab, largest, inverse, cut, BLOCK)
    value = cut.to(tl.float32, bitcast=True).to(tl.float64)
    crossing = tl.ceil((share - mass) / tl.where(value > 0.0, value, 1.0))
    ties = tl.minimum(_ties(logits, vocab, largest, inverse, cut, BLOCK), room - count)
    ties = tl.minimum(ties, tl.maximum(tl.minimum(crossing, 1e9), 1.0).to(tl.int32))
    target = (mass + ties.to(tl.float64) * value) * tl.minimum(noise, _BELOW_ONE)
    low, high = cut, zero + _ONE_BITS
    for _ in range(_STEPS):
        middle = (low + high) // 2
        _, mass = _above(logits, vocab, largest, inverse, middle, BLOCK)
        low, high = tl.where(mass <= target, low, middle + 1), tl.where(mass <= target, middle, high)
    _, mass = _above(logits, vocab, largest, inverse, high, BLOCK)
    value = high.to(tl.float32, bitcast=True).to(tl.float64)
    among = tl.where(high == cut, ties, _ties(logits, vocab, largest, inverse, high, BLOCK))
    n = tl.floor((target - mass) / tl.where(value > 0.0, value, 1.0)).to(tl.int32)
    n = tl.maximum(tl.minimum(n, among - 1), 0)
    return _nth_tie(logits, vocab, largest, inverse, high, n, BLOCK)


@triton.jit
def _unfiltered(logits, vocab, largest, inverse, noise, BLOCK: tl.constexpr):
    """The sampled token id without filters, in the order of ids: first find the block on which the noise falls, then
    the place in it."""
    zero, nothing = tl.full((), 0, tl.int32), tl.full((), 0.0, tl.float64)
    # The next loop adds the same sums in the same order, so it ends at this total bit for bit and passes the target.
    total = nothing
    for start in range(0, vocab, BLOCK):
        total += tl.sum(_weights(logits, start, vocab, largest, inverse, BLOCK)).to(tl.float64)
    target = total * tl.minimum(noise, _BELOW_ONE)
    first, before, passed, found = zero, nothing, nothing, zero
    for start in range(0, vocab, BLOCK):
        weight = _weights(logits, start, vocab, largest, inverse, BLOCK)
        after = passed + tl.sum(weight).to(tl.float64)
        here = (found == 0) & (after > target)
        first, before = tl.where(here, start, first), tl.where(here, passed, before)
        found = tl.where(here, 1, found)
        passed = after
    weight = _weights(logits, first, vocab, largest, inverse, BLOCK)
    sums = before + tl.cumsum(weight.to(tl.float64), 0)
    place = tl.arange(0, BLOCK)
    # The block's float32 sum may exceed the target while the float64 sum ends below it: then take its last token.
    last = tl.max(tl.where(weight > 0.0, place, 0))
    return first + tl.minimum(tl.min(tl.where((sums > target) & (weight > 0.0), place, BLOCK)), last)


@triton.jit
def draw_kernel(logits, settings, tokens, vocab, BLOCK: tl.constexpr):
    """Sample one token for each row; `draw` launches it with one program per row.

    logits: float32 [r, vocab], contiguous, without NaN. settings: float64 [r, 5], of each row what `_settings` returns:
    temperature (0: the largest logit, of equal ones the smallest id), top_k (0: off), top_p (1: off), min_p (0: off)
    and the noise in [0, 1). tokens: int64 [r], the result. BLOCK: logits read at a time, a power of two.
    """
    row = tl.program_id(0).to(tl.int64)
    settings += row * _SETTINGS
    logits += row * vocab
    largest = tl.full((), float("-inf"), tl.float32)
    token = tl.full((), 0, tl.int32)
    for start in range(0, vocab, BLOCK):
        column = start + tl.arange(0, BLOCK)
        x = tl.load(logits + column, mask=column < vocab, other=float("-inf"))
        top, place = tl.max(x, 0, return_indices=True, return_indices_tie_break_left=True)
        token = tl.where(top > largest, start + place, token)
        largest = tl.maximum(largest, top)
    temperature = tl.load(settings).to(tl.float32)
    if temperature > 0.0:
        inverse = tl.minimum(1.0 / temperature, _MOST)
        top_k, top_p = tl.load(settings + 1).to(tl.int32), tl.load(settings + 2)
        min_p, noise = tl.load(settings + 3), tl.load(settings + 4)
        if (top_k > 0) | (top_p < 1.0) | (min_p > 0.0):
            token = _filtered(logits, vocab, largest, inverse, top_k, top_p, min_p, noise, BLOCK)
        else:
            token = _unfiltered(logits, vocab, largest, inverse, noise, BLOCK)
    tl.store(tokens + row, token.to(tl.int64))


def draw(logits: Tensor, draws: Sequence[Draw]) -> Tensor:
    """int64 [r]: one token per row of float32 logits [r, vocab], as `Ops.draw` defines it; logits must not be NaN.

    Copies 40 bytes per row to the device and nothing back: the caller fetches the tokens.
    """
    r, vocab = logits.shape
    assert len(draws) == r, (len(draws), r)
    assert logits.dtype == torch.float32, logits.dtype
    assert logits.is_contiguous()
    tokens = torch.empty(r, dtype=torch.int64, device=logits.device)
    if r == 0:
        return tokens
    settings = torch.tensor([_settings(d, vocab) for d in draws], dtype=torch.float64).to(logits.device)
    draw_kernel[(r,)](logits, settings, tokens, vocab, BLOCK=_BLOCK, num_warps=_WARPS)
    return tokens


def _settings(draw: Draw, vocab: int) -> tuple[float, int, float, float, float]:
    """The numbers of a Draw, clamped to the ranges in which the kernel computes correctly."""
    temperature, top_p, min_p = torch.tensor((draw.temperature, draw.top_p, draw.min_p), dtype=torch.float32).tolist()
    if temperature > 0:
        temperature = min(max(temperature, _COLDEST), _HOTTEST)
    return temperature, min(draw.top_k, vocab), top_p, min(min_p, 1.0), draw.uniform
