"""Tucker grid top-m through PyTorch's own kernels: the grids of a few tokens at a time.

Only the sum of the grids decides, which is the grid of the cores' sum; the scores of each core are
computed for the m chosen pairs alone, by differentiable operations on tensors of that size.
Letters as in reference.py.
"""

import torch
from torch import Tensor

from ultramem_megatron.kernels.selection import largest
from ultramem_megatron.kernels.tucker_topk.reference import pair_addresses

CACHED_SCORES = 2**18
"""Grid entries held at a time by each thread: 1 MB in float32, the second-level cache of a core."""


def tucker_topk_eager(
    scores: Tensor, keys: Tensor, cores: Tensor, keys_per_side: int, best: int | None = None
) -> tuple[Tensor, Tensor]:
    """Same contract as `tucker_topk_reference`."""
    cores = cores.to(scores.dtype)
    chosen = keys.shape[-1] if best is None else best
    positions = _best_positions(scores.detach(), cores.detach().sum(0), chosen)
    return scored_pairs(positions, scores, keys, cores, keys_per_side)


def scored_pairs(
    positions: Tensor, scores: Tensor, keys: Tensor, cores: Tensor, keys_per_side: int
) -> tuple[Tensor, Tensor]:
    """Addresses (T, H, best) and scores (T, H, best, C) of the pairs at positions (T, H, best)."""
    topk, ranks = keys.shape[-1], scores.shape[3]
    index = torch.stack([positions // topk, positions % topk], dim=2)  # (T, H, S, best)
    by_rank = index.unsqueeze(3).expand(-1, -1, -1, ranks, -1)
    row, column = scores.gather(4, by_rank).unbind(2)  # (T, H, R, best)
    products = (row.unsqueeze(3) * column.unsqueeze(2)).flatten(2, 3)  # (T, H, R*R, best)
    by_core = products.transpose(2, 3) @ cores.permute(1, 2, 3, 0).flatten(1, 2)
    return pair_addresses(keys, positions, keys_per_side), by_core


@torch.no_grad()
def _best_positions(scores: Tensor, total: Tensor, best: int) -> Tensor:
    """Positions (T, H, best) of the best pairs; total (H, R, R): the cores' sum."""
    tokens, heads, _, _, topk = scores.shape
    positions = torch.empty(tokens, heads, best, dtype=torch.int64, device=scores.device)
    step = max(1, torch.get_num_threads() * CACHED_SCORES // (heads * topk * topk))
    for start in range(0, tokens, step):
        row, column = scores[start : start + step].unbind(2)  # (t, H, R, m)
        grid = (total.mT @ row).mT @ column  # (t, H, m, m)
        positions[start : start + step] = largest(grid.flatten(2), best)
    return positions
