"""NaN or Inf in the gradient of a value table alone, on one rank: ended, or skipped and counted."""

import functools
import os

import pytest
import torch

from tests.ranks import RanksFailed
from tests.training_runs import run_pretrain, tiny_gpt

_LAYOUTS = [
    (1, {}),
    (2, {}),
    (2, {"ultramem_parallel_size": 2, "ultramem_partition": "number"}),
    (2, {"ultramem_parallel_size": 2, "ultramem_partition": "dimension"}),
]
_BROKEN_STEP = 2


def _flags(**changes):
    return tiny_gpt(
        **{"ultramem_spans": "1:2", "ultramem_num_keys": 12, "ultramem_topk": 6, **changes}
    )


def _break_gradient(value: float, of_table: bool = True) -> None:
    """In every rank: the last one's gradient of a table gets an element `value` in step two.

    Not `of_table`: that of another parameter.
    """
    from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBucketGroup

    start, steps = _ParamAndGradBucketGroup.start_grad_sync, [0]
    last_rank = str(int(os.environ["WORLD_SIZE"]) - 1)

    @functools.wraps(start)
    def start_grad_sync(group, *args, **kwargs):
        parameters = [p for bucket in group.buckets for p in bucket.params]
        chosen = [p for p in parameters if hasattr(p, "ultramem_values") == of_table]
        steps[0] += bool(chosen)
        if chosen and steps[0] == _BROKEN_STEP and os.environ["RANK"] == last_rank:
            chosen[0].main_grad.view(-1)[0] = value
        return start(group, *args, **kwargs)

    _ParamAndGradBucketGroup.start_grad_sync = start_grad_sync


@pytest.mark.parametrize(("world_size", "layout"), _LAYOUTS)
def test_a_run_ends_and_names_the_gradient(world_size, layout):
    for value, name in ((float("nan"), "NaN"), (float("inf"), "Inf")):
        before = functools.partial(_break_gradient, value)
        with pytest.raises(RanksFailed, match=f"found {name} in local grad norm"):
            run_pretrain(world_size, _flags(**layout), before=before)


@pytest.mark.parametrize(("world_size", "layout"), _LAYOUTS)
def test_fp16_skips_the_step_on_all_ranks_and_counts_it(world_size, layout):
    flags = _flags(fp16=True, initial_loss_scale=1024, hysteresis=1, **layout)
    before = functools.partial(_break_gradient, float("inf"))
    broken = run_pretrain(world_size, flags, before=before, parameters=True)
    for rank in broken.ranks:
        assert [record["skipped"] for record in rank.iterations] == [0, 1, 0]
        assert [record["loss_scale"] for record in rank.iterations] == [1024, 512, 512]
        assert all(torch.isfinite(value).all() for value in rank.parameters.values())
    assert all(torch.isfinite(torch.tensor(broken.losses)))


def test_one_loss_scale_for_tables_and_the_rest():
    flags = _flags(fp16=True, initial_loss_scale=1024, hysteresis=1)
    tables, others = (
        run_pretrain(
            1,
            flags,
            before=functools.partial(_break_gradient, float("inf"), of_table),
            parameters=True,
        )
        for of_table in (True, False)
    )
    assert tables.losses == others.losses
    for name, value in others.ranks[0].parameters.items():
        torch.testing.assert_close(tables.ranks[0].parameters[name], value, rtol=0, atol=0)


def test_a_skipped_step_leaves_every_weight_as_it_was():
    flags = {"fp16": True, "initial_loss_scale": 1024, "ultramem_parallel_size": 2}
    one_step = run_pretrain(2, _flags(train_iters=1, lr_decay_iters=3, **flags), parameters=True)
    before = functools.partial(_break_gradient, float("nan"))
    skipped = run_pretrain(
        2, _flags(train_iters=2, lr_decay_iters=3, **flags), before=before, parameters=True
    )
    assert [record["skipped"] for record in skipped.iterations] == [0, 1]
    for rank, expected in zip(skipped.ranks, one_step.ranks, strict=True):
        for name, value in expected.parameters.items():
            torch.testing.assert_close(rank.parameters[name], value, rtol=0, atol=0)
