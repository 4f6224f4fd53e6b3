"""Lookup-dot: its example, its reference in float64, main_grad, shapes alone."""

import pytest
import torch

from tests.closeness import assert_close, rounding
from tests.kernels.dot_cases import SIZES, assert_equals_reference, inputs
from ultramem_megatron.kernels.lookup_dot import lookup_dot, lookup_dot_reference


@pytest.mark.parametrize("op", [lookup_dot, lookup_dot_reference])
def test_the_example(op):
    table, rows = torch.tensor([[1.0, 2], [10, 20]]), torch.tensor([[1, 0, 1]])
    assert op(table, rows, torch.tensor([[3.0, 1]])).tolist() == [[50, 5, 50]]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_equals_the_reference(sizes, dtype):
    assert_equals_reference(sizes, dtype)


def test_micro_batches_add_up_in_main_grad():
    table, rows, x, grad = inputs(SIZES[0], torch.float32)
    expected = lookup_dot_reference(table, rows, x)
    (once,) = torch.autograd.grad(expected, table, grad)
    table.main_grad = torch.zeros_like(table)
    for _ in range(2):
        lookup_dot(table, rows, x).backward(grad)
        assert table.grad._nnz() == 0
        table.grad = None
    assert table.grad_added_to_main_grad
    assert_close(table.main_grad, 2 * once, rounding(torch.float32, 40))


def test_on_the_meta_device_only_shapes_are_known():
    table, rows, x, _ = (t.detach().to("meta") for t in inputs(SIZES[0], torch.bfloat16))
    out = lookup_dot(table.requires_grad_(), rows, x)
    assert (out.shape, out.dtype, out.requires_grad) == ((5, 7), torch.float32, True)
