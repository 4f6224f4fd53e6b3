"""Lookup-reduce as one differentiable operation, whichever kernels run it.

N table rows, V value dim, T tokens, P picks per token, C cores, E groups.
"""

from typing import Any

import torch
from torch import Tensor

from ultramem_megatron.kernels.dispatch import implementation
from ultramem_megatron.kernels.lookup_reduce import torch_path
from ultramem_megatron.kernels.lookup_reduce.main_grad import (
    added_to_main_grad,
    main_grad_of,
    sparse_gradient,
    wants_sparse,
)
from ultramem_megatron.kernels.lookup_reduce.reference import lookup_reduce_reference


def lookup_reduce(
    table: Tensor, rows: Tensor, groups: Tensor, scores: Tensor, num_groups: int
) -> Tensor:
    """Same contract as `lookup_reduce_reference`; differentiable in table and scores.

    The table's gradient is added to its `main_grad` if it has one (see main_grad.py); then nothing
    of the table's size is allocated. Otherwise it is an ordinary gradient, dense, or sparse if the
    table says so.
    """
    if implementation(table.device) == "reference":
        return lookup_reduce_reference(table, rows, groups, scores, num_groups)
    pooled: Tensor = _LookupReduce.apply(table, rows, groups, scores, num_groups)
    return pooled


class _LookupReduce(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, table: Tensor, rows: Tensor, groups: Tensor, scores: Tensor, num_groups: int
    ) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(table, rows, groups, scores)
        return torch_path.pool(table, rows, groups, scores, num_groups)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        table, rows, groups, scores = ctx.saved_tensors
        table_grad = score_grad = None
        if ctx.needs_input_grad[3]:
            score_grad = torch_path.score_gradient(grad, table, rows, groups, scores)
        if ctx.needs_input_grad[0]:
            table_grad = _table_gradient(grad, table, rows, groups, scores)
        return table_grad, None, None, score_grad, None


def _table_gradient(
    grad: Tensor, table: Tensor, rows: Tensor, groups: Tensor, scores: Tensor
) -> Tensor:
    pieces = torch_path.row_gradients(grad, rows, groups, scores)
    if wants_sparse(table):
        return sparse_gradient(table, pieces)
    main_grad = main_grad_of(table)
    target = torch.zeros_like(table) if main_grad is None else main_grad
    for distinct, gradients in pieces:
        target.index_add_(0, distinct, gradients.to(target.dtype))
    return target if main_grad is None else added_to_main_grad(table)
