"""Small models of every kind that an export knows, and Megatron's flags for them."""

from typing import Any

import torch

from tests.training_runs import tiny_gpt

_MEMORY = {"ultramem_num_keys": 12, "ultramem_topk": 6}
MODELS: dict[str, dict[str, Any]] = {
    "convolution": {**_MEMORY, "ultramem_spans": "1:2/3:4", "ultramem_query_conv_kernel": 4},
    "swiglu": {
        **_MEMORY,
        "ultramem_spans": "2:3",
        "swiglu": True,
        "normalization": "RMSNorm",
        "disable_bias_linear": True,
        "add_qkv_bias": True,
        "group_query_attention": True,
        "num_query_groups": 2,
        "kv_channels": 12,
        "rotary_percent": 0.5,
        "rotary_base": 5000,
        "qk_layernorm": True,
        "norm_epsilon": 1e-3,
    },
    "learned": {
        **_MEMORY,
        "ultramem_spans": "full",
        "position_embedding_type": "learned_absolute",
        "untie_embeddings_and_output_weights": False,
        "ultramem_retrieval": "pkm",
        "ultramem_softmax": True,
        "ultramem_init": "official",
        "ultramem_qk_norm": "rmsnorm",
        "seed": 7,
    },
    "experts": {
        "num_experts": 6,
        "moe_ffn_hidden_size": 40,
        "disable_bias_linear": True,
        "moe_router_pre_softmax": True,
        "moe_router_topk": 3,
        "moe_router_dtype": "fp32",
    },
    "experts and memory": {
        **_MEMORY,
        "ultramem_spans": "2:3",
        "num_experts": 4,
        "disable_bias_linear": True,
        "swiglu": True,
        "moe_router_load_balancing_type": "none",
    },
    "dense bf16": {"bf16": True},
    # Rounding changes which of two nearly equal values is picked, in either model.
    "bf16": {**_MEMORY, "ultramem_spans": "2:3", "bf16": True, "disable_bias_linear": True},
}
TOLERANCES = {"dense bf16": 0.02, "bf16": 0.12}
"""Where it is not that of float32."""


def flags(changes: dict[str, Any]) -> list[str]:
    """Megatron's flags of a model in the table."""
    return tiny_gpt(**{"num_layers": 4, "init_method_std": 0.2, **changes})


def tokens() -> torch.Tensor:
    """(2, 20) ids."""
    return torch.randint(500, (2, 20), generator=torch.Generator().manual_seed(3))


def shaken(model: Any) -> None:
    """Move every parameter, and the means of queries: none may hide a mistake by its value."""
    from ultramem_megatron.memory.layer import memory_layers

    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        noise = torch.rand(parameter.shape, generator=generator) - 0.5
        parameter.data += 0.2 * noise.to(parameter.dtype)
    for layer in memory_layers(model):
        if layer.query.common is not None:
            layer.query.common.mean.uniform_(-1, 1, generator=generator)
