"""Tucker grid top-m in Triton: one program per token and head; the grid exists in registers only.

Letters as in reference.py. `scores` of a program are (S, R, m): the row's, then the column's.
"""

import triton
import triton.language as tl

from ultramem_megatron.kernels.grid_shuffle.triton_kernel import shuffled
from ultramem_megatron.kernels.triton_selection import ABSENT, mask_of_largest, ordered_keys


@triton.jit
def _pair_scores(
    scores,
    core,
    next_core,
    i,
    j,
    inside_i,
    inside_j,
    TOPK: tl.constexpr,
    RANKS: tl.constexpr,
    CORES: tl.constexpr,
):
    """sum_ab row[a, i] core[a, b] column[b, j] of index tensors that broadcast.

    core: the first of CORES matrices that add up, each `next_core` numbers after the one before.
    """
    column = scores + RANKS * TOPK
    total = 0.0
    for b in tl.static_range(RANKS):
        half = 0.0
        for a in tl.static_range(RANKS):
            row = tl.load(scores + a * TOPK + i, mask=inside_i, other=0.0)
            entry = 0.0
            for number in tl.static_range(CORES):
                entry += tl.load(core + number * next_core + a * RANKS + b).to(tl.float32)
            half += entry * row
        total += half * tl.load(column + b * TOPK + j, mask=inside_j, other=0.0)
    return total


@triton.jit
def grid_kernel(
    scores,
    keys,
    cores,
    shuffle,
    addresses,
    positions,
    best_scores,
    keys_per_side,
    num_heads,
    TOPK: tl.constexpr,
    PAIRS: tl.constexpr,
    RANKS: tl.constexpr,
    CORES: tl.constexpr,
    ROUNDS: tl.constexpr,
    ROWS: tl.constexpr,
    GROUPS: tl.constexpr,
    CHUNK: tl.constexpr,
    CHOSEN: tl.constexpr,
    CANDIDATES: tl.constexpr,
    PICKS: tl.constexpr,
):
    """addresses, positions (T, H, PAIRS) and best_scores (T, H, PAIRS, C); TOPK is m.

    shuffle: tables of the fixed shuffle's ROUNDS (see grid_shuffle), which may be 0.
    A chunk is CHUNK neighbours of a grid row; the best CHOSEN of them, PAIRS or all, have the best
    pairs. ROWS, GROUPS, CANDIDATES and PICKS are powers of two, at least m, ceil(m / CHUNK),
    CHOSEN * CHUNK and PAIRS.
    """
    program = tl.program_id(0).to(tl.int64)  # token * H + head
    head = program % num_heads
    scores += program * 2 * RANKS * TOPK
    keys += program * 2 * TOPK
    cores += head * RANKS * RANKS
    next_core = num_heads * RANKS * RANKS
    addresses += program * PAIRS

    i = tl.arange(0, ROWS)[:, None]
    group = tl.arange(0, GROUPS)[None, :]
    maxima = tl.full([ROWS, GROUPS], ABSENT, tl.int32)
    for step in range(CHUNK):
        j = group * CHUNK + step
        pair = _pair_scores(scores, cores, next_core, i, j, i < TOPK, j < TOPK, TOPK, RANKS, CORES)
        inside = (i < TOPK) & (j < TOPK)
        maxima = tl.maximum(maxima, tl.where(inside, ordered_keys(pair), ABSENT))
    best_chunks = mask_of_largest(tl.reshape(maxima, [ROWS * GROUPS]), CHOSEN)
    slot = tl.cumsum(best_chunks.to(tl.int32), 0) - 1
    chunk = tl.arange(0, ROWS * GROUPS)
    tl.store(addresses + slot, chunk.to(tl.int64), mask=best_chunks)  # the output as scratch space
    tl.debug_barrier()

    candidate = tl.arange(0, CANDIDATES)
    listed = candidate < CHOSEN * CHUNK
    chunk_of = tl.load(addresses + candidate // CHUNK, mask=listed, other=0).to(tl.int32)
    i = chunk_of // GROUPS
    j = chunk_of % GROUPS * CHUNK + candidate % CHUNK
    inside = listed & (j < TOPK)
    pair = _pair_scores(scores, cores, next_core, i, j, inside, inside, TOPK, RANKS, CORES)
    key = tl.where(inside, ordered_keys(pair), ABSENT)
    best = mask_of_largest(key, PAIRS)
    tl.debug_barrier()
    slot = tl.cumsum(best.to(tl.int32), 0) - 1
    # One integer orders by score, then by lowest position.
    sortable = (key.to(tl.int64) << 32) | (TOPK * TOPK - (i * TOPK + j))
    tl.store(addresses + slot, sortable, mask=best)
    tl.debug_barrier()

    pick = tl.arange(0, PICKS)
    picked = pick < PAIRS
    lowest = tl.full([PICKS], -(2**63), tl.int64)
    in_order = tl.sort(tl.load(addresses + pick, mask=picked, other=lowest), descending=True)
    position = TOPK * TOPK - (in_order & 0xFFFFFFFF).to(tl.int32)
    i, j = position // TOPK, position % TOPK
    row_key = tl.load(keys + i, mask=picked, other=0)
    column_key = tl.load(keys + TOPK + j, mask=picked, other=0)
    tl.debug_barrier()
    row_key, column_key = shuffled(row_key, column_key, shuffle, keys_per_side, ROUNDS)
    tl.store(addresses + pick, row_key.to(tl.int64) * keys_per_side + column_key, mask=picked)
    tl.store(positions + program * PAIRS + pick, position, mask=picked)
    for core in tl.static_range(CORES):
        matrix = cores + core * next_core
        value = _pair_scores(scores, matrix, 0, i, j, picked, picked, TOPK, RANKS, 1)
        tl.store(best_scores + (program * PAIRS + pick) * CORES + core, value, mask=picked)


@triton.jit
def grid_backward_kernel(
    grad_best,
    scores,
    cores,
    positions,
    grad_scores,
    grad_cores,
    num_heads,
    TOPK: tl.constexpr,
    PAIRS: tl.constexpr,
    RANKS: tl.constexpr,
    CORES: tl.constexpr,
    PICKS: tl.constexpr,
    SLAB: tl.constexpr,
):
    """grad_scores (T, H, S, R, m), written in full, and each program's grad_cores (T, C, H, R, R).

    Everything is recomputed from the picks; SLAB shortlisted keys collect theirs at a time.
    """
    program = tl.program_id(0).to(tl.int64)
    head = program % num_heads
    scores += program * 2 * RANKS * TOPK
    grad_scores += program * 2 * RANKS * TOPK
    grad_best += program * PAIRS * CORES
    next_core = num_heads * RANKS * RANKS
    grad_cores += (program // num_heads * CORES * num_heads + head) * RANKS * RANKS
    pick = tl.arange(0, PICKS)
    picked = pick < PAIRS
    position = tl.load(positions + program * PAIRS + pick, mask=picked, other=0)
    for side in tl.static_range(2):
        own = position // TOPK if side == 0 else position % TOPK
        other = position % TOPK if side == 0 else position // TOPK
        for a in tl.static_range(RANKS):
            grad = tl.zeros([PICKS], tl.float32)  # of this side's score of rank a, per pick
            own_score = tl.load(scores + (side * RANKS + a) * TOPK + own, mask=picked, other=0.0)
            for b in tl.static_range(RANKS):
                source = scores + ((1 - side) * RANKS + b) * TOPK + other
                other_score = tl.load(source, mask=picked, other=0.0)
                entry = a * RANKS + b if side == 0 else b * RANKS + a
                for core in tl.static_range(CORES):
                    out = tl.load(grad_best + pick * CORES + core, mask=picked, other=0.0)
                    matrix = cores + core * next_core + head * RANKS * RANKS
                    grad += out * other_score * tl.load(matrix + entry).to(tl.float32)
                    if side == 0:
                        product = tl.sum(out * own_score * other_score, 0)
                        tl.store(grad_cores + core * next_core + entry, product)
            for start in range(0, TOPK, SLAB):
                key = start + tl.arange(0, SLAB)
                mine = picked[:, None] & (own[:, None] == key[None, :])
                collected = tl.sum(tl.where(mine, grad[:, None], 0.0), 0)
                tl.store(grad_scores + (side * RANKS + a) * TOPK + key, collected, key < TOPK)
