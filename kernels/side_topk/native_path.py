"""Side top-m through native.cpp: PyTorch multiplies, and the rest of a chunk is one call.

Chunks of tokens stay in cache, as in eager.py. Letters as in reference.py.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ultramem_megatron.kernels.native.library import call_native, native_library
from ultramem_megatron.kernels.precision import as_multiplied

CACHED_SCORES = 2**18
"""Scores in a buffer, for each thread: 1 MB in float32, the second-level cache of one core."""

_KINDS = {torch.float32: "float32", torch.bfloat16: "bfloat16"}


def serves(query: Tensor, keys: Tensor) -> bool:
    """Whether there are native kernels for these dtypes on this machine."""
    return query.dtype == keys.dtype and query.dtype in _KINDS and native_library() is not None


class NativeSideTopk(torch.autograd.Function):
    """Same contract as `side_topk_reference`, for float32 and bfloat16."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, keys: Tensor, directions: Tensor, topk: int
    ) -> tuple[Tensor, Tensor]:
        tokens, heads, sides, ranks, _ = query.shape
        indices = query.new_empty(tokens, heads, sides, topk, dtype=torch.int64)
        scores = query.new_empty(tokens, heads, sides, ranks, topk, dtype=torch.float32)
        query_m, keys_m = as_multiplied(query), as_multiplied(keys)
        for head in range(heads):
            for side in range(sides):
                _select(
                    query_m[:, head, side],
                    keys_m[head, side],
                    directions[side, head].float().contiguous(),
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
        tokens, heads, sides, ranks, width = query.shape
        query_f, keys_f = query.float().contiguous(), keys.float().contiguous()
        query_grad = torch.empty_like(query_f) if ctx.needs_input_grad[0] else None
        key_grad = torch.zeros_like(keys_f) if ctx.needs_input_grad[1] else None
        tensors = (grad_scores.contiguous(), indices, query_f, keys_f, query_grad, key_grad)
        sizes = (tokens, heads * sides, ranks, indices.shape[-1], keys.shape[2], width)
        call_native("side_backward", *tensors, *sizes)
        for_query = None if query_grad is None else query_grad.to(query.dtype)
        for_keys = None if key_grad is None else key_grad.to(keys.dtype)
        return for_query, for_keys, None, None


def _select(
    query: Tensor, keys: Tensor, direction: Tensor, indices: Tensor, scores: Tensor
) -> None:
    """One head and side: query (T, R, K), keys (N, R, K); fills (T, m) and (T, R, m)."""
    tokens, ranks, _ = query.shape
    num_keys, topk = len(keys), indices.shape[-1]
    step = max(1, min(tokens, torch.get_num_threads() * CACHED_SCORES // (ranks * num_keys)))
    by_rank, columns = query.transpose(0, 1), keys.permute(1, 2, 0)
    name = f"side_select_{_KINDS[query.dtype]}"
    buffer = query.new_empty(ranks * step * num_keys)
    for start in range(0, tokens, step):
        count = min(step, tokens - start)
        found = buffer[: ranks * count * num_keys].view(ranks, count, num_keys)
        torch.bmm(by_rank[:, start : start + count], columns, out=found)
        sizes = (count, ranks, num_keys, topk, indices.stride(0), scores.stride(0))
        call_native(name, found, direction, indices[start:], scores[start:], *sizes)
