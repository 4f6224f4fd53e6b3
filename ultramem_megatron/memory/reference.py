"""The whole memory layer as the equations read, unsharded and unhurried: the oracle of every path.

It shares no code with the layer, loops over heads and cores, materialises everything, and works in
any floating dtype; float64 is the truth that other paths are measured against. Numbers refer to
arXiv 2411.12364.

T tokens, D hidden, H heads, n keys per side (expanded), r rank, m top-m, C cores, E expansion,
N physical values, V value dim.
"""

import torch
from torch import Tensor

from ultramem_megatron.memory.config import UltraMemConfig
from ultramem_megatron.memory.retrieval import RETRIEVALS
from ultramem_megatron.memory.values import VALUES


def reference_layer(
    x: Tensor, state: dict[str, Tensor], config: UltraMemConfig, *, eps: float, first_value: int = 0
) -> Tensor:
    """Output of a memory layer for x of shape (S, B, D), the same shape.

    state: the layer's `state_dict()` (tensors may require grad). eps: of the norms. first_value:
    row at which the memory's values begin.
    """
    sequence, batch, hidden = x.shape
    inputs = x.reshape(sequence * batch, hidden)
    u = x if "query.conv.weight" not in state else _conv(x, state["query.conv.weight"])
    u = u.reshape(sequence * batch, hidden) - state.get("query.common.mean", 0)
    ranks = config.tucker_rank if config.query_per_rank else 1
    queries = u @ state["query.proj.weight"].T + state.get("query.proj.bias", 0)
    queries = queries.view(len(u), -1, 2, ranks, config.key_dim)
    queries = _norm(queries, state, "query.norm", config.qk_norm, eps)
    permutation = reference_permutation(state, config)
    pooled = x.new_zeros(len(u), config.value_expansion, config.value_dim)
    for head in range(config.heads):
        query = queries[:, head * queries.shape[1] // config.heads]  # (T, 2, 1 or r, Dk)
        addresses, scores = _retrieve(query, head, state, config, eps)
        if config.softmax:
            scores = scores.softmax(1)
        if config.relu_scores:
            scores = scores.clamp(min=0)
        rows, groups = _located(permutation[addresses], head, config, first_value)
        kind = VALUES[config.values]
        pooled = pooled + kind.reference(rows, groups, scores, inputs, state, config)
    out = pooled.flatten(1)
    if config.value_projection:
        out = out @ state["value_proj.weight"].T + state.get("value_proj.bias", 0)
    return out.view(sequence, batch, hidden)


def reference_permutation(state: dict[str, Tensor], config: UltraMemConfig) -> Tensor:
    """The shuffle of all E*N virtual addresses as a list, int64."""
    virtual = torch.arange(config.keys_per_side**2)
    if "shuffle.permutation" in state:
        return state["shuffle.permutation"].long()
    if "shuffle.tables" not in state:
        return virtual
    side = config.keys_per_side
    row, column = virtual // side, virtual % side
    for number, table in enumerate(state["shuffle.tables"].long()):
        if number % 2 == 0:
            row = (row + table[column]) % side
        else:
            column = (column + table[row]) % side
    return row * side + column


def _located(
    shuffled: Tensor, head: int, config: UltraMemConfig, first_value: int
) -> tuple[Tensor, Tensor]:
    """Rows and expansion groups (T, m): w*w values from the first one on, e*e times."""
    window = config.window_keys**2
    rows = config.num_values // (config.heads if config.values_per_head else 1)
    row = (shuffled % window + first_value) % rows
    if config.values_per_head:
        row = row + head * rows
    group = shuffled // window
    return row, group if config.value_expansion > 1 else torch.zeros_like(group)


def _conv(x: Tensor, taps: Tensor) -> Tensor:
    """out[s] = sum_j taps[j] * x[s - (kernel-1) + j]: the last tap is the present."""
    kernel = taps.shape[1]
    out = torch.zeros_like(x)
    for tap in range(kernel):
        back = kernel - 1 - tap
        shifted = torch.cat([torch.zeros_like(x[:back]), x[: len(x) - back]])[: len(x)]
        out = out + shifted * taps[:, tap]
    return out


def _norm(x: Tensor, state: dict[str, Tensor], name: str, kind: str, eps: float) -> Tensor:
    if kind == "none":
        return x
    if kind == "layernorm":
        x = x - x.mean(-1, keepdim=True)
    x = x / (x.square().mean(-1, keepdim=True) + eps).sqrt()
    x = x * state.get(f"{name}.weight", 1)
    return x + state.get(f"{name}.bias", 0)


def _keys(head: int, side: int, state: dict[str, Tensor], config: UltraMemConfig, eps: float):
    """Normalised keys of one head and side, (n, r, K)."""
    keys = state["retrieval.keys.weight"][head, side]  # (n, r, K)
    whole = keys.reshape(len(keys), -1, config.key_dim)
    normed = _norm(whole, state, "retrieval.keys.norm", config.qk_norm, eps)
    return normed.view(keys.shape)


def _rank_scores(query: Tensor, keys: Tensor, config: UltraMemConfig) -> Tensor:
    """S[t, a, i] = <key_i of rank a, query of rank a>, (T, r, n) (eq. 4-5)."""
    ranks = []
    for rank in range(config.tucker_rank):
        width = config.rank_key_dim
        part = query[:, rank if config.query_per_rank else 0]
        if config.rank_layout == "split":
            part = part[:, rank * width : (rank + 1) * width]
        ranks.append(part @ keys[:, rank].T)
    return torch.stack(ranks, dim=1)


def _retrieve(
    query: Tensor, head: int, state: dict[str, Tensor], config: UltraMemConfig, eps: float
) -> tuple[Tensor, Tensor]:
    """Virtual addresses (T, m) and scores (T, m, C) of one head."""
    row = _rank_scores(query[:, 0], _keys(head, 0, state, config, eps), config)
    column = _rank_scores(query[:, 1], _keys(head, 1, state, config, eps), config)
    side, short = config.keys_per_side, config.shortlist
    kind = RETRIEVALS[config.retrieval]
    rows, columns, grids = kind.reference(row, column, head, state, config)
    best = torch.stack(grids).sum(0).flatten(1).topk(config.topk).indices
    addresses = rows.gather(1, best // short) * side + columns.gather(1, best % short)
    scores = torch.stack([grid.flatten(1).gather(1, best) for grid in grids], dim=2)
    return addresses, scores
