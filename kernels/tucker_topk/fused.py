"""Tucker grid top-m on GPUs: one Triton kernel each way, and one for sums over tokens.

Letters as in reference.py.
"""

from typing import Any

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from ultramem_megatron.kernels.column_sums import column_sums
from ultramem_megatron.kernels.tucker_topk.triton_kernels import grid_backward_kernel, grid_kernel

FEW_PROGRAMS = 512
"""Up to this, as in decoding, a GPU has room for four times the warps a program."""

MOST_NEIGHBOURS = 8
"""Of a grid row, of which the largest compete first: m*m/8 maxima, then 8 candidates a pair."""


class FusedTuckerTopk(torch.autograd.Function):
    """Same contract as `tucker_topk_reference`, for float32 scores."""

    @staticmethod
    def forward(
        ctx: Any,
        scores: Tensor,
        keys: Tensor,
        cores: Tensor,
        keys_per_side: int,
        pairs: int,
        shuffle: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """shuffle: see `tucker_topk`."""
        scores, keys = scores.contiguous(), keys.contiguous()
        tokens, heads, _, ranks, topk = scores.shape
        num_cores = len(cores)
        addresses = torch.empty(tokens, heads, pairs, dtype=torch.int64, device=scores.device)
        positions = torch.empty_like(addresses, dtype=torch.int32)
        best = scores.new_empty(tokens, heads, pairs, num_cores)
        if tokens:
            with torch.cuda.device_of(scores):
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
                    PAIRS=pairs,
                    RANKS=ranks,
                    CORES=num_cores,
                    ROUNDS=0 if shuffle is None else len(shuffle),
                    **grid_sizes(topk, pairs, tokens * heads),
                )
        ctx.save_for_backward(scores, cores, positions)
        ctx.mark_non_differentiable(addresses)
        ctx.set_materialize_grads(False)
        return addresses, best

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor | None, grad_best: Tensor) -> tuple[Tensor | None, ...]:
        scores, cores, positions = ctx.saved_tensors
        tokens, heads, _, ranks, topk = scores.shape
        num_cores = len(cores)
        grad_scores = torch.empty_like(scores)
        if not tokens:
            return grad_scores, None, torch.zeros_like(cores), None, None, None
        by_token = scores.new_empty(tokens, cores.numel())
        with torch.cuda.device_of(scores):
            grid_backward_kernel[(tokens * heads,)](
                grad_best.contiguous(),
                scores,
                cores.contiguous(),
                positions,
                grad_scores,
                by_token,
                heads,
                TOPK=topk,
                PAIRS=positions.shape[2],
                RANKS=ranks,
                CORES=num_cores,
                **backward_sizes(positions.shape[2]),
            )
            grad_cores = column_sums(by_token, cores.dtype).view_as(cores)
        return grad_scores, None, grad_cores, None, None, None


def grid_sizes(topk: int, pairs: int, programs: int) -> dict[str, int]:
    """Launch constants of the grid kernel, for `pairs` of the m x m; see its docstring.

    Few programs are bounded by how long one takes: with 4 warps instead of one each runs half as
    many instructions (compiled for sm_90, m = 42: 2,440 for 5,460).
    """
    chunk = MOST_NEIGHBOURS
    while chunk > 1 and pairs > topk and chunk * chunk * pairs > 2 * topk * topk:
        chunk //= 2  # so that maxima and candidates are about as many
    in_row = triton.cdiv(topk, chunk)
    chosen = min(pairs, topk * in_row)
    rows, groups = _tile_of(topk), triton.next_power_of_2(in_row)
    return {
        "ROWS": rows,
        "GROUPS": groups,
        "CHUNK": chunk,
        "CHOSEN": chosen,
        "CANDIDATES": triton.next_power_of_2(chosen * chunk),
        "PICKS": _tile_of(pairs),
        "num_warps": max(1, min(16, rows * groups // (128 if programs <= FEW_PROGRAMS else 1024))),
    }


def backward_sizes(pairs: int) -> dict[str, int]:
    """Launch constants of the backward kernel."""
    picks = _tile_of(pairs)
    warps = max(1, picks // 256)
    return {"PICKS": picks, "SLAB": min(16, 1024 * warps // picks), "num_warps": warps}


def _tile_of(count: int) -> int:
    """Power of two of at least that, and half a warp."""
    return max(16, triton.next_power_of_2(count))
