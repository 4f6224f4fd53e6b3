"""Exchange of single memory layers with the authors' published code (their UltraMemLayerV1).

Their parameter names, left, and ours:
    query_proj.weight                (2*Dk, D)          query.proj.weight
    query_norm.*, keys_norm.*        (Dk,)              query.norm.*, retrieval.keys.norm.*
    keys                             (H, 2, e*n, Dk, r) retrieval.keys.weight, last two swapped
    tucker_core.0 ... tucker_core.h-1  (H, r, r)        retrieval.cores.weight, stacked
    tucker_core_u, tucker_core_v     (1, H, 1, r)       retrieval.cores.u, .t
    shuffle_index                    (E*N,)             shuffle.permutation
    values_for_look_up               (N, Dv)            values.weight
    values_proj.weight               (D, E*Dv)          value_proj.weight
"""

import math

import torch
from torch import Tensor, nn

from ultramem_megatron.errors import UltraMemError
from ultramem_megatron.memory.config import Norm, UltraMemConfig
from ultramem_megatron.memory.layer import UltraMemLayer
from ultramem_megatron.memory.modules import build_norm
from ultramem_megatron.memory.retrieval.addresses import StoredShuffle
from ultramem_megatron.memory.retrieval.tdqkr import TuckerRetrieval
from ultramem_megatron.memory.spans import Span
from ultramem_megatron.memory.tables.value_table import mark_as_values

_NORMS: dict[str, Norm] = {
    "rms": "rmsnorm",
    "rmsnorm": "rmsnorm",
    "layernorm": "layernorm",
    "ln": "layernorm",
    "default": "layernorm",
    "lowprecision": "layernorm",
    "amdcompatible": "layernorm",
    "none": "none",
}
_REQUIRED = (
    "keys",
    "values_for_look_up",
    "shuffle_index",
    "tucker_core_u",
    "tucker_core_v",
    "query_proj.weight",
    "values_proj.weight",
    "tucker_core.0",
)


def load_official_v1(
    state_dict: dict[str, Tensor], *, topk: int, norm: str, eps: float
) -> nn.Module:
    """Build an UltraMemLayer from the authors' state dict; dtype and device are the tensors'.

    topk: their `knn`. norm: "rms" or "layernorm" (their "default"), of queries and keys. eps: of
    both norms. Sizes are read off the tensors. The stored rank-1 filter (u, v) is kept as it is;
    where it is still zero, as before their first training step, it is computed from the cores.
    Raises UltraMemError for a state dict that is not such a layer.
    """
    state = {name: torch.as_tensor(tensor).detach() for name, tensor in state_dict.items()}
    config = _config_from(state, topk, norm_kind(norm))
    hidden_size = state["query_proj.weight"].shape[1]
    with torch.device("meta"):
        layer = UltraMemLayer(config, hidden_size=hidden_size, num_layers=1, eps=eps)
        layer.query.norm = _norm_like(state, "query_norm", config, eps)
        layer.retrieval.keys.norm = _norm_like(state, "keys_norm", config, eps)
    layer.shuffle = StoredShuffle(state["shuffle_index"])
    layer.load_state_dict(_our_names(state, config.cores), assign=True)
    mark_as_values(layer.values.weight)
    for parameter in layer.parameters():
        parameter.requires_grad_()
    assert isinstance(layer.retrieval, TuckerRetrieval)
    if not layer.retrieval.cores.u.any():
        layer.after_step()
    return layer


def export_official_v1(layer: nn.Module) -> dict[str, Tensor]:
    """The authors' state dict of a layer, detached copies; inverse of `load_official_v1`.

    Raises UltraMemError for a layer their code cannot represent, naming the field.
    """
    if not isinstance(layer, UltraMemLayer):
        raise UltraMemError(
            f"export_official_v1 takes an UltraMemLayer, not {type(layer).__name__}. "
            f"Pass the memory layer itself, for example model.decoder.layers[2].memory."
        )
    config = layer.config
    _check_representable(config)
    assert isinstance(layer.retrieval, TuckerRetrieval)
    cores, ours = layer.retrieval.cores, layer.state_dict()
    virtual = torch.arange(
        config.value_expansion * config.num_values, device=ours["values.weight"].device
    )
    theirs = {
        "keys": ours["retrieval.keys.weight"].transpose(-1, -2),
        "values_for_look_up": ours["values.weight"],
        "shuffle_index": layer.shuffle(virtual),
        "tucker_core_u": cores.u[None, :, None],
        "tucker_core_v": cores.t[None, :, None],
        "query_proj.weight": ours["query.proj.weight"],
        "values_proj.weight": ours["value_proj.weight"],
    }
    for index, core in enumerate(cores.weight):
        theirs[f"tucker_core.{index}"] = core
    for mine, their in (("query.norm", "query_norm"), ("retrieval.keys.norm", "keys_norm")):
        for part in ("weight", "bias"):
            if f"{mine}.{part}" in ours:
                theirs[f"{their}.{part}"] = ours[f"{mine}.{part}"]
    return {name: tensor.detach().clone().contiguous() for name, tensor in theirs.items()}


def norm_kind(norm: str) -> Norm:
    """Our word for the authors' of a norm. Raises UltraMemError for another."""
    kind = _NORMS.get(norm.lower().replace("_", "").replace("-", ""))
    if kind is None:
        raise UltraMemError(f"norm {norm!r} is unknown; use one of {', '.join(sorted(_NORMS))}.")
    return kind


def _config_from(state: dict[str, Tensor], topk: int, norm: Norm) -> UltraMemConfig:
    missing = [name for name in _REQUIRED if name not in state]
    if missing:
        raise UltraMemError(
            f"Not a state dict of the authors' UltraMemLayerV1: {', '.join(missing)} missing, "
            f"found {', '.join(sorted(state)) or 'nothing'}. Pass the entries of one layer, "
            f"without their prefix."
        )
    heads, _, _, key_dim, rank = state["keys"].shape
    num_values, value_dim = state["values_for_look_up"].shape
    expansion = state["values_proj.weight"].shape[1] // value_dim
    cores = sum(name.startswith("tucker_core.") for name in state)
    config = UltraMemConfig(
        spans=(Span(1, 1),),
        num_keys=math.isqrt(num_values),
        key_dim=key_dim,
        value_dim=value_dim,
        topk=topk,
        heads=heads,
        retrieval="tdqkr",
        tucker_rank=rank,
        rank_layout="full",
        cores=cores,
        value_expansion=expansion,
        qk_norm=norm,
        init="official",
        share_query=state["query_proj.weight"].shape[0] != 2 * key_dim * heads or heads == 1,
    )
    expected = {
        "keys": (heads, 2, config.keys_per_side, key_dim, rank),
        "values_for_look_up": (config.num_keys**2, value_dim),
        "shuffle_index": (expansion * num_values,),
        "query_proj.weight": (
            config.num_queries * 2 * key_dim,
            state["values_proj.weight"].shape[0],
        ),
    }
    for name, shape in expected.items():
        if tuple(state[name].shape) != shape:
            raise UltraMemError(
                f"{name} has shape {tuple(state[name].shape)}, but the other tensors imply "
                f"{shape}. The state dict mixes layers of different sizes."
            )
    return config


def _norm_like(
    state: dict[str, Tensor], name: str, config: UltraMemConfig, eps: float
) -> nn.Module:
    return build_norm(
        config.qk_norm,
        config.key_dim,
        eps,
        affine=f"{name}.weight" in state,
        bias=f"{name}.bias" in state,
    )


def _our_names(state: dict[str, Tensor], cores: int) -> dict[str, Tensor]:
    ours = {
        "retrieval.keys.weight": state["keys"].transpose(-1, -2),
        "retrieval.cores.weight": torch.stack([state[f"tucker_core.{i}"] for i in range(cores)]),
        "retrieval.cores.u": state["tucker_core_u"][0, :, 0],
        "retrieval.cores.t": state["tucker_core_v"][0, :, 0],
        "shuffle.permutation": state["shuffle_index"],
        "values.weight": state["values_for_look_up"],
        "query.proj.weight": state["query_proj.weight"],
        "value_proj.weight": state["values_proj.weight"],
    }
    for mine, their in (("query.norm", "query_norm"), ("retrieval.keys.norm", "keys_norm")):
        for part in ("weight", "bias"):
            if f"{their}.{part}" in state:
                ours[f"{mine}.{part}"] = state[f"{their}.{part}"]
    return {name: tensor.clone().contiguous() for name, tensor in ours.items()}


def _check_representable(config: UltraMemConfig) -> None:
    wrong = {
        "retrieval": config.retrieval != "tdqkr",
        "rank_layout": config.rank_layout != "full" and config.tucker_rank > 1,
        "share_query": config.num_queries != 1,
        "query_conv_kernel": config.query_conv_kernel != 0,
        "value_projection": not config.value_projection,
        "softmax": config.softmax,
        "query_centering": bool(config.query_centering),
    }
    for field, unrepresentable in wrong.items():
        if unrepresentable:
            raise UltraMemError(
                f"The authors' UltraMemLayerV1 has no counterpart of {field}="
                f"{getattr(config, field)!r}; such a layer cannot be exported to it."
            )
