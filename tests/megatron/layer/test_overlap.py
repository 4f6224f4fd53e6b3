"""With --ultramem-overlap training is, bit for bit, what it is without."""

import pytest
import torch

from tests.training_runs import run_pretrain, tiny_gpt

_MEMORY = {
    "num_layers": 6,
    "ultramem_spans": "2:3/4:6",
    "ultramem_num_keys": 11,
    "ultramem_topk": 6,
    "ultramem_value_dim": 16,
    "seq_length": 16,
    "max_position_embeddings": 16,
    "global_batch_size": 8,
    "micro_batch_size": 1,
    "train_iters": 2,
    "clip_grad": 0.5,
}

_NUMBER = {"ultramem_partition": "number"}
_DIMENSION = {"ultramem_partition": "dimension"}
_TP = {"tensor_model_parallel_size": 2}
_SP = {**_TP, "sequence_parallel": True, "ultramem_query_conv_kernel": 3}
_PP = {"pipeline_model_parallel_size": 2}
# Span 4:6 runs beside layer 5, where the stage ends, and crosses.
_CROSSING = {**_PP, "pipeline_model_parallel_layout": "Ettttt|tL"}
# Chunks of two layers: span 2:3 crosses at once, the others run beside layers 6 and 8.
_VPP = {
    **_PP,
    "num_virtual_stages_per_pipeline_rank": 2,
    "num_layers": 8,
    "ultramem_spans": "2:3/5:6/7:8",
}
_OVERLAPS = {
    "use_distributed_optimizer": True,
    "overlap_grad_reduce": True,
    "overlap_param_gather": True,
}
_UNIFORM = {"recompute_granularity": "full", "recompute_method": "uniform"}
_BLOCK = {"recompute_granularity": "full", "recompute_method": "block"}
# Without biases: Megatron 0.19.2 recomputes an MLP with a bias for ever, memories or not.
_SELECTIVE = {
    "recompute_granularity": "selective",
    "recompute_modules": ["core_attn", "mlp"],
    "disable_bias_linear": True,
}
_EXPERTS = {
    "num_experts": 4,
    "moe_router_topk": 2,
    "disable_bias_linear": True,
    "expert_model_parallel_size": 2,
}


def _train(world_size, overlap, layout, env):
    flags = {**_MEMORY, **layout, "ultramem_overlap": overlap}
    return run_pretrain(world_size, tiny_gpt(**flags), gradients_at=2, parameters=True, env=env)


@pytest.mark.parametrize(
    ("world_size", "layout"),
    [
        pytest.param(world_size, layout, id=name)
        for name, world_size, layout in [
            ("DP2 number, experts", 2, {**_NUMBER, **_EXPERTS}),
            ("DP2 dimension, selective recompute", 2, {**_DIMENSION, **_OVERLAPS, **_SELECTIVE}),
            ("P1 of DP2, distributed optimizer", 2, {"ultramem_parallel_size": 1, **_OVERLAPS}),
            ("TP2 DP2 number", 4, {**_TP, **_NUMBER, "bf16": True}),
            ("TP2 SP dimension", 2, {**_SP, **_DIMENSION}),
            (
                "PP2 crossing, TP2, recompute",
                4,
                {**_CROSSING, **_TP, **_DIMENSION, **_UNIFORM, "recompute_num_layers": 3},
            ),
            ("PP2 interleaved, DP2", 4, {**_VPP, **_NUMBER, **_OVERLAPS}),
            (
                "recompute of some layers, evaluation",
                2,
                {
                    **_BLOCK,
                    "recompute_num_layers": 2,
                    **_DIMENSION,
                    "eval_iters": 1,
                    "eval_interval": 1,
                },
            ),
        ]
    ],
)
def test_overlap_changes_no_bit(world_size, layout):
    assert_no_bit_changes(world_size, layout)


def assert_no_bit_changes(world_size, layout, env=None):
    """Between a run with the flag and one without."""
    expected, found = (_train(world_size, overlap, layout, env) for overlap in (False, True))
    assert found.losses == expected.losses
    assert found.grad_norms == expected.grad_norms
    for ours, theirs in zip(found.ranks, expected.ranks, strict=True):
        for kind in ("gradients", "parameters"):
            mine, wanted = getattr(ours, kind), getattr(theirs, kind)
            assert mine.keys() == wanted.keys()
            for name, tensor in wanted.items():
                assert torch.equal(mine[name], tensor), f"{kind} {name}"


def test_a_checkpoint_does_not_care(tmp_path):
    flags = {**_MEMORY, "train_iters": 3, "ckpt_format": "torch_dist"}
    saving = tiny_gpt(**flags, save=tmp_path, save_interval=2)
    expected = run_pretrain(1, saving).losses
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("2")
    resumed = run_pretrain(1, tiny_gpt(**flags, load=tmp_path, ultramem_overlap=True))
    assert resumed.losses == expected[2:]
