"""Attention over a paged cache in Triton: a program some queries of a request, and a group's heads.

Each goes over keys block by block, with a running maximum and sum of its softmax (Milakov and
Gimelshein, arXiv 1805.02867). The heads of a group share what is read, and make the rows that
tensor cores want of one query. Letters as in reference.py.

Where requests are few and contexts long, a request's keys are spread over several programs (as in
Dao's Flash-Decoding, 2023); a second kernel puts together what they have summed.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ultramem_megatron.kernels.lookup_reduce.triton_forward import operands
from ultramem_megatron.kernels.paged_attention.reference import Requests

_ROWS = 32  # queries times heads of a program; of twice as many registers would spill
_KEYS = 64
_PROGRAMS = 264  # two for each of an H100's 132 multiprocessors
_LEAST_KEYS = 4 * _KEYS  # of a program, where others have the rest
_SPLITS = 64  # at most


def attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    requests: Requests,
    scale: float,
    sinks: Tensor | None = None,
    window: int | None = None,
) -> Tensor:
    """Same contract as `paged_attention_reference`, for float32 and less."""
    tokens, heads, width = query.shape
    block, groups, wide = values.shape[1:]
    out = query.new_zeros(tokens, heads, wide)
    assert keys.is_contiguous(), "blocks lie one after the other"
    assert values.is_contiguous(), "blocks lie one after the other"
    sizes = attention_sizes(heads // groups, width, wide, block, requests.most)
    tiles = triton.cdiv(requests.most, sizes["QUERIES"])
    grid = (tiles, len(requests.lengths), groups)
    splits = splits_of(math.prod(grid), block * requests.blocks.shape[1])
    sums, parts = out, out
    if splits > 1:
        sums = out.new_empty(splits, tokens, heads, 2, dtype=torch.float32)
        parts = out.new_empty(splits, tokens, heads, wide, dtype=torch.float32)
    if not out.numel():
        return out
    with torch.cuda.device_of(query):
        attention_kernel[(tiles * splits, *grid[1:])](
            query.contiguous(),
            keys,
            values,
            requests.starts,
            requests.lengths,
            requests.blocks,
            query if sinks is None else sinks,
            parts,
            sums,
            requests.blocks.stride(0),
            scale,
            tokens,
            heads,
            groups,
            splits,
            BLOCK=block,
            WINDOW=-1 if window is None else window,
            WITH_SINKS=sinks is not None,
            SPLIT=splits > 1,
            OPERANDS=operands(query.dtype),
            **sizes,
        )
        if splits > 1:
            merge_kernel[grid](
                parts,
                sums,
                requests.starts,
                query if sinks is None else sinks,
                out,
                tokens,
                heads,
                splits,
                WITH_SINKS=sinks is not None,
                **{name: sizes[name] for name in _MERGED},
            )
    return out


def splits_of(programs: int, keys: int) -> int:
    """Over how many programs a request's keys are spread, of at most `keys`."""
    splits = 1
    while splits < _SPLITS and splits * programs < _PROGRAMS and splits * _LEAST_KEYS < keys:
        splits *= 2
    return splits


def attention_sizes(own_heads: int, width: int, wide: int, block: int, most: int) -> dict[str, int]:
    """Launch constants: `own_heads` heads of a group, widths K and V, blocks of B keys."""
    slots = triton.next_power_of_2(own_heads)
    queries = min(max(1, _ROWS // slots), triton.next_power_of_2(most))
    at_once = min(_KEYS, block & -block)  # of one block of the cache
    queries = max(queries, triton.cdiv(16, slots))
    return {
        "OWN_HEADS": own_heads,
        "HEAD_SLOTS": slots,
        "QUERIES": queries,
        "WIDTH": width,
        "WIDE": wide,
        "BLOCK_K": max(16, triton.next_power_of_2(width)),
        "BLOCK_V": max(16, triton.next_power_of_2(wide)),
        "KEYS": max(16, at_once),
        "num_warps": 4,
    }


_MERGED = ("OWN_HEADS", "HEAD_SLOTS", "QUERIES", "WIDE", "BLOCK_V", "num_warps")


@triton.jit
def _rows(
    start, own, first, group, heads, QUERIES: tl.constexpr, HEAD_SLOTS: tl.constexpr, OWN_HEADS
):
    """Of a program's rows: query of the request, head of the group, if real, place in (T, H)."""
    row = tl.arange(0, QUERIES * HEAD_SLOTS)
    number, head = first + row // HEAD_SLOTS, row % HEAD_SLOTS
    real = (number < own) & (head < OWN_HEADS)
    place = (start + number).to(tl.int64) * heads + group * OWN_HEADS + head
    return number, head, real, place


@triton.jit(do_not_specialize=["blocks_stride", "scale", "tokens", "splits"])
def attention_kernel(
    query,
    keys,
    values,
    starts,
    lengths,
    blocks,
    sinks,
    out,
    sums,
    blocks_stride,
    scale,
    tokens,
    heads,
    groups,
    splits,
    BLOCK: tl.constexpr,
    WINDOW: tl.constexpr,
    WITH_SINKS: tl.constexpr,
    SPLIT: tl.constexpr,
    OPERANDS: tl.constexpr,
    OWN_HEADS: tl.constexpr,
    HEAD_SLOTS: tl.constexpr,
    QUERIES: tl.constexpr,
    WIDTH: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    KEYS: tl.constexpr,
):
    """Grid (tiles of queries * splits, n, G). KEYS are read at a time, which may cross blocks of B.

    WINDOW: keys that are seen before one's own, -1: all. SPLIT: `out` (splits, T, H, V) gets what
    the program's share of the keys adds up to, `sums` (splits, T, H, 2) its maximum and sum.
    """
    request, group = tl.program_id(1), tl.program_id(2)
    start = tl.load(starts + request)
    own = tl.load(starts + request + 1) - start
    length = tl.load(lengths + request)
    tile, split = tl.program_id(0), 0
    if SPLIT:
        tile, split = tile // splits, tile % splits
    first = tile * QUERIES
    if first < own:
        number, head, real, place = _rows(
            start, own, first, group, heads, QUERIES, HEAD_SLOTS, OWN_HEADS
        )
        column = tl.arange(0, BLOCK_K)
        at = query + place[:, None] * WIDTH + column[None, :]
        query_mk = tl.load(at, real[:, None] & (column < WIDTH)[None, :], 0).to(OPERANDS)
        last = length - own + number  # the query's own key
        largest = tl.full([QUERIES * HEAD_SLOTS], float("-inf"), tl.float32)
        total = tl.zeros([QUERIES * HEAD_SLOTS], tl.float32)
        out_mv = tl.zeros([QUERIES * HEAD_SLOTS, BLOCK_V], tl.float32)
        wide = tl.arange(0, BLOCK_V)
        begins, ends = 0, tl.minimum(length, length - own + first + QUERIES)
        if WINDOW >= 0:
            begins = tl.maximum(length - own + first - WINDOW, 0) // KEYS * KEYS
        if SPLIT:
            share = tl.cdiv(tl.cdiv(ends - begins, KEYS), splits) * KEYS
            begins += split * share
            ends = tl.minimum(ends, begins + share)
        for begin in range(begins, ends, KEYS):
            key = begin + tl.arange(0, KEYS)
            inside = key < length
            block = tl.load(blocks + request * blocks_stride + key // BLOCK, inside, 0)
            slot = (block.to(tl.int64) * BLOCK + key % BLOCK) * groups + group
            of_keys = keys + slot[None, :] * WIDTH + column[:, None]
            key_kn = tl.load(of_keys, inside[None, :] & (column < WIDTH)[:, None], 0).to(OPERANDS)
            score_mn = tl.dot(query_mk, key_kn, input_precision="ieee") * scale
            seen = inside[None, :] & (key[None, :] <= last[:, None])
            if WINDOW >= 0:
                seen &= key[None, :] >= last[:, None] - WINDOW
            score_mn = tl.where(seen, score_mn, float("-inf"))
            before, largest = largest, tl.maximum(largest, tl.max(score_mn, 1))
            shift = tl.where(largest == float("-inf"), 0, largest)  # of a row that sees none yet
            weight_mn = tl.exp(score_mn - shift[:, None])
            kept = tl.exp(before - shift)
            total = total * kept + tl.sum(weight_mn, 1)
            of_values = values + slot[:, None] * WIDE + wide[None, :]
            value_nv = tl.load(of_values, inside[:, None] & (wide < WIDE)[None, :], 0)
            weight_mn = weight_mn.to(value_nv.dtype).to(OPERANDS)
            out_mv = out_mv * kept[:, None]
            out_mv += tl.dot(weight_mn, value_nv.to(OPERANDS), input_precision="ieee")
        if SPLIT:
            place += tl.cast(split, tl.int64) * tokens * heads
            tl.store(sums + 2 * place, largest, real)
            tl.store(sums + 2 * place + 1, total, real)
        else:
            if WITH_SINKS:
                sink = tl.load(sinks + group * OWN_HEADS + head, real, 0).to(tl.float32)
                total += tl.exp(sink - largest)
            out_mv = out_mv / tl.where(total == 0, 1, total)[:, None]
        at = out + place[:, None] * WIDE + wide[None, :]
        tl.store(at, out_mv, real[:, None] & (wide < WIDE)[None, :])


@triton.jit(do_not_specialize=["tokens", "splits"])
def merge_kernel(
    parts,
    sums,
    starts,
    sinks,
    out,
    tokens,
    heads,
    splits,
    WITH_SINKS: tl.constexpr,
    OWN_HEADS: tl.constexpr,
    HEAD_SLOTS: tl.constexpr,
    QUERIES: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Grid (tiles of queries, n, G): what programs left of shares of the keys becomes `out`."""
    request, group = tl.program_id(1), tl.program_id(2)
    start = tl.load(starts + request)
    own = tl.load(starts + request + 1) - start
    first = tl.program_id(0) * QUERIES
    if first < own:
        _, head, real, place = _rows(
            start, own, first, group, heads, QUERIES, HEAD_SLOTS, OWN_HEADS
        )
        wide = tl.arange(0, BLOCK_V)
        inside = real[:, None] & (wide < WIDE)[None, :]
        largest = tl.full([QUERIES * HEAD_SLOTS], float("-inf"), tl.float32)
        total = tl.zeros([QUERIES * HEAD_SLOTS], tl.float32)
        out_mv = tl.zeros([QUERIES * HEAD_SLOTS, BLOCK_V], tl.float32)
        for split in range(splits):
            there = place + tl.cast(split, tl.int64) * tokens * heads
            part = tl.load(sums + 2 * there, real, float("-inf"))
            before, largest = largest, tl.maximum(largest, part)
            shift = tl.where(largest == float("-inf"), 0, largest)  # of a row that sees none yet
            kept, added = tl.exp(before - shift), tl.exp(part - shift)
            total = total * kept + tl.load(sums + 2 * there + 1, real, 0) * added
            of_part = tl.load(parts + there[:, None] * WIDE + wide[None, :], inside, 0)
            out_mv = out_mv * kept[:, None] + of_part * added[:, None]
        if WITH_SINKS:
            sink = tl.load(sinks + group * OWN_HEADS + head, real, 0).to(tl.float32)
            total += tl.exp(sink - largest)
        out_mv = out_mv / tl.where(total == 0, 1, total)[:, None]
        tl.store(out + place[:, None] * WIDE + wide[None, :], out_mv, inside)
