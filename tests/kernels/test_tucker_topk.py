"""Tucker grid top-m: its worked case, every implementation against float64, ties, memory.

Letters as in kernels/tucker_topk/reference.py.
"""

import os

import pytest
import torch

from tests.closeness import assert_close, assert_rounds_no_worse, rounding
from tests.kernels.compiler import NATIVE
from ultramem_megatron.kernels.grid_shuffle import grid_shuffle_reference
from ultramem_megatron.kernels.tucker_topk import tucker_topk, tucker_topk_reference
from ultramem_megatron.kernels.tucker_topk.eager import tucker_topk_eager

# tokens, heads, ranks, cores, m
SIZES = [
    (5, 2, 2, 2, 7),
    (2, 1, 2, 2, 128),
    (1, 1, 1, 1, 1),
    (0, 2, 2, 2, 4),
    (3, 3, 3, 1, 13),
    (2, 1, 4, 3, 33),
]
KEYS_PER_SIDE = 1000


TRITON = ["triton"] if os.environ.get("TRITON_INTERPRET") else []


@pytest.fixture(params=["reference", "torch", NATIVE, *TRITON])
def forced(request, monkeypatch):
    """Each implementation in turn."""
    monkeypatch.setenv("ULTRAMEM_KERNELS", request.param)
    return request.param


def _case(sizes, dtype=torch.float64, integers=False, core_dtype=None):
    tokens, heads, ranks, cores, topk = sizes
    generator = torch.Generator().manual_seed(3)

    def draw(*shape):
        drawn = torch.randn(shape, generator=generator, dtype=torch.float64)
        return drawn.round().clamp(-2, 2) if integers else drawn

    scores, core = draw(tokens, heads, 2, ranks, topk), draw(cores, heads, ranks, ranks)
    keys = torch.rand(tokens, heads, 2, KEYS_PER_SIDE, generator=generator).argsort(-1)
    inputs = scores.to(dtype).requires_grad_(), core.to(core_dtype or dtype).requires_grad_()
    return inputs[0], keys[..., :topk].sort(-1).values, inputs[1], KEYS_PER_SIDE


def _run(function, case):
    """Addresses, scores and the gradients of side scores and cores for some gradient."""
    addresses, scores = function(*case)
    generator = torch.Generator().manual_seed(4)
    grad = torch.randn(scores.shape, generator=generator, dtype=torch.float64)
    inputs = (case[0], case[2])
    return addresses, scores, *torch.autograd.grad(scores, inputs, grad.to(scores.dtype))


def test_worked_case(forced):
    scores = torch.tensor([[1.0, 2.0], [3.0, 5.0]]).view(1, 1, 2, 1, 2)
    keys = torch.tensor([[0, 4], [1, 2]]).view(1, 1, 2, 2)
    addresses, best = tucker_topk(scores, keys, torch.ones(1, 1, 1, 1), 5)
    assert addresses.flatten().tolist() == [22, 21]
    assert best.flatten().tolist() == [10, 6]


@pytest.mark.parametrize("sizes", SIZES)
def test_small_integers_with_many_ties_give_the_same_addresses(forced, sizes, nan_filled_empty):
    found = _run(tucker_topk, _case(sizes, torch.float32, integers=True))
    wanted = _run(tucker_topk_reference, _case(sizes, integers=True))
    assert torch.equal(found[0], wanted[0])
    assert torch.equal(found[1].double(), wanted[1])


@pytest.mark.parametrize("sizes", [SIZES[0], *SIZES[3:5]])
def test_addresses_may_be_shuffled(forced, sizes):
    scores, keys, cores, side = _case(sizes, torch.float32)
    tables = torch.randint(side, (4, side), generator=torch.Generator().manual_seed(5)).int()
    plain, best = tucker_topk(scores, keys, cores, side)
    addresses, same = tucker_topk(scores, keys, cores, side, shuffle=tables)
    assert torch.equal(addresses, grid_shuffle_reference(plain, tables))
    assert torch.equal(same, best)


def test_all_equal_gives_the_first_positions(forced):
    scores, keys, cores, side = _case((2, 1, 2, 2, 6), torch.float32)
    addresses, _ = tucker_topk(torch.ones_like(scores), keys, torch.ones_like(cores), side)
    assert torch.equal(addresses, keys[:, :, 0, :1] * side + keys[:, :, 1])


def test_infinities_and_nan(forced):
    """NaN comes first, minus infinity last."""
    _, keys, _, side = _case((1, 1, 1, 1, 3), torch.float32)
    core = torch.ones(1, 1, 1, 1)
    inf, nan = float("inf"), float("nan")
    pairs = torch.tensor([[-inf, 1.0, nan], [1.0, 2.0, 3.0]]).view(1, 1, 2, 1, 3)
    addresses, best = tucker_topk(pairs, keys, core, side)
    assert torch.equal(addresses, keys[:, :, 0, 2:] * side + keys[:, :, 1])
    assert best.isnan().all()
    pairs[0, 0, 0, 0, 2] = -inf
    assert tucker_topk(pairs, keys, core, side)[1].flatten().tolist() == [3, 2, 1]


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_error_is_within_twice_that_of_plain_torch(forced, sizes, dtype, nan_filled_empty):
    exact = _run(tucker_topk_reference, _case(sizes))
    plain = _run(tucker_topk_reference, _case(sizes, dtype))
    found = _run(tucker_topk, _case(sizes, dtype))
    assert torch.equal(found[0], exact[0])
    if sizes[0] == 0:
        assert [out.shape for out in found] == [out.shape for out in exact]
        return
    floor = rounding(dtype, 4)  # the 2 x 2 ranks of the paper
    for name, out, rounded, truth in zip(
        ("scores", "sides", "cores"), found[1:], plain[1:], exact[1:], strict=True
    ):
        assert_rounds_no_worse(out, rounded, truth, floor, name)


def test_cores_may_be_of_half_precision(forced):
    sizes = (4, 2, 2, 2, 9)
    case = _case(sizes, torch.float32, core_dtype=torch.bfloat16)
    exact = [case[n].detach().double().requires_grad_() for n in (0, 2)]
    found = _run(tucker_topk, case)
    wanted = _run(tucker_topk_reference, (exact[0], case[1], exact[1], case[3]))
    assert found[3].dtype == torch.bfloat16
    in_float32 = rounding(torch.float32, 8)  # 2 x 2 ranks, 2 cores
    assert_close(found[1].double(), wanted[1], in_float32)
    assert_close(found[2].double(), wanted[2], in_float32)
    once = torch.finfo(torch.bfloat16).eps / 2
    assert_close(found[3].double(), wanted[3], once + in_float32)


@pytest.mark.parametrize("function", [tucker_topk_reference, tucker_topk_eager])
def test_gradcheck(function):
    scores, keys, cores, side = _case((2, 2, 2, 2, 3))
    assert torch.autograd.gradcheck(lambda s, c: function(s, keys, c, side)[1], (scores, cores))


def test_no_tensor_of_all_grids_is_held(monkeypatch):
    monkeypatch.setenv("ULTRAMEM_KERNELS", "torch")
    case = _case((300, 2, 2, 2, 64), torch.float32)
    with torch.profiler.profile(profile_memory=True) as profile:
        _run(tucker_topk, case)
    largest = max(event.cpu_memory_usage for event in profile.events())
    assert 0 < largest < 300 * 2 * 64 * 64 * 4 / 4  # bytes


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("topk", "best"), [(4, 1), (4, 3), (4, 11), (4, 16), (17, 100)])
def test_more_or_fewer_pairs_than_keys_of_a_side(topk, best, dtype, forced, nan_filled_empty):
    generator = torch.Generator().manual_seed(1)
    scores = torch.randn(3, 2, 2, 3, topk, generator=generator, dtype=dtype)
    keys = torch.randint(9, (3, 2, 2, topk), generator=generator).sort(-1).values
    cores = torch.randn(2, 2, 3, 3, generator=generator, dtype=dtype).requires_grad_()
    scores.requires_grad_()
    found, expected = (
        op(scores, keys, cores, 9, best) for op in (tucker_topk, tucker_topk_reference)
    )
    assert torch.equal(found[0], expected[0])
    assert found[0].shape == (3, 2, best)
    weights = torch.randn(3, 2, best, 2, generator=generator, dtype=dtype)
    gradients = [
        torch.autograd.grad((out[1] * weights).sum(), (scores, cores)) for out in (found, expected)
    ]
    tolerance = rounding(dtype, 18 + best)  # 3 x 3 ranks of 2 cores, and the pairs
    for ours, theirs in zip((found[1], *gradients[0]), (expected[1], *gradients[1]), strict=True):
        assert_close(ours, theirs, tolerance)
