"""Statistics in Triton: one kernel reads all once and leaves sums of parts, one puts them together.

Letters as in reference.py. Sums of parts are added in a fixed order; counts may be in any.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ultramem_megatron.kernels.read_statistics.reference import COMPARED, Counting

_PARTS = 512  # about four programs for each multiprocessor of an H200
_BLOCK = 1024
_TOKENS = 4


@torch.no_grad()
def add(
    sums: Tensor,
    hits: Tensor,
    counting: Counting,
    addresses: Tensor,
    query: Tensor,
    scores: Tensor,
    output: Tensor,
    topk: int,
) -> None:
    """Same contract as `add_statistics_reference`, for float32 and less."""
    tokens, queries, sides, width = query.shape
    apart = max(1, tokens // COMPARED)
    pairs = queries * sides
    parts = min(_PARTS, triton.cdiv(output.numel(), _BLOCK))
    found = torch.empty(4 * parts + pairs, device=output.device)
    with torch.cuda.device_of(output):
        parts_kernel[(parts + pairs,)](
            addresses.contiguous(),
            scores.contiguous(),
            output.contiguous(),
            query.contiguous(),
            hits,
            found,
            *counting,
            addresses.numel(),
            output.numel(),
            tokens,
            apart,
            parts,
            pairs,
            scores.shape[2],
            scores.shape[1],
            topk,
            WIDTH=width,
            BLOCK_K=triton.next_power_of_2(width),
            BLOCK=_BLOCK,
            TOKENS=_TOKENS,
            num_warps=4,
        )
        together_kernel[(1,)](
            found,
            sums,
            parts,
            pairs,
            triton.cdiv(tokens, apart),
            output.numel(),
            scores.numel(),
            scores.numel() // topk,
            PARTS=triton.next_power_of_2(parts),
            PAIRS=triton.next_power_of_2(pairs),
            num_warps=4,
        )


@triton.jit(do_not_specialize=["reads", "numbers", "tokens", "apart", "parts"])
def parts_kernel(
    addresses,
    scores,
    output,
    query,
    hits,
    found,
    num_values,
    own,
    shared,
    stride,
    reads,
    numbers,
    tokens,
    apart,
    parts,
    pairs,
    cores,
    picks,
    topk,
    WIDTH: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """Grid (parts + pairs): reads and sums of a part, or the square of one pair's summed queries.

    found: for each part sums of output, its squares, scores, best scores; then the pairs' squares.
    """
    program = tl.program_id(0)
    if program < parts:
        step = parts.to(tl.int64) * BLOCK
        first = program.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        summed = tl.zeros([BLOCK], tl.float32)
        squares = tl.zeros([BLOCK], tl.float32)
        for start in range(0, tl.cast(numbers, tl.int64), step):
            value = tl.load(output + start + first, start + first < numbers, 0).to(tl.float32)
            summed += value
            squares += value * value
        tl.store(found + program * 4, tl.sum(summed))
        tl.store(found + program * 4 + 1, tl.sum(squares))
        _count(addresses, hits, first, step, reads, num_values, own, shared, stride)
        every = tl.zeros([BLOCK], tl.float32)
        best = tl.zeros([BLOCK], tl.float32)
        count = tl.cast(reads, tl.int64) * cores
        for start in range(0, count, step):
            score = tl.load(scores + start + first, start + first < count, 0).to(tl.float32)
            every += score
            pick = (start + first) // cores % picks
            best += tl.where(pick % topk == 0, score, 0)
        tl.store(found + program * 4 + 2, tl.sum(every))
        tl.store(found + program * 4 + 3, tl.sum(best))
    else:
        pair = program - parts
        number = tl.arange(0, BLOCK_K)[None, :]
        total = tl.zeros([TOKENS, BLOCK_K], tl.float32)
        for start in range(0, tl.cdiv(tokens, apart), TOKENS):
            token = (start + tl.arange(0, TOKENS)).to(tl.int64)[:, None] * apart
            at = query + (token * pairs + pair) * WIDTH + number
            one = tl.load(at, (token < tokens) & (number < WIDTH), 0).to(tl.float32)
            length = tl.sqrt(tl.sum(one * one, 1))
            total += one / tl.maximum(length, 1e-12)[:, None]
        vector = tl.sum(total, 0)
        tl.store(found + parts * 4 + pair, tl.sum(vector * vector))


@triton.jit
def _count(addresses, hits, first, step, reads, num_values, own, shared, stride):
    """One more for the counter of each address; see `Counting`."""
    for start in range(0, tl.cast(reads, tl.int64), step):
        real = start + first < reads
        row = tl.load(addresses + start + first, real, 0) % num_values
        place = row
        if shared != 0:
            place = row * stride % num_values
            place = tl.where(place < own, place, own + place % shared)
        tl.atomic_add(hits + place, 1, real, sem="relaxed")


@triton.jit(do_not_specialize=["parts", "tokens", "numbers", "scores", "best"])
def together_kernel(
    found,
    sums,
    parts,
    pairs,
    tokens,
    numbers,
    scores,
    best,
    PARTS: tl.constexpr,
    PAIRS: tl.constexpr,
):
    """Grid (1). tokens: compared; numbers, scores, best: how many each sum is of."""
    part = tl.arange(0, PARTS)
    inside = part < parts
    summed = tl.sum(tl.load(found + part * 4, inside, 0).to(tl.float64))
    squares = tl.sum(tl.load(found + part * 4 + 1, inside, 0).to(tl.float64))
    every = tl.sum(tl.load(found + part * 4 + 2, inside, 0).to(tl.float64))
    leading = tl.sum(tl.load(found + part * 4 + 3, inside, 0).to(tl.float64))
    variance = (squares - summed * summed / numbers) / (numbers - 1)
    number = tl.arange(0, PAIRS)
    pair = tl.load(found + parts * 4 + number, number < pairs, tokens).to(tl.float64) - tokens
    of_pairs = tl.maximum(tokens.to(tl.float64) * (tokens - 1), 1)
    cosine = tl.sum(pair) / (of_pairs * pairs)
    _add(sums, leading / best)
    _add(sums + 1, every / scores)
    _add(sums + 2, tl.sqrt(tl.where(variance < 0, 0, variance)))
    _add(sums + 3, cosine)


@triton.jit
def _add(at, figure):
    tl.store(at, tl.load(at) + figure.to(tl.float32))
