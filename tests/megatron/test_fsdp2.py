"""Under torch's FSDP2 every layout trains the model that one rank trains, and goes on from it.

Memories' dense weights are shards like any other's, value tables stay over their own groups.
"""

from typing import Any

import pytest

from tests.megatron.test_table_parallelism import (
    _DIMENSION,
    _GRID,
    _NUMBER,
    _RECOMPUTE,
    _SP,
    _TP,
    _check,
    _flags,
    _Start,
)
from tests.ranks import RanksFailed
from tests.training_runs import run_pretrain, tiny_gpt
from tests.whole_model import AFTER_STEPS, assert_same_training, train

_FSDP2 = {"use_torch_fsdp2": True, "ckpt_format": "torch_dist"}
_BESIDE = {"ultramem_overlap": True}
_long = pytest.mark.long


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> _Start:
    return _Start(tmp_path_factory.mktemp("start"))


@pytest.mark.parametrize(
    ("world_size", "layout"),
    [
        pytest.param(2, _NUMBER, id="number", marks=_long),
        pytest.param(4, _GRID, id="grid", marks=_long),
        pytest.param(2, _DIMENSION, id="dimension", marks=_long),
        pytest.param(2, {"ultramem_parallel_size": 1}, id="P1 of 2", marks=_long),
        pytest.param(4, {**_NUMBER, "ultramem_parallel_size": 2}, id="P2 of 4", marks=_long),
        pytest.param(8, _NUMBER, id="more ranks than cores and heads", marks=_long),
        pytest.param(2, {**_NUMBER, **_RECOMPUTE}, id="recompute", marks=_long),
        pytest.param(4, {**_TP, **_NUMBER}, id="TP2", marks=_long),
        pytest.param(4, {**_SP, **_DIMENSION}, id="TP2 SP", marks=_long),
        pytest.param(4, {**_NUMBER, "context_parallel_size": 2}, id="CP2", marks=_long),
        pytest.param(2, {**_NUMBER, "overlap_grad_reduce": True}, id="overlap", marks=_long),
        pytest.param(2, {**_DIMENSION, **_BESIDE}, id="overlap of memories", marks=_long),
        pytest.param(
            4, {"ultramem_parallel_size": 2, **_BESIDE}, id="P2 of 4, overlap", marks=_long
        ),
        pytest.param(4, {**_TP, **_NUMBER, **_BESIDE}, id="TP2, overlap", marks=_long),
        pytest.param(
            2,
            {**_NUMBER, **_BESIDE, **_RECOMPUTE, "recompute_num_layers": 2},
            id="overlap, recompute",
            marks=_long,
        ),
        pytest.param(
            2,
            {**_NUMBER, "torch_fsdp2_no_reshard_after_forward": True},
            id="kept whole after forward",
            marks=_long,
        ),
    ],
)
def test_it_trains_like_one_rank(start: _Start, world_size: int, layout: dict[str, Any]) -> None:
    _check(start, world_size, **_FSDP2, **layout)


@pytest.mark.parametrize(
    "flags",
    [
        pytest.param({}, id="memories"),
        pytest.param({"calculate_per_token_loss": True}, id="loss per token", marks=_long),
        pytest.param({"ultramem_row_adam": True}, id="row Adam", marks=_long),
        pytest.param({"ultramem_train_only": "memory"}, id="memories alone", marks=_long),
        pytest.param({"ultramem_share_values": 2}, id="shared tables", marks=_long),
        pytest.param({"ultramem_share_values": 2, **_BESIDE}, id="shared, overlap", marks=_long),
        pytest.param(
            {"swiglu": True, "ultramem_replace_mlp": True, "ultramem_spans": "2:2/4:4"},
            id="in place of gated MLPs",
            marks=_long,
        ),
    ],
)
def test_it_trains_like_ddp(flags: dict[str, Any]) -> None:
    expected = train(2, _flags(**_NUMBER, **{**flags, "ultramem_overlap": False}))
    assert_same_training(train(2, _flags(**_NUMBER, **flags, **_FSDP2)), expected)


@_long
def test_a_hybrid_trains_like_one_rank(tmp_path: Any) -> None:
    pattern = {"hybrid_layer_pattern": "*-*-*-", "num_layers": None}
    start = _Start(tmp_path, **pattern, ultramem_spans="2:3/4:6")
    _check(start, 2, **_FSDP2, **_NUMBER)


@_long
def test_a_checkpoint_goes_on_in_any_layout(tmp_path: Any) -> None:
    gated = {"swiglu": True}
    saved = run_pretrain(2, _flags(**gated, **_FSDP2, **_NUMBER, save=tmp_path, save_interval=2))
    for world_size, layout in (
        (2, {**_FSDP2, **_NUMBER}),
        (4, {**_FSDP2, **_GRID}),
        (1, {}),
        (2, _DIMENSION),
    ):
        again = run_pretrain(world_size, _flags(**gated, load=tmp_path, ckpt_step=2, **layout))
        assert again.losses == pytest.approx(saved.losses[2:], rel=AFTER_STEPS)


def test_a_plain_gpt_saves_and_goes_on(tmp_path: Any) -> None:
    plain = {**_FSDP2, "train_iters": 4, "save_interval": 2}
    saved = run_pretrain(2, tiny_gpt(**plain, save=tmp_path))
    again = run_pretrain(2, tiny_gpt(**plain, load=tmp_path, ckpt_step=2))
    assert again.losses == saved.losses[2:]


@pytest.mark.parametrize("beside", [{}, _BESIDE], ids=["", "overlap"])
@_long
def test_bf16_follows_ddp(tmp_path: Any, beside: dict[str, Any]) -> None:
    half = {**_NUMBER, **_FSDP2, **beside, "bf16": True, "eval_iters": 1, "eval_interval": 2}
    saved = run_pretrain(2, _flags(**half, save=tmp_path, save_interval=2))
    again = run_pretrain(2, _flags(**half, load=tmp_path, ckpt_step=2))
    assert again.losses == saved.losses[2:]
    ddp = run_pretrain(2, _flags(**_NUMBER, bf16=True))
    assert saved.losses == pytest.approx(ddp.losses, rel=1e-3)


@_long
def test_shards_that_no_checkpoint_holds_are_refused(tmp_path: Any) -> None:
    with pytest.raises(RanksFailed, match=r"first dimension of .* is .*, no multiple of them"):
        run_pretrain(
            3, _flags(**_FSDP2, **_NUMBER, micro_batch_size=2, save=tmp_path, save_interval=2)
        )
