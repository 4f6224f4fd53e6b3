"""UltraMemV2, Memory+ and PEER in Megatron: every layout trains the model that one rank trains."""

import re
from pathlib import Path
from typing import Any

import pytest

from tests.megatron.test_table_parallelism import _check, _Start
from tests.ranks import RanksFailed
from tests.training_runs import run_pretrain, tiny_gpt
from tests.whole_model import assert_same_training, first_decided, train, train_watched

_COMMON: dict[str, Any] = {
    "num_layers": 4,
    "ultramem_spans": "full",
    "ultramem_query_conv_kernel": 0,
    "ultramem_heads": 1,
    "ultramem_value_expansion": 1,
    "ultramem_aux_loss_weight": 0.0,
}
_V2: dict[str, Any] = {
    **_COMMON,
    "ultramem_num_keys": 8,
    "ultramem_values": "prevalued",
    "ultramem_pre_value_dim": 8,
    "ultramem_key_expansion": 2,
    "ultramem_share_values": 2,
    "ultramem_rank_layout": "full",
    "ultramem_query_per_rank": True,
    "ultramem_qk_norm": "rmsnorm",
    "ultramem_topk": 9,
    "ultramem_side_topk": 5,
}
_PKM = {"ultramem_retrieval": "pkm", "ultramem_softmax": True, "no_ultramem_share_query": True}
_MEMORY_PLUS = {
    **_COMMON,
    **_PKM,
    "ultramem_heads": 2,
    "ultramem_values": "gated",
    "ultramem_projection_bias": True,
    "ultramem_share_values": 4,
    "ultramem_share_order": "same",
}
_PEER = {
    **_COMMON,
    **_PKM,
    "ultramem_spans": "2:3",
    "ultramem_heads": 2,
    "ultramem_values": "prevalued",
    "ultramem_pre_value_activation": "gelu",
    "no_ultramem_value_projection": True,
    "ultramem_value_dim": 32,
}
_NUMBER = {"ultramem_partition": "number"}
_DIMENSION = {"ultramem_partition": "dimension"}
_GRID = {"ultramem_partition": "grid", "ultramem_node_size": 2}
_TP = {"tensor_model_parallel_size": 2}
_SP = {**_TP, "sequence_parallel": True}
_PP = {"pipeline_model_parallel_size": 2}
_RECOMPUTE = {
    "recompute_granularity": "full",
    "recompute_method": "uniform",
    "recompute_num_layers": 1,
}
_DIST = {"use_distributed_optimizer": True, "dist_ckpt_optim_fully_reshardable": True}
_OVERLAP = {"overlap_grad_reduce": True, "overlap_param_gather": True}
_long = pytest.mark.long


@pytest.fixture(scope="module")
def v2(tmp_path_factory: pytest.TempPathFactory) -> _Start:
    return _Start(tmp_path_factory.mktemp("v2"), **_V2)


@pytest.mark.parametrize(
    ("world_size", "layout"),
    [
        pytest.param(2, {**_TP, **_DIMENSION}, id="TP2 dimension"),
        pytest.param(4, {**_PP, **_NUMBER, **_RECOMPUTE}, id="PP2 DP2 number, recompute"),
        pytest.param(2, {"ultramem_parallel_size": 1}, id="P1 of DP2", marks=_long),
        pytest.param(2, _NUMBER, id="DP2 number", marks=_long),
        pytest.param(2, _DIMENSION, id="DP2 dimension", marks=_long),
        pytest.param(4, {**_DIMENSION, "ultramem_overlap": True}, id="DP4, overlap", marks=_long),
        pytest.param(4, _GRID, id="DP4 grid", marks=_long),
        pytest.param(4, {**_TP, **_GRID}, id="TP2 DP2 grid", marks=_long),
        pytest.param(8, {**_PP, **_SP, **_GRID}, id="PP2 TP2 SP DP2 grid", marks=_long),
        pytest.param(2, {**_TP, **_NUMBER}, id="TP2 number", marks=_long),
        pytest.param(2, {**_SP, **_NUMBER}, id="TP2 SP number", marks=_long),
        pytest.param(4, {**_SP, **_DIMENSION}, id="TP2 SP DP2 dimension", marks=_long),
        pytest.param(2, _PP, id="PP2", marks=_long),
        pytest.param(4, {**_PP, **_SP, **_DIMENSION}, id="PP2 TP2 SP", marks=_long),
        pytest.param(2, {"context_parallel_size": 2, **_NUMBER}, id="CP2 number", marks=_long),
        pytest.param(2, {**_RECOMPUTE, **_DIMENSION}, id="DP2 recompute", marks=_long),
    ],
)
def test_ultramem_v2_trains_like_one_rank(
    v2: _Start, world_size: int, layout: dict[str, Any]
) -> None:
    _check(v2, world_size, **layout)


@_long
@pytest.mark.parametrize(
    ("world_size", "layout"),
    [(2, {**_NUMBER}), (4, {**_DIMENSION, **_OVERLAP}), (4, {**_PP, **_OVERLAP, **_NUMBER})],
    ids=str,
)
def test_ultramem_v2_with_the_distributed_optimizer(
    world_size: int, layout: dict[str, Any], tmp_path: Path
) -> None:
    _check(_Start(tmp_path, **_V2, **_DIST), world_size, **layout)


@_long
@pytest.mark.parametrize("design", [_MEMORY_PLUS, _PEER], ids=["Memory+", "PEER"])
def test_others_train_like_one_rank(design: dict[str, Any], tmp_path: Path) -> None:
    start = _Start(tmp_path, **design)
    layouts = [(2, {**_TP, **_NUMBER}), (4, {**_SP, **_DIMENSION}), (4, _GRID)]
    for world_size, layout in layouts:
        _check(start, world_size, **layout)


_VPP = {**_PP, "num_virtual_stages_per_pipeline_rank": 2}
_STRADDLING = {"num_layers": 8, **_PP, "pipeline_model_parallel_layout": "Et|ttt|tt|ttL"}
_PROPOSED = "Et*2|t*2|t*2|t*2L"


@_long
def test_groups_within_virtual_stages_train_like_one_rank(tmp_path: Path) -> None:
    start = _Start(tmp_path, **{**_V2, "num_layers": 8})
    _check(start, 2, **_VPP, **_RECOMPUTE)
    _check(start, 4, **_VPP, **_SP, **_DIMENSION)
    _check(start, 4, **{**_STRADDLING, **_NUMBER, "pipeline_model_parallel_layout": _PROPOSED})


_REPLACING = {"ultramem_replace_mlp": True}
_PLUS_ALONE = {**_MEMORY_PLUS, **_REPLACING, "ultramem_spans": "1:1/2:2/4:4"}
_PLUS_ALONE["ultramem_share_values"] = 3
_PEER_ALONE = {**_PEER, **_REPLACING, "ultramem_spans": "2:2/4:4"}


@_long
@pytest.mark.parametrize(
    ("design", "layouts"),
    [
        (
            _PLUS_ALONE,
            [
                (2, {**_TP, **_NUMBER}),
                (4, {**_SP, **_DIMENSION, **_RECOMPUTE}),
                (2, {"context_parallel_size": 2, **_NUMBER}),
            ],
        ),
        (
            _PEER_ALONE,
            [
                (2, _PP),
                (4, {**_PP, **_SP, **_DIMENSION}),
                (4, {**_NUMBER, "ultramem_overlap": True, "hidden_dropout": 0.0}),
                (2, {"num_virtual_stages_per_pipeline_rank": 2, **_PP}),
            ],
        ),
    ],
    ids=["Memory+", "PEER"],
)
def test_in_place_of_mlps_others_train_like_one_rank(
    design: dict[str, Any], layouts: list[tuple[int, dict[str, Any]]], tmp_path: Path
) -> None:
    start = _Start(tmp_path, **design)
    for world_size, layout in layouts:
        _check(start, world_size, **layout)


@_long
def test_in_place_of_mlps_with_the_distributed_optimizer(tmp_path: Path) -> None:
    _check(_Start(tmp_path, **_PLUS_ALONE, **_DIST), 4, **_DIMENSION, **_OVERLAP)


@_long
@pytest.mark.parametrize("order", ["ring", "noring"])
def test_windows_of_one_table_train_like_one_rank(order: str, tmp_path: Path) -> None:
    start = _Start(tmp_path, **{**_V2, "ultramem_share_order": order})
    _check(start, 4, **_TP, **_NUMBER)
    with pytest.raises(RanksFailed, match="share a table, but pipeline stage 0"):
        _check(start, 2, **_PP)


@_long
@pytest.mark.parametrize(
    ("saving", "loading"),
    [((2, {**_PP, **_DIST}), (2, {**_NUMBER})), ((2, {**_DIMENSION}), (4, {**_PP, **_NUMBER}))],
    ids=str,
)
def test_a_checkpoint_of_shared_tables_continues_in_another_layout(
    saving: Any, loading: Any, tmp_path: Path
) -> None:
    (save_ranks, save_layout), (load_ranks, load_layout) = saving, loading
    dist = _DIST if "use_distributed_optimizer" in save_layout else {}
    base = {
        **_V2,
        **dist,
        "train_iters": 4,
        "save_interval": 2,
        "ckpt_format": "torch_dist",
        "adam_eps": 1e-5,
        "disable_bias_linear": True,
    }

    def attempt(seed: int) -> tuple[Any, float]:
        flags = {**base, "seed": seed}
        saved = tiny_gpt(**{**flags, **save_layout, "save": tmp_path / str(seed)})
        run, closest_call = train_watched(save_ranks, saved)
        return (flags, tmp_path / str(seed), run), closest_call

    flags, folder, uninterrupted = first_decided(attempt)
    (folder / "latest_checkpointed_iteration.txt").write_text("2")
    resumed = train(
        load_ranks, tiny_gpt(**{**flags, **load_layout, "load": folder, "no_load_rng": True})
    )
    del uninterrupted.iterations[:2]
    assert_same_training(resumed, uninterrupted, gradients=False)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({**_PP, "ultramem_share_values": 4}, "layers 1 to 4 share a table, but pipeline stage 0"),
        (
            {**_PP, "pipeline_model_parallel_layout": "Ettt|tL"},
            "layers 3 to 4 share a table, .* Use --pipeline-model-parallel-layout .Et.2.t.2L",
        ),
        (
            _STRADDLING,
            r"layers 1 to 2 share a table, but pipeline stage 0 chunk 0 .*"
            rf'Use --pipeline-model-parallel-layout "{re.escape(_PROPOSED)}"',
        ),
        (
            {**_VPP, "num_layers": 8, "ultramem_share_values": 4},
            "at most 2 stages or virtual chunks, 4 are asked for: use --pipeline-model-parallel-s",
        ),
        (
            {**_RECOMPUTE, "overlap_grad_reduce": True},
            "--overlap-grad-reduce with --recompute-granularity full cannot be combined",
        ),
        (
            {**_DIMENSION, "ultramem_pre_value_dim": 7},
            "--ultramem-pre-value-dim 7 is not divisible by --ultramem-parallel-size 2",
        ),
        (
            {
                **_REPLACING,
                "num_experts": 2,
                "moe_layer_freq": "[0,0,1,0]",
                "disable_bias_linear": True,
            },
            "--ultramem-spans 3:3 with --ultramem-replace-mlp: layer 3 has experts",
        ),
    ],
)
def test_what_shared_tables_cannot_is_refused(flags: dict[str, Any], message: str) -> None:
    with pytest.raises(RanksFailed, match=message):
        run_pretrain(2, tiny_gpt(**{**_V2, **flags, "train_iters": 1}))
