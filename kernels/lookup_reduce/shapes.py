"""Lookup-reduce without numbers, on the meta device. Letters as in reference.py."""

from torch import Tensor

from ultramem_megatron.kernels.shapes import kept_for_backward


def lookup_reduce_shapes(
    table: Tensor, rows: Tensor, groups: Tensor, scores: Tensor, num_groups: int
) -> Tensor:
    """Shape (T, E, V) and what is kept; see `lookup_reduce_reference`."""
    shape = (len(rows), num_groups, table.shape[1])
    return kept_for_backward(shape, table.dtype, table, rows, groups, scores)
