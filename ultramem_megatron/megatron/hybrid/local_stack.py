"""The stack of a HybridModel from Megatron's own layers, without Transformer Engine.

Megatron publishes `hybrid_stack_spec` of Transformer Engine's layers alone. These are the halves of
its GPT layer for --transformer-impl local, and its Mamba layer; names in checkpoints are the same.
"""

from typing import Any

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_submodules
from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
from megatron.core.models.hybrid.hybrid_block import HybridStack, HybridStackSubmodules
from megatron.core.ssm.mamba_layer import MambaLayer, MambaLayerSubmodules
from megatron.core.ssm.mamba_mixer import MambaMixer, MambaMixerSubmodules
from megatron.core.ssm.mlp_layer import MLPLayer
from megatron.core.transformer.multi_token_prediction import (
    MultiTokenPredictionBlock,
    MultiTokenPredictionBlockSubmodules,
    get_mtp_layer_spec,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

_OF_ATTENTION = ("input_layernorm", "self_attention", "self_attn_bda")
_OF_MLP = ("pre_mlp_layernorm", "mlp", "mlp_bda")


class LocalHybridStack(HybridStack):
    """HybridStack with the final norm of Megatron's own layers: upstream's is the engine's."""

    def __init__(
        self, config: TransformerConfig, *args: Any, post_layer_norm: bool = True, **kwargs: Any
    ) -> None:
        super().__init__(config, *args, post_layer_norm=False, **kwargs)
        self.post_layer_norm = post_layer_norm
        if self.post_process and post_layer_norm:
            self.final_norm = _norm(config)(
                config, hidden_size=config.hidden_size, eps=config.layernorm_epsilon
            )


def local_stack_spec(config: TransformerConfig) -> ModuleSpec:
    """The spec of the stack: attention, MLPs, experts where there are any, Mamba, later tokens."""
    whole = get_gpt_layer_local_submodules(
        qk_layernorm=config.qk_layernorm, normalization=config.normalization
    )
    experts = {}
    if config.num_moe_experts is not None:
        moe = get_moe_module_spec(use_te=False, num_experts=config.num_moe_experts)
        submodules = _half(whole, _OF_MLP, mlp=moe, sharded_state_dict_keys_map={})
        experts["moe_layer"] = ModuleSpec(TransformerLayer, submodules=submodules)
    return ModuleSpec(
        LocalHybridStack,
        submodules=HybridStackSubmodules(
            attention_layer=ModuleSpec(TransformerLayer, submodules=_half(whole, _OF_ATTENTION)),
            mlp_layer=ModuleSpec(MLPLayer, submodules=_half(whole, _OF_MLP)),
            mamba_layer=_mamba(config),
            mtp_block_spec=_later_tokens(),
            **experts,
        ),
    )


def _half(
    whole: TransformerLayerSubmodules, names: tuple[str, ...], **changes: Any
) -> TransformerLayerSubmodules:
    """Some of a layer's submodules; the others stay the identity."""
    kept = (*names, "sharded_state_dict_keys_map")
    return TransformerLayerSubmodules(**{name: getattr(whole, name) for name in kept} | changes)


def _mamba(config: TransformerConfig) -> ModuleSpec:
    linear = LocalSpecProvider()
    mixer = ModuleSpec(
        MambaMixer,
        submodules=MambaMixerSubmodules(
            in_proj=linear.column_parallel_linear(), out_proj=linear.row_parallel_linear()
        ),
    )
    return ModuleSpec(
        MambaLayer,
        submodules=MambaLayerSubmodules(
            norm=_norm(config),
            mixer=mixer,
            mamba_bda=get_bias_dropout_add,
            # Transformer Engine's layers fuse the norm into in_proj.
            sharded_state_dict_keys_map={"norm.": "mixer.in_proj.layer_norm_"},
        ),
    )


def _later_tokens() -> ModuleSpec:
    """Of heads for later tokens, whose inner layers are the stack's own kinds."""
    layer = get_mtp_layer_spec(None, use_transformer_engine=False)
    return ModuleSpec(
        MultiTokenPredictionBlock,
        submodules=MultiTokenPredictionBlockSubmodules(layer_specs=[layer]),
    )


def _norm(config: TransformerConfig) -> Any:
    return LocalSpecProvider().layer_norm(rms_norm=config.normalization == "RMSNorm")
