"""Between a PlainGPT and the model that transformers loads: configuration, names, same logits.

Q query heads per group, G groups, K head dim, D hidden.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ultramem_megatron.errors import UltraMemError
from ultramem_megatron.memory.config import UltraMemConfig
from ultramem_megatron.memory.spans import parse_spans
from ultramem_megatron.tools.export.hf.configuration_ultramem import (
    RETRIEVALS,
    VALUES,
    UltraMemGPTConfig,
)
from ultramem_megatron.tools.export.plain_model import PlainConfig, PlainGPT

_SAME = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "ffn_hidden_size": "intermediate_size",
    "num_layers": "num_hidden_layers",
    "num_attention_heads": "num_attention_heads",
    "num_query_groups": "num_key_value_heads",
    "kv_channels": "head_dim",
    "max_positions": "max_position_embeddings",
    "normalization": "normalization",
    "norm_epsilon": "norm_eps",
    "bias": "mlp_bias",
    "qk_norm": "qk_norm",
    "positions": "position_embedding",
    "tied_embeddings": "tie_word_embeddings",
    "pattern": "layer_pattern",
    "mamba_num_heads": "mamba_num_heads",
    "mamba_head_dim": "mamba_head_dim",
    "mamba_num_groups": "mamba_num_groups",
    "mamba_state_dim": "mamba_state_dim",
    "router_float32": "router_float32",
}
"""Fields of PlainConfig that transformers' configuration has under another name, or the same."""
_ACTIVATIONS = {"gelu": "gelu", "swiglu": "silu"}

# Our names, left, and theirs; the first that fits the start of a name is replaced.
_NAMES = (
    ("embedding.", "model.embed_tokens."),
    ("position_embedding.", "model.embed_positions."),
    ("final_norm.", "model.norm."),
    ("output.", "lm_head."),
)
_LAYER_NAMES = (
    ("attention_norm.", "input_layernorm."),
    ("attention.proj.", "self_attn.o_proj."),
    ("attention.query_norm.", "self_attn.q_norm."),
    ("attention.key_norm.", "self_attn.k_norm."),
    ("mamba_norm.", "input_layernorm."),
    ("mamba.", "mamba."),
    ("mlp_norm.", "post_attention_layernorm."),
    ("mlp.router.", "mlp.gate."),
    ("memory.values.", "memory.reading."),
    ("memory.", "memory."),
)
_TABLE = r"layers\.(\d+)\.memory\.values\.(?:table\.|(pre_)table\.)?weight"
_QKV = r"layers\.(\d+)\.attention\.qkv\.(weight|bias)"
_MLP = r"layers\.(\d+)\.mlp\.(experts\.\d+\.)?(up|down)\.(weight|bias)"


def hf_config(config: PlainConfig) -> UltraMemGPTConfig:
    """The same model for transformers. Raises UltraMemError for a kind that its files lack."""
    memory = None if config.ultramem is None else _memory(config.ultramem)
    return UltraMemGPTConfig(
        **{theirs: getattr(config, ours) for ours, theirs in _SAME.items()},
        hidden_act=_ACTIVATIONS[config.activation],
        attention_bias=config.bias or config.qkv_bias,
        attention_output_bias=config.bias,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": config.rotary_base,
            "partial_rotary_factor": config.rotary_percent,
        },
        num_experts=config.num_experts or 0,
        num_experts_per_tok=config.expert_topk if config.num_experts else 0,
        moe_intermediate_size=config.expert_ffn_hidden_size or 0,
        norm_topk_prob=not config.router_pre_softmax,
        memory=memory,
        dtype=config.dtype,
    )


def _memory(ultramem: UltraMemConfig) -> dict[str, Any]:
    for what, kind, known in (
        ("retrieval", ultramem.retrieval, RETRIEVALS),
        ("values", ultramem.values, VALUES),
    ):
        if kind not in known:
            raise UltraMemError(
                f"A model with --ultramem-{what} {kind} cannot be exported for transformers: its "
                f"model file knows {', '.join(known)}. Use --to OUT, without hf."
            )
    spans = "/".join(map(str, ultramem.spans))
    return {**dataclasses.asdict(ultramem), "spans": spans}


def plain_config(config: UltraMemGPTConfig) -> PlainConfig:
    """The inverse of `hf_config`. Raises UltraMemError for what a PlainGPT has not."""
    rope = config.rope_parameters or {}
    fields: dict[str, Any] = {ours: getattr(config, theirs) for ours, theirs in _SAME.items()}
    if config.attention_output_bias != config.mlp_bias:
        raise UltraMemError("Biases in the MLP, but not in the attention's output, or the reverse.")
    if config.num_experts:
        fields |= {
            "num_experts": config.num_experts,
            "expert_topk": config.num_experts_per_tok,
            "expert_ffn_hidden_size": config.moe_intermediate_size,
            "router_pre_softmax": not config.norm_topk_prob,
        }
    return PlainConfig(
        **fields,
        activation="gelu" if config.hidden_act == "gelu" else "swiglu",
        qkv_bias=config.attention_bias and not config.mlp_bias,
        rotary_base=float(rope.get("rope_theta", 1e4)),
        rotary_percent=rope.get("partial_rotary_factor", 1.0),
        dtype=str(config.dtype or torch.float32).removeprefix("torch."),  # type: ignore[arg-type]  # checked by its reader
        ultramem=None if config.memory is None else _ultramem(config),
    )


def _ultramem(config: UltraMemGPTConfig) -> UltraMemConfig:
    assert config.memory is not None
    spans = parse_spans(config.memory["spans"], config.num_hidden_layers)
    return UltraMemConfig(**{**config.memory, "spans": spans})


def hf_state(plain: PlainGPT) -> dict[str, Tensor]:
    """The model's tensors by transformers' names; those that are cut are views."""
    state: dict[str, Tensor] = {}
    for name, tensor in plain.state_dict().items():
        state |= hf_parts(plain.config, name, tensor)
    return state


def hf_parts(config: PlainConfig, name: str, tensor: Tensor) -> dict[str, Tensor]:
    """What one tensor of a PlainGPT is there, by name: itself, or its parts."""
    if found := re.fullmatch(_QKV, name):
        parts = dict(zip("qkv", _cut_qkv(config, tensor), strict=True))
        prefix = f"model.layers.{found[1]}.self_attn."
        return {f"{prefix}{part}_proj.{found[2]}": rows for part, rows in parts.items()}
    if found := re.fullmatch(_MLP, name):
        expert = (found[2] or "").replace("experts.", "expert_mlps.")
        prefix = f"model.layers.{found[1]}.mlp.{expert}"
        if found[3] == "down" or config.activation == "gelu":
            return {f"{prefix}{found[3]}_proj.{found[4]}": tensor}
        gate, up = tensor.chunk(2)
        return {f"{prefix}gate_proj.{found[4]}": gate, f"{prefix}up_proj.{found[4]}": up}
    if found := re.fullmatch(_TABLE, name):
        holder = hf_config(config).table_holders[int(found[1]) + 1]
        return {f"{holder}.{found[2] or ''}values.weight": tensor}
    layer = re.fullmatch(r"layers\.(\d+)\.(.*)", name)
    start, rest = (f"model.layers.{layer[1]}.", layer[2]) if layer else ("", name)
    for ours, theirs in _LAYER_NAMES if layer else _NAMES:
        if rest.startswith(ours):
            return {start + theirs + rest.removeprefix(ours): tensor}
    raise AssertionError(name)


def _cut_qkv(config: PlainConfig, rows: Tensor) -> list[Tensor]:
    """Rows of queries, keys and values; ours are, group by group: Q queries, one key, one value."""
    per_group = config.num_attention_heads // config.num_query_groups
    shape = (config.num_query_groups, per_group + 2, config.kv_channels)
    by_group = rows.unflatten(0, shape)
    return [part.flatten(0, 2) for part in by_group.split([per_group, 1, 1], dim=1)]


def plain_state(config: PlainConfig, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `hf_state`. Raises UltraMemError, naming tensors, where it has others."""
    with torch.device("meta"):
        wanted = PlainGPT(config).state_dict()
    parts = {name: hf_parts(config, name, tensor) for name, tensor in wanted.items()}
    check_tensors(state, {name: part for found in parts.values() for name, part in found.items()})
    joined = {}
    for name, found in parts.items():
        given = [state[part] for part in found]
        is_qkv = re.fullmatch(_QKV, name) is not None
        joined[name] = _join_qkv(config, given) if is_qkv else _join(given)
    return joined


def _join(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)  # tables are large, and may be shared


def _join_qkv(config: PlainConfig, parts: list[Tensor]) -> Tensor:
    groups, channels = config.num_query_groups, config.kv_channels
    by_group = [part.unflatten(0, (groups, -1, channels)) for part in parts]
    return torch.cat(by_group, dim=1).flatten(0, 2)


def check_tensors(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    """Raise UltraMemError, naming the first of them, for tensors or shapes that are not wanted."""
    problems = [f"{name} is missing" for name in wanted.keys() - found.keys()]
    problems += [f"{name} is not expected" for name in found.keys() - wanted.keys()]
    problems += [
        f"{name} has shape {tuple(found[name].shape)}, not {tuple(wanted[name].shape)}"
        for name in wanted.keys() & found.keys()
        if found[name].shape != wanted[name].shape
    ]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise UltraMemError(f"{'; '.join(sorted(problems)[:3])}{more}.")
