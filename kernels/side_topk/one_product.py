"""Side top-m on GPUs for weights that stay, as in decoding: one product, nothing copied.

With few tokens a product for each rank, and copies of a query that several heads read, cost
more in launches than in work. Keys are kept so that all scores come out of one batched product:
those that read the same numbers of a query beside each other.

Letters as in reference.py; A = N, aligned. G groups of heads, each with a query of its own: 1 or H.
L query slices that each have products of their own: R, or 1 where all ranks read the same.
"""

import torch
from torch import Tensor

from ultramem_megatron.kernels.side_topk.fused import aligned, select


def stored_for_one_product(keys: Tensor, shared: bool) -> Tensor:
    """The keys (H, S, N, R, K), aligned, as a view (H, S, A, R, K) of (G, S, R, H/G, A, K).

    shared: all heads read one query.
    """
    groups = 1 if shared else len(keys)
    stored = aligned(keys).unflatten(0, (groups, -1)).permute(0, 2, 4, 1, 3, 5).contiguous()
    return stored.permute(0, 3, 1, 4, 2, 5).flatten(0, 1)


def best_keys(
    query: Tensor, keys: Tensor, directions: Tensor, topk: int, num_keys: int
) -> tuple[Tensor, Tensor] | None:
    """As `side_topk_reference`, without a graph; None for keys that are not stored for it."""
    tokens, heads, sides, ranks, _ = query.shape
    groups = 1 if query.stride(1) == 0 else heads
    stored = keys.unflatten(0, (groups, -1)).permute(0, 2, 4, 1, 3, 5)  # (G, S, R, H/G, A, K)
    width = keys.shape[2]
    if not stored.is_contiguous() or width % 64:
        return None
    slices = 1 if query.stride(3) == 0 else ranks
    own = query.unflatten(1, (groups, -1))[:, :, 0, :, :slices]  # (T, G, S, L, K)
    rows = stored.reshape(groups * sides * slices, -1, keys.shape[-1])
    scores = torch.bmm(own.flatten(1, 3).transpose(0, 1), rows.mT)
    # (G, S, L, T, R/L, H/G, A), of L and R/L one is 1
    apart = scores.view(groups, sides, slices, tokens, ranks // slices, heads // groups, width)
    by_rank = apart.permute(2, 4, 0, 5, 1, 3, 6).flatten(0, 1).flatten(1, 2)
    return select(by_rank, num_keys, directions, topk)
