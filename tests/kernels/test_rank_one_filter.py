"""The filter's update: its worked case, and the kernel against the reference in float64."""

import os

import pytest
import torch

from tests.closeness import assert_close, rounding
from ultramem_megatron.kernels.rank_one_filter import update_filter, update_filter_reference

TRITON = ["triton"] if os.environ.get("TRITON_INTERPRET") else []
_TERMS = 90  # see test_small_svd.py


@pytest.fixture(params=["reference", *TRITON])
def forced(request, monkeypatch):
    """Each implementation in turn."""
    monkeypatch.setenv("ULTRAMEM_KERNELS", request.param)
    return request.param


def test_worked_case(forced):
    cores = torch.tensor([[0.0, 2.0], [1.0, 0.0]]).view(1, 1, 2, 2)
    u, t = torch.tensor([[-1.0, 0.0]]), torch.tensor([[0.0, -1.0]])
    values = update_filter(cores, u, t)
    assert u.tolist() == [[-1, 0]]
    assert t.tolist() == [[0, -1]]
    assert values.tolist() == [[2, 1]]


@pytest.mark.parametrize(("cores", "heads", "rank"), [(2, 2, 2), (1, 3, 1), (2, 1, 5)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_equals_the_reference_whichever_sign_was_kept(forced, cores, heads, rank, dtype):
    generator = torch.Generator().manual_seed(5)
    given = torch.randn(cores, heads, rank, rank, generator=generator).to(dtype)
    precise = torch.promote_types(dtype, torch.float32)
    wanted_u, wanted_t = torch.zeros(2, heads, rank, dtype=torch.float64)
    wanted = update_filter_reference(given.double(), wanted_u, wanted_t)
    gaps = wanted[:, 0] / (wanted[:, 0] - wanted[:, 1]) if rank > 1 else torch.ones(1)
    tolerance = rounding(precise, _TERMS, condition=gaps.max().item())
    for sign in (1, -1):
        u, t = (sign * wanted_u + 0.01).to(precise), (sign * wanted_t - 0.01).to(precise)
        assert_close(update_filter(given, u, t).double(), wanted, tolerance)
        assert_close(u.double(), sign * wanted_u, tolerance)
        assert_close(t.double(), sign * wanted_t, tolerance)
        before = u.clone(), t.clone()
        update_filter(given, u, t)
        assert torch.equal(u, before[0])
        assert torch.equal(t, before[1])
