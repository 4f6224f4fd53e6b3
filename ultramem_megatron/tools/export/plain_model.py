"""A GPT with memories or experts in plain PyTorch: what an exported model computes, no Megatron.

Or a HybridModel, whose layers are each one part of a GPT's.

No dropout, no parallelism, no KV cache: one forward pass over whole sequences. Parameters keep
Megatron's shapes; where a shape needs explaining, the code that reads it does.

B batch, S sequence, D hidden, V vocabulary (padded), G query groups, Q heads per group, K head dim.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ultramem_megatron.kernels.precision import at_least_float32
from ultramem_megatron.megatron.pipeline.pattern import ATTENTION, EXPERTS, MAMBA, MLP, READABLE
from ultramem_megatron.memory.config import UltraMemConfig
from ultramem_megatron.memory.layer import UltraMemLayer
from ultramem_megatron.memory.modules import Linear
from ultramem_megatron.memory.placement import Placement, placements
from ultramem_megatron.memory.spans import Span
from ultramem_megatron.memory.values import VALUES
from ultramem_megatron.memory.values.contract import Site
from ultramem_megatron.tools.export.plain_mamba import PlainMamba

Dtype = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True, kw_only=True)
class PlainConfig:
    """Sizes and choices of a PlainGPT; the JSON file holds these fields."""

    vocab_size: int
    """V: rows of the embedding, with the padding that training added."""
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    """Heads of keys and values; num_attention_heads unless queries share them."""
    kv_channels: int
    """Width of a head."""
    max_positions: int
    activation: Literal["gelu", "swiglu"] = "gelu"
    normalization: Literal["LayerNorm", "RMSNorm"] = "LayerNorm"
    norm_epsilon: float = 1e-5
    bias: bool = True
    qkv_bias: bool = False
    """Biases of the query-key-value projection where other linears have none."""
    qk_norm: bool = False
    """Norms of every head's query and key."""
    positions: Literal["rope", "learned_absolute", "none"] = "rope"
    rotary_base: float = 10000.0
    rotary_percent: float = 1.0
    tied_embeddings: bool = False
    pattern: str | None = None
    """Of a HybridModel: each layer is attention (*), MLP (-), experts (E) or Mamba (M)."""
    mamba_num_heads: int = 0
    mamba_head_dim: int = 0
    mamba_num_groups: int = 0
    """Groups of heads that share what a state is written and read with."""
    mamba_state_dim: int = 0
    num_experts: int | None = None
    """In place of every layer's MLP, of a HybridModel in its layers E; None: no experts."""
    expert_topk: int = 2
    expert_ffn_hidden_size: int | None = None
    router_pre_softmax: bool = False
    """Weights of a token's experts are taken from the softmax over all, and do not sum to 1."""
    router_float32: bool = False
    dtype: Dtype = "float32"
    ultramem: UltraMemConfig | None = None

    def parts(self, number: int) -> str:
        """What layer `number`, counted from 1, consists of, in the pattern's symbols."""
        if self.pattern is not None:
            return self.pattern[number - 1]
        return ATTENTION + (EXPERTS if self.num_experts else MLP)


class PlainGPT(nn.Module):
    """Decoder-only transformer, pre-norm, with memories at the spans of `config.ultramem`."""

    def __init__(self, config: PlainConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        if config.positions == "learned_absolute":
            self.position_embedding = nn.Embedding(config.max_positions, config.hidden_size)
        values: dict[int, nn.Module] = {}
        self.layers = nn.ModuleList(
            PlainLayer(config, number, values) for number in range(1, config.num_layers + 1)
        )
        self.final_norm = _norm(config, config.hidden_size)
        if not config.tied_embeddings:
            self.output = Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits (B, S, V), float32, of tokens (B, S), int64; S at most `config.max_positions`."""
        hidden = self.embedding(tokens)
        if self.config.positions == "learned_absolute":
            hidden = hidden + self.position_embedding.weight[: tokens.shape[1]]
        rotation = _rotation(self.config, tokens.shape[1], tokens.device)
        pending: Tensor | None = None
        for layer in self.layers:
            hidden, pending = layer(hidden, pending, rotation)
        head = self.embedding if self.config.tied_embeddings else self.output
        return at_least_float32(F.linear(self.final_norm(hidden), head.weight))


class PlainLayer(nn.Module):
    """Attention and MLP, or one of them, or Mamba; and memories.

    A memory reads what the MLP reads, and is added at its span's end.
    """

    def __init__(self, config: PlainConfig, number: int, values: dict[int, nn.Module]) -> None:
        """number: counted from 1. values: of memories before, by number of their tables."""
        super().__init__()
        parts = config.parts(number)
        self.attends = ATTENTION in parts
        if self.attends:
            self.attention_norm = _norm(config, config.hidden_size)
            self.attention = PlainAttention(config)
        self.scans = MAMBA in parts
        if self.scans:
            self.mamba_norm = _norm(config, config.hidden_size)
            self.mamba = PlainMamba(
                config.hidden_size,
                heads=config.mamba_num_heads,
                head_dim=config.mamba_head_dim,
                groups=config.mamba_num_groups,
                state_dim=config.mamba_state_dim,
            )
        self.feeds = parts[-1] in READABLE
        if self.feeds:
            self.mlp_norm = _norm(config, config.hidden_size)
        spans: tuple[Span, ...] = config.ultramem.spans if config.ultramem else ()
        replaced = config.ultramem is not None and config.ultramem.replace_mlp
        self.mlp: nn.Module | None = None
        if self.feeds and not (replaced and number in {span.start for span in spans}):
            self.mlp = PlainExperts(config) if parts[-1] == EXPERTS else PlainMLP(config)
        self.ends_span = number in {span.end for span in spans}
        self.memory: UltraMemLayer | None = None
        places = placements(config.ultramem) if config.ultramem else ()
        for place in places:
            if place.reads == number:
                self.memory = _memory(config, place, values)

    def forward(
        self, hidden: Tensor, pending: Tensor | None, rotation: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """hidden (B, S, D); pending: result of a memory that has not been added yet, or None."""
        if self.attends:
            hidden = hidden + self.attention(self.attention_norm(hidden), rotation)
        if self.scans:
            hidden = hidden + self.mamba(self.mamba_norm(hidden))
        if self.feeds:
            normed = self.mlp_norm(hidden)
            if self.mlp is not None:
                hidden = hidden + self.mlp(normed)
            if self.memory is not None:
                # The convolution of the queries runs over the first axis.
                pending = self.memory(normed.transpose(0, 1)).transpose(0, 1)
        if not self.ends_span:
            return hidden, pending
        assert pending is not None
        return hidden + pending, None


class PlainAttention(nn.Module):
    """Causal self-attention; queries in groups that share keys and values."""

    def __init__(self, config: PlainConfig) -> None:
        super().__init__()
        self.config = config
        width = config.kv_channels * config.num_attention_heads
        both = 2 * config.kv_channels * config.num_query_groups
        bias = config.bias or config.qkv_bias
        self.qkv = Linear(config.hidden_size, width + both, bias=bias)
        self.proj = Linear(width, config.hidden_size, bias=config.bias)
        if config.qk_norm:
            self.query_norm = _norm(config, config.kv_channels)
            self.key_norm = _norm(config, config.kv_channels)

    def forward(self, x: Tensor, rotation: Tensor | None) -> Tensor:
        """x: (B, S, D), normed."""
        config = self.config
        groups, channels = config.num_query_groups, config.kv_channels
        per_group = config.num_attention_heads // groups
        # The rows of the weight are, group by group: Q queries, one key, one value.
        by_group = self.qkv(x).unflatten(-1, (groups, per_group + 2, channels))  # (B, S, G, Q+2, K)
        query, key, value = by_group.split([per_group, 1, 1], dim=3)
        query, key, value = (heads.flatten(2, 3).transpose(1, 2) for heads in (query, key, value))
        if config.qk_norm:
            query, key = self.query_norm(query), self.key_norm(key)
        if rotation is not None:
            query, key = _rotate(query, rotation), _rotate(key, rotation)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        return self.proj(mixed.transpose(1, 2).flatten(2))


class PlainMLP(nn.Module):
    """GELU, or SwiGLU: silu of the first half of `up` times the second half."""

    def __init__(self, config: PlainConfig, width: int | None = None) -> None:
        super().__init__()
        self.gated = config.activation == "swiglu"
        width = width or config.ffn_hidden_size
        self.up = Linear(config.hidden_size, 2 * width if self.gated else width, bias=config.bias)
        self.down = Linear(width, config.hidden_size, bias=config.bias)

    def forward(self, x: Tensor, weight: Tensor | float = 1.0) -> Tensor:
        """x: (..., D), normed; weight, broadcast: of the result."""
        inner = self.up(x)
        if self.gated:
            gate, inner = inner.chunk(2, dim=-1)
            return self.down(F.silu(gate) * inner * weight)
        return self.down(F.gelu(inner) * weight)


class PlainExperts(nn.Module):
    """Mixture of experts: each token's k best, weighted by a softmax; no token is dropped."""

    def __init__(self, config: PlainConfig) -> None:
        super().__init__()
        assert config.num_experts is not None
        self.config = config
        self.router = Linear(config.hidden_size, config.num_experts, bias=False)
        self.experts = nn.ModuleList(
            PlainMLP(config, config.expert_ffn_hidden_size) for _ in range(config.num_experts)
        )

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, S, D), normed."""
        tokens = x.flatten(0, 1)
        weights, chosen = self._route(tokens)
        mixed = torch.zeros_like(tokens)
        for number, expert in enumerate(self.experts):
            token, place = (chosen == number).nonzero(as_tuple=True)
            mixed.index_add_(0, token, expert(tokens[token], weights[token, place].unsqueeze(1)))
        return mixed.view_as(x)

    def _route(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Weights and numbers (B*S, k) of each token's experts."""
        dtype = torch.float32 if self.config.router_float32 else tokens.dtype
        scores = F.linear(tokens.to(dtype), self.router.weight.to(dtype))
        if self.config.router_pre_softmax:
            weights, chosen = at_least_float32(scores).softmax(-1).topk(self.config.expert_topk)
        else:
            best, chosen = scores.topk(self.config.expert_topk)
            weights = at_least_float32(best).softmax(-1)
        return weights.to(tokens.dtype), chosen


def _memory(config: PlainConfig, place: Placement, values: dict[int, nn.Module]) -> UltraMemLayer:
    assert config.ultramem is not None
    site = Site(config.hidden_size, shared=values.get(place.table))
    own = VALUES[config.ultramem.values].build(config.ultramem, site)
    values.setdefault(place.table, own)
    return UltraMemLayer(
        config.ultramem,
        hidden_size=config.hidden_size,
        num_layers=config.num_layers,
        layer_number=place.reads,
        eps=config.norm_epsilon,
        values=own,
        table_number=place.table,
        first_value=place.first_value,
    )


def _norm(config: PlainConfig, width: int) -> nn.Module:
    kind = nn.LayerNorm if config.normalization == "LayerNorm" else nn.RMSNorm
    return kind(width, eps=config.norm_epsilon)


def _rotation(config: PlainConfig, length: int, device: torch.device) -> Tensor | None:
    """Angles (S, R) of the rotated first R channels, float32; None without rotary positions."""
    if config.positions != "rope":
        return None
    width = int(config.kv_channels * config.rotary_percent)
    exponents = torch.arange(0, width, 2, dtype=torch.float32, device=device) / width
    frequencies = 1.0 / config.rotary_base**exponents
    angles = torch.outer(torch.arange(length, dtype=torch.float32, device=device), frequencies)
    return torch.cat([angles, angles], dim=-1)


def _rotate(x: Tensor, angles: Tensor) -> Tensor:
    """x: (B, heads, S, K); channel i turns with channel i + R/2, the rest pass."""
    turned, rest = x[..., : angles.shape[-1]], x[..., angles.shape[-1] :]
    first, second = turned.chunk(2, dim=-1)
    other = torch.cat([-second, first], dim=-1)
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    return torch.cat([turned * cos + other * sin, rest], dim=-1)
