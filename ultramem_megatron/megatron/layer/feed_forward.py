"""How large the output of a transformer layer's own MLP or experts is at the start.

Read off Megatron's config: sizes, initial weights, activation, routing. `--ultramem-init matched`
starts memories as large.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.transformer.moe.moe_utils import topk_routing_with_score_function
from megatron.core.transformer.transformer_config import TransformerConfig

from ultramem_megatron.errors import UltraMemError
from ultramem_megatron.megatron.pipeline.pattern import EXPERTS, MLP, kept_stages
from ultramem_megatron.memory.config import UltraMemConfig, flag
from ultramem_megatron.memory.initialization.feed_forward import mlp_std

_ROUTED_TOKENS = 4096


def residual_branches(config: TransformerConfig) -> int:
    """How many outputs the model adds to its hidden states, as Megatron scales their weights."""
    return config.num_layers * (1 if config.is_hybrid_model else 2)


def check_replaced(ultramem: UltraMemConfig, config: TransformerConfig) -> None:
    """Raise UltraMemError where a memory would stand in the place of experts.

    Megatron's balancing losses count the layers that have experts by its flags.
    """
    if not ultramem.replace_mlp:
        return
    for span in ultramem.spans:
        if _has_experts(config, span.start):
            raise UltraMemError(
                f"{flag('spans')} {span} with {flag('replace_mlp')}: layer {span.start} has "
                f"experts, and a memory takes the place of an MLP. Choose layers without "
                f"(--moe-layer-freq, or - in a pattern)."
            )


def mlp_parameters(config: TransformerConfig) -> int:
    """Elements of the matrices of one layer's MLP."""
    matrices = 3 if config.gated_linear_unit else 2
    return matrices * config.hidden_size * config.ffn_hidden_size


def feed_forward_std(config: TransformerConfig, layer_number: int) -> float:
    """Of the layer of this number, counted from 1, for inputs as a norm leaves them.

    In a HybridModel, where layers without any of the two exist: of the last one up to it that has.
    Experts draw their weights independently, so the squares of their shares of the output add up.
    """
    if not _has_experts(config, layer_number):
        return _mlp_std(config, config.ffn_hidden_size)
    inner = config.moe_ffn_hidden_size or config.ffn_hidden_size
    square = _mean_square_share(config) * _mlp_std(config, inner) ** 2
    if config.moe_shared_expert_intermediate_size:
        square += _mlp_std(config, config.moe_shared_expert_intermediate_size) ** 2
    return math.sqrt(square)


def _has_experts(config: TransformerConfig, layer_number: int) -> bool:
    if config.num_moe_experts is None:
        return False
    stages = kept_stages(config)
    if stages is not None:
        before = "".join(stages)[:layer_number]
        return before.rfind(EXPERTS) > before.rfind(MLP)
    frequency = config.moe_layer_freq
    if isinstance(frequency, int):
        return (layer_number - 1) % frequency == 0
    return bool(frequency[layer_number - 1])


def _mlp_std(config: TransformerConfig, inner_size: int) -> float:
    outer = config.hidden_size
    return mlp_std(
        outer,
        inner_size,
        first_std=_std(config.init_method, outer, inner_size),
        second_std=_std(config.output_layer_init_method, outer, inner_size),
        activation=config.activation_func,
        gated=config.gated_linear_unit,
        gate_offset=getattr(config, "glu_linear_offset", 0.0),
    )


def _std(method: Callable[..., Any] | None, rows: int, columns: int) -> float:
    """Standard deviation of the weights that a Megatron init method draws."""
    if isinstance(method, functools.partial) and "std" in method.keywords:
        return float(method.keywords["std"])
    if method is torch.nn.init.xavier_uniform_:
        return math.sqrt(2 / (rows + columns))
    assert method is not None, "TransformerConfig fills it in"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        sample = torch.empty(min(rows, 512), min(columns, 512), device="cpu", dtype=torch.float32)
        method(sample)
        return float(sample.double().std())


def _mean_square_share(config: TransformerConfig) -> float:
    """Sum over a token's experts of the mean square of their shares, by Megatron's own routing."""
    std = _std(config.init_method, config.hidden_size, config.num_moe_experts)
    generator = torch.Generator("cpu").manual_seed(0)
    logits = torch.randn(_ROUTED_TOKENS, config.num_moe_experts, generator=generator, device="cpu")
    shares = topk_routing_with_score_function(
        logits * std * math.sqrt(config.hidden_size),
        config.moe_router_topk,
        use_pre_softmax=config.moe_router_pre_softmax,
        num_groups=config.moe_router_num_groups,
        group_topk=config.moe_router_group_topk,
        scaling_factor=config.moe_router_topk_scaling_factor,
        score_function=config.moe_router_score_function,
    )[0]
    return float(shares.double().square().sum(1).mean())
