"""Inputs for lookup-reduce, and running an implementation on them."""

import mmap
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from tests.closeness import assert_close, assert_rounds_no_worse, rounding
from ultramem_megatron.kernels.lookup_reduce import lookup_reduce_reference

Lookup = Callable[[Tensor, Tensor, Tensor, Tensor, int], Tensor]


class Sizes(NamedTuple):
    """tokens, picks, cores, width of one core's slice, groups, table rows."""

    tokens: int
    picks: int
    cores: int
    width: int
    groups: int
    rows: int = 13


ODD_SIZES = [
    Sizes(5, 7, 2, 3, 4),
    Sizes(1, 1, 1, 1, 1),
    Sizes(0, 3, 2, 2, 4),
    Sizes(4, 63, 3, 5, 9),
    Sizes(6, 8, 4, 2, 1),
    Sizes(3, 5, 1, 33, 4, rows=1),  # all tokens on one row
    Sizes(1, 17, 2, 40, 16, rows=1000),
]


class Inputs(NamedTuple):
    """Arguments of a lookup, then the gradient of its output."""

    table: Tensor
    rows: Tensor
    groups: Tensor
    scores: Tensor
    num_groups: int
    grad: Tensor


def lazy_zeros(rows: int, width: int, dtype: torch.dtype) -> Tensor:
    """Zeros of which only the pages that are written ever take memory."""
    memory = mmap.mmap(-1, rows * width * dtype.itemsize)
    return torch.frombuffer(memory, dtype=dtype).view(rows, width)


def inputs(sizes: Sizes, dtype: torch.dtype = torch.float64, seed: int = 3) -> Inputs:
    """Random arguments, the same numbers in every dtype up to rounding to bfloat16."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        # Numbers that every dtype holds exactly: then only the arithmetic differs.
        return torch.randn(*shape, generator=generator).bfloat16().to(dtype)

    width = sizes.width * sizes.cores
    index = (sizes.tokens, sizes.picks)
    return Inputs(
        draw(sizes.rows, width).requires_grad_(),
        torch.randint(sizes.rows, index, generator=generator),
        torch.randint(sizes.groups, index, generator=generator),
        draw(*index, sizes.cores).requires_grad_(),
        sizes.groups,
        draw(sizes.tokens, sizes.groups, width),
    )


def results(lookup: Lookup, given: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """Output, table gradient and score gradient."""
    out = lookup(*given[:5])
    table_grad, score_grad = torch.autograd.grad(out, (given.table, given.scores), given.grad)
    return out.detach(), table_grad, score_grad


NAMES = ("output", "table gradient", "score gradient")


def exact_rounding(sizes: Sizes) -> float:
    """What float64 may round off: a row gets all picks at worst, a score's gradient its slice."""
    return rounding(torch.float64, max(sizes.tokens * sizes.picks, sizes.picks, sizes.width))


def main_grad_rounding(dtype: torch.dtype, sizes: Sizes) -> float:
    """Of two micro-batches' sums in float32, each added to a main_grad of `dtype`."""
    picks_a_row = 2 * sizes.tokens * sizes.picks // sizes.rows
    return rounding(dtype, picks_a_row, sums=torch.float32 if dtype.itemsize < 4 else None)


def assert_equals_reference(lookup: Lookup, sizes: Sizes) -> None:
    """Everything `lookup` gives, against the reference in float64."""
    found = results(lookup, inputs(sizes))
    expected = results(lookup_reduce_reference, inputs(sizes))
    for name, ours, theirs in zip(NAMES, found, expected, strict=True):
        assert_close(ours, theirs, exact_rounding(sizes), f"{name} of {sizes}")


def assert_rounds_like_reference(lookup: Lookup, sizes: Sizes, dtype: torch.dtype) -> None:
    """Errors of `lookup` in `dtype` are at most twice those of the reference in `dtype`."""
    exact = results(lookup_reduce_reference, inputs(sizes))
    plain = results(lookup_reduce_reference, inputs(sizes, dtype))
    ours = results(lookup, inputs(sizes, dtype))
    for name, got, torchs, true in zip(NAMES, ours, plain, exact, strict=True):
        floor = torch.finfo(dtype).eps / 8
        assert_rounds_no_worse(got, torchs, true, floor, f"{name} in {dtype}")
