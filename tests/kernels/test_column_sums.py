"""Sums over parts: of few and many, in few and many columns."""

import os

import pytest
import torch

from tests.closeness import assert_close, rounding


@pytest.mark.skipif(
    not os.environ.get("TRITON_INTERPRET"),
    reason="there is no other implementation: test_triton_kernels.py runs it in the interpreter",
)
@pytest.mark.parametrize(
    ("count", "width", "rows"), [(1, 1, 1), (3, 90, 2), (129, 64, 4), (9000, 3, 3), (2100, 16, 1)]
)
def test_sums_of_triton_are_those_in_float64(count, width, rows, nan_filled_empty):
    from ultramem_megatron.kernels.column_sums import column_sums

    generator = torch.Generator().manual_seed(count)
    parts = torch.randn(count, width, generator=generator)
    wanted = parts.double().sum(0).view(rows, -1).t()
    found = column_sums(parts, torch.float32, rows)
    assert_close(found.double(), wanted, rounding(torch.float32, count))
    assert torch.equal(found, column_sums(parts, torch.float32, rows))
