"""The lookup behind pre-values without numbers, on the meta device. Letters as in reference.py."""

import torch
from torch import Tensor

from ultramem_megatron.kernels.shapes import kept_for_backward


def lookup_prevalued_shapes(
    table: Tensor,
    pre_table: Tensor,
    rows: Tensor,
    groups: Tensor,
    scores: Tensor,
    x: Tensor,
    num_groups: int,
) -> Tensor:
    """Shape (T, E, V) and what is kept, the products too; see `lookup_prevalued_reference`."""
    dots = scores.new_empty(rows.shape, dtype=torch.promote_types(table.dtype, torch.float32))
    shape = (len(rows), num_groups, table.shape[1])
    kept = (table, pre_table, rows, groups, scores, x, dots)
    return kept_for_backward(shape, table.dtype, *kept)
