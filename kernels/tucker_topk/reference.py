"""Tucker grid top-m in the plainest form: the whole grid of every core, a stable sort, a gather.

T tokens, H heads, S = 2 sides (row, column), m top-m, R Tucker rank, C cores. Source: UltraMem,
arXiv 2411.12364, eq. 9 (exact rescoring) and eq. 16 (one grid per core).
"""

import torch
from torch import Tensor


def tucker_topk_reference(
    scores: Tensor, keys: Tensor, cores: Tensor, keys_per_side: int, best: int | None = None
) -> tuple[Tensor, Tensor]:
    """The `best` best, by default m, of the m x m pairs of shortlisted row and column keys.

    With row, column = scores[:, :, 0], scores[:, :, 1] the grid of core c is
    G_c[i, j] = sum_ab row[a, i] cores[c, a, b] column[b, j]; chosen are the largest of
    sum_c G_c, of equal ones the lowest position i * m + j, NaN above all.

    scores (T, H, S, R, m) float32 or float64; keys (T, H, S, m) int64; cores (C, H, R, R). Returns
    addresses row key * keys_per_side + column key (T, H, best) int64, best first, and the C scores
    G_c of each (T, H, best, C) in the dtype of `scores`; differentiable in scores and cores.

    With one token, head, rank and core, m=2, row scores [1, 2] of keys [0, 4], column scores [3, 5]
    of keys [1, 2], a core of 1 and 5 keys per side, the grid is [[3, 5], [6, 10]], the addresses
    are [22, 21] and their scores [10, 6].
    """
    row, column = scores.unbind(2)  # (T, H, R, m)
    grids = torch.einsum("thai,chab,thbj->thcij", row, cores.to(scores.dtype), column).flatten(3)
    chosen = keys.shape[-1] if best is None else best
    order = grids.sum(2).sort(dim=-1, descending=True, stable=True).indices
    positions = order[..., :chosen]  # (T, H, best)
    picked = grids.gather(3, positions.unsqueeze(2).expand(*grids.shape[:3], chosen))
    return pair_addresses(keys, positions, keys_per_side), picked.transpose(2, 3)


def pair_addresses(keys: Tensor, positions: Tensor, keys_per_side: int) -> Tensor:
    """Addresses, as many as positions i * m + j in the grids of keys (T, H, S, m)."""
    topk = keys.shape[-1]
    rows = keys[:, :, 0].gather(2, positions // topk)
    columns = keys[:, :, 1].gather(2, positions % topk)
    return rows * keys_per_side + columns
