"""Attention over a paged cache in Triton: a program some queries of a request, and a group's heads.

Each goes over the keys once, block by block, with a running maximum and sum of its softmax (Milakov
and Gimelshein, arXiv 1805.02867). The heads of a group share what is read, and make the rows that
tensor cores want of one query. Letters as in reference.py.

Keys of a request are not spread over programs: few requests leave a GPU idle.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ultramem_megatron.kernels.lookup_reduce.triton_forward import operands
from ultramem_megatron.kernels.paged_attention.reference import Requests

_ROWS = 32  # queries times heads of a program; of twice as many registers would spill
_KEYS = 64


def attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    requests: Requests,
    scale: float,
    sinks: Tensor | None = None,
) -> Tensor:
    """Same contract as `paged_attention_reference`, for float32 and less."""
    tokens, heads, width = query.shape
    block, groups, wide = values.shape[1:]
    out = query.new_zeros(tokens, heads, wide)
    assert keys.is_contiguous(), "blocks lie one after the other"
    assert values.is_contiguous(), "blocks lie one after the other"
    sizes = attention_sizes(heads // groups, width, wide, block, requests.most)
    tiles = triton.cdiv(requests.most, sizes["QUERIES"])
    if out.numel():
        with torch.cuda.device_of(query):
            attention_kernel[(tiles, len(requests.lengths), groups)](
                query.contiguous(),
                keys,
                values,
                requests.starts,
                requests.lengths,
                requests.blocks,
                query if sinks is None else sinks,
                out,
                requests.blocks.stride(0),
                scale,
                heads,
                groups,
                BLOCK=block,
                WITH_SINKS=sinks is not None,
                OPERANDS=operands(query),
                **sizes,
            )
    return out


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


@triton.jit(do_not_specialize=["blocks_stride", "scale"])
def attention_kernel(
    query,
    keys,
    values,
    starts,
    lengths,
    blocks,
    sinks,
    out,
    blocks_stride,
    scale,
    heads,
    groups,
    BLOCK: tl.constexpr,
    WITH_SINKS: tl.constexpr,
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
    """Grid (tiles of queries, n, G). KEYS are read at a time, which may cross blocks of B."""
    request, group = tl.program_id(1), tl.program_id(2)
    start = tl.load(starts + request)
    own = tl.load(starts + request + 1) - start
    length = tl.load(lengths + request)
    first = tl.program_id(0) * QUERIES
    if first < own:
        row = tl.arange(0, QUERIES * HEAD_SLOTS)
        number, head = first + row // HEAD_SLOTS, row % HEAD_SLOTS
        real = (number < own) & (head < OWN_HEADS)
        place = (start + number).to(tl.int64) * heads + group * OWN_HEADS + head
        column = tl.arange(0, BLOCK_K)
        at = query + place[:, None] * WIDTH + column[None, :]
        query_mk = tl.load(at, real[:, None] & (column < WIDTH)[None, :], 0).to(OPERANDS)
        last = length - own + number  # the query's own key
        largest = tl.full([QUERIES * HEAD_SLOTS], float("-inf"), tl.float32)
        total = tl.zeros([QUERIES * HEAD_SLOTS], tl.float32)
        out_mv = tl.zeros([QUERIES * HEAD_SLOTS, BLOCK_V], tl.float32)
        wide = tl.arange(0, BLOCK_V)
        for begin in range(0, tl.minimum(length, length - own + first + QUERIES), KEYS):
            key = begin + tl.arange(0, KEYS)
            inside = key < length
            block = tl.load(blocks + request * blocks_stride + key // BLOCK, inside, 0)
            slot = (block.to(tl.int64) * BLOCK + key % BLOCK) * groups + group
            of_keys = keys + slot[None, :] * WIDTH + column[:, None]
            key_kn = tl.load(of_keys, inside[None, :] & (column < WIDTH)[:, None], 0).to(OPERANDS)
            score_mn = tl.dot(query_mk, key_kn, input_precision="ieee") * scale
            seen = inside[None, :] & (key[None, :] <= last[:, None])
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
        if WITH_SINKS:
            sink = tl.load(sinks + group * OWN_HEADS + head, real, 0).to(tl.float32)
            total += tl.exp(sink - largest)
        out_mv = out_mv / tl.where(total == 0, 1, total)[:, None]
        at = out + place[:, None] * WIDE + wide[None, :]
        tl.store(at, out_mv, real[:, None] & (wide < WIDE)[None, :])
