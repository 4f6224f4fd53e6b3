"""Flags that say how ranks share a model, and how to forget them."""

from argparse import Namespace
from collections.abc import Mapping
from typing import Any

ONE_RANK: Mapping[str, Any] = {
    "tensor_model_parallel_size": 1,
    "sequence_parallel": False,
    "context_parallel_size": 1,
    "cp_comm_type": ["p2p"],
    "hierarchical_context_parallel_sizes": None,
    "expert_model_parallel_size": 1,
    "expert_tensor_parallel_size": None,
    "pipeline_model_parallel_size": 1,
    "pipeline_model_parallel_layout": None,
    "virtual_pipeline_model_parallel_size": None,
    "num_layers_per_virtual_pipeline_stage": None,
    "num_virtual_stages_per_pipeline_rank": None,
    "decoder_first_pipeline_num_layers": None,
    "decoder_last_pipeline_num_layers": None,
    "account_for_embedding_in_pipeline_split": False,
    "account_for_loss_in_pipeline_split": False,
    "use_tp_pp_dp_mapping": False,
    "num_distributed_optimizer_instances": 1,
    "tensor_parallel_num_weight_shards": None,
    "expert_tensor_parallel_num_weight_shards": None,
    "gtp_weight_remat_size": 1,
    "expert_gtp_weight_remat_size": 1,
    "ultramem_parallel_size": None,
    "ultramem_partition": None,
    "ultramem_node_size": None,
    "ultramem_overlap": False,
    "ultramem_table_memory": None,
}
"""Each with its value where one rank has all of the model; names as in Megatron's parsed flags."""


def lay_on_one_rank(args: Namespace) -> None:
    """Replace the layout in parsed flags; what else they say of the model stays."""
    vars(args).update(world_size=1, **ONE_RANK)
    if args.hybrid_layer_pattern is not None:
        args.hybrid_layer_pattern = args.hybrid_layer_pattern.replace("|", "")
