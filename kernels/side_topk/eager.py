"""Side top-m through PyTorch's own kernels, for CPUs: scores never leave the cache.

Forward scores a few tokens at a time into a buffer that stays in the cache, so the (T, N) scores of
a side are never in memory. Backward uses that only m of N scores have a gradient: the query's is a
weighted sum of the picked keys, a key's the weighted sum of the queries that picked it, in token
order (deterministic). Letters as in reference.py.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ultramem_megatron.kernels.precision import as_multiplied, at_least_float32
from ultramem_megatron.kernels.selection import largest

CACHED_SCORES = 2**18
"""Scores in a buffer, for each thread: 1 MB in float32, the second-level cache of one core."""


class EagerSideTopk(torch.autograd.Function):
    """Same contract as `side_topk_reference`."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, keys: Tensor, directions: Tensor, topk: int
    ) -> tuple[Tensor, Tensor]:
        # Where norms are left out, autocast gives queries another dtype than keys.
        convert = as_multiplied if query.dtype == keys.dtype else at_least_float32
        query_p, keys_p = convert(query), convert(keys)
        tokens, heads, sides, ranks, _ = query.shape
        indices = torch.empty(tokens, heads, sides, topk, dtype=torch.int64, device=query.device)
        scores = at_least_float32(query.new_empty(tokens, heads, sides, ranks, topk))
        for head in range(heads):
            for side in range(sides):
                _select(
                    query_p[:, head, side],
                    keys_p[head, side],
                    directions[side, head],
                    indices[:, head, side],
                    scores[:, head, side],
                )
        ctx.save_for_backward(query, keys, indices)
        ctx.mark_non_differentiable(indices)
        return indices, scores

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, _: Tensor, grad_scores: Tensor
    ) -> tuple[Tensor | None, Tensor | None, None, None]:
        query, keys, indices = ctx.saved_tensors
        query_f, keys_f = at_least_float32(query), at_least_float32(keys)
        heads, sides, num_keys = keys.shape[:3]
        first = torch.arange(heads * sides, device=keys.device).view(heads, sides, 1) * num_keys
        picked = indices + first  # (T, H, S, m), numbers of all heads' and sides' keys
        grad_query = grad_keys = None
        if ctx.needs_input_grad[0]:
            grad_query = _query_gradient(keys_f, picked, grad_scores).to(query.dtype)
        if ctx.needs_input_grad[1]:
            grad_keys = _key_gradient(query_f, picked, grad_scores, keys.shape).to(keys.dtype)
        return grad_query, grad_keys, None, None


def _select(
    query: Tensor, keys: Tensor, direction: Tensor, indices: Tensor, scores: Tensor
) -> None:
    """One head and side: query (T, R, K), keys (N, R, K); fills (T, m) and (T, R, m)."""
    tokens, ranks, _ = query.shape
    num_keys, topk = len(keys), indices.shape[-1]
    step = max(1, min(tokens, torch.get_num_threads() * CACHED_SCORES // (ranks * num_keys)))
    buffer = query.new_empty(ranks, step, num_keys)
    weights = direction.tolist()
    for start in range(0, tokens, step):
        stop = min(start + step, tokens)
        all_scores = buffer[:, : stop - start]
        for rank in range(ranks):
            torch.mm(query[start:stop, rank], keys[:, rank].t(), out=all_scores[rank])
        combined = at_least_float32(all_scores[0]) * weights[0]
        for rank in range(1, ranks):
            combined.add_(all_scores[rank], alpha=weights[rank])
        best = largest(combined, topk).sort(dim=-1).values
        indices[start:stop] = best
        picked = all_scores.gather(2, best.expand(ranks, *best.shape))
        scores[start:stop] = picked.transpose(0, 1)


def _query_gradient(keys: Tensor, picked: Tensor, grad_scores: Tensor) -> Tensor:
    """(T, H, S, R, K): the picked keys, weighted; every key is a bag's member once per rank."""
    ranks, width = keys.shape[3:]
    rank = torch.arange(ranks, device=keys.device).unsqueeze(1)
    members = picked.unsqueeze(3) * ranks + rank  # (T, H, S, R, m)
    summed = _weighted_bags(
        keys.reshape(-1, width), members.flatten(0, 3), grad_scores.reshape(-1, picked.shape[-1])
    )
    return summed.view(*grad_scores.shape[:4], width)


def _key_gradient(query: Tensor, picked: Tensor, grad_scores: Tensor, shape: torch.Size) -> Tensor:
    """(H, S, N, R, K): of every key the queries that picked it, weighted."""
    heads, sides, num_keys, ranks, width = shape
    keys, order = picked.flatten().sort(stable=True)
    every_key = torch.arange(heads * sides * num_keys, device=keys.device)
    starts = torch.searchsorted(keys, every_key)
    queries = order // picked.shape[-1] * ranks
    by_pick = grad_scores.transpose(-1, -2).reshape(-1, ranks)[order]
    flat = query.reshape(-1, width)
    grad = query.new_empty(len(every_key), ranks, width)
    for rank in range(ranks):
        weights = by_pick[:, rank].contiguous()
        grad[:, rank] = _weighted_bags(flat, queries + rank, weights, starts)
    return grad.view(shape)


def _weighted_bags(
    rows: Tensor, members: Tensor, weights: Tensor, starts: Tensor | None = None
) -> Tensor:
    return F.embedding_bag(members, rows, starts, mode="sum", per_sample_weights=weights)
