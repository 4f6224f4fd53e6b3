"""Tucker grid top-m on GPUs: one Triton kernel each way, sums over tokens by PyTorch.

Letters as in reference.py.
"""

from typing import Any

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from ultramem_megatron.kernels.tucker_topk.triton_kernels import grid_backward_kernel, grid_kernel

CHUNK = 8
"""Neighbours of a grid row that compete first: m*m/8 maxima, then m*8 candidates."""


class FusedTuckerTopk(torch.autograd.Function):
    """Same contract as `tucker_topk_reference`, for float32 scores."""

    @staticmethod
    def forward(
        ctx: Any,
        scores: Tensor,
        keys: Tensor,
        cores: Tensor,
        keys_per_side: int,
        shuffle: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """shuffle: see `tucker_topk`."""
        scores, keys = scores.contiguous(), keys.contiguous()
        tokens, heads, _, ranks, topk = scores.shape
        num_cores = len(cores)
        addresses = torch.empty(tokens, heads, topk, dtype=torch.int64, device=scores.device)
        positions = torch.empty_like(addresses, dtype=torch.int32)
        best = scores.new_empty(tokens, heads, topk, num_cores)
        if tokens:
            grid_kernel[(tokens * heads,)](
                scores,
                keys,
                cores.contiguous(),
                keys if shuffle is None else shuffle.contiguous(),
                addresses,
                positions,
                best,
                keys_per_side,
                heads,
                TOPK=topk,
                RANKS=ranks,
                CORES=num_cores,
                ROUNDS=0 if shuffle is None else len(shuffle),
                **grid_sizes(topk),
            )
        ctx.save_for_backward(scores, cores, positions)
        ctx.mark_non_differentiable(addresses)
        return addresses, best

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor, grad_best: Tensor) -> tuple[Tensor | None, ...]:
        scores, cores, positions = ctx.saved_tensors
        tokens, heads, _, ranks, topk = scores.shape
        num_cores = len(cores)
        grad_scores = torch.empty_like(scores)
        by_token = scores.new_empty(tokens, heads, num_cores, ranks, ranks)
        if tokens:
            rows = rows_of(topk)
            grid_backward_kernel[(tokens * heads,)](
                grad_best.contiguous(),
                scores,
                cores.float().contiguous(),
                positions,
                grad_scores,
                by_token,
                heads,
                TOPK=topk,
                RANKS=ranks,
                CORES=num_cores,
                ROWS=rows,
                SLAB=min(16, 1024 // rows),
                num_warps=1,
            )
        grad_cores = by_token.sum(0).transpose(0, 1).to(cores.dtype)
        return grad_scores, None, grad_cores, None, None


def rows_of(topk: int) -> int:
    """Power of two of at least m, and half a warp."""
    return max(16, triton.next_power_of_2(topk))


def grid_sizes(topk: int) -> dict[str, int]:
    """Launch constants of the grid kernel."""
    rows, groups = rows_of(topk), triton.next_power_of_2(triton.cdiv(topk, CHUNK))
    return {
        "ROWS": rows,
        "GROUPS": groups,
        "CHUNK": CHUNK,
        "CANDIDATES": triton.next_power_of_2(topk * CHUNK),
        "num_warps": max(1, rows * groups // 1024),
    }
