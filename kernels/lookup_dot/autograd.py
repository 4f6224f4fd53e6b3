"""Lookup-dot as one differentiable operation, out of the kernels of lookup-reduce.

The two are transposes of each other. The gradient of lookup-reduce's scores is a lookup-dot, whose
gradients are a lookup-reduce and its table's gradient, with one core and one group: gathered rows
are stored nowhere, in no direction, and the table's gradient goes where that of lookup-reduce goes.

N table rows, K their width, T tokens, P picks per token.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ultramem_megatron.kernels.dispatch import implementation
from ultramem_megatron.kernels.lookup_dot.reference import lookup_dot_reference
from ultramem_megatron.kernels.lookup_dot.shapes import lookup_dot_shapes
from ultramem_megatron.kernels.lookup_reduce.autograd import (
    backward_kernel,
    pool_kernel,
    table_gradient,
)
from ultramem_megatron.kernels.precision import at_least_float32
from ultramem_megatron.kernels.reading import about_to_read, brought


def lookup_dot(table: Tensor, rows: Tensor, x: Tensor) -> Tensor:
    """Same contract as `lookup_dot_reference`; differentiable in table and x.

    The table's gradient is added to its `main_grad` if it has one, as that of `lookup_reduce` is.
    """
    chosen = implementation(table.device)
    if chosen == "shapes":
        return lookup_dot_shapes(table, rows, x)
    about_to_read(table, rows)
    rows, table = brought(rows, table)
    if chosen == "reference":
        return lookup_dot_reference(table, rows, x)
    dots: Tensor = _LookupDot.apply(table, rows, x)
    return dots


class _LookupDot(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, table: Tensor, rows: Tensor, x: Tensor) -> Tensor:
        ctx.save_for_backward(table, rows, x)
        vectors = x.to(table.dtype).unsqueeze(1)  # (T, 1, K): a gradient of one group
        # Only the shape and dtype of what comes back.
        scores = at_least_float32(table.new_empty(*rows.shape, 1))
        one_group = torch.zeros_like(rows)
        dots = backward_kernel(table)(vectors, table, rows, one_group, scores, None, True)
        assert dots is not None
        return dots.squeeze(2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, Tensor | None]:
        table, rows, x = ctx.saved_tensors
        weights, one_group = grad.unsqueeze(2), torch.zeros_like(rows)
        table_grad = x_grad = None
        if ctx.needs_input_grad[0]:
            vectors = x.to(table.dtype).unsqueeze(1)
            table_grad, _ = table_gradient(vectors, table, rows, one_group, weights, False)
        if ctx.needs_input_grad[2]:
            x_grad = (
                pool_kernel(table, weights.device)(table, rows, one_group, weights, 1)
                .squeeze(1)
                .to(x.dtype)
            )
        return table_grad, None, x_grad
