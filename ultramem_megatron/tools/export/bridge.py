"""Megatron-Bridge converts folders for transformers into its own models, and back.

    import ultramem_megatron.tools.export.bridge                       # registers with AutoBridge
    bridge = AutoBridge.from_hf_pretrained(OUT, trust_remote_code=True)
    provider = bridge.to_megatron_provider()                           # an UltraMemGPTModelProvider
    bridge.save_hf_pretrained(model, OUT2)

Names and cuts are those of `ultramem export`. Written against Megatron-Bridge 0.6.2.
"""

import copy
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_model import GPTModel

from ultramem_megatron.errors import UltraMemError
from ultramem_megatron.tools.export.hf.configuration_ultramem import UltraMemGPTConfig
from ultramem_megatron.tools.export.huggingface import hf_parts, plain_config
from ultramem_megatron.tools.export.megatron import megatron_name
from ultramem_megatron.tools.export.plain_model import PlainConfig, PlainGPT
from ultramem_megatron.training.bridge.provider import UltraMemGPTModelProvider

try:
    from megatron.bridge.models.conversion.mapping_registry import MegatronMappingRegistry
    from megatron.bridge.models.conversion.model_bridge import MegatronModelBridge
    from megatron.bridge.models.conversion.param_mapping import (
        AutoMapping,
        DirectMapping,
        GatedMLPMapping,
        QKVMapping,
    )
except ImportError as error:
    raise UltraMemError(
        f"Megatron-Bridge's conversion cannot be imported ({error}). Install megatron-bridge with "
        f"Transformer Engine, or convert with ultramem export --from hf, which needs neither."
    ) from error

_FUSED = {
    "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
    "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
}
"""Norms, and where Transformer Engine's layers have them that no memory stands in."""
_WHOLE = (".memory.", "position_embeddings.")
"""In names of what every rank has whole."""
_SAME = (
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "kv_channels",
    "vocab_size",
    "normalization",
    "rotary_base",
    "rotary_percent",
    "ultramem",
)
"""Fields of a PlainConfig that the provider has, too."""


@MegatronModelBridge.register_bridge(
    source="UltraMemGPTForCausalLM",
    target=GPTModel,
    provider=UltraMemGPTModelProvider,
    model_type=UltraMemGPTConfig.model_type,
)
class UltraMemBridge(MegatronModelBridge):
    """What AutoBridge does with a folder whose architecture is UltraMemGPTForCausalLM."""

    def provider_bridge(self, hf_pretrained: Any) -> UltraMemGPTModelProvider:
        """The provider of the folder's model. Raises UltraMemError for experts and Mamba."""
        plain = _plain(hf_pretrained.config)
        dtype = getattr(torch, plain.dtype)
        return UltraMemGPTModelProvider(
            **{name: getattr(plain, name) for name in _SAME},
            seq_length=plain.max_positions,
            layernorm_epsilon=plain.norm_epsilon,
            add_bias_linear=plain.bias,
            add_qkv_bias=plain.qkv_bias,
            qk_layernorm=plain.qk_norm,
            position_embedding_type=plain.positions,
            share_embeddings_and_output_weights=plain.tied_embeddings,
            gated_linear_unit=plain.activation == "swiglu",
            activation_func=F.silu if plain.activation == "swiglu" else F.gelu,
            hidden_dropout=0.0,
            attention_dropout=0.0,
            params_dtype=dtype,
            bf16=dtype == torch.bfloat16,
            fp16=dtype == torch.float16,
        )

    def mapping_registry(self) -> Any:
        """Each of Megatron's tensors, and those of the folder that it is made of."""
        plain = _plain(self.hf_config)
        with torch.device("meta"):
            state = PlainGPT(plain).state_dict()
        found = [
            mapping
            for name, tensor in state.items()
            for mapping in _mappings(megatron_name(name), list(hf_parts(plain, name, tensor)))
        ]
        return MegatronMappingRegistry(*found)


class _QKV(QKVMapping):
    """Bridge's, which copies a model's config to send it, and cannot a frozen design in it."""

    def _get_config(self, module: Any) -> Any:
        config = copy.copy(super()._get_config(module))
        config.ultramem = None
        return config


def _plain(config: Any) -> PlainConfig:
    plain = plain_config(UltraMemGPTConfig.from_dict(config.to_dict()))
    for what, given in (("experts", plain.num_experts), ("layer_pattern", plain.pattern)):
        if given:
            raise UltraMemError(
                f"Megatron-Bridge is not given a model with {what} ({given}). Convert it with "
                f"ultramem export --from hf."
            )
    return plain


def _mappings(name: str, parts: list[str]) -> Iterator[Any]:
    """name: Megatron's. parts: the folder's, in the order in which they are joined."""
    if len(parts) == 3:
        yield _QKV(name, **dict(zip("qkv", parts, strict=True)))
    elif len(parts) == 2:
        yield GatedMLPMapping(name, **dict(zip(("gate", "up"), parts, strict=True)))
    elif any(whole in name for whole in _WHOLE):
        yield DirectMapping(name, parts[0])
    else:
        yield AutoMapping(name, parts[0])
        for norm, fused in _FUSED.items():
            if norm in name:
                yield AutoMapping(name.replace(norm, fused), parts[0])
