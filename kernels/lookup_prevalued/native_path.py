"""The lookup behind pre-values through native.cpp: each pick's two rows are read once a pass.

Letters as in reference.py.
"""

import torch
from torch import Tensor

from ultramem_megatron.kernels.lookup_prevalued.activations import IN_KERNELS
from ultramem_megatron.kernels.lookup_prevalued.contract import Gradients, Picks
from ultramem_megatron.kernels.lookup_reduce import torch_path
from ultramem_megatron.kernels.lookup_reduce.native_path import (
    call_for_dtype,
    check_indices,
    serves,
    takes,
)

__all__ = ["backward", "forward", "serves"]


def forward(picked: Picks, num_groups: int, act: str) -> tuple[Tensor, Tensor]:
    """As `composed.forward`. Raises IndexError for rows or groups that are not there."""
    table, pre_table, rows, groups, scores, x = picked
    check_indices(rows, min(len(table), len(pre_table)), "table row")
    check_indices(groups, num_groups, "group")
    out = table.new_empty(len(rows), num_groups, table.shape[1])
    dots = scores.new_empty(rows.shape, dtype=torch.float32)
    tensors = (table, pre_table, rows, groups, scores.float(), x, out, dots)
    sizes = (*scores.shape, num_groups, table.shape[1], pre_table.shape[1], IN_KERNELS.index(act))
    call_for_dtype("prevalued_pool", *tensors, *sizes)
    return out, dots


def backward(
    grad: Tensor,
    picked: Picks,
    gates: Tensor,
    slopes: Tensor,
    target: Tensor | None,
    pre_target: Tensor | None,
) -> Gradients:
    """As `composed.backward`; a target in half precision takes that road."""
    table, pre_table, rows, groups, scores, x = picked
    found = Gradients(
        torch.empty_like(scores, memory_format=torch.contiguous_format),
        x.new_empty(x.shape, dtype=torch.float32),
        torch.empty_like(gates, memory_format=torch.contiguous_format),
    )
    native = [t if t is not None and takes(t) else None for t in (target, pre_target)]
    tensors = (grad.to(table.dtype), table, pre_table, rows, groups, scores, x, gates, slopes)
    sizes = (*scores.shape, grad.shape[1], grad.shape[2], pre_table.shape[1])
    call_for_dtype("prevalued_backward", *tensors, *native, *found, *sizes)
    if target is not None and native[0] is None:
        weights = scores * gates.unsqueeze(2)
        torch_path.backward(grad, table, rows, groups, weights, target, False)
    if pre_target is not None and native[1] is None:
        one_group, factors = torch.zeros_like(rows), found.dots.unsqueeze(2)
        torch_path.backward(x.unsqueeze(1), pre_table, rows, one_group, factors, pre_target, False)
    return found
