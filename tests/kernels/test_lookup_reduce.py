"""Lookup-reduce: its worked case, and the fast way against the plain one."""

import pytest
import torch

from tests.closeness import assert_close, relative_error
from ultramem_megatron.kernels.lookup_reduce import lookup_reduce, lookup_reduce_reference


def _case(tokens, picks, cores, width, groups, rows=13, dtype=torch.float64):
    generator = torch.Generator().manual_seed(3)
    table = torch.randn(rows, width * cores, generator=generator, dtype=torch.float64).to(dtype)
    index = torch.randint(rows, (tokens, picks), generator=generator)
    group = torch.randint(groups, (tokens, picks), generator=generator)
    scores = torch.randn(tokens, picks, cores, generator=generator, dtype=torch.float64)
    return table.requires_grad_(), index, group, scores.requires_grad_(), groups


@pytest.mark.parametrize("read", [lookup_reduce, lookup_reduce_reference])
def test_worked_case(read):
    out = read(
        torch.tensor([[1.0, 1.0], [10.0, 10.0]]), torch.tensor([[0, 1]]), torch.tensor([[1, 1]]),
        torch.tensor([[[2.0, 0.0], [3.0, 1.0]]]), 2,
    )  # fmt: skip
    assert out.tolist() == [[[0, 0], [32, 10]]]


@pytest.mark.parametrize(
    "sizes",
    [(5, 7, 2, 3, 4), (1, 1, 1, 1, 1), (0, 3, 2, 2, 4), (4, 63, 3, 5, 9), (6, 8, 4, 2, 1)],
)
def test_output_and_gradients_equal_the_reference(sizes):
    fast, plain = _case(*sizes), _case(*sizes)
    out, expected = lookup_reduce(*fast), lookup_reduce_reference(*plain)
    assert_close(out, expected, 1e-13)
    grad = torch.randn_like(expected)
    out.backward(grad)
    expected.backward(grad)
    assert_close(fast[0].grad, plain[0].grad, 1e-13, "table gradient")
    assert_close(fast[3].grad, plain[3].grad, 1e-13, "score gradient")


def test_gradcheck():
    table, rows, groups, scores, count = _case(3, 4, 2, 2, 4)
    for read in (lookup_reduce, lookup_reduce_reference):
        torch.autograd.gradcheck(
            lambda t, s, read=read: read(t, rows, groups, s, count), (table, scores)
        )


def test_repeated_rows_add_up():
    table, _, groups, scores, count = _case(4, 6, 1, 3, 1)
    rows = torch.full((4, 6), 2)
    out = lookup_reduce(table, rows, groups, scores, count)
    assert_close(out[:, 0], scores.sum(1) * table[2], 1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rounding_is_no_worse_than_the_references(dtype):
    exact = lookup_reduce_reference(*_case(32, 40, 2, 8, 4))
    case = _case(32, 40, 2, 8, 4, dtype=dtype)
    plain = relative_error(lookup_reduce_reference(*case), exact)
    assert relative_error(lookup_reduce(*case), exact) <= 2 * plain + 1e-7
