"""The lookup behind pre-values: its example, every gradient, main_grad, threads, shapes alone."""

import pytest
import torch

from tests.closeness import assert_close, rounding
from tests.kernels.compiler import NATIVE, needs_compiler
from tests.kernels.prevalued_cases import (
    SIZES,
    Sizes,
    assert_equals_reference,
    inputs,
    results,
    terms,
)
from ultramem_megatron.kernels.lookup_prevalued import lookup_prevalued, lookup_prevalued_reference
from ultramem_megatron.kernels.lookup_prevalued.activations import IN_KERNELS


@pytest.fixture(autouse=True, params=["torch", NATIVE])
def forced(request, monkeypatch):
    monkeypatch.setenv("ULTRAMEM_KERNELS", request.param)


@pytest.mark.parametrize("op", [lookup_prevalued, lookup_prevalued_reference])
def test_the_example(op):
    table, pre_table = torch.tensor([[1.0, 1], [10, 10]]), torch.tensor([[1.0], [2]])
    scores, x = torch.tensor([[[2.0, 0], [3, 1]]]), torch.tensor([[5.0]])
    rows, groups = torch.tensor([[0, 1]]), torch.tensor([[0, 0]])
    assert op(table, pre_table, rows, groups, scores, x, 1).tolist() == [[[310, 100]]]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.usefixtures("nan_filled_empty")
def test_output_and_gradients_equal_the_reference(sizes, dtype):
    assert_equals_reference(sizes, dtype, "none")


@pytest.mark.parametrize("act", [*IN_KERNELS, "tanh"])
def test_activations_equal_the_reference(act):
    assert_equals_reference(Sizes(5, 7, 2, 3, 5, 4), torch.float32, act)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_micro_batches_add_up_in_main_grad(dtype):
    sizes = Sizes(9, 7, 2, 3, 6, 4)
    exact = results(lookup_prevalued_reference, inputs(sizes))
    case = inputs(sizes, torch.float32)
    for table in case[:2]:
        table.main_grad = torch.zeros_like(table, dtype=dtype)
    for _ in range(2):
        lookup_prevalued(*case[:7]).backward(case.grad)
        for table in case[:2]:
            assert table.grad_added_to_main_grad
            assert table.grad._nnz() == 0
            table.grad = None
    for table, once in zip(case[:2], exact[1:3], strict=True):
        assert_close(table.main_grad.double(), 2 * once, rounding(dtype, terms(sizes)))


def test_sparse_gradients_of_both_tables():
    sizes = SIZES[0]
    case, expected = inputs(sizes), results(lookup_prevalued_reference, inputs(sizes))
    for table in case[:2]:
        table.ultramem_sparse_gradient = True
    lookup_prevalued(*case[:7]).backward(case.grad)
    for table, wanted in zip(case[:2], expected[1:3], strict=True):
        assert table.grad.is_sparse
        assert_close(table.grad.to_dense(), wanted, rounding(torch.float64, terms(sizes)))


def test_tables_that_do_not_train_get_nothing():
    case = inputs(SIZES[0])
    frozen = [table.detach() for table in case[:2]]
    lookup_prevalued(*frozen, *case[2:7]).backward(case.grad)
    expected = results(lookup_prevalued_reference, case)
    for found, wanted in zip((case.scores.grad, case.x.grad), expected[3:], strict=True):
        assert_close(found, wanted, rounding(torch.float64, terms(SIZES[0])))
    assert all(table.grad is None for table in frozen)


@needs_compiler
@pytest.mark.parametrize("threads", [2, 3])
def test_threads_change_no_bit(threads, monkeypatch):
    monkeypatch.setenv("ULTRAMEM_KERNELS", "native")
    case = inputs(Sizes(40, 30, 2, 9, 13, 2, rows=7), torch.float32)
    alone, before = results(lookup_prevalued, case, "gelu"), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert all(map(torch.equal, alone, results(lookup_prevalued, case, "gelu")))
    finally:
        torch.set_num_threads(before)


@needs_compiler
@pytest.mark.parametrize("where", ["rows", "groups"])
@pytest.mark.parametrize("index", [-1, 13, 2**40])
def test_an_index_that_is_not_there_is_no_address(where, index, monkeypatch):
    monkeypatch.setenv("ULTRAMEM_KERNELS", "native")
    case = inputs(Sizes(4, 3, 2, 5, 6, 13), torch.float32)
    getattr(case, where)[1, 2] = index
    with pytest.raises(IndexError, match=f" {index} of 13"):
        lookup_prevalued(*case[:7])


def test_on_the_meta_device_only_shapes_are_known():
    case = inputs(Sizes(5, 7, 2, 3, 5, 4), torch.bfloat16)
    on_meta = [t.detach().to("meta").requires_grad_(t.is_floating_point()) for t in case[:6]]
    out = lookup_prevalued(*on_meta, 4)
    assert (out.shape, out.dtype, out.requires_grad) == ((5, 4, 6), torch.bfloat16, True)
