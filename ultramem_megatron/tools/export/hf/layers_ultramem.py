"""The layers of an UltraMem GPT: attention or Mamba, MLP or experts, and memories beside them.

B batch, S sequence, D hidden, K head dim.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicLayer
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .configuration_ultramem import UltraMemGPTConfig
from .mamba_ultramem import UltraMemMamba
from .memory_ultramem import Pending, UltraMemMemory
from .values_ultramem import UltraMemTables


def eager_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Attention written out, which returns its weights: the interface's "eager"."""
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    scores = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = F.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class UltraMemAttention(nn.Module):
    """Causal self-attention; queries may share keys and values in groups."""

    def __init__(self, config: UltraMemGPTConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = self.head_dim**-0.5
        self.is_causal = True
        width = config.num_attention_heads * self.head_dim
        narrow = config.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, width, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.hidden_size, narrow, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, narrow, bias=config.attention_bias)
        self.o_proj = nn.Linear(width, config.hidden_size, bias=config.attention_output_bias)
        self.q_norm = norm(config, self.head_dim) if config.qk_norm else None
        self.k_norm = norm(config, self.head_dim) if config.qk_norm else None

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """hidden_states: (B, S, D), normed."""
        shape = hidden_states.shape[:-1]
        by_head = (*shape, -1, self.head_dim)
        query = self.q_proj(hidden_states).view(by_head).transpose(1, 2)
        key = self.k_proj(hidden_states).view(by_head).transpose(1, 2)
        value = self.v_proj(hidden_states).view(by_head).transpose(1, 2)
        if self.q_norm is not None and self.k_norm is not None:
            query, key = self.q_norm(query), self.k_norm(key)
        if position_embeddings is not None:
            query, key = _rotate(query, position_embeddings), _rotate(key, position_embeddings)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        attention_interface = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        mixed, weights = attention_interface(
            self, query, key, value, attention_mask, dropout=0.0, scaling=self.scaling, **kwargs
        )
        return self.o_proj(mixed.reshape(*shape, -1).contiguous()), weights


class UltraMemMLP(nn.Module):
    """GELU, or SwiGLU."""

    def __init__(self, config: UltraMemGPTConfig, width: int) -> None:
        super().__init__()
        self.up_proj = nn.Linear(config.hidden_size, width, bias=config.mlp_bias)
        self.down_proj = nn.Linear(width, config.hidden_size, bias=config.mlp_bias)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., D), normed."""
        return self.down_proj(self.act_fn(self.up_proj(x)))


class UltraMemGatedMLP(UltraMemMLP):
    """SwiGLU."""

    def __init__(self, config: UltraMemGPTConfig, width: int) -> None:
        super().__init__(config, width)
        self.gate_proj = nn.Linear(config.hidden_size, width, bias=config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., D), normed."""
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class UltraMemRouter(nn.Module):
    """Which experts a token goes to, and their weights. No nn.Linear: it is never quantised."""

    def __init__(self, config: UltraMemGPTConfig) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Weights and numbers (T, k) of each token's experts; tokens (T, D)."""
        topk = self.config.num_experts_per_tok
        dtype = torch.float32 if self.config.router_float32 else tokens.dtype
        scores = F.linear(tokens.to(dtype), self.weight.to(dtype))
        if self.config.norm_topk_prob:
            best, chosen = scores.topk(topk)
            weights = best.float().softmax(-1)
        else:
            weights, chosen = scores.float().softmax(-1).topk(topk)
        return weights.to(tokens.dtype), chosen


class UltraMemExperts(nn.Module):
    """Mixture of experts: each token's k best, weighted by a softmax; no token is dropped."""

    def __init__(self, config: UltraMemGPTConfig) -> None:
        super().__init__()
        self.gate = UltraMemRouter(config)
        # Not "experts": vLLM would put its own there, which have other activations and weights.
        self.expert_mlps = nn.ModuleList(
            _mlp(config, config.moe_intermediate_size) for _ in range(config.num_experts)
        )

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, S, D), normed."""
        tokens = x.flatten(0, 1)
        weights, chosen = self.gate(tokens)
        mixed = torch.zeros_like(tokens)
        for number, expert in enumerate(self.expert_mlps):
            token, place = (chosen == number).nonzero(as_tuple=True)
            mixed.index_add_(0, token, expert(tokens[token]) * weights[token, place].unsqueeze(1))
        return mixed.view_as(x)


class UltraMemDecoderLayer(GradientCheckpointingLayer):
    """Attention and MLP, or one of them, or Mamba; and memories.

    A memory reads what the MLP reads, and is added at its span's end.
    """

    def __init__(self, config: UltraMemGPTConfig, layer_idx: int) -> None:
        super().__init__()
        parts = config.parts(layer_idx + 1)
        self.attends, self.scans, self.feeds = "*" in parts, "M" in parts, parts[-1] in "-E"
        if self.attends:
            self.self_attn = UltraMemAttention(config, config.cache_place(layer_idx))
        if self.scans:
            self.mamba = UltraMemMamba(config, config.cache_place(layer_idx))
        if self.attends or self.scans:
            self.input_layernorm = norm(config, config.hidden_size)
        starts = [start for start, _ in config.spans]
        self.mlp: nn.Module | None = None
        if self.feeds:
            if not ((config.memory or {}).get("replace_mlp") and layer_idx + 1 in starts):
                dense = parts[-1] == "-"
                width = config.intermediate_size
                self.mlp = _mlp(config, width) if dense else UltraMemExperts(config)
            self.post_attention_layernorm = norm(config, config.hidden_size)
        self.ends_span = layer_idx + 1 in [end for _, end in config.spans]
        self.memory: UltraMemMemory | None = None
        if config.memory is not None and layer_idx + 1 in starts:
            number = starts.index(layer_idx + 1)
            self.table, first_value = config.table_places[number]
            self.memory = UltraMemMemory(
                config.memory,
                config.hidden_size,
                config.norm_eps,
                config.value_quantization,
                first_value=first_value,
                shared=config.shared_tables > 0,
                on_disk=config.table_memory == "disk",
            )
            # Inputs of the convolution are kept in the cache, behind the layers' keys.
            self.cache_idx = config.num_hidden_layers + number

    def forward(
        self,
        hidden_states: Tensor,
        pending: Pending | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        real: Tensor | None = None,
        tables: Sequence[UltraMemTables] = (),
        **kwargs: Any,
    ) -> tuple[Tensor, Pending | None]:
        """pending: result of a memory not added yet. real: (B, S), False for padding.

        tables: those that memories share.
        """
        if self.attends:
            mixed, _ = self.self_attn(
                hidden_states=self.input_layernorm(hidden_states),
                position_embeddings=position_embeddings,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                **kwargs,
            )
            hidden_states = hidden_states + mixed
        if self.scans:
            normed = self.input_layernorm(hidden_states)
            hidden_states = hidden_states + self.mamba(normed, past_key_values, real)
        if self.feeds:
            normed = self.post_attention_layernorm(hidden_states)
            if self.mlp is not None:
                hidden_states = hidden_states + self.mlp(normed)
            if self.memory is not None:
                before = None
                if self.memory.history:
                    normed, before = self._history(normed, past_key_values, real)
                shared = tables[self.table] if tables else None
                pending = self.memory(normed, before, position_ids, real, tables=shared)
        if not self.ends_span:
            return hidden_states, pending
        if pending is None:
            raise ValueError("A memory's span crosses a cut of the model: pipelines cannot run it.")
        return hidden_states + (pending() if callable(pending) else pending), None

    def _history(
        self, x: Tensor, cache: Cache | None, real: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """x (B, S, D) without padding, and the inputs of the convolution before it."""
        assert self.memory is not None
        taps = self.memory.history
        if real is not None:
            x = x * real.unsqueeze(-1)  # padding is nothing, as the time before a text
        if cache is None:
            return x, None
        while len(cache.layers) <= self.cache_idx:
            cache.layers.append(DynamicLayer())
        kept: Any = cache.layers[self.cache_idx]
        seen, _ = kept.update(x.unsqueeze(1), x.unsqueeze(1)[..., :0])
        return x, F.pad(seen[:, 0], (0, 0, taps, 0))[:, -taps - x.shape[1] : -x.shape[1]]


def _mlp(config: UltraMemGPTConfig, width: int) -> UltraMemMLP:
    return (UltraMemGatedMLP if config.hidden_act == "silu" else UltraMemMLP)(config, width)


def norm(config: UltraMemGPTConfig, width: int) -> nn.Module:
    kind = nn.LayerNorm if config.normalization == "LayerNorm" else nn.RMSNorm
    return kind(width, eps=config.norm_eps)


def _rotate(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """x: (B, heads, S, K); channel i turns with channel i + R/2, the rest pass."""
    cos, sin = rotation
    turned, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    first, second = turned.chunk(2, dim=-1)
    return torch.cat([turned * cos + torch.cat([-second, first], -1) * sin, rest], -1)
