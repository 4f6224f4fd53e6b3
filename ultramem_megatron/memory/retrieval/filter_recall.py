"""How much of the best pairs the rank-1 filter lets through to the exact scores (paper eq. 7-9).

The filter takes the largest of each side, so pairs whose filter scores are both negative, whose
product is positive, are out of its reach by design: they are left out here as well.
"""

import torch
from torch import Tensor


@torch.no_grad()
def filter_recall(scores: Tensor, directions: Tensor, core: Tensor, topk: int) -> Tensor:
    """Share of the `topk` best pairs within reach that stand in the shortlist, mean over heads.

    scores (T, H, S, R, N): of all keys of both sides S, for each rank. directions (S, H, R): the
    filter (u, t). core (H, R, R): sum of the cores. A pair is within reach where both of its filter
    scores are positive; its score is row^T core column. Returns a float64 scalar; NaN without any
    pair within reach. Takes T*H grids of at most N x N, one after the other.
    """
    filtered = torch.einsum("thsrn,shr->thsn", scores, directions.to(scores.dtype))
    kept = torch.zeros_like(filtered, dtype=torch.bool)
    shortlist = filtered.topk(min(topk, filtered.shape[-1])).indices
    kept.scatter_(3, shortlist, torch.ones_like(shortlist, dtype=torch.bool))
    shares = [
        _recall(scores[token, head], filtered[token, head], kept[token, head], core[head], topk)
        for token in range(scores.shape[0])
        for head in range(scores.shape[1])
    ]
    return torch.stack(shares).nanmean()


def _recall(scores: Tensor, filtered: Tensor, kept: Tensor, core: Tensor, topk: int) -> Tensor:
    """Of one token and head: scores (S, R, N), filtered and kept (S, N)."""
    row, column = (scores[side][:, filtered[side] > 0] for side in (0, 1))
    grid = row.T @ core.to(row.dtype) @ column
    passes = kept[0, filtered[0] > 0][:, None] & kept[1, filtered[1] > 0]
    best = grid.flatten().topk(min(topk, grid.numel())).indices
    return passes.flatten()[best].double().mean()
