"""Lookup-reduce as one differentiable operation, whichever kernels run it.

N table rows, V value dim, T tokens, P picks per token, C cores, E groups.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ultramem_megatron.kernels.dispatch import implementation
from ultramem_megatron.kernels.lookup_reduce import native_path, reused, torch_path
from ultramem_megatron.kernels.lookup_reduce.main_grad import (
    added_to_main_grad,
    main_grad_of,
    sparse_gradient,
    wants_sparse,
)
from ultramem_megatron.kernels.lookup_reduce.reference import lookup_reduce_reference
from ultramem_megatron.kernels.lookup_reduce.shapes import lookup_reduce_shapes
from ultramem_megatron.kernels.lookup_reduce.torch_path import RowGradients
from ultramem_megatron.kernels.reading import about_to_read, brought, is_kept


def lookup_reduce(
    table: Tensor, rows: Tensor, groups: Tensor, scores: Tensor, num_groups: int
) -> Tensor:
    """Same contract as `lookup_reduce_reference`; differentiable in table and scores.

    The table's gradient is added to its `main_grad` if it has one (see main_grad.py); then nothing
    of the table's size is allocated. Otherwise it is an ordinary gradient, dense, or sparse if the
    table says so; a dense one uses its memory again in the next step (see reused.py). Without a
    graph, Triton's kernels read a table in pinned host memory, too; all else is on the GPU.
    """
    chosen = implementation(scores.device)
    if chosen == "shapes":
        return lookup_reduce_shapes(table, rows, groups, scores, num_groups)
    about_to_read(table, rows)
    rows, table = brought(rows, table)
    if chosen == "reference":
        return lookup_reduce_reference(table, rows, groups, scores, num_groups)
    pooled: Tensor = _LookupReduce.apply(table, rows, groups, scores, num_groups)
    return pooled


def lookup_addresses(table: Tensor, addresses: Tensor, scores: Tensor, num_groups: int) -> Tensor:
    """`lookup_reduce` of addresses (T, P), int64, group * N + row of the N-row table.

    On GPUs with few tokens and no graph, as in decoding, the lookup's kernel takes them apart.
    """
    if implementation(table.device) == "triton" and not torch.is_grad_enabled():
        from ultramem_megatron.kernels.lookup_reduce import triton_forward  # needs Triton installed

        few = len(addresses) <= triton_forward.FEW_TOKENS and num_groups * len(table) < 2**31
        if few and not is_kept(table):
            return triton_forward.pool(table, addresses, None, scores, num_groups)
    rows, groups = addresses % len(table), addresses // len(table)
    return lookup_reduce(table, rows, groups, scores, num_groups)


class _LookupReduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx, table, rows, groups, scores, num_groups):
        ctx.save_for_backward(table, rows, groups, scores)
        return pool_kernel(table, scores.device)(table, rows, groups, scores, num_groups)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        table, rows, groups, scores = ctx.saved_tensors
        wants_table, _, _, wants_scores, _ = ctx.needs_input_grad
        table_grad = score_grad = None
        if wants_table:
            table_grad, score_grad = table_gradient(grad, table, rows, groups, scores, wants_scores)
        elif wants_scores:
            score_grad = backward_kernel(table)(grad, table, rows, groups, scores, None, True)
        return table_grad, None, None, score_grad, None


def table_gradient(
    grad: Tensor, table: Tensor, rows: Tensor, groups: Tensor, scores: Tensor, with_scores: bool
) -> tuple[Tensor, Tensor | None]:
    """What backward returns for the table, and for the scores if asked; grad: (T, E, V)."""
    target = gradient_target(table, rows)
    score_grad = backward_kernel(table)(grad, table, rows, groups, scores, target, with_scores)
    pieces = torch_path.row_gradients(grad, rows, groups, scores)
    return gradient_to_return(table, target, pieces), score_grad


def gradient_target(table: Tensor, rows: Tensor) -> Tensor | None:
    """What gradients of `rows` are added to; None if they are to become a sparse tensor."""
    if wants_sparse(table):
        return None
    main_grad = main_grad_of(table)
    return reused.zeros_for(table, rows) if main_grad is None else main_grad


def gradient_to_return(table: Tensor, target: Tensor | None, pieces: RowGradients) -> Tensor:
    """What backward returns for the table when its `gradient_target` has been added to.

    pieces: looked at only where there was none.
    """
    if target is None:
        return sparse_gradient(table, pieces)
    if target is main_grad_of(table):
        return added_to_main_grad(table)
    reused.added(table, target)
    return target


def pool_kernel(table: Tensor, device: torch.device) -> Any:
    """`pool` of the path for this table where all else is on `device`."""
    if implementation(device) == "triton":
        from ultramem_megatron.kernels.lookup_reduce import triton_forward  # needs Triton installed

        return triton_forward.pool
    return _path(table).pool


def backward_kernel(table: Tensor) -> Any:
    """`backward` of the path for this table's device."""
    if implementation(table.device) == "triton":
        from ultramem_megatron.kernels.lookup_reduce import triton_backward

        return triton_backward.backward
    return _path(table).backward


def _path(table: Tensor) -> Any:
    native = implementation(table.device) == "native" and native_path.serves(table)
    return native_path if native else torch_path
