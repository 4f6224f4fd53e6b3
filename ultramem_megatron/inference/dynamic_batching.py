"""Megatron's context of dynamic batching, with the room that a number of requests needs."""

import math
from typing import Any

from ultramem_megatron.errors import UltraMemError
from ultramem_megatron.megatron.pipeline.pattern import ATTENTION, MAMBA

_STEP_TOKENS = 4096
"""Of prompts, in one step of dynamic batching; further requests wait."""


def dynamic_context(model: Any, requests: int, length: int, block_tokens: int = 256) -> Any:
    """Megatron's DynamicInferenceContext with room for so many requests of `length` tokens.

    Unlike one made from the model's config alone it knows that an expert-parallel group without
    experts only shares tables. block_tokens: of a block of the cache; FlashAttention asks for 256.

    Raises UltraMemError for experts over several ranks, whose exchange under dynamic batching needs
    kernels of a GPU that have not been tried.
    """
    from megatron.core import parallel_state
    from megatron.core.inference.config import InferenceConfig, MambaInferenceStateConfig
    from megatron.core.inference.contexts import DynamicInferenceContext
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.utils import get_model_config

    config = get_model_config(model)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    if groups.ep.size() > 1:
        if config.num_moe_experts:
            raise UltraMemError(
                f"Dynamic batching of a model whose experts are shared by {groups.ep.size()} ranks "
                f"is not supported. Use static batching, or --ultramem-parallel-size 1."
            )
        groups.ep = parallel_state.get_context_parallel_group()  # of one rank, in decoding
    ranks = groups.tp.size()
    slots = math.ceil(requests / math.lcm(4, ranks)) * math.lcm(4, ranks)
    heads = math.ceil((config.num_query_groups or config.num_attention_heads) / ranks)
    mamba = MambaInferenceStateConfig.from_model(model)
    # Of a HybridModel without Mamba layers Megatron makes room in all layers.
    layers = config.num_layers if mamba is None else mamba.layer_type_list.count(ATTENTION)
    token_bytes = 2 * layers * heads * config.kv_channels * config.params_dtype.itemsize
    blocks = slots * math.ceil(length / block_tokens) + 2  # one is a dummy, one rounds up
    return DynamicInferenceContext(
        config,
        InferenceConfig(
            max_sequence_length=length,
            max_requests=slots,
            max_tokens=max(slots, length, _STEP_TOKENS),
            block_size_tokens=block_tokens,
            buffer_size_gb=(blocks * block_tokens * token_bytes + slots * _state_bytes(mamba))
            / 2**30,
            mamba_inference_state_config=mamba,
            pg_collection=groups,
            # None: no graphs. A graph is captured for each power of two.
            num_cuda_graphs=slots.bit_length() if config.cuda_graph_impl == "local" else None,
            use_cuda_graphs_for_non_decode_steps=False,
        ),
    )


def _state_bytes(mamba: Any) -> int:
    """Of one request's states in all Mamba layers, by Megatron's MambaInferenceStateConfig."""
    if mamba is None:
        return 0
    one_layer = (
        math.prod(mamba.conv_states_shape) * mamba.conv_states_dtype.itemsize
        + math.prod(mamba.ssm_states_shape) * mamba.ssm_states_dtype.itemsize
    )
    count: int = mamba.layer_type_list.count(MAMBA)
    return count * one_layer
