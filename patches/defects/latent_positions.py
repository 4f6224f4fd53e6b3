"""Latent attention under tensor parallelism: keys' positions get the gradient of all heads.

All heads share one rotated part of the key. Megatron's own layers cut its projection over the
tensor-parallel ranks and gather what comes out; back goes the gradient of a rank's own heads alone.
"""

from typing import Any

import torch
from torch import Tensor

from ultramem_megatron.patches.patch import Editor, Patch

_DOWN = "megatron.core.transformer.multi_latent_attention.MLASelfAttention._qkv_down_projection"


def _whole_down_projection(original: Any) -> Any:
    def _qkv_down_projection(self: Any, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        query, combined = original(self, hidden_states)
        widths = [self.config.kv_lora_rank, self.config.qk_pos_emb_head_dim]
        if combined.shape[-1] == sum(widths):
            return query, combined
        from megatron.core.tensor_parallel import mappings

        combined = mappings.gather_from_tensor_model_parallel_region(combined)
        if self.config.sequence_parallel:
            # Gathered again over the sequence by the caller, whose gradient is summed.
            return query, mappings.scatter_to_sequence_parallel_region(combined)
        latent, positions = combined.split(widths, -1)
        positions = mappings.copy_to_tensor_model_parallel_region(positions)
        return query, torch.cat([latent, positions], -1)

    return _qkv_down_projection


def _install(editor: Editor) -> None:
    editor.wrap(_DOWN, _whole_down_projection, ("self", "hidden_states"))


PATCH = Patch(
    name="defects.latent_positions",
    symbols=(_DOWN,),
    reason="get_query_key_value_tensors gathers kv_combined with a gradient that is split, not "
    "summed, though k_pos_emb goes to each rank's own heads.",
    delete_when="The gradient of k_pos_emb is summed over tensor-parallel ranks.",
    install=_install,
    versions=">=0.19",
)
