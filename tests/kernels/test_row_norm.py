"""Norms: worked cases, every implementation against float64, and keys in the products' order."""

import os

import pytest
import torch

from tests.closeness import assert_close, rounding
from ultramem_megatron.kernels.row_norm import (
    normed_keys,
    normed_keys_reference,
    row_norm,
    row_norm_reference,
)

TRITON = ["triton"] if os.environ.get("TRITON_INTERPRET") else []


@pytest.fixture(params=["reference", *TRITON])
def forced(request, monkeypatch):
    """Each implementation in turn."""
    monkeypatch.setenv("ULTRAMEM_KERNELS", request.param)
    return request.param


def _drawn(*shape):
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64) + 0.5


def _compared(ours, plain, x, gain, dtype, terms):
    """Output and gradients, of numbers that `dtype` holds."""
    x, gain = x.to(dtype), gain.to(dtype)
    grad = _drawn(*plain(x, gain).shape).to(dtype)
    results = []
    for function, kind in ((ours, dtype), (plain, torch.float64)):
        leaves = [leaf.to(kind).requires_grad_() for leaf in (x, gain)]
        out = function(*leaves)
        results.append((out.detach(), *torch.autograd.grad(out, leaves, grad.to(kind))))
    tolerance = rounding(torch.promote_types(dtype, torch.float32), terms, condition=4)
    for found, wanted in zip(*results, strict=True):
        assert found.dtype == dtype
        once = torch.finfo(dtype).eps if dtype == torch.bfloat16 else 0
        assert_close(found.double(), wanted, once + tolerance)


def test_worked_case(forced):
    x, ones = torch.tensor([[1.0, 3.0]]), torch.ones(2)
    assert row_norm(x, ones, 0.0, True).tolist() == [[-1, 1]]
    assert_close(row_norm(x, ones, 0.0, False), x / 5**0.5, rounding(torch.float32, 4))


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("shape", [(3, 2, 5), (40, 1, 100), (0, 2, 3), (1, 1, 600)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_output_and_gradients_are_those_in_float64(forced, centred, shape, dtype, nan_filled_empty):
    def ours(x, gain):
        return row_norm(x, gain, 1e-5, centred)

    def plain(x, gain):
        return row_norm_reference(x, gain, 1e-5, centred)

    _compared(ours, plain, _drawn(*shape), _drawn(shape[-1]), dtype, shape[-1] + shape[0])


def test_the_gain_may_be_a_strided_view(forced):
    x, gain = _drawn(3, 6).float(), _drawn(12).float()[::2]
    assert torch.equal(row_norm(x, gain, 1e-5, True), row_norm(x, gain.clone(), 1e-5, True))


@pytest.mark.parametrize(("together", "eps"), [(True, 1e-5), (False, 1e-5), (True, 0.0)])
@pytest.mark.parametrize(
    ("heads", "keys", "ranks", "width", "queries"),
    [(1, 70, 2, 4, 1), (2, 20, 2, 3, 2), (1, 64, 3, 8, 1), (1, 9, 1, 5, 1)],
)
def test_keys_come_in_the_order_of_their_products(
    forced, together, eps, heads, keys, ranks, width, queries, nan_filled_empty
):
    """Ranks are normed together or each alone; behind the keys there are zeros."""
    x = _drawn(heads, 2, keys, ranks, width)
    gain = _drawn(ranks * width if together else width)

    def ours(x, gain):
        normed = normed_keys(x, gain, eps, True, queries)
        if forced == "triton":
            normed = normed.permute(0, 3, 1, 4, 2, 5).flatten(0, 1)[:, :, :keys]
        return normed

    def plain(x, gain):
        return normed_keys_reference(x, gain, eps, True, queries)

    _compared(ours, plain, x, gain, torch.float32, 2 * heads * keys + len(gain))
    if forced == "triton":
        whole = normed_keys(x.float(), gain.float(), eps, True, queries)
        assert whole.is_contiguous()
        assert whole.shape[4] % 64 == 0
        assert not whole[:, :, :, :, keys:].any()
