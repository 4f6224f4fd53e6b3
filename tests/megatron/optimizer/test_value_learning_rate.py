"""The value tables' learning rate: k times the base, falling linearly to it."""

from dataclasses import replace

import pytest
import torch
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from tests.closeness import rounding
from tests.layers import small_config
from ultramem_megatron.megatron.optimizer.value_learning_rate import (
    ValueLearningRateScheduler,
    throw_warning,
    value_lr_factor,
    value_overrides,
)


class _Optimizer:
    def __init__(self):
        self.param_groups = [{"default_config": True}, {"lr_mult": 10.0}]


_SETTINGS = {
    "init_lr": 0.0,
    "max_lr": 1e-3,
    "min_lr": 1e-4,
    "lr_warmup_steps": 10,
    "lr_decay_steps": 100,
    "lr_decay_style": "cosine",
    "start_wd": 0.1,
    "end_wd": 0.1,
    "wd_incr_steps": 200,
    "wd_incr_style": "constant",
}


@pytest.mark.parametrize(
    ("progress", "decay", "expected"),
    [(0, 0.5, 10), (0.25, 0.5, 5.5), (0.5, 0.5, 1), (0.9, 0.5, 1), (0.5, 1, 5.5), (1, 1, 1)],
)
def test_factor(progress, decay, expected):
    assert value_lr_factor(10.0, progress, decay) == pytest.approx(expected)


def test_schedule_multiplies_megatrons_over_a_fraction_of_training():
    optimizer, plain = _Optimizer(), _Optimizer()
    scheduler = ValueLearningRateScheduler(optimizer, value_lr_decay=0.6, **_SETTINGS)
    upstream = OptimizerParamScheduler(plain, **_SETTINGS)
    in_float64 = rounding(torch.float64, 4)
    for step in range(200):
        base = plain.param_groups[0]["lr"]
        factor = 1 + 9 * max(0.0, 1 - step / (0.6 * 200))
        assert optimizer.param_groups[0]["lr"] == base
        assert optimizer.param_groups[1]["lr"] == pytest.approx(base * factor, rel=in_float64)
        assert scheduler.value_learning_rate() == optimizer.param_groups[1]["lr"]
        scheduler.step(1)
        upstream.step(1)


def test_a_fixed_rate_knows_no_schedule():
    config = small_config(value_lr_fixed=3e-3, topk=16, heads=2, value_expansion=1)
    (override,) = value_overrides(config).values()
    optimizer, plain = _Optimizer(), _Optimizer()
    optimizer.param_groups[1] = dict(override)
    rates = {"value_lr_decay": 0.6, "value_lr_fixed": 3e-3}
    scheduler = ValueLearningRateScheduler(optimizer, **rates, **_SETTINGS)
    upstream = OptimizerParamScheduler(plain, **_SETTINGS)
    for _ in range(200):
        assert optimizer.param_groups[0]["lr"] == plain.param_groups[0]["lr"]
        assert scheduler.value_learning_rate() == optimizer.param_groups[1]["lr"] == 3e-3
        scheduler.step(1)
        upstream.step(1)
    high = throw_warning(replace(config, value_lr_fixed=4e-3), 1e-4, 1000)
    assert high is not None
    assert "--ultramem-value-lr-fixed 0.004 one step can move a memory's output by 0.13" in high
    assert throw_warning(config, 1.0, 0) is None


def test_state_is_megatrons():
    scheduler = ValueLearningRateScheduler(_Optimizer(), value_lr_decay=0.6, **_SETTINGS)
    assert scheduler.state_dict() == OptimizerParamScheduler(_Optimizer(), **_SETTINGS).state_dict()


def test_no_group_of_its_own_at_the_base_rate():
    assert value_overrides(small_config(value_lr_mult=1.0)) == {}
    (override,) = value_overrides(small_config(value_lr_mult=4.0)).values()
    assert override == {"lr_mult": 4.0}
    (override,) = value_overrides(small_config(value_lr_mult=1.0, value_wd_mult=0.0)).values()
    assert override == {"wd_mult": 0.0}


def test_a_rate_that_would_throw_the_tables_is_warned_of():
    config = small_config(topk=16, heads=2, value_expansion=4, value_lr_mult=10.0)  # 8 * 10 = 80
    warning = throw_warning(config, max_lr=2e-3, warmup_steps=20)
    assert warning is not None
    assert "move a memory's output by 0.16, after a warm-up of 20 steps" in warning
    assert throw_warning(config, max_lr=2e-3, warmup_steps=100) is None
    assert throw_warning(config, max_lr=1e-3, warmup_steps=20) is None
