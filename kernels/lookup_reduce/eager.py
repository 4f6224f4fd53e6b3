"""Lookup-reduce through PyTorch's own kernels: one gather and one small matrix product per core.

Summing into groups is a product with the scores laid out by group, (E x P) @ (P x V/C), so neither
the weighted rows nor a scatter is needed; the gathered rows (T, P, V) are the largest intermediate.
"""

import torch.nn.functional as F
from torch import Tensor


def lookup_reduce(
    table: Tensor, rows: Tensor, groups: Tensor, scores: Tensor, num_groups: int
) -> Tensor:
    """Same contract as `lookup_reduce_reference`; differentiable in table and scores."""
    tokens, picks, cores = scores.shape
    width = table.shape[1]
    picked = F.embedding(rows, table).view(tokens, picks, cores, width // cores)
    in_group = F.one_hot(groups, num_groups).to(table.dtype)  # (T, P, E)
    by_group = scores.to(table.dtype).unsqueeze(-1) * in_group.unsqueeze(2)  # (T, P, C, E)
    pooled = by_group.permute(0, 2, 3, 1) @ picked.transpose(1, 2)  # (T, C, E, V/C)
    return pooled.transpose(1, 2).reshape(tokens, num_groups, width)
