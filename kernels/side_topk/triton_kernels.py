"""Side top-m in Triton: one program per token, head and side.

Letters as in one_product.py; P = H*S pairs of head and side. Scores are as the matrix products
leave them: rows of A scores, of which those of the N keys count, A a multiple of 64, so that all
strides are.
"""

import triton
import triton.language as tl

from ultramem_megatron.kernels.triton_selection import ABSENT, larger, mask_of_largest, ordered_keys


@triton.jit
def _combined(row, rank_stride, direction, index, inside, RANKS: tl.constexpr):
    """sum_a direction[a] * scores[a, index] where `inside`."""
    total = tl.zeros(index.shape, tl.float32)
    for rank in tl.static_range(RANKS):
        scores = tl.load(row + rank * rank_stride + index, mask=inside, other=0.0)
        total += tl.load(direction + rank) * scores.to(tl.float32)
    return total


@triton.jit
def select_kernel(
    scores,
    directions,
    indices,
    picked,
    by_rank,
    by_query,
    by_head,
    by_side,
    by_token,
    num_keys,
    width,
    num_heads,
    own_heads,
    RANKS: tl.constexpr,
    TOPK: tl.constexpr,
    CHOSEN: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    CANDIDATES: tl.constexpr,
):
    """indices (T, P, m) and picked (T, P, R, m) from scores and directions (P, R).

    by_rank to by_token: strides of the scores; width: A; own_heads: H/G. CHUNK keys are a chunk, of
    which the best CHOSEN, m or m + 1, have the best keys. CHUNKS and CANDIDATES are powers of two,
    at least ceil(N / CHUNK) >= CHOSEN and CHOSEN * CHUNK.
    """
    program = tl.program_id(0).to(tl.int64)  # token * P + pair
    token, pair = program // (2 * num_heads), program % (2 * num_heads)
    row = scores + _row_start(token, pair, by_query, by_head, by_side, by_token, own_heads)
    rank_stride = tl.cast(by_rank, tl.int64)
    direction = directions + pair * RANKS
    indices += program * TOPK

    chunk = tl.arange(0, CHUNKS)
    index = chunk[:, None] * CHUNK + tl.arange(0, CHUNK)[None, :]
    # Masked by the width, which whole vectors divide, not by the number of keys.
    total = _combined(row, rank_stride, direction, index, index < width, RANKS)
    if CHOSEN == TOPK:  # else keys that do not count may bring in a chunk more, and no other
        total = tl.where(index < num_keys, total, float("-inf"))
    maxima = tl.reduce(total, 1, larger)
    keys = tl.where(chunk * CHUNK < num_keys, ordered_keys(maxima), ABSENT)
    best_chunks = mask_of_largest(keys, CHOSEN)
    slot = tl.cumsum(best_chunks.to(tl.int32), 0) - 1
    scratch = indices.to(tl.pointer_type(tl.int32), bitcast=True)  # the output, of twice as many
    tl.store(scratch + slot, chunk, mask=best_chunks)
    tl.debug_barrier()

    candidate = tl.arange(0, CANDIDATES)
    listed = candidate < CHOSEN * CHUNK
    chunk_of = tl.load(scratch + candidate // CHUNK, mask=listed, other=0)
    key_index = chunk_of * CHUNK + candidate % CHUNK
    inside = listed & (key_index < num_keys)
    total = _combined(row, rank_stride, direction, key_index, inside, RANKS)
    best = mask_of_largest(tl.where(inside, ordered_keys(total), ABSENT), TOPK)
    tl.debug_barrier()
    slot = tl.cumsum(best.to(tl.int32), 0) - 1
    tl.store(indices + slot, key_index.to(tl.int64), mask=best)
    for rank in tl.static_range(RANKS):
        value = tl.load(row + rank * rank_stride + key_index, mask=best, other=0.0)
        target = picked + (program * RANKS + rank) * TOPK + slot
        tl.store(target, value.to(tl.float32), mask=best)


@triton.jit
def scatter_kernel(
    grad_picked,
    indices,
    grad,
    by_rank,
    by_query,
    by_head,
    by_side,
    by_token,
    width,
    num_heads,
    own_heads,
    RANKS: tl.constexpr,
    TOPK: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """grad, laid out as the scores, in full: grad_picked (T, P, R, m) at indices, else zero."""
    program = tl.program_id(0).to(tl.int64)
    token, pair = program // (2 * num_heads), program % (2 * num_heads)
    row = grad + _row_start(token, pair, by_query, by_head, by_side, by_token, own_heads)
    rank_stride = tl.cast(by_rank, tl.int64)
    offset = tl.arange(0, BLOCK)
    for rank in tl.static_range(RANKS):
        for start in range(0, width, BLOCK):
            zeros = tl.zeros([BLOCK], grad.dtype.element_ty)
            tl.store(row + rank * rank_stride + start + offset, zeros, start + offset < width)
    tl.debug_barrier()  # the row is still in the cache
    slot = tl.arange(0, SLOTS)
    index = tl.load(indices + program * TOPK + slot, mask=slot < TOPK, other=0)
    for rank in tl.static_range(RANKS):
        source = grad_picked + (program * RANKS + rank) * TOPK + slot
        value = tl.load(source, mask=slot < TOPK, other=0.0)
        tl.store(row + rank * rank_stride + index, value.to(grad.dtype.element_ty), slot < TOPK)


@triton.jit
def _row_start(token, pair, by_query, by_head, by_side, by_token, own_heads):
    """Where the scores of a token, head and side (pair % 2) start."""
    head = pair // 2
    start = token * by_token + head // own_heads * by_query
    return start + head % own_heads * by_head + pair % 2 * by_side
