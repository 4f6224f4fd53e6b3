"""Centring: its worked cases, the kernels against the reference, alone and in a convolution."""

import os

import pytest
import torch

from tests.closeness import assert_close, rounding
from ultramem_megatron.kernels.causal_convolution import (
    causal_convolution,
    causal_convolution_reference,
    causal_convolution_step,
)
from ultramem_megatron.kernels.query_centring import Centring, centred_reference, update_mean

TRITON = ["triton"] if os.environ.get("TRITON_INTERPRET") else []


@pytest.fixture(params=["reference", *TRITON])
def forced(request, monkeypatch):
    """Each implementation in turn."""
    monkeypatch.setenv("ULTRAMEM_KERNELS", request.param)
    return request.param


def test_worked_cases(forced):
    x, sums = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.zeros(3)
    assert centred_reference(x, Centring(torch.ones(2), sums)).tolist() == [[0, 1], [2, 3]]
    assert sums.tolist() == [4, 6, 2]
    mean, updates = torch.ones(1), torch.ones(1)
    update_mean(mean, updates, sums[1:].clone(), 0.9)
    assert mean.tolist() == [2]
    assert updates.tolist() == [2]


@pytest.mark.parametrize("channels", [3, 1500])
@pytest.mark.parametrize("broken", [None, "nothing", "nan", "inf"])
def test_the_mean_moves_by_sums_that_are_sound(forced, channels, broken):
    generator = torch.Generator().manual_seed(2)
    mean, total = torch.randn(2, channels, generator=generator, dtype=torch.float64)
    sums = torch.cat([7 * total, torch.full((1,), 7.0)])
    if broken:
        sums = 0 * sums if broken == "nothing" else sums
        sums[channels // 2] += 0 if broken == "nothing" else float(broken)
    for before in (0, 4, 30):
        moved, updates, own = mean.clone(), torch.full((1,), before).double(), sums.clone()
        update_mean(moved, updates, own, 0.9)
        assert not own.any()
        if broken:
            assert torch.equal(moved, mean)
            assert updates.item() == before
        else:
            wanted = mean + max(1 / (before + 1), 0.1) * (total - mean)
            assert_close(moved, wanted, rounding(torch.float64, 4))
            assert updates.item() == before + 1


@pytest.mark.parametrize("sizes", [(9, 2, 3, 4, 1), (12, 3, 300, 2, 2), (0, 2, 3, 2, 1)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_convolution_centres_and_sums_in_passing(forced, sizes, dtype, nan_filled_empty):
    """In bfloat16 it is rounded once, and its sums not at all."""
    positions, sequences, channels, taps, pieces = sizes
    generator = torch.Generator().manual_seed(3)

    def draw(*shape):
        return torch.randn(shape, generator=generator).bfloat16().double()

    x, weight = draw(positions, sequences, channels), draw(channels, taps)
    history = draw(pieces, taps - 1, sequences, channels)
    precise = torch.promote_types(dtype, torch.float32)
    mean, before = draw(channels), draw(channels + 1)
    exact = causal_convolution_reference(x, weight, history)
    wanted = before.clone()
    wanted[:-1] += exact.flatten(0, 1).sum(0)
    wanted[-1] += positions * sequences

    sums = before.to(precise)
    leaves = [given.to(dtype).requires_grad_() for given in (x, weight, history)]
    out = causal_convolution(*leaves, centring=Centring(mean.to(precise), sums))
    once = 0 if dtype == torch.float64 else torch.finfo(dtype).eps
    often = 2 if forced == "reference" else 1
    exactness = rounding(precise, positions * sequences + taps)
    assert_close(out.double(), exact - mean, often * once + exactness)
    assert_close(sums.double(), wanted, (once if forced == "reference" else 0) + exactness)
    plain = causal_convolution(*leaves)
    grad = draw(*x.shape).to(dtype)
    for mine, other in zip(
        *(torch.autograd.grad(o, leaves, grad) for o in (out, plain)), strict=True
    ):
        assert torch.equal(mine, other)

    one = sums.clone()
    with torch.no_grad():
        kept = history[0].to(dtype).clone()
        steps = torch.zeros(1, sequences, channels, dtype=dtype)
        step = causal_convolution_step(steps, leaves[1], kept, Centring(mean.to(precise), one))
    last = torch.cat([history[0], 0 * draw(1, sequences, channels)])
    wanted = (last * weight.t()[:, None]).sum(0, keepdim=True) - mean
    assert_close(step.double(), wanted, often * once + rounding(precise, taps + 1))
    assert torch.equal(one, sums)
