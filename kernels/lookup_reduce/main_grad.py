"""Where a table's gradient goes: into Megatron's `main_grad`, or into a gradient of its own.

Megatron's DistributedDataParallel gives every parameter `main_grad`, its part of the gradient
buffer, zeroes it once per step and lets backward hooks reduce it. Whoever adds to it in backward
sets `grad_added_to_main_grad`; the hook then ignores `.grad`, which with --overlap-grad-reduce must
still not be None (Megatron's own linear layers do the same under gradient accumulation fusion, and
return a dummy of the weight's size). Our dummy is a sparse tensor without entries: autograd would
copy an expanded one to full size. With `zero_out_wgrad` the hook adds the dummy, which changes
nothing.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

SPARSE = "ultramem_sparse_gradient"
"""A table with this attribute set to True, and no `main_grad`, gets a sparse gradient."""


MAKES_MAIN_GRAD = "ultramem_makes_main_grad"
"""Attribute of a table whose `main_grad`, float32, is there from when a backward asks for it."""


def main_grad_of(table: Tensor) -> Tensor | None:
    """The buffer that backward adds this table's gradient to, None if it has none."""
    main_grad = getattr(table, "main_grad", None)
    if main_grad is None and hasattr(table, MAKES_MAIN_GRAD):
        main_grad = getattr(table, MAKES_MAIN_GRAD).make(table)
    return main_grad if isinstance(main_grad, Tensor) else None


def wants_sparse(table: Tensor) -> bool:
    """Whether the gradient of this table is to be a sparse tensor."""
    return main_grad_of(table) is None and bool(getattr(table, SPARSE, False))


def added_to_main_grad(table: Tensor) -> Tensor:
    """Mark the table's gradient as added; returns the dummy that backward is to return."""
    table.grad_added_to_main_grad = True  # type: ignore[attr-defined]  # Megatron's tag
    index = torch.empty(1, 0, dtype=torch.int64, device=table.device)
    values = table.new_empty(0, *table.shape[1:])
    return sparse_rows(table, index, values)


def sparse_gradient(table: Tensor, pieces: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """Pieces of distinct ascending rows (u,) and their gradients (u, V) as one sparse tensor."""
    index = [torch.empty(0, dtype=torch.int64, device=table.device)]
    values = [table.new_empty(0, *table.shape[1:])]
    for rows, gradients in pieces:
        index.append(rows)
        values.append(gradients.to(table.dtype))
    return sparse_rows(table, torch.cat(index).unsqueeze(0), torch.cat(values))


def sparse_rows(table: Tensor, index: Tensor, values: Tensor) -> Tensor:
    """A sparse tensor of the table's shape with these distinct ascending rows."""
    return torch.sparse_coo_tensor(
        index, values, table.shape, is_coalesced=True, check_invariants=False
    )
