"""Lookup-reduce: its worked case, and PyTorch's kernels against the plain way."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.closeness import assert_close, rounding
from tests.kernels.compiler import NATIVE
from tests.kernels.lookup_cases import (
    ODD_SIZES,
    Sizes,
    assert_equals_reference,
    assert_rounds_like_reference,
    exact_rounding,
    inputs,
    lazy_zeros,
    results,
)
from ultramem_megatron.kernels.lookup_reduce import (
    lookup_reduce,
    lookup_reduce_reference,
    torch_path,
)


@pytest.fixture(autouse=True, params=["torch", NATIVE])
def forced(request, monkeypatch):
    monkeypatch.setenv("ULTRAMEM_KERNELS", request.param)


@pytest.mark.parametrize("read", [lookup_reduce, lookup_reduce_reference])
def test_worked_case(read):
    out = read(
        torch.tensor([[1.0, 1.0], [10.0, 10.0]]),
        torch.tensor([[0, 1]]),
        torch.tensor([[1, 1]]),
        torch.tensor([[[2.0, 0.0], [3.0, 1.0]]]),
        2,
    )
    assert out.tolist() == [[[0, 0], [32, 10]]]


@pytest.mark.parametrize("sizes", ODD_SIZES, ids=str)
@pytest.mark.usefixtures("nan_filled_empty")
def test_output_and_gradients_equal_the_reference(sizes):
    assert_equals_reference(lookup_reduce, sizes)


@settings(max_examples=40, deadline=None)
@given(
    st.builds(
        Sizes,
        tokens=st.integers(0, 9),
        picks=st.integers(1, 20),
        cores=st.integers(1, 5),
        width=st.integers(1, 19),
        groups=st.integers(1, 9),
        rows=st.integers(1, 50),
    )
)
def test_any_sizes(sizes):
    assert_equals_reference(lookup_reduce, sizes)


def test_gradients_in_many_pieces_are_the_same(monkeypatch):
    from ultramem_megatron.kernels.lookup_reduce import torch_path

    monkeypatch.setattr(torch_path, "_CHUNK_BYTES", 3 * 8 * 6)  # three rows of 6 doubles
    assert_equals_reference(lookup_reduce, Sizes(20, 9, 2, 3, 4, rows=17))


@pytest.mark.parametrize("read", [lookup_reduce, lookup_reduce_reference])
def test_gradcheck(read):
    case = inputs(Sizes(3, 4, 2, 2, 4))
    torch.autograd.gradcheck(
        lambda t, s: read(t, case.rows, case.groups, s, case.num_groups), (case.table, case.scores)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rounding_is_no_worse_than_the_references(dtype):
    assert_rounds_like_reference(lookup_reduce, Sizes(32, 40, 2, 8, 4), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_picks_of_more_rows_than_one_digit_of_their_sort(dtype):
    assert_rounds_like_reference(lookup_reduce, Sizes(300, 16, 1, 4, 3, rows=5000), dtype)


def test_backward_is_deterministic():
    case = inputs(Sizes(64, 40, 2, 8, 4, rows=5), torch.float32)
    first, second = results(lookup_reduce, case), results(lookup_reduce, case)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_only_what_is_asked_for():
    sizes = Sizes(3, 4, 2, 2, 4)
    case = inputs(sizes)
    fixed = case.table.detach()
    out = lookup_reduce(fixed, case.rows, case.groups, case.scores, case.num_groups)
    out.backward(case.grad)
    assert fixed.grad is None
    assert_close(case.scores.grad, results(lookup_reduce_reference, case)[2], exact_rounding(sizes))


def test_addresses_beyond_2_to_31_bytes():
    rows, width = 2**21 + 3, 520  # 2.2e9 bytes
    table = lazy_zeros(rows, width, torch.float16)
    table[-1], table[-2] = 2, 3
    table.requires_grad_().main_grad = lazy_zeros(rows, width, torch.float32)
    scores = torch.tensor([[[1.0, 10.0], [1.0, 1.0]]], requires_grad=True)
    picks, groups = torch.tensor([[rows - 1, rows - 2]]), torch.tensor([[0, 0]])
    out = lookup_reduce(table, picks, groups, scores, 1)
    assert out[0, 0, 0] == 5
    assert out[0, 0, -1] == 23
    out.sum().backward()
    assert table.main_grad[-1].tolist() == [1] * 260 + [10] * 260
    assert scores.grad.tolist() == [[[520, 520], [780, 780]]]


@pytest.mark.parametrize("sizes", ODD_SIZES, ids=str)
def test_gathered_rows_give_the_same_score_gradients(sizes):
    """What a GPU does in bfloat16; the arithmetic is float32's."""
    case = inputs(sizes)
    _, _, expected = results(lookup_reduce_reference, case)
    with torch.no_grad():
        found = torch_path._dots_of_gathered(case.grad, *case[:4])
    assert_close(found, expected, rounding(torch.float32, sizes.width))
