"""The lookup behind pre-values out of lookup-reduce's kernels, whichever they are: two passes.

For devices, dtypes and activations that the one-pass kernels do not serve. Letters as in
reference.py.
"""

import torch
from torch import Tensor

from ultramem_megatron.kernels.lookup_prevalued.activations import activation
from ultramem_megatron.kernels.lookup_prevalued.contract import Gradients, Picks
from ultramem_megatron.kernels.lookup_reduce.autograd import backward_kernel, pool_kernel
from ultramem_megatron.kernels.precision import at_least_float32


def forward(picked: Picks, num_groups: int, act: str) -> tuple[Tensor, Tensor]:
    """Sums (T, E, V), and the products (T, P) for the backward."""
    table, pre_table, rows, groups, scores, x = picked
    # A product is the gradient of a score; of that only the shape and dtype are looked at.
    like = at_least_float32(table.new_empty(*rows.shape, 1))
    multiply = backward_kernel(pre_table)
    dots = multiply(x.unsqueeze(1), pre_table, rows, torch.zeros_like(rows), like, None, True)
    weights = scores * activation(act)(dots)
    return pool_kernel(table, weights.device)(
        table, rows, groups, weights, num_groups
    ), dots.squeeze(2)


def backward(
    grad: Tensor,
    picked: Picks,
    gates: Tensor,
    slopes: Tensor,
    target: Tensor | None,
    pre_target: Tensor | None,
) -> Gradients:
    """Add the tables' gradients to the targets that are given; return the others.

    grad: (T, E, V). gates, slopes: (T, P), of `gates_and_slopes`.
    """
    table, pre_table, rows, groups, scores, x = picked
    weights = scores * gates.unsqueeze(2)
    by_weight = backward_kernel(table)(grad, table, rows, groups, weights, target, True)
    of_dots = (by_weight * scores).sum(2) * slopes
    one_group, factors = torch.zeros_like(rows), of_dots.unsqueeze(2)
    if pre_target is not None:
        add = backward_kernel(pre_table)
        add(x.unsqueeze(1), pre_table, rows, one_group, factors, pre_target, False)
    of_x = pool_kernel(pre_table, factors.device)(pre_table, rows, one_group, factors, 1).squeeze(1)
    return Gradients(by_weight * gates.unsqueeze(2), of_x, of_dots)
