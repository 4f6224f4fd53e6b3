"""Inputs for lookup-dot, and its results beside its reference's in float64."""

import torch
from torch import Tensor

from tests.closeness import assert_close, rounding
from ultramem_megatron.kernels.lookup_dot import lookup_dot, lookup_dot_reference

SIZES = [(5, 7, 6, 13), (1, 1, 1, 1), (0, 3, 4, 5), (4, 9, 33, 2)]
"""Tokens, picks, width, table rows."""


def inputs(
    sizes: tuple[int, int, int, int], dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """table, rows, x, and the gradient of the products; numbers that every dtype holds."""
    tokens, picks, width, rows = sizes
    generator = torch.Generator().manual_seed(4)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).bfloat16().to(dtype)

    index = torch.randint(rows, (tokens, picks), generator=generator)
    grad = draw(tokens, picks).to(torch.promote_types(dtype, torch.float32))
    return draw(rows, width).requires_grad_(), index, draw(tokens, width).requires_grad_(), grad


def assert_equals_reference(sizes: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    """Products and both gradients."""
    table, rows, x, grad = inputs(sizes, dtype)
    found = lookup_dot(table, rows, x)
    assert found.dtype == grad.dtype
    ours = (found, *torch.autograd.grad(found, (table, x), grad))
    exact = inputs(sizes, torch.float64)
    expected = lookup_dot_reference(*exact[:3])
    theirs = (expected, *torch.autograd.grad(expected, (exact[0], exact[2]), exact[3]))
    tolerance = rounding(dtype, sum(sizes), sums=torch.promote_types(dtype, torch.float32))
    names = ("products", "table gradient", "input gradient")
    for name, one, other in zip(names, ours, theirs, strict=True):
        assert_close(one.double(), other, tolerance, f"{name} of {sizes} in {dtype}")
