"""Side top-m on GPUs: a matrix product, then one Triton kernel from its output to the picks.

Letters as in one_product.py. Neither pass copies the scores, nor a query that several heads read.
"""

from typing import Any

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from ultramem_megatron.kernels.side_topk.one_product import Products, products
from ultramem_megatron.kernels.side_topk.triton_kernels import scatter_kernel, select_kernel

SCORES_PER_WARP = 2048
"""64 scores per thread: what fits in registers beside the bisection (tests compile it)."""

FEW_PROGRAMS = 1024
"""Up to this, as in decoding, a GPU has room for four times the warps a program."""


class FusedSideTopk(torch.autograd.Function):
    """As `side_topk`, of a query (T, G, S, L, K) and keys as rows (G, S, R, H/G, A, K)."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, rows: Tensor, directions: Tensor, topk: int, num_keys: int
    ) -> tuple[Tensor, Tensor]:
        """Rows beyond `num_keys` are zeros. For float32, bfloat16 and float16."""
        sizes = products(query, rows)
        scores = torch.bmm(_by_slice(query), _by_product(rows, sizes).mT)
        indices, picked = select(scores, sizes, num_keys, directions, topk)
        ctx.save_for_backward(query, rows, indices)
        ctx.mark_non_differentiable(indices)
        ctx.set_materialize_grads(False)
        return indices, picked

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, _: Tensor | None, grad_picked: Tensor
    ) -> tuple[Tensor, Tensor, None, None, None]:
        query, rows, indices = ctx.saved_tensors
        sizes = products(query, rows)
        grad = _scattered(grad_picked.contiguous(), indices, sizes, rows.dtype)
        grad_query = torch.empty_like(query, memory_format=torch.contiguous_format)
        torch.bmm(grad, _by_product(rows, sizes), out=_by_slice(grad_query))
        grad_rows = torch.bmm(grad.mT, _by_slice(query)).view_as(rows)
        return grad_query, grad_rows, None, None, None


def _by_slice(query: Tensor) -> Tensor:
    """Query (G*S*L, T, K), a view of a contiguous one."""
    return query.flatten(1, 3).transpose(0, 1)


def _by_product(rows: Tensor, sizes: Products) -> Tensor:
    """Keys (G*S*L, R/L * H/G * A, K)."""
    batch = sizes.queries * sizes.sides * sizes.slices
    return rows.view(batch, -1, rows.shape[-1])


def select_sizes(num_keys: int, topk: int, programs: int) -> dict[str, int]:
    """Launch constants: chunks of about sqrt(N / m) keys balance the two bisections.

    One chunk more than m spares masking the keys that do not count, where it makes no slots more.
    Few programs are bounded by how long one takes: with 8 warps instead of 2 each runs half as many
    instructions (compiled for sm_90, N = 3578, m = 42: 1,600 for 3,010).
    """
    chunk = 1
    while chunk < 32 and 4 * chunk * chunk * topk <= 2 * num_keys and num_keys > 2 * chunk * topk:
        chunk *= 2
    chunks = triton.next_power_of_2(triton.cdiv(num_keys, chunk))
    candidates = triton.next_power_of_2(topk * chunk)
    chosen = min(topk + 1, triton.cdiv(num_keys, chunk))
    scores = SCORES_PER_WARP // 4 if programs <= FEW_PROGRAMS else SCORES_PER_WARP
    return {
        "CHOSEN": chosen if chosen * chunk <= candidates else topk,
        "CHUNK": chunk,
        "CHUNKS": chunks,
        "CANDIDATES": candidates,
        "num_warps": max(1, min(16, chunks * chunk // scores)),
    }


def select(
    scores: Tensor, sizes: Products, num_keys: int, directions: Tensor, topk: int
) -> tuple[Tensor, Tensor]:
    """Indices (T, H, S, m) and scores (T, H, S, R, m) of the best keys.

    scores: contiguous, of these sizes; those beyond `num_keys` do not count. directions: (S, H, R),
    of any dtype; for nothing where (H, S, R) is contiguous in float32.
    """
    outer = (sizes.tokens, sizes.heads, sizes.sides)
    indices = torch.empty(*outer, topk, dtype=torch.int64, device=scores.device)
    picked = torch.empty(*outer, sizes.ranks, topk, device=scores.device)
    programs = sizes.tokens * sizes.heads * sizes.sides
    if programs:
        with torch.cuda.device_of(scores):
            select_kernel[(programs,)](
                scores,
                directions.float().transpose(0, 1).contiguous(),
                indices,
                picked,
                *sizes.strides(),
                num_keys,
                sizes.width,
                sizes.heads,
                sizes.own_heads,
                RANKS=sizes.ranks,
                TOPK=topk,
                **select_sizes(num_keys, topk, programs),
            )
    return indices, picked


def _scattered(grad_picked: Tensor, indices: Tensor, sizes: Products, dtype: torch.dtype) -> Tensor:
    """Gradient of the scores, (G*S*L, T, R/L * H/G * A)."""
    topk = indices.shape[-1]
    batch = sizes.queries * sizes.sides * sizes.slices
    inner = sizes.ranks // sizes.slices * sizes.own_heads * sizes.width
    grad = torch.empty(batch, sizes.tokens, inner, dtype=dtype, device=indices.device)
    if sizes.tokens:
        with torch.cuda.device_of(grad):
            scatter_kernel[(sizes.tokens * sizes.heads * sizes.sides,)](
                grad_picked,
                indices,
                grad,
                *sizes.strides(),
                sizes.width,
                sizes.heads,
                sizes.own_heads,
                RANKS=sizes.ranks,
                TOPK=topk,
                SLOTS=triton.next_power_of_2(topk),
                BLOCK=1024,
                num_warps=4,
            )
    return grad
