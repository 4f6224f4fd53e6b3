"""Small SVD: torch.linalg's in float64, wherever it runs; equal, zero and broken matrices."""

import os

import pytest
import torch

from tests.closeness import assert_close, rounding
from ultramem_megatron.kernels.small_svd import decomposes, singular_values

TRITON = ["triton"] if os.environ.get("TRITON_INTERPRET") else []
_TERMS = 90
"""The turns that bring a matrix of a few rows to its singular values, times its rows."""


@pytest.fixture(params=["torch", *TRITON])
def forced(request, monkeypatch):
    """Each implementation in turn."""
    monkeypatch.setenv("ULTRAMEM_KERNELS", request.param)
    return request.param


def _decomposed(given):
    """U, S, Vh by Triton where it is forced."""
    if not decomposes(given):
        return torch.linalg.svd(given)
    from ultramem_megatron.kernels.small_svd.triton_kernel import decompose

    return decompose(given)


def _matrices(size, count=3, dtype=torch.float64):
    generator = torch.Generator().manual_seed(size)
    return torch.randn(count, size, size, generator=generator, dtype=dtype)


@pytest.mark.parametrize(
    ("size", "dtype"),
    [*((size, torch.float64) for size in (1, 2, 3, 4)), (4, torch.float32), (7, torch.float32)],
)
def test_its_parts_make_the_matrix_and_are_orthogonal(forced, size, dtype):
    given = _matrices(size, dtype=dtype)
    left, values, right = _decomposed(given)
    tolerance = rounding(dtype, _TERMS)
    assert_close((left * values.unsqueeze(-2)) @ right, given, tolerance)
    one = torch.eye(size, dtype=dtype).expand_as(given)
    assert_close(left.mT @ left, one, tolerance)
    assert_close(right @ right.mT, one, tolerance)
    assert_close(values, torch.linalg.svdvals(given), tolerance)
    assert (values.diff(dim=-1) <= 0).all()


@pytest.mark.parametrize("size", [2, 3])
def test_gradients_of_singular_values(forced, size):
    given = _matrices(size).requires_grad_()
    weights = torch.arange(1.0, size + 1, dtype=torch.float64)
    (found,) = torch.autograd.grad((singular_values(given) * weights).sum(), given)
    (wanted,) = torch.autograd.grad((torch.linalg.svdvals(given) * weights).sum(), given)
    assert_close(found, wanted, rounding(torch.float64, _TERMS, condition=100))


def test_special_matrices(forced):
    one = torch.eye(2, dtype=torch.float64)
    given = torch.stack([one, 0 * one, torch.ones_like(one), one.flip(0) * -3])
    left, values, right = _decomposed(given)
    assert_close((left * values.unsqueeze(-2)) @ right, given, rounding(torch.float64, _TERMS))
    wanted = torch.tensor([[1, 1], [0, 0], [2, 0], [3, 3]], dtype=torch.float64)
    assert_close(values, wanted, rounding(torch.float64, _TERMS))
    assert torch.isfinite(left).all()


@pytest.mark.skipif(not TRITON, reason="of the Triton kernel; torch.linalg raises instead")
def test_what_is_not_a_number_stays_so_in_triton(monkeypatch):
    monkeypatch.setenv("ULTRAMEM_KERNELS", "triton")
    _, values, _ = _decomposed(torch.full((1, 2, 2), float("nan")))
    assert values.isnan().all()
