"""Side top-m on GPUs: matrix products, then one Triton kernel from their output to the picks.

Products and kernels are several times faster where the rows of the scores start at multiples of 16
bytes, so keys get rows of zeros up to a multiple of 64; the selection passes over their scores.

Letters as in reference.py; P = H*S pairs of head and side, A = N, aligned. Neither pass copies the
scores.
"""

from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from ultramem_megatron.kernels.side_topk.triton_kernels import scatter_kernel, select_kernel

_ALIGNED = 64

SCORES_PER_WARP = 2048
"""64 scores per thread: what fits in registers beside the bisection (tests compile it)."""


class FusedSideTopk(torch.autograd.Function):
    """Same contract as `side_topk_reference`, for float32, bfloat16 and float16."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, keys: Tensor, directions: Tensor, topk: int, num_keys: int
    ) -> tuple[Tensor, Tensor]:
        """Keys beyond `num_keys` are zeros that `aligned` put there."""
        ctx.given_keys = keys.shape[2]
        keys = aligned(keys)
        query_p, keys_p = _by_pair(query, keys)
        scores = _scores(query_p, keys_p).unflatten(1, query.shape[1:3])
        indices, picked = select(scores, num_keys, directions, topk)
        ctx.save_for_backward(query, keys, indices)
        ctx.mark_non_differentiable(indices)
        return indices, picked

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, _: Tensor, grad_picked: Tensor
    ) -> tuple[Tensor, Tensor, None, None, None]:
        query, keys, indices = ctx.saved_tensors
        query_p, keys_p = _by_pair(query, keys)
        grad = _scattered(grad_picked.contiguous(), indices, keys)  # (R, P, T, A)
        grad_query = torch.matmul(grad, keys_p).permute(2, 1, 0, 3).reshape(query.shape)
        grad_keys = torch.matmul(grad.mT, query_p).permute(1, 2, 0, 3).reshape(keys.shape)
        return grad_query, grad_keys[:, :, : ctx.given_keys], None, None, None


def aligned(keys: Tensor) -> Tensor:
    """Keys (H, S, N, R, K) with rows of zeros up to a multiple of 64: (H, S, A, R, K)."""
    missing = -keys.shape[2] % _ALIGNED
    return F.pad(keys, (0, 0, 0, 0, 0, missing)) if missing else keys


def _by_pair(query: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    """Query (R, P, T, K) and keys (R, P, A, K); views, but for a query that serves some heads."""
    return query.flatten(1, 2).permute(2, 1, 0, 3), keys.flatten(0, 1).permute(2, 0, 1, 3)


def _scores(query_p: Tensor, keys_p: Tensor) -> Tensor:
    """(R, P, T, A): one batched product per rank, which takes the strides as they are."""
    ranks, pairs, tokens, _ = query_p.shape
    scores = query_p.new_empty(ranks, pairs, tokens, keys_p.shape[2])
    for rank in range(ranks):
        torch.bmm(query_p[rank], keys_p[rank].mT, out=scores[rank])
    return scores


def select_sizes(num_keys: int, topk: int) -> dict[str, int]:
    """Launch constants: chunks of about sqrt(N / m) keys balance the two bisections."""
    chunk = 1
    while chunk < 32 and 4 * chunk * chunk * topk <= 2 * num_keys and num_keys > 2 * chunk * topk:
        chunk *= 2
    chunks = triton.next_power_of_2(triton.cdiv(num_keys, chunk))
    candidates = triton.next_power_of_2(topk * chunk)
    warps = max(1, min(16, chunks * chunk // SCORES_PER_WARP))
    return {"CHUNK": chunk, "CHUNKS": chunks, "CANDIDATES": candidates, "num_warps": warps}


def select(scores: Tensor, num_keys: int, directions: Tensor, topk: int) -> tuple[Tensor, Tensor]:
    """Indices (T, H, S, m) and scores (T, H, S, R, m) of the best keys.

    scores: (R, H, S, T, A), any strides but the last's; those beyond `num_keys` do not count.
    directions: (S, H, R), of any dtype; for nothing where (H, S, R) is contiguous in float32.
    """
    ranks, heads, sides, tokens, width = scores.shape
    indices = torch.empty(tokens, heads, sides, topk, dtype=torch.int64, device=scores.device)
    picked = torch.empty(tokens, heads, sides, ranks, topk, device=scores.device)
    by_rank, by_head, by_side, by_token, _ = scores.stride()
    if tokens:
        select_kernel[(tokens * heads * sides,)](
            scores,
            directions.float().transpose(0, 1).contiguous(),
            indices,
            picked,
            by_rank,
            by_head,
            by_side,
            by_token,
            num_keys,
            width,
            heads,
            RANKS=ranks,
            TOPK=topk,
            **select_sizes(num_keys, topk),
        )
    return indices, picked


def _scattered(grad_picked: Tensor, indices: Tensor, keys: Tensor) -> Tensor:
    """Gradient of the scores, (R, P, T, A) in the dtype of the keys (H, S, A, R, K)."""
    tokens, heads, sides, ranks, topk = grad_picked.shape
    width = keys.shape[2]
    grad = keys.new_empty(ranks, heads * sides, tokens, width)
    if tokens:
        scatter_kernel[(tokens * heads * sides,)](
            grad_picked,
            indices,
            grad,
            tokens,
            width,
            heads * sides,
            RANKS=ranks,
            TOPK=topk,
            SLOTS=triton.next_power_of_2(topk),
            BLOCK=1024,
            num_warps=4,
        )
    return grad
