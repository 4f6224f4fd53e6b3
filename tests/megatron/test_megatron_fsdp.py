"""Under Megatron-FSDP every layout trains the model that one rank trains, and goes on from it.

Memories' dense weights are shards like any other's, value tables stay over their own groups.
"""

from typing import Any

import pytest

from tests.megatron.test_table_parallelism import (
    _DIMENSION,
    _GRID,
    _NUMBER,
    _OVERLAP,
    _RECOMPUTE,
    _SP,
    _TP,
    _flags,
)
from tests.ranks import RanksFailed
from tests.training_runs import TrainingRun, run_pretrain, tiny_gpt
from tests.whole_model import AFTER_STEPS, assert_same_training, first_decided, train, train_watched
from ultramem_megatron.patches import registry

_FSDP = {"use_megatron_fsdp": True, "ckpt_format": "fsdp_dtensor"}
_STRATEGY = "data_parallel_sharding_strategy"
_FULL = {**_FSDP, _STRATEGY: "optim_grads_params"}
_BESIDE = {"ultramem_overlap": True}
_STRETCHES = {**_RECOMPUTE, "recompute_num_layers": 2}
_long = pytest.mark.long


def _one_rank(**flags: Any) -> tuple[int, TrainingRun]:
    """A seed without near-ties, and how one rank trains with it."""

    def attempt(seed: int) -> tuple[tuple[int, TrainingRun], float]:
        run, closest_call = train_watched(1, _flags(seed=seed, **flags), gradients_at=2)
        return (seed, run), closest_call

    return first_decided(attempt)


@pytest.fixture(scope="module")
def one_rank() -> tuple[int, TrainingRun]:
    return _one_rank()


def _check(one_rank: tuple[int, TrainingRun], world_size: int, **layout: Any) -> None:
    seed, expected = one_rank
    assert_same_training(train(world_size, _flags(seed=seed, **layout), gradients_at=2), expected)


@pytest.mark.parametrize("strategy", ["optim", "optim_grads", "optim_grads_params"])
@pytest.mark.parametrize(
    ("world_size", "layout"),
    [
        pytest.param(2, _NUMBER, id="number"),
        pytest.param(4, _GRID, id="grid"),
        pytest.param(2, _DIMENSION, id="dimension"),
        pytest.param(2, {"ultramem_parallel_size": 1}, id="P1 of 2"),
        pytest.param(4, {**_NUMBER, "ultramem_parallel_size": 2}, id="P2 of 4"),
    ],
)
@_long
def test_it_trains_like_one_rank(
    one_rank: tuple[int, TrainingRun], strategy: str, world_size: int, layout: dict[str, Any]
) -> None:
    _check(one_rank, world_size, **_FSDP, **layout, **{_STRATEGY: strategy})


@pytest.mark.parametrize(
    ("world_size", "layout"),
    [
        pytest.param(8, _NUMBER, id="more ranks than cores and heads"),
        pytest.param(2, {**_NUMBER, **_RECOMPUTE}, id="recompute"),
        pytest.param(4, {**_TP, **_NUMBER}, id="TP2"),
        pytest.param(4, {**_NUMBER, "context_parallel_size": 2}, id="CP2"),
        pytest.param(4, {"ultramem_parallel_size": 2, **_RECOMPUTE}, id="P2 of 4, recompute"),
        pytest.param(2, {**_NUMBER, **_BESIDE}, id="overlap"),
        pytest.param(4, {"ultramem_parallel_size": 2, **_BESIDE}, id="P2 of 4, overlap"),
        pytest.param(4, {**_TP, **_NUMBER, **_BESIDE}, id="TP2, overlap"),
        pytest.param(2, {**_DIMENSION, **_BESIDE, **_STRETCHES}, id="overlap, recompute"),
    ],
)
@_long
def test_with_all_shards_it_trains_like_one_rank(
    one_rank: tuple[int, TrainingRun], world_size: int, layout: dict[str, Any]
) -> None:
    _check(one_rank, world_size, **_FULL, **layout)


def test_it_trains_like_ddp() -> None:
    expected = train(2, _flags(**_NUMBER))
    assert_same_training(train(2, _flags(**_NUMBER, **_FULL)), expected)


@pytest.mark.parametrize(
    "flags",
    [
        pytest.param({_STRATEGY: "no_shard"}, id="no shard"),
        pytest.param({_STRATEGY: "optim", **_OVERLAP}, id="the optimizer cut, overlap"),
        pytest.param({"calculate_per_token_loss": True}, id="loss per token"),
        pytest.param({"ultramem_train_only": "memory"}, id="memories alone"),
        pytest.param({"ultramem_share_values": 2}, id="shared tables"),
        pytest.param({"ultramem_share_values": 2, **_BESIDE}, id="shared tables, overlap"),
        pytest.param({_STRATEGY: "no_shard", **_BESIDE}, id="no shard, overlap of memories"),
        pytest.param({_STRATEGY: "optim", **_BESIDE}, id="the optimizer cut, overlap of memories"),
        pytest.param({"ultramem_share_values": 2, **_RECOMPUTE}, id="shared tables, recompute"),
        pytest.param({"ultramem_value_wd_mult": 0.5, "ultramem_value_lr_mult": 3}, id="rates"),
        pytest.param(
            {"swiglu": True, "ultramem_replace_mlp": True, "ultramem_spans": "2:2/4:4"},
            id="in place of gated MLPs",
        ),
        pytest.param(  # gradients of norms before experts are some 1e-4: see STEADY
            {"num_experts": 2, "moe_router_load_balancing_type": "none", "adam_eps": 1e-4},
            id="experts",
        ),
    ],
)
@_long
def test_with_other_flags_it_trains_like_ddp(flags: dict[str, Any]) -> None:
    ddp = {
        name: value for name, value in flags.items() if name not in {_STRATEGY, *_OVERLAP, *_BESIDE}
    }
    expected = train(2, _flags(**_NUMBER, **ddp))
    assert_same_training(train(2, _flags(**{**_NUMBER, **_FULL, **flags})), expected)


@pytest.mark.parametrize("strategy", ["no_shard", "optim", "optim_grads_params"])
@_long
def test_a_checkpoint_goes_on_in_other_layouts(tmp_path: Any, strategy: str) -> None:
    flags = {"ultramem_share_values": 2, "swiglu": True, **_FSDP, _STRATEGY: strategy}
    flags["ultramem_overlap"] = strategy == "optim_grads_params"
    saved = run_pretrain(2, _flags(**flags, **_NUMBER, save=tmp_path, save_interval=2))
    for world_size, layout in (
        (2, _NUMBER),
        (4, {**_NUMBER, "ultramem_parallel_size": 2}),
        (4, _GRID),
        (1, {}),
        (2, _DIMENSION),
    ):
        again = run_pretrain(world_size, _flags(**flags, load=tmp_path, ckpt_step=2, **layout))
        assert again.losses == pytest.approx(saved.losses[2:], rel=AFTER_STEPS)


def test_a_checkpoint_goes_on_with_tables_cut_otherwise(tmp_path: Any) -> None:
    short = {**_FULL, "train_iters": 2, "save_interval": 1}
    saved = run_pretrain(2, _flags(**short, **_NUMBER, save=tmp_path))
    again = run_pretrain(2, _flags(**short, **_DIMENSION, load=tmp_path, ckpt_step=1))
    assert again.losses == pytest.approx(saved.losses[1:], rel=AFTER_STEPS)
    with pytest.raises(RanksFailed, match="topk is 5 here, 6 in the checkpoint"):
        run_pretrain(1, _flags(**short, load=tmp_path, ultramem_topk=5))


@pytest.mark.parametrize("strategy", ["no_shard", "optim", "optim_grads", "optim_grads_params"])
@pytest.mark.parametrize("world_size", [2, 4])
@_long
def test_experts_over_ranks_train_like_ddp(strategy: str, world_size: int) -> None:
    experts = {"num_experts": 2, "moe_router_load_balancing_type": "none", "swiglu": True}
    layout = {**experts, "expert_model_parallel_size": 2, "ultramem_parallel_size": 2}
    expected = train(world_size, _flags(**layout))
    assert_same_training(
        train(world_size, _flags(**layout, **_FSDP, **{_STRATEGY: strategy})), expected
    )


@_long
def test_under_sequence_parallelism_it_trains_like_ddp() -> None:
    expected = train(4, _flags(**_SP, **_DIMENSION))
    assert_same_training(train(4, _flags(**_SP, **_DIMENSION, **_FULL)), expected)


@_long
def test_a_plain_gpt_saves_and_goes_on(tmp_path: Any) -> None:
    plain = {**_FULL, "train_iters": 4, "save_interval": 2}
    saved = run_pretrain(2, tiny_gpt(**plain, save=tmp_path))
    again = run_pretrain(2, tiny_gpt(**plain, load=tmp_path, ckpt_step=2))
    assert again.losses == saved.losses[2:]


@pytest.mark.parametrize("half", [{"bf16": True}, {"fp16": True, "initial_loss_scale": 4096}])
@_long
def test_half_precision_follows_ddp(tmp_path: Any, half: dict[str, Any]) -> None:
    cut = {**_NUMBER, **_FULL, **half}
    saved = run_pretrain(2, _flags(**cut, save=tmp_path, save_interval=2))
    again = run_pretrain(2, _flags(**cut, load=tmp_path, ckpt_step=2))
    assert again.losses == saved.losses[2:]
    ddp = run_pretrain(2, _flags(**_NUMBER, **half))
    assert saved.losses == pytest.approx(ddp.losses, rel=1e-3)


@pytest.mark.parametrize("strategy", ["no_shard", "optim_grads_params"])
@_long
def test_an_overflow_skips_the_step_of_tables_and_dense_parts(strategy: str) -> None:
    flags = {**_NUMBER, "fp16": True, "initial_loss_scale": 2**32, "train_iters": 2}
    run = run_pretrain(2, _flags(**flags, **_FSDP, **{_STRATEGY: strategy}))
    assert [step["skipped"] for step in run.iterations] == [1, 1]


@pytest.mark.parametrize(
    ("without", "flags", "ending"),
    [
        ("gated_names", {"swiglu": True}, "has no attribute `module`"),
        ("loss_scale", {"fp16": True, "initial_loss_scale": 4096}, "'NoneType' .* 'data'"),
    ],
)
@_long
def test_upstreams_defects_end_a_plain_gpt(
    tmp_path: Any, without: str, flags: dict[str, Any], ending: str
) -> None:
    names = [patch.name for patch in registry.all_patches()]
    names.remove(f"defects.megatron_fsdp_{without}")
    plain = tiny_gpt(**_FULL, **flags, train_iters=1, save=tmp_path, save_interval=1)
    with pytest.raises(RanksFailed, match=ending):
        run_pretrain(2, plain, patches=names)
    run_pretrain(2, plain)
