"""Between a model of Megatron's and a PlainGPT: what it is, names, and the same logits."""

import dataclasses
import math
import re
from argparse import Namespace
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ultramem_megatron.errors import UltraMemError
from ultramem_megatron.megatron.pipeline.pattern import ATTENTION, EXPERTS, MAMBA, MLP, stages
from ultramem_megatron.memory.config import UltraMemConfig, flag
from ultramem_megatron.tools.export.plain_model import Dtype, PlainConfig, PlainGPT

# Megatron's names, left, and ours; the first that fits the start of a name is replaced.
_NAMES = (
    ("embedding.word_embeddings.", "embedding."),
    ("embedding.position_embeddings.", "position_embedding."),
    ("decoder.final_layernorm.", "final_norm."),
    ("decoder.final_norm.", "final_norm."),
    ("output_layer.", "output."),
)
_LAYER_NAMES = (
    ("input_layernorm.", "attention_norm."),
    ("self_attention.linear_qkv.", "attention.qkv."),
    ("self_attention.linear_proj.", "attention.proj."),
    ("self_attention.q_layernorm.", "attention.query_norm."),
    ("self_attention.k_layernorm.", "attention.key_norm."),
    ("pre_mlp_layernorm.", "mlp_norm."),
    ("norm.", "mamba_norm."),
    ("mixer.", "mamba."),
    ("mlp.linear_fc1.", "mlp.up."),
    ("mlp.linear_fc2.", "mlp.down."),
    ("mlp.router.", "mlp.router."),
    ("memory.", "memory."),
)
_EXPERT_NAME = r"mlp\.experts\.local_experts\.(\d+)\.linear_fc([12])\.(.*)"
_DTYPES: dict[torch.dtype, Dtype] = {
    torch.float32: "float32",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
}
_LAYERS = (ATTENTION, MAMBA, MLP, EXPERTS)
_TOLERANCE = {torch.float32: 1e-4, torch.float16: 0.05, torch.bfloat16: 0.2}
"""Difference of logits, relative in norm, that rounding in other orders explains in any model."""
_MOST = 0.5
"""Beyond it two models are not the same, however chaotic."""
_PROBE = (2, 16)  # sequences, tokens


def plain_config(args: Namespace, config: Any, ultramem: UltraMemConfig | None) -> PlainConfig:
    """What the model of Megatron's flags and TransformerConfig is. Raises UltraMemError."""
    _refuse(args, config)
    return PlainConfig(
        vocab_size=args.padded_vocab_size,
        num_layers=config.num_layers,
        hidden_size=config.hidden_size,
        ffn_hidden_size=config.ffn_hidden_size,
        num_attention_heads=config.num_attention_heads,
        num_query_groups=config.num_query_groups,
        kv_channels=config.kv_channels,
        max_positions=args.max_position_embeddings,
        activation="swiglu" if config.gated_linear_unit else "gelu",
        normalization=config.normalization,
        norm_epsilon=config.layernorm_epsilon,
        bias=config.add_bias_linear,
        qkv_bias=config.add_qkv_bias,
        qk_norm=config.qk_layernorm,
        positions=args.position_embedding_type,
        rotary_base=float(args.rotary_base),
        rotary_percent=args.rotary_percent,
        tied_embeddings=not args.untie_embeddings_and_output_weights,
        pattern=_pattern(args),
        **_mamba(args, config),
        **_experts(config),
        dtype=_DTYPES[config.params_dtype],
        ultramem=ultramem,
    )


def _pattern(args: Namespace) -> str | None:
    """What each layer of a HybridModel is; where stages end is left out."""
    pattern = args.hybrid_layer_pattern
    return None if pattern is None else "".join(stages(pattern))


def _mamba(args: Namespace, config: Any) -> dict[str, Any]:
    if MAMBA not in (_pattern(args) or ""):
        return {}
    inner = 2 * config.hidden_size  # as MambaMixer
    return {
        "mamba_num_heads": config.mamba_num_heads or inner // config.mamba_head_dim,
        "mamba_head_dim": config.mamba_head_dim,
        "mamba_num_groups": config.mamba_num_groups,
        "mamba_state_dim": config.mamba_state_dim,
    }


def _experts(config: Any) -> dict[str, Any]:
    if config.num_moe_experts is None:
        return {}
    return {
        "num_experts": config.num_moe_experts,
        "expert_topk": config.moe_router_topk,
        "expert_ffn_hidden_size": config.moe_ffn_hidden_size,
        "router_pre_softmax": config.moe_router_pre_softmax,
        "router_float32": config.moe_router_dtype == "fp32",
    }


def _refuse(args: Namespace, config: Any) -> None:
    """Raise UltraMemError for what a PlainGPT has not."""
    activation = (config.gated_linear_unit, config.activation_func)
    refused = {
        f"{_symbols(args)} in --hybrid-layer-pattern": bool(_symbols(args)),
        "a --hybrid-layer-pattern with neither attention nor Mamba": not (
            {ATTENTION, MAMBA} & set(_pattern(args) or ATTENTION)
        ),
        "--multi-latent-attention": config.multi_latent_attention,
        "--mtp-num-layers": bool(config.mtp_num_layers),
        "--experimental-attention-variant": config.experimental_attention_variant is not None,
        "--position-embedding-type " + args.position_embedding_type: args.position_embedding_type
        not in ("rope", "learned_absolute", "none"),
        "--use-rope-scaling": args.use_rope_scaling,
        "--rotary-interleaved": config.rotary_interleaved,
        "--rotary-seq-len-interpolation-factor": args.rotary_seq_len_interpolation_factor
        not in (None, 1),
        "--no-rope-freq": config.no_rope_freq is not None,
        "--window-size": config.window_size is not None,
        "--softmax-type": config.softmax_type != "vanilla",
        "--attention-output-gate": config.attention_output_gate,
        "--apply-residual-connection-post-layernorm": (
            config.apply_residual_connection_post_layernorm
        ),
        "--apply-layernorm-1p": config.layernorm_zero_centered_gamma,
        "--fp32-residual-connection": config.fp32_residual_connection,
        "an activation other than GELU and SwiGLU": activation
        not in ((False, F.gelu), (True, F.silu)),
    }
    if config.num_moe_experts is not None:
        refused |= _refused_experts(config)
    present = [name for name, found in refused.items() if found]
    if present:
        raise UltraMemError(
            f"A model with {', '.join(present)} cannot be exported: the plain model has attention, "
            f"a GELU or SwiGLU MLP or top-k experts of that kind, LayerNorm or RMSNorm, and memory "
            f"layers. Keep its checkpoint."
        )


def _symbols(args: Namespace) -> str:
    """Those of layers that a PlainGPT has not."""
    return ", ".join(sorted(set(_pattern(args) or "") - set(_LAYERS)))


def _refused_experts(config: Any) -> dict[str, bool]:
    balancing = config.moe_router_load_balancing_type
    kinds = [balancing] if isinstance(balancing, str) else balancing
    frequency = config.moe_layer_freq
    return {
        "biases in experts": config.add_bias_linear,
        "--moe-layer-freq": any(
            f != 1 for f in (frequency if isinstance(frequency, list) else [frequency])
        ),
        "--moe-shared-expert-intermediate-size": config.moe_shared_expert_intermediate_size
        is not None,
        "--moe-router-load-balancing-type " + " ".join(kinds): not set(kinds)
        <= {"none", "aux_loss", "seq_aux_loss", "global_aux_loss"},
        "--moe-router-score-function "
        + config.moe_router_score_function: config.moe_router_score_function != "softmax",
        "--moe-router-num-groups": bool(config.moe_router_num_groups),
        "--moe-router-topk-scaling-factor": bool(config.moe_router_topk_scaling_factor),
        "--moe-router-enable-expert-bias": config.moe_router_enable_expert_bias,
        "--moe-router-dtype fp64": config.moe_router_dtype == "fp64",
        "--moe-expert-capacity-factor": config.moe_expert_capacity_factor is not None,
        "--moe-apply-probs-on-input": config.moe_apply_probs_on_input,
        "--moe-latent-size": config.moe_latent_size is not None,
        "--moe-mlp-glu-interleave-size": config.moe_mlp_glu_interleave_size is not None,
    }


def plain_name(name: str) -> str:
    """The PlainGPT's name of a tensor of the Megatron model. Raises UltraMemError."""
    layer = re.fullmatch(r"decoder\.layers\.(\d+)\.(.*)", name)
    prefix, rest = (f"layers.{layer[1]}.", layer[2]) if layer else ("", name)
    if expert := re.fullmatch(_EXPERT_NAME, rest):
        number, linear, tensor = expert.groups()
        return f"{prefix}mlp.experts.{number}.{'up' if linear == '1' else 'down'}.{tensor}"
    for theirs, ours in _LAYER_NAMES if layer else _NAMES:
        if rest.startswith(theirs):
            return prefix + ours + rest.removeprefix(theirs)
    raise UltraMemError(f"The model has {name}, which the plain model has not: no export.")


def megatron_name(name: str) -> str:
    """The inverse of `plain_name` for a GPT without experts."""
    layer = re.fullmatch(r"layers\.(\d+)\.(.*)", name)
    prefix, rest = (f"decoder.layers.{layer[1]}.", layer[2]) if layer else ("", name)
    for theirs, ours in _LAYER_NAMES if layer else _NAMES:
        if rest.startswith(ours):
            return prefix + theirs + rest.removeprefix(ours)
    raise AssertionError(name)


def plain_model(model: Any, config: PlainConfig) -> PlainGPT:
    """A PlainGPT on the model's own tensors, after checking that both give the same logits."""
    state = {plain_name(name): tensor.detach() for name, tensor in _tensors(model).items()}
    with torch.device("meta"):
        plain = PlainGPT(config)
    wanted = plain.state_dict().keys()
    if state.keys() != wanted:
        raise UltraMemError(
            f"The model's tensors are not those of a plain model: {sorted(state.keys() ^ wanted)}."
        )
    plain.load_state_dict(state, assign=True)
    plain.eval()
    check_same_logits(model, plain)
    return plain


def load_into(model: Any, plain: PlainGPT) -> None:
    """Copy a PlainGPT's tensors into a Megatron model of its design; check the logits."""
    state = plain.state_dict()
    with torch.no_grad():
        for name, tensor in _tensors(model).items():
            tensor.copy_(state[plain_name(name)])
    check_same_logits(model, plain)


def _tensors(model: Any) -> dict[str, Tensor]:
    from megatron.core.utils import unwrap_model

    state = unwrap_model(model).state_dict(keep_vars=True)
    return {name: t for name, t in state.items() if not name.endswith("_extra_state")}


def check_same_logits(model: Any, plain: PlainGPT) -> None:
    """Raise UltraMemError unless both give the same logits for a few random tokens."""

    def megatron(tokens: Tensor) -> Tensor:
        length = tokens.shape[1]
        positions = torch.arange(length, device=tokens.device).expand(len(tokens), -1)
        mask = torch.ones(1, 1, length, length, dtype=torch.bool, device=tokens.device).triu(1)
        logits: Tensor = model(tokens, positions, mask, runtime_gather_output=True)
        return logits

    check_same(plain, megatron, "Megatron's")


@torch.no_grad()
def check_same(plain: PlainGPT, logits: Callable[[Tensor], Tensor], whose: str) -> None:
    """Raise UltraMemError unless `logits` of a few random tokens (B, S) are the plain model's."""
    device = plain.embedding.weight.device
    sequences, length = _PROBE
    length = min(length, plain.config.max_positions)
    tokens = torch.randint(plain.config.vocab_size, (sequences, length), device=device)
    wanted = logits(tokens).double()
    difference = (plain(tokens).double() - wanted).norm() / wanted.norm()
    allowed = _allowed(plain, tokens)
    if not difference <= allowed:
        raise UltraMemError(
            f"The plain model's logits differ from {whose} by {difference:.1e} (relative; "
            f"allowed {allowed:.0e}): the model uses something that the plain model has not."
        )


def _allowed(plain: PlainGPT, tokens: Tensor) -> float:
    """Relative difference of logits that rounding explains; in half precision, that of this model.

    Memories pick other values where scores are nearly equal, the more often the more memories.
    """
    dtype = plain.embedding.weight.dtype
    known = _TOLERANCE[dtype]
    if dtype == torch.float32:
        return known

    def rounded_otherwise(_: object, __: object, hidden: Tensor) -> Tensor:
        signs = torch.randint_like(hidden, 2) * 2 - 1
        return hidden * (1 + signs * torch.finfo(dtype).eps)

    logits = plain(tokens).double()
    hook = plain.embedding.register_forward_hook(rounded_otherwise)
    moved = (plain(tokens).double() - logits).norm() / logits.norm()
    hook.remove()
    return min(_MOST, max(known, 2 * float(moved)))


def flags_of(config: PlainConfig) -> list[str]:
    """Megatron's and our flags for a model of that design."""
    flags: dict[str, Any] = {
        "vocab-size": config.vocab_size,
        "make-vocab-size-divisible-by": math.gcd(config.vocab_size, 128),  # no more padding
        # An = before a pattern, which may begin with a -.
        f"hybrid-layer-pattern={config.pattern}": config.pattern is not None,
        "num-layers": config.pattern is None and config.num_layers,
        "hidden-size": config.hidden_size,
        "ffn-hidden-size": config.ffn_hidden_size,
        "num-attention-heads": config.num_attention_heads,
        "kv-channels": config.kv_channels,
        "seq-length": config.max_positions,
        "max-position-embeddings": config.max_positions,
        "swiglu": config.activation == "swiglu",
        "normalization": config.normalization,
        "norm-epsilon": config.norm_epsilon,
        "disable-bias-linear": not config.bias,
        "add-qkv-bias": config.qkv_bias,
        "qk-layernorm": config.qk_norm,
        "position-embedding-type": config.positions,
        "rotary-base": int(config.rotary_base),
        "rotary-percent": config.rotary_percent,
        "untie-embeddings-and-output-weights": not config.tied_embeddings,
        "bf16": config.dtype == "bfloat16",
        "fp16": config.dtype == "float16",
    }
    if config.num_query_groups != config.num_attention_heads:
        flags |= {"group-query-attention": True, "num-query-groups": config.num_query_groups}
    if config.mamba_num_heads:
        flags |= {
            "mamba-num-heads": config.mamba_num_heads,
            "mamba-head-dim": config.mamba_head_dim,
            "mamba-num-groups": config.mamba_num_groups,
            "mamba-state-dim": config.mamba_state_dim,
        }
    if config.num_experts:
        flags |= {
            "num-experts": config.num_experts,
            "moe-router-topk": config.expert_topk,
            "moe-ffn-hidden-size": config.expert_ffn_hidden_size,
            "moe-router-pre-softmax": config.router_pre_softmax,
            "moe-router-load-balancing-type": "none",
        }
        if config.router_float32:
            flags["moe-router-dtype"] = "fp32"
    words = []
    for name, value in flags.items():
        if value is not False:
            words += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return words + (_memory_flags(config.ultramem) if config.ultramem else [])


def _memory_flags(ultramem: UltraMemConfig) -> list[str]:
    words = ["--seed", str(ultramem.seed)]
    followed = ("value_lr_mult", "value_lr_decay")
    for field in dataclasses.fields(ultramem):
        if ultramem.value_lr_fixed and field.name in followed:
            continue  # one or the other
        name, value = flag(field.name), getattr(ultramem, field.name)
        if isinstance(value, bool):
            words.append(name if value else name.replace("--", "--no-", 1))
        elif field.name == "spans":
            words += [name, "/".join(map(str, value))]
        elif field.name != "seed":
            words += [name, str(value)]
    return words
