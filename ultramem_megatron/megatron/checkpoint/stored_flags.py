"""What is believed of the flags stored in a checkpoint: those that describe its model, as data.

They were written by whoever made the checkpoint. A flag is taken by name, from a list, and only
with a value that is plain data; flags that name code or files are left where they are.
"""

import dataclasses
from argparse import Namespace
from collections.abc import Collection, Iterable
from enum import Enum
from functools import cache
from typing import Any

import torch

from ultramem_megatron.errors import UltraMemError
from ultramem_megatron.faults.trust import ADVICE, is_trusted
from ultramem_megatron.megatron.flags.layout_flags import ONE_RANK
from ultramem_megatron.memory.config import UltraMemConfig

CODE_FLAGS = (
    "spec",
    "fp8_quantizer_factory",
    "fp4_quantizer_factory",
    "trust_remote_code",
    "metadata_path",
    "yaml_cfg",
    "heterogeneous_layers_config_path",
    "te_precision_config_file",
    "kitchen_config_file",
    "config_logger_dir",
)
"""Name modules to import, files that do, or what Megatron writes while it builds."""

_NEEDED_BY_MODEL = (
    "spec",
    "fp8_quantizer_factory",
    "fp4_quantizer_factory",
    "heterogeneous_layers_config_path",
    "yaml_cfg",
)
"""Without these the model would be another one: refused, not left out."""

_MODEL_FLAGS = (
    "num_experts",
    "group_query_attention",
    "swiglu",
    "squared_relu",
    "quick_geglu",
    "openai_gelu",
    "add_position_embedding",
    "position_embedding_type",
    "max_position_embeddings",
    "use_rotary_position_embeddings",
    "rotary_base",
    "rotary_percent",
    "rotary_interleaved",
    "rotary_seq_len_interpolation_factor",
    "use_rope_scaling",
    "rope_scaling_factor",
    "rotary_scaling_factor",
    "mscale",
    "mscale_all_dim",
    "yarn_original_max_position_embeddings",
    "yarn_beta_fast",
    "yarn_beta_slow",
    "yarn_correction_range_round_to_int",
    "relative_attention_num_buckets",
    "relative_attention_max_distance",
    "hybrid_layer_pattern",
    "heterogeneous_layers_config_encoded_json",
    "untie_embeddings_and_output_weights",
    "make_vocab_size_divisible_by",
    "vocab_size",
    "padded_vocab_size",
    "pad_vocab_size",
    "init_method_xavier_uniform",
    "no_persist_layer_norm",
    "fp16_lm_cross_entropy",
    "fp8_param_gather",
    "fp4_param_gather",
    "bias_gelu_fusion",
    "bias_swiglu_fusion",
    "seq_length",
    "encoder_seq_length",
    "seed",
)
"""Megatron's flags of a GPT that its TransformerConfig does not have under the same name."""

_TOKENIZER_FLAGS = (
    "tokenizer_type",
    "tokenizer_model",
    "vocab_file",
    "merge_file",
    "vocab_extra_ids",
    "special_tokens",
    "tiktoken_pattern",
    "tiktoken_num_special_tokens",
    "chat_template",
    "tokenizer_sentencepiece_legacy",
    "tokenizer_sentencepiece_ignore_extra_whitespaces",
    "tokenizer_hf_no_use_fast",
    "tokenizer_hf_no_include_special_tokens",
    "null_tokenizer_eod_id",
    "null_tokenizer_pad_id",
    "tensorboard_dir",
)
"""Folders and files here are read as data, where the tokenizer and the log of the run are."""

LAYOUT_FLAGS = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "virtual_pipeline_model_parallel_size",
    "expert_model_parallel_size",
    "optimizer",
    "muon_tp_mode",
    "ultramem_train_rows",
    "lr",
    "min_lr",
)
"""Of how a run was laid out, what decides whether its optimizer's state fits another one."""

_MEMORY_FLAGS = (
    "preset",
    "parallel_size",
    "partition",
    "node_size",
    "overlap",
    "train_only",
    "in_force",
)


@cache
def taken_flags() -> frozenset[str]:
    """Names of the stored flags that are believed."""
    from megatron.core.transformer import MLATransformerConfig

    architecture = {field.name for field in dataclasses.fields(MLATransformerConfig)}
    memory = {field.name for field in dataclasses.fields(UltraMemConfig)} | set(_MEMORY_FLAGS)
    named = architecture.union(_MODEL_FLAGS, _TOKENIZER_FLAGS, (f"ultramem_{n}" for n in memory))
    layout = {name for name in ONE_RANK if not name.startswith("ultramem_")}
    return frozenset(named - layout - set(CODE_FLAGS))


def believed(stored: Any, folder: str) -> Namespace:
    """The flags of `stored` that describe the model; all of them where the user trusts the file.

    Raises UltraMemError for values that are no plain data, and for a model that needs code.
    """
    if not isinstance(stored, Namespace):
        raise UltraMemError(
            f"{folder}: its flags are a {type(stored).__name__}, not what Megatron stores. {ADVICE}"
        )
    _complete_older(stored)
    if is_trusted():
        return stored
    for name in _NEEDED_BY_MODEL:
        value = getattr(stored, name, None)
        if value is not None:
            raise UltraMemError(
                f"{folder}: its model needs code or files named in it ({name} is {value!r:.200}), "
                f"which are never taken from a checkpoint. {ADVICE}"
            )
    return _as_data(stored, taken_flags(), folder)


def believed_layout(stored: Any, folder: str) -> Namespace:
    """How the run that wrote `stored` was laid out: those of LAYOUT_FLAGS that it has.

    Raises UltraMemError for values that are no plain data.
    """
    found = stored if isinstance(stored, Namespace) else Namespace()
    return _as_data(found, LAYOUT_FLAGS, folder)


def _as_data(stored: Namespace, names: Collection[str], folder: str) -> Namespace:
    taken = {name: value for name, value in vars(stored).items() if name in names}
    odd = sorted(name for name, value in taken.items() if not _is_data(value))
    if odd:
        raise UltraMemError(
            f"{folder}: its flag {odd[0]} is no plain data, but a {type(taken[odd[0]]).__name__}. "
            f"{ADVICE}"
        )
    return Namespace(**taken)


def _complete_older(stored: Namespace) -> None:
    """Give flags that are older than their default what was true of them then."""
    spans, preset = (getattr(stored, f"ultramem_{name}", None) for name in ("spans", "preset"))
    if not (spans or preset) or hasattr(stored, "ultramem_query_centering"):
        return
    stored.ultramem_query_centering = False
    if not preset and getattr(stored, "ultramem_value_lr_mult", None) is None:
        stored.ultramem_value_lr_mult = 10.0


def _is_data(value: Any) -> bool:
    if isinstance(value, (list, tuple, dict)):
        parts: Iterable[Any] = [*value, *value.values()] if isinstance(value, dict) else value
        return all(map(_is_data, parts))
    if isinstance(value, Enum):
        return type(value).__module__.startswith("megatron.core.")
    return value is None or type(value) in (bool, int, float, str, torch.dtype)


def completed(stored: Namespace) -> Namespace:
    """Stored flags over Megatron's defaults on one rank: what a model is built from."""
    from ultramem_megatron.megatron.flags.parse import parse_words

    flags = parse_words([])
    vars(flags).update(vars(stored))
    return flags
