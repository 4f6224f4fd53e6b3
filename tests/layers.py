"""Small memory layers for tests, each a switch or a combination away from the default."""

from typing import Any

import torch

from ultramem_megatron.memory.config import UltraMemConfig
from ultramem_megatron.memory.layer import UltraMemLayer
from ultramem_megatron.memory.spans import Span

HIDDEN = 24

_SMALL: dict[str, Any] = {
    "spans": (Span(1, 2),),
    "num_keys": 7,
    "key_dim": 12,
    "value_dim": 12,
    "topk": 5,
}

VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "pkm": {
        "retrieval": "pkm",
        "tucker_rank": 1,
        "cores": 1,
        "value_expansion": 1,
        "softmax": True,
        "value_projection": False,
        "value_dim": HIDDEN,
        "qk_norm": "none",
        "share_query": False,
        "init": "official",
    },
    "pkm-no-softmax-expanded": {
        "retrieval": "pkm",
        "tucker_rank": 1,
        "cores": 1,
        "value_expansion": 4,
    },
    "rank-1": {"tucker_rank": 1, "cores": 1},
    "rank-3-full": {"tucker_rank": 3, "rank_layout": "full", "value_dim": 9, "cores": 3},
    "rank-4-split": {"tucker_rank": 4},
    "expansion-1": {"value_expansion": 1},
    "expansion-9": {"value_expansion": 9, "topk": 11},
    "cores-4": {"cores": 4},
    "heads-1": {"heads": 1},
    "heads-3": {"heads": 3},
    "heads-4": {"heads": 4},
    "heads-3-own-queries": {"heads": 3, "share_query": False},
    "rmsnorm": {"qk_norm": "rmsnorm"},
    "no-norm": {"qk_norm": "none"},
    "official-init": {"init": "official", "qk_norm": "rmsnorm", "rank_layout": "full"},
    "not-centred": {"query_centering": False},
    "pkm-init": {"init": "pkm", "retrieval": "pkm", "tucker_rank": 1, "cores": 1},
    "convolution": {"query_conv_kernel": 5},
    "softmax": {"softmax": True},
    "v2": {
        "values": "prevalued",
        "pre_value_dim": 7,
        "value_expansion": 1,
        "key_expansion": 2,
        "query_per_rank": True,
        "rank_layout": "full",
        "topk": 11,
        "side_topk": 4,
    },
    "prevalued-expanded": {"values": "prevalued", "pre_value_activation": "gelu"},
    "peer": {
        "values": "prevalued",
        "pre_value_activation": "gelu",
        "retrieval": "pkm",
        "tucker_rank": 1,
        "cores": 1,
        "value_expansion": 1,
        "value_projection": False,
        "value_dim": HIDDEN,
        "values_per_head": True,
        "softmax": True,
        "share_query": False,
    },
    "memory-plus": {
        "values": "gated",
        "projection_bias": True,
        "retrieval": "pkm",
        "tucker_rank": 1,
        "cores": 1,
        "value_expansion": 1,
        "softmax": True,
        "share_query": False,
    },
    "relu-scores": {"relu_scores": True, "values": "gated"},
    "ring": {"spans": (Span(1, 1), Span(2, 2)), "share_values": 1.5, "share_order": "ring"},
    "block-of-two": {"spans": (Span(1, 1), Span(2, 2)), "share_values": 2, "value_expansion": 1},
    "all-keys": {"num_keys": 3, "topk": 6},
}


def small_config(**changes: Any) -> UltraMemConfig:
    """A valid configuration for hidden size HIDDEN and two layers."""
    return UltraMemConfig(**{**_SMALL, **changes})


def sum_lengths(config: UltraMemConfig, hidden_size: int = HIDDEN) -> int:
    """Lengths, added up, of the sums that a result of a layer passes through.

    Projection of the query, norms of query and keys, a key's score, the Tucker score over ranks and
    cores, the picks of all heads, the projection of the values. A gradient passes each of them once
    too: forward up to its parameter and back from there.
    """
    query = hidden_size + 2 * config.key_dim + config.rank_key_dim
    scores = config.tucker_rank**2 + config.cores
    values = config.topk * config.heads + config.value_expansion * config.value_dim
    return query + scores + values


def small_layer(
    dtype: torch.dtype = torch.float64, *, layer_number: int = 1, **changes: Any
) -> UltraMemLayer:
    """A layer of that configuration; nothing in it is left at a value that hides mistakes."""
    layer = UltraMemLayer(
        small_config(**changes), hidden_size=HIDDEN, num_layers=2, layer_number=layer_number
    ).to(dtype)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if "norm" in name or "conv" in name:
                parameter.mul_(0.5 + torch.rand(parameter.shape, generator=generator))
        if layer.query.common is not None:
            layer.query.common.mean.copy_(torch.rand(HIDDEN, generator=generator))
    return layer
