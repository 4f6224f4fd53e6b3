"""Every parallel layout trains the model that one rank trains.

All runs start from one checkpoint (weights and Adam state), see the same data and take three steps;
losses, gradient norms, every gradient of the second step and every weight must agree.
"""

import pytest
import torch

from tests.ranks import RanksFailed
from tests.training_runs import run_pretrain, tiny_gpt
from tests.whole_model import (
    STEADY,
    assert_same_training,
    first_decided,
    train,
    train_watched,
    whole,
)

_MEMORY = {
    "num_layers": 6,
    "ultramem_spans": "2:3/4:6",
    "ultramem_num_keys": 11,
    "ultramem_topk": 6,
    "ultramem_value_dim": 16,
    "ultramem_query_conv_kernel": 3,
    "ultramem_aux_loss_weight": 1.0,
    "global_batch_size": 24,
    "micro_batch_size": 3,
    "train_iters": 4,
    "ckpt_format": "torch_dist",
    "lr_decay_style": "constant",
    "clip_grad": 0.5,  # below the norms seen: clipping takes part
    "disable_bias_linear": True,
    **STEADY,
}


def _flags(**changes):
    return tiny_gpt(**{**_MEMORY, **changes})


class _Start:
    """A checkpoint after one step (`folder`), and the three steps one rank takes from it."""

    def __init__(self, folder, **flags):
        self.folder, self.flags, self.expected = first_decided(
            lambda seed: self._make(folder / str(seed), {**flags, "seed": seed})
        )

    @staticmethod
    def _make(folder, flags):
        run_pretrain(1, _flags(save=folder, save_interval=1, **flags))
        (folder / "latest_checkpointed_iteration.txt").write_text("1")
        argv = _flags(load=folder, no_load_rng=True, **flags)
        expected, closest_call = train_watched(1, argv, gradients_at=2)
        assert len(expected.losses) == 3
        return (folder, flags, expected), closest_call


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    return _Start(tmp_path_factory.mktemp("start"))


def _check(start, world_size, **layout):
    flags = {**start.flags, **layout, "load": start.folder, "no_load_rng": True}
    run = train(world_size, _flags(**flags), gradients_at=2)
    gradients = not flags.get("use_distributed_optimizer", False)
    assert_same_training(run, start.expected, gradients=gradients)


_NUMBER = {"ultramem_partition": "number"}
_DIMENSION = {"ultramem_partition": "dimension"}
_GRID = {"ultramem_partition": "grid", "ultramem_node_size": 2}
_TP = {"tensor_model_parallel_size": 2}
_SP = {**_TP, "sequence_parallel": True}
_PP = {"pipeline_model_parallel_size": 2}
_CROSSING = {**_PP, "pipeline_model_parallel_layout": "Ett|ttttL"}  # span 2:3
_VPP = {**_PP, "num_virtual_stages_per_pipeline_rank": 3}
_DIST = {"use_distributed_optimizer": True, "dist_ckpt_optim_fully_reshardable": True}
_RECOMPUTE = {
    "recompute_granularity": "full",
    "recompute_method": "uniform",
    "recompute_num_layers": 2,
}
_OVERLAP = {"overlap_grad_reduce": True, "overlap_param_gather": True}


@pytest.mark.parametrize(
    ("world_size", "layout"),
    [
        pytest.param(world_size, layout, id=name)
        for name, world_size, layout in [
            ("P1 of DP2", 2, {"ultramem_parallel_size": 1}),
            ("DP2 number", 2, _NUMBER),
            ("DP2 dimension", 2, _DIMENSION),
            ("DP3 number", 3, {**_NUMBER, "micro_batch_size": 2}),
            ("DP4 dimension", 4, _DIMENSION),
            ("P2 of DP4 number", 4, {**_NUMBER, "ultramem_parallel_size": 2}),
            ("P2 of DP4 dimension", 4, {**_DIMENSION, "ultramem_parallel_size": 2}),
            ("DP8 dimension", 8, _DIMENSION),
            ("DP8 number", 8, _NUMBER),
            ("DP4 grid", 4, _GRID),
            ("P1 of TP2", 2, {**_TP, "ultramem_parallel_size": 1}),
            ("TP2 number", 2, {**_TP, **_NUMBER}),
            ("TP2 dimension", 2, {**_TP, **_DIMENSION}),
            ("TP2 SP number", 2, {**_SP, **_NUMBER}),
            ("TP2 SP dimension", 2, {**_SP, **_DIMENSION}),
            ("P1 of TP2 SP", 2, {**_SP, "ultramem_parallel_size": 1}),
            ("TP2 DP2 number", 4, {**_TP, **_NUMBER}),
            ("TP2 DP2 SP P2", 4, {**_SP, **_DIMENSION, "ultramem_parallel_size": 2}),
            ("TP2 DP2 SP grid", 4, {**_SP, **_GRID}),
            ("PP2 not crossing", 2, _PP),
            ("PP2 crossing", 2, _CROSSING),
            ("PP3 crossing twice", 3, {"pipeline_model_parallel_size": 3}),
            ("PP2 interleaved, crossing", 2, _VPP),
            (
                "PP2 crossing at another span",
                2,
                {**_PP, "pipeline_model_parallel_layout": "Etttt|ttL"},
            ),
            ("PP2 DP2 number, crossing", 4, {**_CROSSING, **_NUMBER}),
            ("PP2 TP2 SP, crossing", 4, {**_CROSSING, **_SP, **_DIMENSION}),
            ("PP2 interleaved TP2 DP2", 8, {**_VPP, **_TP, **_DIMENSION}),
            ("per-token loss", 2, {"calculate_per_token_loss": True, **_DIMENSION}),
            ("recompute", 2, {**_NUMBER, **_RECOMPUTE}),
            (
                "PP2 crossing, recompute",
                2,
                {
                    **_CROSSING,
                    "recompute_granularity": "full",
                    "recompute_method": "block",
                    "recompute_num_layers": 2,
                },
            ),
        ]
    ],
)
def test_layout_trains_like_one_rank(start, world_size, layout):
    _check(start, world_size, **layout)


@pytest.mark.long
@pytest.mark.parametrize(
    ("world_size", "layout"),
    [
        pytest.param(world_size, layout, id=name)
        for name, world_size, layout in [
            ("DP8 nodes of 2", 8, {}),
            ("DP8 nodes of 4", 8, {"ultramem_node_size": 4}),
            ("P4 of DP8", 8, {"ultramem_parallel_size": 4}),
            ("TP2 DP2", 4, _TP),
            ("TP4", 4, {"tensor_model_parallel_size": 4}),
            ("TP2 SP DP4, nodes of 4", 8, {**_SP, "ultramem_node_size": 4}),
            ("CP2 TP2 SP", 4, {"context_parallel_size": 2, **_SP}),
            ("PP2 DP4, crossing", 8, _CROSSING),
            ("PP2 interleaved TP2 DP2, crossing", 8, {**_VPP, **_TP}),
            ("recompute", 4, _RECOMPUTE),
            ("PP2 crossing, recompute", 8, {**_CROSSING, **_RECOMPUTE}),
            ("overlap", 4, {"ultramem_overlap": True}),
            ("TP2 DP2 SP overlap", 4, {**_SP, "ultramem_overlap": True}),
            ("per-token loss", 4, {"calculate_per_token_loss": True}),
            ("nodes of 1: columns alone", 4, {"ultramem_node_size": 1}),
            ("one node: rows alone", 4, {"ultramem_node_size": None}),
        ]
    ],
)
def test_grid_trains_like_one_rank(start, world_size, layout):
    _check(start, world_size, **{**_GRID, **layout})


_CP = {"context_parallel_size": 2}


@pytest.mark.parametrize(
    ("world_size", "layout"),
    [
        pytest.param(world_size, layout, id=name)
        for name, world_size, layout in [
            ("CP2 whole tables", 2, {**_CP, "ultramem_parallel_size": 1}),
            ("CP2 number", 2, {**_CP, **_NUMBER}),
            ("CP2 dimension", 2, {**_CP, **_DIMENSION}),
            ("CP4 number", 4, {"context_parallel_size": 4, **_NUMBER}),
            ("CP2 TP2 SP", 4, {**_CP, **_SP, **_DIMENSION}),
            (
                "CP2 DP2 P2, per-token loss",
                4,
                {**_CP, **_NUMBER, "ultramem_parallel_size": 2, "calculate_per_token_loss": True},
            ),
            (
                "CP2 PP2 crossing, recompute",
                4,
                {
                    **_CP,
                    **_CROSSING,
                    "recompute_granularity": "full",
                    "recompute_method": "block",
                    "recompute_num_layers": 2,
                },
            ),
            (
                "CP2 mask made by the attention",
                2,
                {**_CP, "no_create_attention_mask_in_dataloader": True},
            ),
        ]
    ],
)
def test_context_parallelism_trains_like_one_rank(start, world_size, layout):
    _check(start, world_size, **layout)


def test_context_parallelism_of_another_attention(tmp_path):
    """Grouped queries, learned positions, and sequences that are not cut into equal powers of 2."""
    sizes = {"seq_length": 24, "max_position_embeddings": 24}
    design = {"position_embedding_type": "learned_absolute", "ultramem_query_conv_kernel": 5}
    grouped = {"group_query_attention": True, "num_query_groups": 2}
    start = _Start(tmp_path, **design, **grouped, **sizes)
    _check(start, 3, context_parallel_size=3, ultramem_parallel_size=1)


@pytest.mark.parametrize(
    "design",
    [
        {"ultramem_heads": 1, "ultramem_cores": 1, "ultramem_value_expansion": 1},
        {"ultramem_cores": 4, "ultramem_value_expansion": 9, "ultramem_tucker_rank": 4},
        {
            "ultramem_retrieval": "pkm",
            "ultramem_qk_norm": "rmsnorm",
            "seq_length": 31,
            "max_position_embeddings": 31,
        },
    ],
)
def test_other_designs(design, tmp_path):
    start = _Start(tmp_path, **design)
    layouts = [(4, {**_TP, **_NUMBER}), (4, {**_TP, **_DIMENSION, "ultramem_parallel_size": 2})]
    for world_size, layout in layouts:
        _check(start, world_size, **layout)


@pytest.fixture(scope="module")
def start_reshardable(tmp_path_factory):
    """The same with the distributed optimizer, whose checkpoints come in a form of their own."""
    return _Start(tmp_path_factory.mktemp("start_reshardable"), **_DIST)


@pytest.mark.parametrize(
    ("world_size", "layout"),
    [
        (2, {**_NUMBER}),
        (4, {**_DIMENSION, **_OVERLAP}),
        (4, {**_NUMBER, **_OVERLAP, "ultramem_parallel_size": 2}),
        (4, {**_SP, **_DIMENSION, **_OVERLAP}),
        (4, {**_CROSSING, **_OVERLAP, "ultramem_parallel_size": 1}),
    ],
)
def test_distributed_optimizer(start_reshardable, world_size, layout):
    _check(start_reshardable, world_size, **layout)


@pytest.mark.long
@pytest.mark.parametrize(
    ("world_size", "layout"),
    [
        (4, {**_OVERLAP}),
        (8, {**_OVERLAP, "ultramem_parallel_size": 4}),
        (8, {**_SP, **_OVERLAP, "ultramem_node_size": 4}),
        (8, {**_CROSSING, **_TP, **_OVERLAP, "ultramem_overlap": True}),
    ],
    ids=str,
)
def test_distributed_optimizer_of_a_grid(start_reshardable, world_size, layout):
    _check(start_reshardable, world_size, **{**_GRID, **layout})


def test_bfloat16_follows_one_rank(start):
    half = {"bf16": True, "no_load_optim": True, "finetune": True, "lr": 1e-3}
    half |= {**start.flags, "load": start.folder}
    expected = train(1, _flags(**half))
    run = train(4, _flags(**half, **_SP, **_DIMENSION))
    # Rounding may change which values are selected, so single gradients need not be close. Losses
    # are means over tokens, norms over weights: a token or weight is off by eps / 2 or by another
    # value picked, and most of that evens out.
    eps = torch.finfo(torch.bfloat16).eps
    assert run.losses == pytest.approx(expected.losses, rel=eps / 4)
    assert run.grad_norms == pytest.approx(expected.grad_norms, rel=3 * eps)


@pytest.mark.long
@pytest.mark.parametrize("precision", [{"bf16": True}, {"fp16": True, "initial_loss_scale": 4096}])
def test_a_grid_in_half_precision_follows_one_rank(start, precision):
    half = {**precision, "no_load_optim": True, "finetune": True, "lr": 1e-3}
    half |= {**start.flags, "load": start.folder}
    expected, run = train(1, _flags(**half)), train(4, _flags(**half, **_SP, **_GRID))
    eps = torch.finfo(torch.bfloat16).eps  # bounds: as above
    assert run.losses == pytest.approx(expected.losses, rel=eps / 4)
    assert run.grad_norms == pytest.approx(expected.grad_norms, rel=3 * eps)


_HEAVY = {"num_layers": 6, "train_iters": 6, "save_interval": 3}


@pytest.mark.parametrize(
    ("saving", "loading"),
    [
        ((4, {**_NUMBER}), (2, {**_DIMENSION})),
        ((2, {**_DIMENSION, "micro_batch_size": 4}), (3, {**_NUMBER, "micro_batch_size": 4})),
        ((4, {**_TP, **_NUMBER, "ultramem_parallel_size": 2}), (1, {})),
        ((4, {**_SP, **_DIMENSION}), (4, {**_CROSSING, **_NUMBER})),
        ((2, {**_PP, "ultramem_parallel_size": 1}), (4, {**_TP, **_DIMENSION})),
        pytest.param((4, {**_GRID}), (2, {**_NUMBER}), marks=pytest.mark.long),
        pytest.param((4, {**_NUMBER}), (4, {**_GRID}), marks=pytest.mark.long),
        pytest.param((4, {**_TP, **_GRID}), (2, {**_DIMENSION}), marks=pytest.mark.long),
        pytest.param((2, {**_DIMENSION}), (4, {**_SP, **_GRID}), marks=pytest.mark.long),
        pytest.param((4, {**_GRID}), (1, {}), marks=pytest.mark.long),
        pytest.param((1, {}), (8, {**_GRID, "ultramem_node_size": 4}), marks=pytest.mark.long),
        pytest.param(
            (8, {**_GRID}),
            (8, {**_CROSSING, **_GRID, "ultramem_node_size": 2}),
            marks=pytest.mark.long,
        ),
    ],
)
def test_a_checkpoint_of_any_layout_continues_in_any_other(saving, loading, tmp_path):
    # Some pairs with the distributed optimizer, whose state is saved in another form.
    dist = _DIST if saving[1].get("ultramem_partition") in ("number", "grid") else {}

    (save_ranks, save_layout), (load_ranks, load_layout) = saving, loading

    def attempt(seed):
        flags = {**_HEAVY, **dist, "seed": seed}
        saved = {**flags, **save_layout, "save": tmp_path / str(seed)}
        uninterrupted, closest_call = train_watched(save_ranks, _flags(**saved))
        return (flags, tmp_path / str(seed), uninterrupted), closest_call

    flags, folder, uninterrupted = first_decided(attempt)
    (folder / "latest_checkpointed_iteration.txt").write_text("3")
    loaded = {**flags, **load_layout, "load": folder, "no_load_rng": True}
    resumed = train(load_ranks, _flags(**loaded))
    del uninterrupted.iterations[:3]
    assert_same_training(resumed, uninterrupted, gradients=False)


@pytest.mark.parametrize(
    ("world_size", "layout"),
    [
        (2, {**_NUMBER}),
        (2, {**_DIMENSION}),
        (2, {**_TP, **_NUMBER}),
        pytest.param(4, {**_GRID}, marks=pytest.mark.long),
    ],
    ids=str,
)
def test_the_initial_table_does_not_depend_on_the_layout(world_size, layout):
    frozen = {"lr": 0.0, "min_lr": 0.0, "weight_decay": 0.0, "train_iters": 1}
    one = whole(train(1, _flags(**frozen)), "parameters")
    cut = whole(train(world_size, _flags(**frozen, **layout)), "parameters")
    tables = [name for name in one if ".memory." in name]
    assert len(tables) == 16
    for name in tables:
        assert torch.equal(cut[name], one[name]), name


def test_only_the_own_part_is_allocated():
    run = train(4, _flags(train_iters=1, **_NUMBER))
    sizes = [
        rank.parameters["module.decoder.layers.1.memory.values.weight"].numel()
        for rank in run.ranks
    ]
    assert sum(sizes) == 121 * 16
    assert max(sizes) - min(sizes) <= 16


def test_experts_and_tables_share_their_groups():
    experts = {"num_experts": 4, "moe_router_topk": 2}
    run = train(2, _flags(**experts, expert_model_parallel_size=2, ultramem_partition="number"))
    assert run.losses[-1] < run.losses[0]
    table = whole(run, "gradients", only="values.weight")["decoder.layers.1.memory.values.weight"]
    assert torch.isfinite(table).all()
    assert table.norm() > 0


@pytest.mark.long
def test_a_grid_beside_experts_trains_as_another_cut_beside_them():
    experts = {"num_experts": 4, "moe_router_topk": 2, "expert_model_parallel_size": 4}
    runs = [train(4, _flags(**experts, **cut), gradients_at=2) for cut in (_NUMBER, _GRID)]
    assert_same_training(runs[1], runs[0])


@pytest.mark.parametrize(
    ("world_size", "flags", "message"),
    [
        (2, {"ultramem_parallel_size": 3}, "-parallel-size 3: it must divide the 2 ranks"),
        (2, {"ultramem_parallel_size": 0}, "--ultramem-parallel-size 0: .* Use one of 1, 2"),
        (2, {**_PP, "ultramem_parallel_size": 2}, "must divide the 1 ranks of a pipeline stage"),
        (
            3,
            {**_DIMENSION, "micro_batch_size": 2},
            "-value-dim 16 is not divisible by --ultramem-parallel-size 3",
        ),
        (2, {**_DIMENSION, "ultramem_cores": 3, "ultramem_value_dim": 18}, "straddle ranks"),
        (2, {**_GRID, "ultramem_node_size": 0}, "--ultramem-node-size 0: it must be at least 1"),
        (
            2,
            {"num_experts": 4, "ultramem_parallel_size": 2},
            "must equal --expert-model-parallel-size 1",
        ),
        (2, {**_PP, "pipeline_model_parallel_layout": "Etttttt|L", "ultramem_spans": "2:3"}, None),
        (
            3,
            {
                "pipeline_model_parallel_size": 3,
                "ultramem_spans": "2:5",
                "pipeline_model_parallel_layout": "Ettt||tttL",
            },
            "stage 1 has no transformer layer to pass it on",
        ),
        (2, {**_CROSSING, "fp32_residual_connection": True, "bf16": True}, "--fp32-resid"),
    ],
)
def test_impossible_layouts_are_refused(world_size, flags, message):
    if message is None:  # a stage without layers is no obstacle where no span crosses
        run_pretrain(world_size, _flags(**flags, train_iters=1))
        return
    with pytest.raises(RanksFailed, match=message):
        run_pretrain(world_size, _flags(**flags))


def test_a_checkpoint_of_another_table_size_is_refused(start):
    with pytest.raises(RanksFailed, match="--ultramem-num-keys is 12 here, 11 in the checkpoint"):
        run_pretrain(2, _flags(load=start.folder, ultramem_num_keys=12, **_NUMBER))
