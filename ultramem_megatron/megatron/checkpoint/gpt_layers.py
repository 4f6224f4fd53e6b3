"""A GPT's checkpoint read by a HybridModel: which of its layers are which of the pattern.

Each layer of a GPT is an attention (*) and an MLP (-) or experts (E) of the pattern, in order;
Mamba layers (M) have no counterpart and start anew. The pairing is upstream's.
"""

import re
from argparse import Namespace
from collections.abc import Collection
from functools import partial
from typing import Any

from ultramem_megatron.errors import UltraMemError

_LAYER = re.compile(r"decoder\.layers\.(\d+)\.")
_NOT_OF_A_GPT = "output_layer._extra_state"
_OF_MAMBA = ("mamba_state_dim", "mamba_head_dim", "mamba_num_groups", "mamba_num_heads")


def read_as_gpt(args: Namespace, stored: Namespace) -> Namespace:
    """The flags of the GPT that a HybridModel's `args` ask of a GPT's checkpoint; else `args`.

    stored: flags in the checkpoint. Raises UltraMemError for a pattern that is no GPT's.
    """
    if not is_hybrid(args) or is_hybrid(stored):
        return args
    changes = {name: getattr(stored, name, None) for name in _OF_MAMBA}
    changes |= {
        "hybrid_layer_pattern": None,
        "num_layers": pairs_of_layers(args.hybrid_layer_pattern).num_gpt_layers,
    }
    return Namespace(**{**vars(args), **changes})


def is_hybrid(args: Namespace) -> bool:
    """Whether flags are of a HybridModel; older ones know none."""
    return getattr(args, "hybrid_layer_pattern", None) is not None


def pairs_of_layers(pattern: str) -> Any:
    """Upstream's GPTCompatLayerMaps. Raises UltraMemError for a pattern that is no GPT's."""
    from megatron.core.dist_checkpointing.gpt_checkpoint_interop import gpt_compatible_layer_maps

    try:
        return gpt_compatible_layer_maps(pattern)
    except ValueError as error:
        raise UltraMemError(f"A GPT's checkpoint in a HybridModel: {error}") from error


def fresh_layers(pattern: str) -> list[int]:
    """The layers of a pattern, from 1, that have no counterpart in a GPT."""
    return sorted(index + 1 for index in pairs_of_layers(pattern).fresh_init)


def point_at_gpt(state: dict[str, Any], pattern: str, stored: Collection[str]) -> None:
    """Let a HybridModel's sharded state read a GPT's tensors, whose keys are `stored`. In place.

    Layers are one stack, which upstream pairs, or each has keys of its own. The norm before experts
    has the name that MLPs have for it, where Megatron's own layers wrote it.
    """
    from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace
    from megatron.core.dist_checkpointing.gpt_checkpoint_interop import (
        retarget_sharded_state_dict_to_gpt_checkpoint,
    )

    pairs = pairs_of_layers(pattern)
    if has_key_for_each_layer(stored):
        dict_list_map_inplace(partial(_with_its_layer, pairs=pairs), state)
    else:
        retarget_sharded_state_dict_to_gpt_checkpoint(state, pairs)
    dict_list_map_inplace(partial(_with_norm_of_mlp, stored=stored), state)


def has_key_for_each_layer(stored: Collection[str]) -> bool:
    """Whether a checkpoint of these keys has its layers apart, not as one stack."""
    return any(key.startswith("decoder.layers.0.") for key in stored)


def _with_its_layer(entry: Any, pairs: Any) -> Any:
    from megatron.core.dist_checkpointing.mapping import LocalNonpersistentObject, ShardedBase

    if not isinstance(entry, ShardedBase):
        return entry
    entry.key = entry.key.replace("decoder.final_norm.", "decoder.final_layernorm.")
    found = _LAYER.match(entry.key)
    number = int(found[1]) if found else None
    if entry.key == _NOT_OF_A_GPT or number in pairs.fresh_init:
        return LocalNonpersistentObject(entry.data)
    if found is not None:
        of_gpt = {**pairs.attention_to_gpt, **pairs.mlp_to_gpt}[number]
        entry.key = f"decoder.layers.{of_gpt}.{entry.key[found.end() :]}"
    return entry


def _with_norm_of_mlp(entry: Any, stored: Collection[str]) -> Any:
    from megatron.core.dist_checkpointing.mapping import ShardedBase

    if isinstance(entry, ShardedBase) and entry.key not in stored:
        other = entry.key.replace(".pre_mlp_layernorm.", ".mlp.linear_fc1.layer_norm_")
        entry.key = other if other in stored else entry.key
    return entry
