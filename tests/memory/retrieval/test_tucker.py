"""The cores' rank-1 filter, its sign, the penalty, and the retrieval built on them."""

import pytest
import torch

from tests.closeness import assert_close, rounding
from tests.layers import small_config
from ultramem_megatron.memory.retrieval.product_key import ProductKeyRetrieval
from ultramem_megatron.memory.retrieval.tdqkr import TuckerRetrieval
from ultramem_megatron.memory.retrieval.tucker_core import TuckerCores, singular_value_penalty


def _cores(rank=3, heads=2, cores=2, seed=0):
    module = TuckerCores(small_config(tucker_rank=rank, heads=heads, cores=cores)).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        module.weight.copy_(torch.randn(module.weight.shape, generator=generator))
    return module


# The rotations that bring a 3 x 3 matrix to its singular values: some ten, of 3 x 3 products.
_SVD_TERMS = 90


def test_filter_is_the_leading_singular_pair_of_the_sum():
    cores = _cores()
    cores(update_filter=True)
    total = cores.weight.sum(0)
    leading = torch.linalg.svdvals(total)[:, 0]
    tolerance = rounding(torch.float64, _SVD_TERMS)
    row, column = leading[:, None] * cores.u, leading[:, None] * cores.t
    assert_close(torch.einsum("hr,hrs->hs", cores.u, total), column, tolerance)
    assert_close(torch.einsum("hrs,hs->hr", total, cores.t), row, tolerance)


def test_sign_is_that_of_the_decomposition_where_the_stored_pair_decides_nothing():
    """As at the very first update: the other sign would shortlist the other quadrant."""
    cores = _cores()
    left, _, right = torch.linalg.svd(cores.total())
    assert not cores.u.any()
    cores(update_filter=True)
    assert torch.equal(cores.u, left[..., :, 0])
    assert torch.equal(cores.t, right[..., 0, :])


def test_repeating_the_update_changes_nothing():
    cores = _cores()
    cores(update_filter=True)
    u, t = cores.u.clone(), cores.t.clone()
    cores(update_filter=True)
    assert torch.equal(cores.u, u)
    assert torch.equal(cores.t, t)


def test_sign_follows_the_stored_pair_and_flips_both():
    cores = _cores()
    cores(update_filter=True)
    u, t = cores.u.clone(), cores.t.clone()
    cores.u.neg_()
    cores.t.neg_()
    with torch.no_grad():
        cores.weight.mul_(1.001)
    cores(update_filter=True)
    values = torch.linalg.svdvals(cores.total())
    gap = (values[:, 0] / (values[:, 0] - values[:, 1])).max().item()  # what vectors depend on
    tolerance = rounding(torch.float64, _SVD_TERMS, condition=gap)
    assert_close(cores.u, -u, tolerance)
    assert_close(cores.t, -t, tolerance)


def test_sign_stays_continuous_while_the_cores_move():
    """Along a path on which the leading vector turns by 180 degrees no step may jump."""
    cores = _cores(rank=2, heads=1, cores=1)
    previous = None
    for step in range(101):
        angle = torch.tensor(torch.pi * step / 100, dtype=torch.float64)
        turned = torch.stack([angle.cos(), angle.sin()])
        with torch.no_grad():
            cores.weight.copy_(torch.outer(turned, torch.tensor([0.6, 0.8])))
        cores(update_filter=True)
        if previous is not None:
            assert (cores.u - previous).norm() < 0.1
        previous = cores.u.clone()


def test_penalty_by_hand():
    values = torch.tensor([[2.0, 0.5, 0.1], [3.0, 0.25, 0.25]])
    # (0.35^2 + 0 + 0.1^2 + 0.1^2) / (2 heads * 2)
    assert singular_value_penalty(values, 0.15).item() == pytest.approx(0.1425 / 4)
    assert singular_value_penalty(values[:, :1], 0.15).item() == 0


def test_penalty_gradient_of_equal_singular_values_is_finite():
    cores = _cores(rank=2, heads=1, cores=1)
    with torch.no_grad():
        cores.weight.copy_(torch.eye(2))
    singular_value_penalty(cores.singular_values(), 0.15).backward()
    assert torch.isfinite(cores.weight.grad).all()
    assert cores.weight.grad.norm() > 0


def _with_random_keys(retrieval):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in retrieval.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return retrieval


def _query(config, tokens=5):
    generator = torch.Generator().manual_seed(2)
    shape = (tokens, config.num_queries, 2, config.key_dim)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def _all_scores(keys, query):
    """Row and column scores (H, R, T, N) of every key."""
    config = keys.config
    directions = torch.ones(2, config.heads, config.tucker_rank, dtype=query.dtype)
    _, scores = keys(query, directions, config.keys_per_side)
    return scores.permute(2, 1, 3, 0, 4)


def test_product_keys_find_the_best_of_the_whole_grid():
    config = small_config(retrieval="pkm", tucker_rank=1, cores=1, num_keys=11)
    retrieval = _with_random_keys(ProductKeyRetrieval(config, 1e-5).double())
    query = _query(config)
    addresses, scores = retrieval(query)
    row, column = _all_scores(retrieval.keys, query)
    grid = row[:, 0, :, :, None] + column[:, 0, :, None, :]
    best = grid.flatten(2).topk(config.topk)
    assert_close(scores.view(5, 2, -1).transpose(0, 1), best.values, rounding(query.dtype, 2))
    assert torch.equal(
        addresses.view(5, 2, -1).transpose(0, 1).sort(-1).values, best.indices.sort(-1).values
    )


def test_tucker_retrieval_is_exact_when_every_key_is_shortlisted():
    config = small_config(num_keys=3, topk=6, tucker_rank=3, cores=2)
    retrieval = _with_random_keys(TuckerRetrieval(config, 1e-5).double())
    retrieval.cores(update_filter=True)
    query = _query(config)
    addresses, scores = retrieval(query)
    row, column = _all_scores(retrieval.keys, query)
    grid = torch.einsum("hati,chab,hbtj->htij", row, retrieval.cores.weight, column)
    best = grid.flatten(2).topk(config.topk)
    total = scores.sum(-1).view(5, 2, -1).transpose(0, 1)
    assert_close(total, best.values, rounding(query.dtype, 3 * 3 * 2))  # ranks, ranks, cores
    assert torch.equal(addresses.view(5, 2, -1).transpose(0, 1), best.indices)


def test_within_a_head_scores_come_best_first():
    config = small_config()
    retrieval = _with_random_keys(TuckerRetrieval(config, 1e-5).double())
    retrieval.cores(update_filter=True)
    totals = retrieval(_query(config)).scores.sum(-1).view(5, config.heads, config.topk)
    assert (totals.diff(dim=-1) <= 0).all()
