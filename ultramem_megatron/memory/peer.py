"""Exchange with PEER (arXiv 2407.04153) as the package PEER-pytorch has it, one layer.

Its names, left, and ours; H heads, n keys a side, N = n^2 experts (of each head, if separate):
    to_queries.0.weight        (2 H Dk, D), side first   query.proj.weight, head first
    keys                       (H, n, 2, Dk)             retrieval.keys.weight, (H, 2, n, 1, Dk)
    weight_down_embed.weight   (N, D)                    values.pre_table.weight
    weight_up_embed.weight     (N, D)                    values.table.weight
    norm.gamma                 (D,)                      gamma, with `pre_rmsnorm`
"""

import math
from collections.abc import Mapping
from typing import Any, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ultramem_megatron.memory.config import Activation, UltraMemConfig
from ultramem_megatron.memory.foreign import Entry, ForeignMemories, Sizes, check_shapes, tensors
from ultramem_megatron.memory.layer import UltraMemLayer
from ultramem_megatron.memory.spans import Span

_WHAT = "PEER"


class NormedInput(nn.Module):
    """A memory behind a norm of its input, to length sqrt(D), with gains 1 + gamma."""

    def __init__(self, memory: nn.Module, hidden_size: int) -> None:
        super().__init__()
        self.memory = memory
        self.gamma = nn.Parameter(torch.empty(hidden_size))

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., D) to the same."""
        unit = F.normalize(x, dim=-1)
        out: Tensor = self.memory(unit * math.sqrt(x.shape[-1]) * (self.gamma + 1))
        return out


def load_peer(state_dict: Mapping[str, Any], cfg: Mapping[str, Any]) -> ForeignMemories:
    """One layer of PEER-pytorch 0.2.2; dtypes and device are the tensors'.

    state_dict: of its module, tensors or numpy arrays. cfg: its constructor's arguments.
    `non_competing_scores`, which is on by default there, takes one expert for each head. Raises
    UltraMemError for what it does not have.
    """
    state, sizes = tensors(state_dict), Sizes(cfg, _WHAT)
    config = _config(sizes)
    hidden, normed = sizes.get("dim"), sizes.get("pre_rmsnorm", False)
    check_shapes(state, _shapes(config, hidden, normed), _WHAT)
    with torch.device("meta"):
        memory: nn.Module = UltraMemLayer(config, hidden_size=hidden, num_layers=1)
        layer = NormedInput(memory, hidden) if normed else memory
    return ForeignMemories([layer], _entries(config, normed)).take(_ours(state, config, normed))


def to_peer(memories: ForeignMemories) -> dict[str, Tensor]:
    """Its state dict, detached copies; inverse of `load_peer`."""
    return memories.authors_state()


def _config(sizes: Sizes) -> UltraMemConfig:
    hidden, experts, heads = (sizes.get(name) for name in ("dim", "num_experts", "heads"))
    alone = sizes.get("non_competing_scores", True)
    asked = sizes.get("num_experts_per_head", 16)
    side = sizes.get("product_key_topk", 0) or asked
    sizes.refuse("dropout", why="dropout is not supported; pass 0")
    sizes.require(math.isqrt(experts) ** 2 == experts, "num_experts", "a square")
    sizes.require(hidden % 2 == 0, "dim", "even")
    return UltraMemConfig(
        spans=(Span(1, 1),),
        num_keys=math.isqrt(experts),
        key_dim=sizes.get("dim_key", 0) or hidden // 2,
        value_dim=hidden,
        topk=1 if alone else asked,
        side_topk=side,
        heads=heads,
        share_query=False,
        retrieval="pkm",
        tucker_rank=1,
        cores=1,
        values="prevalued",
        pre_value_activation=_activation(sizes),
        value_expansion=1,
        value_projection=False,
        values_per_head=sizes.get("separate_embed_per_head", False),
        softmax=not alone,
        relu_scores=alone,
        qk_norm="none",
        init="official",
        aux_loss_weight=0.0,
    )


def _activation(sizes: Sizes) -> Activation:
    """Ours of a class of torch.nn or of its name, `LeakyReLU` as `leaky_relu`."""
    given = sizes.get("activation", "gelu")
    asked = str(getattr(given, "__name__", given)).lower().replace("_", "")
    known = {name.replace("_", ""): name for name in get_args(Activation)} | {"identity": "none"}
    sizes.require(asked in known, "activation", f"one of {', '.join(get_args(Activation))}")
    found: Activation = known[asked]
    return found


def _shapes(config: UltraMemConfig, hidden: int, normed: bool) -> dict[str, tuple[int, ...]]:
    norm: dict[str, tuple[int, ...]] = {"norm.gamma": (hidden,)} if normed else {}
    return {
        "to_queries.0.weight": (2 * config.heads * config.key_dim, hidden),
        "keys": (config.heads, config.num_keys, 2, config.key_dim),
        "weight_down_embed.weight": (config.num_values, hidden),
        "weight_up_embed.weight": (config.num_values, hidden),
        **norm,
    }


def _entries(config: UltraMemConfig, normed: bool) -> dict[str, Entry]:
    memory = "layers.0.memory." if normed else "layers.0."
    heads, width = config.heads, config.key_dim

    def sides_first(weight: Tensor) -> Tensor:
        return weight.view(heads, 2, width, -1).transpose(0, 1).flatten(0, 2)

    norm = {"norm.gamma": Entry("layers.0.gamma")} if normed else {}
    return {
        "to_queries.0.weight": Entry(f"{memory}query.proj.weight", sides_first),
        "keys": Entry(f"{memory}retrieval.keys.weight", lambda w: w.squeeze(3).transpose(1, 2)),
        "weight_down_embed.weight": Entry(f"{memory}values.pre_table.weight"),
        "weight_up_embed.weight": Entry(f"{memory}values.table.weight"),
        **norm,
    }


def _ours(state: Mapping[str, Tensor], config: UltraMemConfig, normed: bool) -> dict[str, Tensor]:
    memory = "layers.0.memory." if normed else "layers.0."
    queries = state["to_queries.0.weight"].view(2, config.heads, config.key_dim, -1)
    norm = {"layers.0.gamma": state["norm.gamma"]} if normed else {}
    return {
        f"{memory}query.proj.weight": queries.transpose(0, 1).flatten(0, 2),
        f"{memory}retrieval.keys.weight": state["keys"].transpose(1, 2).unsqueeze(3),
        f"{memory}values.pre_table.weight": state["weight_down_embed.weight"],
        f"{memory}values.table.weight": state["weight_up_embed.weight"],
        **norm,
    }
