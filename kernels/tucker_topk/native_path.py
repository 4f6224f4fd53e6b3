"""Tucker grid top-m through native.cpp, one call each way. Letters as in reference.py."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ultramem_megatron.kernels.native.library import call_native, native_library


def serves(scores: Tensor) -> bool:
    """Whether there are native kernels for scores of this dtype on this machine."""
    return scores.dtype == torch.float32 and native_library() is not None


class NativeTuckerTopk(torch.autograd.Function):
    """Same contract as `tucker_topk_reference`, for float32 scores."""

    @staticmethod
    def forward(
        ctx: Any, scores: Tensor, keys: Tensor, cores: Tensor, keys_per_side: int, best: int
    ) -> tuple[Tensor, Tensor]:
        tokens, heads, _, ranks, topk = scores.shape
        scores, cores_f = scores.contiguous(), cores.float().contiguous()
        positions = keys.new_empty(tokens, heads, best)
        addresses = torch.empty_like(positions)
        found = scores.new_empty(tokens, heads, best, len(cores))
        given = (scores, keys.contiguous(), cores_f, cores_f.sum(0))
        sizes = (tokens, heads, ranks, topk, best, len(cores), keys_per_side)
        call_native("grid_select", *given, positions, addresses, found, *sizes)
        ctx.save_for_backward(scores, cores, positions.int())
        ctx.mark_non_differentiable(addresses)
        return addresses, found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor, grad_best: Tensor) -> tuple[Any, ...]:
        scores, cores, positions = ctx.saved_tensors
        tokens, heads, _, ranks, topk = scores.shape
        grad_scores = torch.zeros_like(scores)
        by_token = scores.new_zeros(tokens, heads, len(cores), ranks, ranks)
        given = (grad_best.contiguous(), scores, cores.float().contiguous(), positions.long())
        sizes = (tokens, heads, ranks, topk, positions.shape[-1], len(cores))
        call_native("grid_backward", *given, grad_scores, by_token, *sizes)
        grad_cores = by_token.sum(0).transpose(0, 1).to(cores.dtype)
        return grad_scores, None, grad_cores, None, None
