"""The lookup behind pre-values as one differentiable operation, whichever kernels run it.

N rows of both tables, V value dim, K pre-value dim, T tokens, P picks per token, C cores, E groups.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ultramem_megatron.kernels.dispatch import implementation
from ultramem_megatron.kernels.lookup_prevalued import composed, native_path
from ultramem_megatron.kernels.lookup_prevalued.activations import IN_KERNELS, gates_and_slopes
from ultramem_megatron.kernels.lookup_prevalued.contract import Picks
from ultramem_megatron.kernels.lookup_prevalued.reference import lookup_prevalued_reference
from ultramem_megatron.kernels.lookup_prevalued.shapes import lookup_prevalued_shapes
from ultramem_megatron.kernels.lookup_reduce.autograd import gradient_target, gradient_to_return
from ultramem_megatron.kernels.lookup_reduce.torch_path import row_gradients
from ultramem_megatron.kernels.precision import at_least_float32
from ultramem_megatron.kernels.reading import about_to_read, brought


def lookup_prevalued(
    table: Tensor,
    pre_table: Tensor,
    rows: Tensor,
    groups: Tensor,
    scores: Tensor,
    x: Tensor,
    num_groups: int,
    act: str = "none",
) -> Tensor:
    """Same contract as `lookup_prevalued_reference`; differentiable in tables, scores and x.

    Each table's gradient goes where that of `lookup_reduce` goes, and tables may lie where that
    takes them from, but for an activation that is not IN_KERNELS.
    """
    chosen = implementation(scores.device)
    if chosen == "shapes":
        return lookup_prevalued_shapes(table, pre_table, rows, groups, scores, x, num_groups)
    about_to_read(table, rows)
    about_to_read(pre_table, rows)
    rows, table, pre_table = brought(rows, table, pre_table)
    arguments = (table, pre_table, rows, groups, scores, x, num_groups)
    if chosen == "reference":
        return lookup_prevalued_reference(*arguments, act)
    pooled: Tensor = _LookupPrevalued.apply(*arguments, act)
    return pooled


class _LookupPrevalued(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        table: Tensor,
        pre_table: Tensor,
        rows: Tensor,
        groups: Tensor,
        scores: Tensor,
        x: Tensor,
        num_groups: int,
        act: str,
    ) -> Tensor:
        picked = Picks(
            table, pre_table, rows, groups, at_least_float32(scores), x.to(pre_table.dtype)
        )
        out, dots = _kernels(table, scores.device, act).forward(picked, num_groups, act)
        ctx.save_for_backward(table, pre_table, rows, groups, scores, x, dots)
        ctx.act = act
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        table, pre_table, rows, groups, scores, x, dots = ctx.saved_tensors
        wants_table, wants_pre = ctx.needs_input_grad[:2]
        target = gradient_target(table, rows) if wants_table else None
        pre_target = gradient_target(pre_table, rows) if wants_pre else None
        inputs, precise = x.to(pre_table.dtype), at_least_float32(scores)
        gates, slopes = gates_and_slopes(dots, ctx.act)
        picked = Picks(table, pre_table, rows, groups, precise, inputs)
        found = _kernels(table, scores.device, ctx.act).backward(
            grad, picked, gates, slopes, target, pre_target
        )
        table_grad = pre_grad = None
        if wants_table:
            pieces = row_gradients(grad, rows, groups, precise * gates.unsqueeze(2))
            table_grad = gradient_to_return(table, target, pieces)
        if wants_pre:
            one_group, factors = torch.zeros_like(rows), found.dots.unsqueeze(2)
            pieces = row_gradients(inputs.unsqueeze(1), rows, one_group, factors)
            pre_grad = gradient_to_return(pre_table, pre_target, pieces)
        of_scores, of_x = found.scores.to(scores.dtype), found.x.to(x.dtype)
        return table_grad, pre_grad, None, None, of_scores, of_x, None, None


def _kernels(table: Tensor, device: torch.device, act: str) -> Any:
    """`forward` and `backward` of the path for this table where all else is on `device`."""
    chosen = implementation(device)
    if act in IN_KERNELS and chosen == "triton":
        from ultramem_megatron.kernels.lookup_prevalued import triton_path  # needs Triton installed

        return triton_path
    native = act in IN_KERNELS and chosen == "native" and native_path.serves(table)
    return native_path if native else composed
