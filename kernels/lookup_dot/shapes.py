"""Lookup-dot without numbers, on the meta device. Letters as in reference.py."""

import torch
from torch import Tensor

from ultramem_megatron.kernels.shapes import kept_for_backward


def lookup_dot_shapes(table: Tensor, rows: Tensor, x: Tensor) -> Tensor:
    """Shape (T, P) and what is kept; see `lookup_dot_reference`."""
    dtype = torch.promote_types(table.dtype, torch.float32)
    return kept_for_backward(tuple(rows.shape), dtype, table, rows, x)
