"""Side top-m through native.cpp: PyTorch multiplies, and the rest of a chunk is one call.

Chunks of tokens stay in cache, as in eager.py. Letters as in reference.py.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ultramem_megatron.kernels.native.library import call_native, native_library
from ultramem_megatron.kernels.precision import as_multiplied
from ultramem_megatron.kernels.side_topk.sharing import per_head_and_rank

CACHED_BYTES = 2**22
"""Of scores in a buffer, for each thread. With less, products pack the keys more often; with more,
the selection waits for memory."""

FEW_TOKENS = 32
"""Up to so many, keys are multiplied as they lie: to copy them takes longer than the products of
queries and keys of different ranks, which come for nothing."""
FEW_RANKS = 2
"""Up to so many: with R ranks such products are R times as many."""

_KINDS = {torch.float32: "float32", torch.bfloat16: "bfloat16"}


def serves(query: Tensor, keys: Tensor) -> bool:
    """Whether there are native kernels for these dtypes on this machine."""
    return query.dtype == keys.dtype and query.dtype in _KINDS and native_library() is not None


class NativeSideTopk(torch.autograd.Function):
    """Same contract as `side_topk`, for float32 and bfloat16 and keys (H, S, N, R, K)."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, keys: Tensor, directions: Tensor, topk: int
    ) -> tuple[Tensor, Tensor]:
        tokens, (heads, sides, _, ranks, _) = len(query), keys.shape
        indices = query.new_empty(tokens, heads, sides, topk, dtype=torch.int64)
        scores = query.new_empty(tokens, heads, sides, ranks, topk, dtype=torch.float32)
        pairs = heads * sides
        _select(
            per_head_and_rank(as_multiplied(query), heads, ranks).flatten(1, 2),
            as_multiplied(keys).flatten(0, 1),
            directions.float().transpose(0, 1).reshape(pairs, ranks),
            indices.view(tokens, pairs, topk),
            scores.view(tokens, pairs, ranks, topk),
        )
        ctx.save_for_backward(query, keys, indices)
        ctx.mark_non_differentiable(indices)
        return indices, scores

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, _: Tensor, grad_scores: Tensor
    ) -> tuple[Tensor | None, Tensor | None, None, None]:
        query, keys, indices = (saved.contiguous() for saved in ctx.saved_tensors)
        tokens, queries, sides, query_ranks, width = query.shape
        heads, _, num_keys, ranks, _ = keys.shape
        query_grad, key_grad = (
            torch.empty_like(each) if wanted else None
            for each, wanted in zip((query, keys), ctx.needs_input_grad, strict=False)
        )
        tensors = (query, keys, grad_scores.contiguous(), indices, query_grad, key_grad)
        sizes = (tokens, heads * sides, ranks, indices.shape[-1], num_keys, width)
        sharing = (sides, queries, -(-heads // queries), query_ranks)
        call_native(f"side_backward_{_KINDS[query.dtype]}", *tensors, *sizes, *sharing)
        return query_grad, key_grad, None, None


def _select(
    query: Tensor, keys: Tensor, directions: Tensor, indices: Tensor, scores: Tensor
) -> None:
    """Of P pairs of a head and a side: query (T, P, R, K), keys (P, N, R, K), directions (P, R).

    Fills indices (T, P, m) and scores (T, P, R, m). Few tokens, as in decoding, have one product
    for all pairs.
    """
    tokens, pairs, ranks, _ = query.shape
    if 0 < tokens <= FEW_TOKENS and ranks <= FEW_RANKS:
        _select_in_place(query, keys, directions, indices, scores)
        return
    num_keys = keys.shape[1]
    room = torch.get_num_threads() * CACHED_BYTES // query.element_size() // (ranks * num_keys)
    together = pairs if tokens * pairs <= room else 1
    buffer = query.new_empty(together * ranks * min(tokens, max(1, room)) * num_keys)
    for first in range(0, pairs, together):
        own = slice(first, first + together)
        chosen = query[:, own], keys[own], directions[own], indices[:, own], scores[:, own]
        _select_together(*chosen, buffer)


def _select_in_place(
    query: Tensor, keys: Tensor, directions: Tensor, indices: Tensor, scores: Tensor
) -> None:
    """As `_select`, with the keys as they lie: every rank of a query by every rank of a key."""
    tokens, _, ranks, _ = query.shape
    by_pair = query.transpose(0, 1).flatten(1, 2)
    found = torch.bmm(by_pair, keys.contiguous().flatten(1, 2).mT)  # (P, T*R, N*R)
    row = found.shape[2]
    strides = (tokens * ranks * row, row + 1, ranks * row, ranks)
    _choose(found, strides, directions, indices, scores, keys.shape[1])


def _select_together(
    query: Tensor, keys: Tensor, directions: Tensor, indices: Tensor, scores: Tensor, buffer: Tensor
) -> None:
    """As `_select`, as many tokens at a time as the buffer has room for."""
    (tokens, pairs, ranks, _), (_, num_keys, _, _) = query.shape, keys.shape
    # PyTorch's product in half precision takes ten times as long where rows have gaps.
    by_rank = query.permute(1, 2, 0, 3).contiguous().flatten(0, 1)
    columns = keys.transpose(1, 2).contiguous().flatten(0, 1).mT
    row = pairs * ranks * num_keys
    chunks = -(-tokens // max(1, len(buffer) // row))
    for chunk in range(chunks):  # of equal size: one of few tokens packs as many keys
        start, end = (tokens * i // chunks for i in (chunk, chunk + 1))
        count = end - start
        found = buffer[: count * row].view(-1, count, num_keys)
        torch.bmm(by_rank[:, start:end], columns, out=found)
        strides = (ranks * count * num_keys, count * num_keys, num_keys, 1)
        _choose(found, strides, directions, indices[start:end], scores[start:end], num_keys)


def _choose(
    found: Tensor,
    strides: tuple[int, int, int, int],
    directions: Tensor,
    indices: Tensor,
    scores: Tensor,
    num_keys: int,
) -> None:
    """Fill indices and scores from products, `strides` apart by pair, rank, token and key."""
    (tokens, pairs, topk), ranks = indices.shape, scores.shape[2]
    sizes = (pairs, tokens, ranks, num_keys, topk, indices.stride(0), scores.stride(0))
    given = (found, directions, indices, scores)
    call_native(f"side_select_{_KINDS[found.dtype]}", *given, *sizes, *strides)
