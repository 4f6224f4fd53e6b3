"""An MoE layer whose experts are one grouped product: no loop, nothing read on the host.

Megatron's local experts take turns in a loop that first asks the host how many tokens each has;
that cannot stand in a CUDA graph, and on a GPU launches decide how long it takes. Here tokens are
sorted by expert once, and the products of all experts are calls of PyTorch's `grouped_mm`. Weights
and routing are Megatron's.

T tokens, K experts a token, N experts, D hidden, F inner size (2 F with a gate).
"""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.moe.moe_layer import BaseMoELayer
from megatron.core.transformer.moe.moe_utils import topk_routing_with_score_function
from torch import Tensor, nn

from ultramem_megatron.errors import UltraMemError


class GroupedProducts(nn.Module):
    """The experts themselves."""

    def __init__(self, experts: Any, config: Any) -> None:
        """experts: Megatron's SequentialMLP, whose weights move here."""
        super().__init__()
        self.up = nn.Parameter(_moved(experts, "linear_fc1"), requires_grad=False)  # N, F, D
        self.down = nn.Parameter(_moved(experts, "linear_fc2"), requires_grad=False)  # N, D, F
        self.activation, self.gated = config.activation_func, config.gated_linear_unit

    def forward(self, tokens: Tensor, ends: Tensor) -> Tensor:
        """tokens: (T*K, D), sorted by expert. ends: (N,) int32, where each expert's end."""
        inner = F.grouped_mm(tokens, self.up.transpose(1, 2), offs=ends)
        if self.gated:
            gate, inner = inner.chunk(2, -1)
            inner = self.activation(gate) * inner
        else:
            inner = self.activation(inner)
        return F.grouped_mm(inner, self.down.transpose(1, 2), offs=ends)


class GroupedExperts(nn.Module):
    """In place of Megatron's MoE layer."""

    numbers: Tensor

    def __init__(self, layer: BaseMoELayer) -> None:
        """layer: loses its experts' weights to this. Raises UltraMemError for other kinds."""
        super().__init__()
        config = layer.config
        routing = layer.router.routing_type
        capped = config.moe_expert_capacity_factor is not None
        of_batch = routing in ("sinkhorn", "quantile_balancing")
        if config.add_bias_linear or layer.use_shared_expert or capped or of_batch:
            raise UltraMemError(
                f"The grouped product of experts knows no biases (use --disable-bias-linear), no "
                f"shared experts, no capacity factor, no sinkhorn, no quantile_balancing (given: "
                f"{routing}). Leave these out."
            )
        self.router, self.config = layer.router, config
        self.products = GroupedProducts(layer.experts, config)
        numbers = torch.arange(1, len(self.products.up) + 1, device=self.products.up.device)
        self.register_buffer("numbers", numbers, persistent=False)

    def forward(self, hidden_states: Tensor, **_: Any) -> tuple[Tensor, None]:
        """hidden_states: (S, B, D), to the same; no bias."""
        tokens = hidden_states.flatten(0, 1)
        weights, experts = self._route(tokens)
        sorted_experts, order = experts.flatten().sort(stable=True)
        ends = torch.searchsorted(sorted_experts, self.numbers, out_int32=True)
        products = self.products(tokens[order // experts.shape[1]], ends)
        of_token = torch.empty_like(products)
        of_token[order] = products
        # (T, 1, K) @ (T, K, D): each token's experts, weighted
        out = weights.to(tokens.dtype).unsqueeze(1) @ of_token.view(*experts.shape, -1)
        return out.view_as(hidden_states), None

    def _route(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Weights and numbers of each token's experts, (T, K)."""
        config, router = self.config, self.router
        chosen: tuple[Tensor, Tensor] = topk_routing_with_score_function(
            router.gating(tokens),
            router.topk,
            use_pre_softmax=config.moe_router_pre_softmax,
            num_groups=config.moe_router_num_groups,
            group_topk=config.moe_router_group_topk,
            scaling_factor=config.moe_router_topk_scaling_factor,
            score_function=router.score_function,
            expert_bias=router.expert_bias,
            dense_output=True,
        )
        return chosen


def group_experts(model: Any) -> None:
    """Give every MoE layer of the model the grouped product instead. Raises UltraMemError."""
    for layer in model.decoder.layers:
        if isinstance(layer.mlp, BaseMoELayer):
            layer.mlp = GroupedExperts(layer.mlp)


def _moved(experts: Any, linear: str) -> Tensor:
    """The weights of all experts in one tensor; the experts lose theirs, so that one fits."""
    weights = [getattr(expert, linear).weight for expert in experts.local_experts]
    stacked = torch.stack([weight.detach() for weight in weights])
    for expert in experts.local_experts:
        getattr(expert, linear).weight = None
    return stacked
