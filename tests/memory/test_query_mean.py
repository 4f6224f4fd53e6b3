"""The running mean that is taken off the queries' input."""

import copy

import pytest
import torch

from tests.closeness import assert_close, rounding
from tests.layers import HIDDEN, small_layer
from ultramem_megatron.memory.query_mean import MOMENTUM, QueryMean


def _steps(count, tokens=30, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(tokens, 4, generator=generator).double() + step for step in range(count)]


def _trained(steps, micro_batches=1):
    torch.set_default_dtype(torch.float64)
    module = QueryMean(4)
    for step in steps:
        for part in step.chunk(micro_batches):
            module(part)
        module.update()
    return module


def test_it_is_the_mean_of_the_steps_before_then_falls_off():
    steps = _steps(14)
    expected = torch.zeros(4).double()
    for number, step in enumerate(steps, start=1):
        share = max(1 / number, 1 - MOMENTUM)
        expected = (1 - share) * expected + share * step.mean(0)
    assert_close(_trained(steps).mean, expected, rounding(torch.float64, 14 * 30))
    few = _trained(steps[:5]).mean
    assert_close(few, torch.cat(steps[:5]).mean(0), rounding(torch.float64, 5 * 30))


def test_a_step_sees_only_the_steps_before():
    module = _trained(_steps(3))
    before = module.mean.clone()
    x = torch.randn(7, 4).double() + 9
    assert torch.equal(module(x), x - before)


def test_micro_batches_and_ranks_make_no_difference():
    steps = _steps(4)
    whole, cut = _trained(steps), _trained(steps, micro_batches=3)
    assert_close(cut.mean, whole.mean, rounding(torch.float64, 120))

    first, second = QueryMean(4).double(), QueryMean(4).double()
    for step in steps:
        mine, others = step[:10], step[10:]
        first(mine)
        second(others)
        theirs = second.sums.clone()
        first.update(reduce=lambda sums, theirs=theirs: sums.add_(theirs))
        second.sums.zero_()
    assert_close(first.mean, whole.mean, rounding(torch.float64, 120))


def test_only_training_forwards_count_and_recomputed_ones_once():
    module = QueryMean(4)
    x = torch.randn(5, 4)
    module.eval()(x)
    with torch.no_grad():
        module.train()(x)
    module.update()
    assert not module.mean.any()
    assert not module.updates.any()
    torch.utils.checkpoint.checkpoint(
        module, x.requires_grad_(), use_reentrant=True
    ).sum().backward()
    assert module.sums[-1] == 5


def test_broken_inputs_are_not_taken_in():
    module = _trained(_steps(2))
    before = module.mean.clone()
    module(torch.full((3, 4), torch.nan).double())
    module.update()
    assert torch.equal(module.mean, before)
    module(torch.ones(3, 4).double())
    module.update()
    assert module.mean.isfinite().all()
    assert not torch.equal(module.mean, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_it_stays_precise_under_half_precision(dtype):
    module = QueryMean(4).to(dtype)
    for x in _steps(3):
        assert module(x.to(dtype)).dtype == dtype
        module.update()
    assert module.mean.dtype == torch.float32
    assert module.sums.dtype == torch.float32


def test_a_common_part_of_all_inputs_no_longer_makes_their_queries_one():
    """A vector seven times the token's own part: without centring all tokens read the same."""
    layer = small_layer(torch.float32, num_keys=40, topk=8, key_dim=16)
    generator = torch.Generator().manual_seed(5)
    common = 7 * torch.randn(HIDDEN, generator=generator)

    def read():
        x = torch.randn(200, HIDDEN, generator=generator) + common
        x = torch.nn.functional.layer_norm(x, (HIDDEN,))
        return len(layer.retrieve(layer.query(x)).addresses.unique())

    layer.query.common.reset()
    before = read()
    for _ in range(2):
        read()
        layer.end_batch()
    assert read() > 10 * before


def test_a_checkpoint_holds_it():
    layer = small_layer(torch.float32)
    layer(torch.randn(4, HIDDEN))
    layer.end_batch()
    other = small_layer(torch.float32, seed=99)
    other.load_state_dict(copy.deepcopy(layer.state_dict()))
    assert torch.equal(other.query.common.mean, layer.query.common.mean)
    assert other.query.common.updates == 1
