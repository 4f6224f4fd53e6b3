"""Flags whose layout is forgotten against flags that never had one."""

from tests.ranks import run_on_ranks
from tests.training_runs import tiny_gpt

_LAYOUT = {
    "tensor_model_parallel_size": 4,
    "sequence_parallel": True,
    "context_parallel_size": 4,
    "cp_comm_type": "a2a+p2p",
    "hierarchical_context_parallel_sizes": (2, 2),
    "expert_model_parallel_size": 2,
    "expert_tensor_parallel_size": 2,
    "pipeline_model_parallel_size": 2,
    "pipeline_model_parallel_layout": "Et|tL",
    "num_layers_per_virtual_pipeline_stage": 1,
    "num_virtual_stages_per_pipeline_rank": 2,
    "decoder_first_pipeline_num_layers": 1,
    "decoder_last_pipeline_num_layers": 1,
    "account_for_embedding_in_pipeline_split": True,
    "account_for_loss_in_pipeline_split": True,
    "use_tp_pp_dp_mapping": True,
    "num_distributed_optimizer_instances": 2,
    "tensor_parallel_num_weight_shards": 4,
    "expert_tensor_parallel_num_weight_shards": 2,
    "ultramem_parallel_size": 8,
    "ultramem_partition": "number",
    "ultramem_overlap": True,
}


def _checked(layout):
    from megatron.training.arguments import validate_args

    from ultramem_megatron.megatron.flags import machine_flags
    from ultramem_megatron.megatron.flags.layout_flags import lay_on_one_rank
    from ultramem_megatron.megatron.flags.parse import parse_words

    args = parse_words(machine_flags.complete(tiny_gpt(**layout)))
    if layout:
        lay_on_one_rank(args)
    validate_args(args)
    return {name: repr(value) for name, value in vars(args).items()}


def test_a_layout_forgotten_is_as_if_it_had_not_been_given():
    (never,), (forgotten,) = (run_on_ranks(1, _checked, layout) for layout in ({}, _LAYOUT))
    assert forgotten == never
