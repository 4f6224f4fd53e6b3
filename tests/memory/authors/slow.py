"""The authors' layers one token at a time, as their formulas read, and weights for them.

Plain loops over heads, ranks, cores and picks; gradients by autograd. Nothing of the project is
used. Letters as in the papers; cfg has the authors' names.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

State = dict[str, Tensor]


def _normal(generator: torch.Generator, *shape: int, std: float = 1.0) -> Tensor:
    return std * torch.randn(shape, generator=generator, dtype=torch.float64)


def _best(scores: list[Tensor], count: int) -> list[int]:
    """Places of the largest, best first."""
    order = sorted(range(len(scores)), key=lambda place: -scores[place].item())
    return order[:count]


def v2_window(cfg: Mapping[str, Any]) -> int:
    return int(math.sqrt(cfg["mem_layer_num"] * cfg["knum"] ** 2 * cfg["share_ratio"]))


def v2_weights(cfg: Mapping[str, Any], seed: int = 0) -> State:
    generator = torch.Generator().manual_seed(seed)
    hidden, width, ranks, heads = (cfg[n] for n in ("hidden_size", "kdim", "tucker_rank", "head"))
    rows, keys = cfg["mem_layer_num"] * cfg["knum"] ** 2, cfg["key_expand_time"] * v2_window(cfg)
    per_rank = ranks if cfg["q_for_each_tucker_rank"] else 1
    state = {"full_memory_layer.values_for_look_up": _normal(generator, rows, cfg["vdim"])}
    if cfg["pre_vdim"]:
        pre = _normal(generator, rows, cfg["pre_vdim"])
        state["full_memory_layer.pre_values_for_look_up"] = pre
    for layer in range(cfg["mem_layer_num"]):
        block = {
            "query_proj.weight": _normal(generator, 2 * per_rank * width, hidden, std=0.3),
            "keys": _normal(generator, heads, 2, keys, width, ranks),
            "values_proj.weight": _normal(
                generator, hidden, cfg["value_expand_time"] * cfg["vdim"]
            ),
            "shuffle_index": torch.randperm(keys**2, generator=generator),
            "query_norm.weight": 1 + 0.3 * _normal(generator, width),
            "keys_norm.weight": 1 + 0.3 * _normal(generator, width),
            "tucker_core_u": _normal(generator, 1, heads, 1, ranks),
            "tucker_core_v": _normal(generator, 1, heads, 1, ranks),
        }
        for core in range(cfg["tucker_multihead"]):
            block[f"tucker_core.{core}"] = _normal(generator, heads, ranks, ranks)
        if cfg["pre_vdim"]:
            block["pre_values_proj.weight"] = _normal(generator, cfg["pre_vdim"], hidden, std=0.3)
        if cfg.get("bias_for_layer_norm"):
            for name in ("query_norm", "keys_norm"):
                block[f"{name}.bias"] = _normal(generator, width)
        state |= {f"mem_blocks.{layer}.{name}": tensor for name, tensor in block.items()}
    return state


def _norm(x: Tensor, gain: Tensor, bias: Tensor | float, kind: str, eps: float) -> Tensor:
    if kind == "ln":
        x = x - x.mean()
    return gain * x / torch.sqrt((x * x).mean() + eps) + bias


def v2_token(x: Tensor, state: State, cfg: Mapping[str, Any], layer: int) -> Tensor:
    def of(name: str) -> Tensor:
        return state[f"mem_blocks.{layer}.{name}"]

    def normed(x: Tensor, name: str) -> Tensor:
        bias = of(f"{name}.bias") if cfg.get("bias_for_layer_norm") else 0.0
        return _norm(x, of(f"{name}.weight"), bias, cfg["norm"], cfg["layer_norm_eps"])

    width, ranks, knn = cfg["kdim"], cfg["tucker_rank"], cfg["knn"]
    groups, vdim, window = cfg["value_expand_time"], cfg["vdim"], v2_window(cfg) ** 2
    rows, side = cfg["mem_layer_num"] * cfg["knum"] ** 2, cfg["key_expand_time"] * v2_window(cfg)
    keys, projected = of("keys"), of("query_proj.weight") @ x
    pooled = [x.new_zeros(vdim) for _ in range(groups)]
    for head in range(cfg["head"]):
        best, scores = [], []
        for s, direction in enumerate(("tucker_core_u", "tucker_core_v")):
            start = (head // 2 * 2 + s) * width
            query = projected[start : start + width]
            query = normed(query, "query_norm")
            found = []
            for key in range(side):
                by_rank = [
                    normed(keys[head, s, key, :, rank], "keys_norm") @ query
                    for rank in range(ranks)
                ]
                found.append(torch.stack(by_rank))
            filtered = [one @ of(direction)[0, head, 0] for one in found]
            best.append(_best(filtered, knn))
            scores.append(found)
        pairs, by_core = [], []
        for row in best[0]:
            for column in best[1]:
                pairs.append(row * side + column)
                by_core.append(
                    torch.stack(
                        [
                            scores[0][row] @ of(f"tucker_core.{core}")[head] @ scores[1][column]
                            for core in range(cfg["tucker_multihead"])
                        ]
                    )
                )
        for place in _best([one.sum() for one in by_core], knn):
            z = int(of("shuffle_index")[pairs[place]])
            row = (z % window + layer * cfg["knum"] ** 2) % rows
            weight = by_core[place]
            if cfg["pre_vdim"]:
                pre = state["full_memory_layer.pre_values_for_look_up"][row]
                dot = pre @ (of("pre_values_proj.weight") @ x)
                weight = weight * (_gelu(dot) if cfg["use_glu_act"] else dot)
            value = state["full_memory_layer.values_for_look_up"][row]
            sliced = value.view(cfg["tucker_multihead"], -1) * weight[:, None]
            group = z // window if groups > 1 else 0
            pooled[group] = pooled[group] + sliced.flatten()
    return of("values_proj.weight") @ torch.cat(pooled)


def _gelu(x: Tensor) -> Tensor:
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


def _product_keys(row: Tensor, column: Tensor, short: int, best: int) -> tuple[list[int], Tensor]:
    """Slots and scores of the best sums of a row's and a column's score, both (n,)."""
    pairs = [(i, j) for i in _best([*row], short) for j in _best([*column], short)]
    sums = [row[i] + column[j] for i, j in pairs]
    taken = _best(sums, best)
    slots = [pairs[place][0] * len(row) + pairs[place][1] for place in taken]
    return slots, torch.stack([sums[place] for place in taken])


def plus_weights(cfg: Mapping[str, Any], layers: list[int], owner: int, seed: int = 0) -> State:
    generator = torch.Generator().manual_seed(seed)
    hidden, heads, both = cfg["dim"], cfg["mem_heads"], cfg["mem_k_dim"]
    width = cfg["mem_v_dim"] if cfg["mem_v_dim"] > 0 else hidden
    state: State = {}
    for layer in layers:
        block = {
            "keys": _normal(generator, 2 * heads * cfg["mem_n_keys"], both // 2),
            "query_proj.query_mlps.0.weight": _normal(generator, heads * both, hidden, std=0.3),
            "query_proj.query_mlps.0.bias": _normal(generator, heads * both),
        }
        if cfg["swilu_projection"]:
            block["swilu_projection.weight"] = _normal(generator, width, hidden)
            block["swilu_projection.bias"] = _normal(generator, width)
        if cfg["swilu_projection"] or cfg["mem_v_dim"] > 0:
            block["value_proj.weight"] = _normal(generator, hidden, width)
            block["value_proj.bias"] = _normal(generator, hidden)
        if cfg["mem_gated"]:
            block["gating.weight"] = _normal(generator, 1, hidden)
            block["gating.bias"] = _normal(generator, 1)
        if layer == owner or not cfg["mem_share_values"]:
            for name in ("values_u", "values_v") if cfg["peer_variant"] else ("values",):
                block[f"{name}.weight"] = _normal(generator, cfg["mem_n_keys"] ** 2, width)
        state |= {f"layers.{layer}.feed_forward.{name}": t for name, t in block.items()}
    return state


def plus_token(x: Tensor, state: State, cfg: Mapping[str, Any], layer: int, owner: int) -> Tensor:
    def of(name: str, at: int = layer) -> Tensor:
        return state[f"layers.{at}.feed_forward.{name}"]

    table = owner if cfg["mem_share_values"] else layer
    heads, both, side = cfg["mem_heads"], cfg["mem_k_dim"], cfg["mem_n_keys"]
    half = both // 2
    keys = of("keys").view(heads, 2, side, half)
    query = of("query_proj.query_mlps.0.weight") @ x + of("query_proj.query_mlps.0.bias")
    out: Tensor | float = 0.0
    for head in range(heads):
        own = query[head * both : (head + 1) * both]
        row, column = keys[head, 0] @ own[:half], keys[head, 1] @ own[half:]
        slots, scores = _product_keys(row, column, cfg["mem_knn"], cfg["mem_knn"])
        weights = scores.softmax(0)
        for slot, weight in zip(slots, weights, strict=True):
            if cfg["peer_variant"]:
                inner = _gelu(of("values_u.weight", table)[slot] @ x)
                out = out + weight * inner * of("values_v.weight", table)[slot]
            else:
                out = out + weight * of("values.weight", table)[slot]
    assert isinstance(out, Tensor)
    if not cfg["peer_variant"]:
        if cfg["swilu_projection"]:
            gate = of("swilu_projection.weight") @ x + of("swilu_projection.bias")
            out = out * gate / (1 + torch.exp(-gate))
        if cfg["swilu_projection"] or cfg["mem_v_dim"] > 0:
            out = of("value_proj.weight") @ out + of("value_proj.bias")
    if cfg["mem_gated"]:
        out = out / (1 + torch.exp(-(of("gating.weight") @ x + of("gating.bias"))))
    return out


def peer_weights(cfg: Mapping[str, Any], seed: int = 0) -> State:
    generator = torch.Generator().manual_seed(seed)
    hidden, heads, width = cfg["dim"], cfg["heads"], cfg["dim_key"]
    rows = cfg["num_experts"] * (heads if cfg["separate_embed_per_head"] else 1)
    state = {
        "to_queries.0.weight": _normal(generator, 2 * heads * width, hidden, std=0.5),
        "keys": _normal(generator, heads, math.isqrt(cfg["num_experts"]), 2, width),
        "weight_down_embed.weight": _normal(generator, rows, hidden, std=0.3),
        "weight_up_embed.weight": _normal(generator, rows, hidden),
    }
    if cfg["pre_rmsnorm"]:
        state["norm.gamma"] = 0.3 * _normal(generator, hidden)
    return state


_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": _gelu,
    "ReLU": lambda x: x.clamp(min=0),
    "SiLU": lambda x: x / (1 + torch.exp(-x)),
    "tanh": torch.tanh,
}


def peer_token(x: Tensor, state: State, cfg: Mapping[str, Any]) -> Tensor:
    heads, width = cfg["heads"], cfg["dim_key"]
    side, alone = math.isqrt(cfg["num_experts"]), cfg["non_competing_scores"]
    if cfg["pre_rmsnorm"]:
        x = x / torch.sqrt((x * x).sum()) * math.sqrt(len(x)) * (1 + state["norm.gamma"])
    query, keys = (state["to_queries.0.weight"] @ x).view(2, heads, width), state["keys"]
    out: Tensor = torch.zeros_like(x)
    for head in range(heads):
        row, column = (keys[head, :, s] @ query[s, head] for s in (0, 1))
        best = 1 if alone else cfg["num_experts_per_head"]
        slots, scores = _product_keys(row, column, cfg["product_key_topk"], best)
        weights = scores.clamp(min=0) if alone else scores.softmax(0)
        first = head * side * side if cfg["separate_embed_per_head"] else 0
        for slot, weight in zip(slots, weights, strict=True):
            inner = state["weight_down_embed.weight"][first + slot] @ x
            activated = _ACTIVATIONS[cfg["activation"]](inner)
            out = out + weight * activated * state["weight_up_embed.weight"][first + slot]
    return out
