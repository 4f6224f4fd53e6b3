"""Is a checkpoint of this run's memory design? Asked before anything is built."""

import dataclasses
from argparse import Namespace
from typing import Any

from ultramem_megatron.errors import UltraMemError
from ultramem_megatron.megatron.checkpoint.folder import (
    NoFlagsError,
    is_fsdp_dtensor,
    is_torch_dist,
    stored_args,
)
from ultramem_megatron.megatron.checkpoint.gpt_layers import read_as_gpt
from ultramem_megatron.megatron.checkpoint.source import Source
from ultramem_megatron.megatron.flags.arguments import config_from_args
from ultramem_megatron.memory.config import UltraMemConfig, flag

_RESUMABLE = {
    "value_lr_decay",
    "row_adam",
    "table_moments",
    "table_main_params",
    "aux_loss_weight",
    "aux_loss_margin",
    "init",
    "seed",
}
"""Fields that a resumed run may change: they shape neither tensors nor what is read from them."""


PATTERN = "hybrid_layer_pattern"
SAME_FLAGS = (
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "group_query_attention",
    "kv_channels",
    "vocab_size",
    "normalization",
    "layernorm_epsilon",
    "swiglu",
    "squared_relu",
    "quick_geglu",
    "openai_gelu",
    "activation_func_clamp_value",
    "glu_linear_offset",
    "apply_residual_connection_post_layernorm",
    "layernorm_zero_centered_gamma",
    "add_bias_linear",
    "add_qkv_bias",
    "qk_layernorm",
    "qk_l2_norm",
    "attention_output_gate",
    "untie_embeddings_and_output_weights",
    "position_embedding_type",
    "rotary_percent",
    "rotary_interleaved",
    "rotary_scaling_factor",
    "mscale",
    "mscale_all_dim",
    "no_rope_freq",
    "multi_latent_attention",
    "num_experts",
    "moe_layer_freq",
    "moe_router_topk",
    "moe_router_score_function",
    "moe_router_pre_softmax",
    "moe_router_topk_scaling_factor",
    "moe_router_num_groups",
    "moe_router_group_topk",
    "moe_apply_probs_on_input",
    "mtp_num_layers",
    PATTERN,
    "mamba_state_dim",
    "mamba_head_dim",
    "mamba_num_groups",
    "mamba_num_heads",
    "softmax_type",
    "window_size",
    "window_attn_skip_freq",
)
"""Flags of Megatron's that decide what the weights mean."""
_POSITIONS = (
    "rotary_base",
    "rotary_seq_len_interpolation_factor",
    "use_rope_scaling",
    "rope_scaling_factor",
)
"""Likewise, but changed on purpose where --finetune makes windows longer."""


def check_design(source: Source, args: Namespace, ultramem: UltraMemConfig | None) -> None:
    """Raise UltraMemError if the checkpoint to be loaded holds another model.

    Compares the flags stored in it; where a loop that is not Megatron's wrote none, nothing is.
    Formats other than `torch_dist`, of Megatron-FSDP `fsdp_dtensor`, are refused with memories, and
    said to go unchecked without.
    """
    folder = source.iteration()
    if args.use_megatron_fsdp:
        if is_torch_dist(folder):
            raise UltraMemError(
                f"{source} is a torch_dist checkpoint; Megatron-FSDP loads fsdp_dtensor alone, as "
                f"it saves. Go on without --use-megatron-fsdp."
            )
    elif not is_torch_dist(folder):
        if ultramem is not None:
            raise UltraMemError(
                f"{source} is no torch_dist checkpoint, which memory layers need: with others an "
                f"optimizer's state may be of another iteration than its weights. "
                f"{_conversion(source)}"
            )
        print(f"{source}: not torch_dist, so its flags are not compared.", flush=True)
        return
    try:
        stored = stored_args(str(folder))
    except NoFlagsError:
        return
    _refuse_other_memories(source, config_from_args(stored), ultramem)
    if ultramem is None:  # Megatron loads a GPT as a HybridModel, but not its memories
        args = read_as_gpt(args, stored)
    differences = differing_flags(args, stored)
    if differences:
        raise UltraMemError(
            f"{source}: the checkpoint is of another model: {'; '.join(differences)}. Give this "
            f"run the flags the checkpoint was made with."
        )


def _conversion(source: Source) -> str:
    if not is_fsdp_dtensor(source.iteration()):
        return "Convert it."
    return (
        f"Go on with --use-megatron-fsdp, or from its weights alone: ultramem export --load "
        f"{source.folder} --to OUT, then --from OUT --save NEW, and --load NEW."
    )


def refuse_memories_left_out(load: str, args: Namespace) -> None:
    """Raise UltraMemError if flags without memory layers load a checkpoint that has them.

    load: the folder with the iterations; args: also those of a loop that knows no flags of ours.
    """
    if config_from_args(args) is not None:
        return
    source = Source("--load", load, args.ckpt_step)
    try:
        folder = source.iteration()
        saved = config_from_args(stored_args(str(folder))) if is_torch_dist(folder) else None
    except UltraMemError:  # a plain model's, about which Megatron has its own say
        return
    _refuse_other_memories(source, saved, None)


def differing_flags(args: Namespace, stored: Namespace) -> list[str]:
    """ "name is x here, y in the checkpoint" of each flag that makes another model of weights."""
    if args.moe_use_upcycling:
        return []  # of a dense model, on purpose
    positions = () if args.finetune else _POSITIONS
    return [
        f"{name} is {getattr(args, name)} here, {getattr(stored, name)} in the checkpoint"
        for name in (*SAME_FLAGS, *positions)
        if _meaning(args, name) != _meaning(stored, name)
        and hasattr(args, name)
        and hasattr(stored, name)
    ]


def _meaning(args: Namespace, name: str) -> Any:
    """A flag's value, without what only lays layers out over pipeline stages."""
    value = getattr(args, name, None)
    return value.replace("|", "") if name == PATTERN and value else value


def _refuse_other_memories(
    source: Source, saved: UltraMemConfig | None, ultramem: UltraMemConfig | None
) -> None:
    if saved is None or ultramem is None:
        if saved is not ultramem:
            raise UltraMemError(
                f"{source}: the checkpoint has no memory layers, this run asks for them. Start "
                f"from it with --ultramem-upcycle {source.folder}, or drop the --ultramem-* flags."
                if saved is None
                else f"{source}: the checkpoint has memory layers, this run asks for none. Give "
                f"the --ultramem-* flags it was made with, or load another checkpoint."
            )
        return
    differences = [
        f"{flag(name)} is {_shown(mine)} here, {_shown(theirs)} in the checkpoint"
        for name, mine, theirs in _fields(ultramem, saved)
        if mine != theirs and name not in _RESUMABLE
    ]
    if differences:
        raise UltraMemError(
            f"{source}: the checkpoint was made with another memory design: "
            f"{'; '.join(differences)}. Use the checkpoint's values, or start without it."
        )


def _fields(mine: UltraMemConfig, theirs: UltraMemConfig) -> list[tuple[str, Any, Any]]:
    names = [field.name for field in dataclasses.fields(UltraMemConfig)]
    return [(name, getattr(mine, name), getattr(theirs, name)) for name in names]


def _shown(value: Any) -> str:
    return "/".join(map(str, value)) if isinstance(value, tuple) else str(value)
