"""A memory layer as plain PyTorch code does it, the authors' among it: the baseline of the ratios.

Scores of all keys and the grid of all addresses are stored, gathered rows are multiplied by their
scores and scattered into their groups, and the table's gradient is dense. It has the parameters of
an UltraMemLayer and computes the same.

T tokens, Q queries, H heads, S = 2 sides, N keys per side, R Tucker rank, K key width of a rank,
m top-m, C cores, P = H*m picks, E groups, V value dim.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ultramem_megatron.memory.layer import UltraMemLayer
from ultramem_megatron.memory.retrieval.addresses import split_address
from ultramem_megatron.memory.retrieval.tdqkr import TuckerRetrieval


def plain_layer(layer: UltraMemLayer, x: Tensor) -> Tensor:
    """What `layer` gives for x (T, D)."""
    addresses, scores = plain_retrieval(layer, layer.query(x, None))
    rows, groups = split_address(layer.shuffle(addresses), layer.config.num_values)
    expansion = layer.config.value_expansion
    pooled = plain_lookup(layer.values.weight, rows, groups, scores, expansion)
    out: Tensor = layer.value_proj(pooled.flatten(1))
    return out


def plain_retrieval(layer: UltraMemLayer, query: Tensor) -> tuple[Tensor, Tensor]:
    """Virtual addresses (T, P) and scores (T, P, C) for normalised queries (T, Q, S, Dk)."""
    config, retrieval = layer.config, layer.retrieval
    assert isinstance(retrieval, TuckerRetrieval)
    weight = retrieval.keys.weight  # (H, S, N, R, K)
    keys = retrieval.keys.norm(weight.view(*weight.shape[:3], -1, config.key_dim)).view_as(weight)
    per_head = query.repeat_interleave(config.heads // query.shape[1], dim=1)
    by_rank = per_head.unflatten(-1, weight.shape[3:])  # (T, H, S, R, K)
    scores = torch.einsum("thsrk,hsnrk->sthrn", by_rank, keys)
    cores = retrieval.cores
    row, row_keys = _shortlist(scores[0], cores.u, config.topk)
    column, column_keys = _shortlist(scores[1], cores.t, config.topk)
    grids = torch.einsum("thai,chab,thbj->thcij", row, cores(), column).flatten(3)
    addresses = (row_keys.unsqueeze(3) * config.keys_per_side + column_keys.unsqueeze(2)).flatten(2)
    best = grids.sum(2).topk(config.topk, dim=-1).indices  # (T, H, m)
    picked = torch.stack([grids[:, :, c].gather(2, best) for c in range(config.cores)], dim=-1)
    return addresses.gather(2, best).flatten(1), picked.flatten(1, 2)


def _shortlist(scores: Tensor, direction: Tensor, topk: int) -> tuple[Tensor, Tensor]:
    """Scores (T, H, R, m) and indices (T, H, m) of the keys best by their combined scores."""
    with torch.no_grad():
        merged = (scores * direction.unsqueeze(-1)).sum(2)
        indices = merged.topk(topk, dim=-1).indices
    return scores.gather(3, indices.unsqueeze(2).expand(-1, -1, scores.shape[2], -1)), indices


def plain_lookup(
    table: Tensor, rows: Tensor, groups: Tensor, scores: Tensor, num_groups: int
) -> Tensor:
    """Sums (T, E, V): rows gathered, multiplied, scattered."""
    tokens, picks, cores = scores.shape
    width = table.shape[1]
    values = F.embedding(rows, table).view(tokens, picks, cores, width // cores)
    weighted = (values * scores.to(table.dtype).unsqueeze(-1)).flatten(2)
    out = weighted.new_zeros(tokens, num_groups, width)
    return out.scatter_add(1, groups.unsqueeze(-1).expand_as(weighted), weighted)
