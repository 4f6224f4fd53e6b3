"""Inputs for the lookup behind pre-values, and everything it gives beside its reference."""

from typing import NamedTuple

import torch
from torch import Tensor

from tests.closeness import assert_close, rounding
from ultramem_megatron.kernels.lookup_prevalued import lookup_prevalued, lookup_prevalued_reference


class Sizes(NamedTuple):
    """tokens, picks, cores, width of one core's slice, width of a pre-value, groups, table rows."""

    tokens: int
    picks: int
    cores: int
    width: int
    pre_width: int
    groups: int
    rows: int = 13


SIZES = [
    Sizes(5, 7, 2, 3, 5, 1),
    Sizes(1, 1, 1, 1, 1, 1),
    Sizes(0, 3, 2, 2, 4, 4),
    Sizes(2, 33, 3, 5, 70, 9),
    Sizes(3, 5, 1, 33, 20, 1, rows=1),  # all tokens on one row
    Sizes(2, 17, 2, 40, 24, 4, rows=1000),
]
NAMES = ("output", "table", "pre-table", "scores", "inputs")


class Inputs(NamedTuple):
    """Arguments of the lookup, then the gradient of its output."""

    table: Tensor
    pre_table: Tensor
    rows: Tensor
    groups: Tensor
    scores: Tensor
    x: Tensor
    num_groups: int
    grad: Tensor


def inputs(sizes: Sizes, dtype: torch.dtype = torch.float64, seed: int = 6) -> Inputs:
    """Random arguments, the same numbers in every dtype; scores of at least float32."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int, at_least: torch.dtype = dtype) -> Tensor:
        drawn = torch.randn(*shape, generator=generator).bfloat16()
        return drawn.to(torch.promote_types(dtype, at_least))

    width, index = sizes.width * sizes.cores, (sizes.tokens, sizes.picks)
    return Inputs(
        draw(sizes.rows, width).requires_grad_(),
        (draw(sizes.rows, sizes.pre_width) / 8).requires_grad_(),
        torch.randint(sizes.rows, index, generator=generator),
        torch.randint(sizes.groups, index, generator=generator),
        draw(*index, sizes.cores, at_least=torch.float32).requires_grad_(),
        draw(sizes.tokens, sizes.pre_width).requires_grad_(),
        sizes.groups,
        draw(sizes.tokens, sizes.groups, width),
    )


def results(lookup: object, case: Inputs, act: str = "none") -> list[Tensor]:
    """As NAMES: the output, and the gradient of every floating argument."""
    out = lookup(*case[:7], act)  # type: ignore[operator]  # any lookup of this contract
    leaves = (case.table, case.pre_table, case.scores, case.x)
    return [out.detach(), *torch.autograd.grad(out, leaves, case.grad)]


def terms(sizes: Sizes) -> int:
    """Lengths of the sums that a result passes through, added up."""
    return sizes.tokens * sizes.picks + sizes.width * sizes.cores + sizes.pre_width


def assert_equals_reference(sizes: Sizes, dtype: torch.dtype, act: str) -> None:
    """Everything, against the reference in float64."""
    found = results(lookup_prevalued, inputs(sizes, dtype), act)
    expected = results(lookup_prevalued_reference, inputs(sizes), act)
    sums = torch.promote_types(dtype, torch.float32)
    for name, ours, theirs in zip(NAMES, found, expected, strict=True):
        # A weight is rounded to the table's dtype on some paths, a sum once more.
        tolerance = 2 * rounding(dtype, terms(sizes), sums=None if dtype == sums else sums)
        assert_close(ours.double(), theirs, tolerance, f"{name} of {sizes}, {act}, in {dtype}")
