"""What retrieval hands to the value table, and the selections both retrievals share."""

from typing import NamedTuple

import torch
from torch import Tensor


class Retrieved(NamedTuple):
    """The values a token reads, as virtual addresses with one score per core.

    addresses: (T, H*m) int64 in 0..(e*n)^2-1, row key * (e*n) + column key.
    scores: (T, H*m, C) float32 (float64 for float64 inputs), within a head best first.
    """

    addresses: Tensor
    scores: Tensor


def at_least_float32(x: Tensor) -> Tensor:
    """x in float32, or in float64 if it is already."""
    return x if x.dtype == torch.float64 else x.float()


def pick(scores: Tensor, indices: Tensor) -> Tensor:
    """Scores (H, R, T, N) at per-head indices (H, T, m): (H, R, T, m), at least float32."""
    heads, ranks, tokens, _ = scores.shape
    index = indices.unsqueeze(1).expand(heads, ranks, tokens, indices.shape[-1])
    return at_least_float32(scores.gather(-1, index))


def best_of_grid(
    grid: Tensor, row_keys: Tensor, column_keys: Tensor, keys_per_side: int
) -> tuple[Tensor, Tensor]:
    """The m best of an m x m grid of candidates.

    grid: (H, T, m, m); row_keys, column_keys: (H, T, m). Returns positions in the flattened grid
    and virtual addresses, both (H, T, m) int64.
    """
    topk = grid.shape[-1]
    with torch.no_grad():
        positions = grid.flatten(-2).topk(topk, dim=-1).indices
        rows = row_keys.gather(-1, positions // topk)
        columns = column_keys.gather(-1, positions % topk)
    return positions, rows * keys_per_side + columns


def by_token(x: Tensor) -> Tensor:
    """(H, T, m, ...) to (T, H*m, ...): the order in which a token's heads follow each other."""
    return x.transpose(0, 1).flatten(1, 2)
