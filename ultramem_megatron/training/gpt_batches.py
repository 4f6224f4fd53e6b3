"""Micro-batches of a GPT task, as each rank of a layout needs them.

Megatron-LM keeps this in its script pretrain_gpt.py, which the megatron-core wheel does not hold.
Shapes: B micro-batch size, S sequence length on this context-parallel rank.
"""

from argparse import Namespace
from collections.abc import Iterator
from typing import Any, cast

from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.multi_token_prediction import mtp_on_this_rank
from megatron.core.utils import (
    flatten_batch_for_packed_sequences,
    get_batch_on_this_cp_rank,
    get_batch_on_this_tp_rank,
)
from megatron.training import get_args
from megatron.training.training import update_seqlen_stats_from_cu_seqlens
from megatron.training.utils import is_first_or_last_pipeline_stage
from torch import Tensor

Batch = dict[str, Tensor | None]

_BATCH_KEYS = (
    "tokens",  # int64 [B, S]
    "labels",  # int64 [B, S]
    "loss_mask",  # float32 [B, S]
    "position_ids",  # int64 [B, S]
    "attention_mask",  # bool [B, 1, S, S]; True where attention is forbidden
    "cu_seqlens",  # int32 [B, padded]; with --dataloader-inter-document-masking only
    "cu_seqlens_padded",
    "max_seqlen",
    "local_cp_size",
)


def _holds_mtp(config: TransformerConfig, vp_stage: int | None) -> bool:
    """Whether this (virtual) stage holds multi-token-prediction layers."""
    return bool(
        mtp_on_this_rank(
            layout=config.pipeline_model_parallel_layout,
            mtp_num_layers=config.mtp_num_layers,
            ignore_virtual=False,
            vp_stage=vp_stage,
        )
    )


def stage_needs_tokens(config: TransformerConfig, vp_stage: int | None) -> bool:
    """Whether this (virtual) stage embeds tokens, predicts them, or both."""
    return bool(is_first_or_last_pipeline_stage(vp_stage)) or _holds_mtp(config, vp_stage)


def get_batch(
    data_iterator: Iterator[dict[str, Any]] | None,
    config: TransformerConfig,
    vp_stage: int | None = None,
    *,
    evaluates: bool = False,
) -> Batch:
    """Next micro-batch, as this rank needs it.

    Tensor-parallel rank 0 reads it and broadcasts; every context-parallel rank keeps its part of
    the sequence. Entries a pipeline stage has no use for are None.

    Args:
        data_iterator: iterator of Megatron's data loader; used on tensor-parallel rank 0.
        config: the model's; tells where multi-token prediction takes place.
        vp_stage: virtual pipeline stage of the model chunk, None without virtual stages.
        evaluates: whether it is of --eval-micro-batch-size.

    Returns:
        One entry for every key of `_BATCH_KEYS`.
    """
    args = get_args()
    packed = args.dataloader_inter_document_masking
    needs_tokens = stage_needs_tokens(config, vp_stage)
    if not needs_tokens and not packed:
        return dict.fromkeys(_BATCH_KEYS)
    samples = args.micro_batch_size
    if evaluates:  # not of its own before megatron-core 0.19
        samples = getattr(args, "eval_micro_batch_size", samples)
    batch = _broadcast_batch(args, data_iterator, samples, _holds_mtp(config, vp_stage))
    batch = flatten_batch_for_packed_sequences(batch)
    if not needs_tokens:  # a middle stage learns the document boundaries and nothing else
        boundaries = ("cu_seqlens", "cu_seqlens_padded", "max_seqlen")
        return {key: batch[key] if key in boundaries else None for key in _BATCH_KEYS}
    return cast(
        Batch,
        get_batch_on_this_cp_rank(
            batch,
            is_hybrid_cp=False,
            cp_group=parallel_state.get_context_parallel_group(),
            use_per_sequence_balancing=packed,
        ),
    )


def _broadcast_batch(
    args: Namespace, data_iterator: Iterator[dict[str, Any]] | None, samples: int, holds_mtp: bool
) -> Batch:
    tp_rank = parallel_state.get_tensor_model_parallel_rank()
    batch: Batch = {}
    if tp_rank == 0:
        if data_iterator is None:
            raise RuntimeError("tensor-parallel rank 0 has no data iterator to read from.")
        sample = next(data_iterator)
        for key in _BATCH_KEYS:
            value = sample.get(key)
            batch[key] = None if value is None else value.cuda(non_blocking=True)
    return cast(
        Batch,
        get_batch_on_this_tp_rank(
            batch,
            has_cu_seqlens=args.dataloader_inter_document_masking,
            is_hybrid_cp=False,
            create_attention_mask_in_dataloader=args.create_attention_mask_in_dataloader,
            broadcast_src_rank=parallel_state.get_tensor_model_parallel_src_rank(),
            broadcast_group=parallel_state.get_tensor_model_parallel_group(),
            cp_size=args.context_parallel_size,
            tp_rank=tp_rank,
            micro_batch_size=samples,
            seq_length=args.seq_length,
            mtp_on_this_rank=holds_mtp,
            pipeline_model_parallel_size=args.pipeline_model_parallel_size,
            is_pipeline_first_stage=parallel_state.is_pipeline_first_stage(),
            is_pipeline_last_stage=parallel_state.is_pipeline_last_stage(),
        ),
    )


def packed_sequence(batch: Batch, tokens_per_sample: int) -> PackedSeqParams | None:
    """Document boundaries for attention kernels that take packed sequences; None without them.

    tokens_per_sample: S before context parallelism cuts it.
    """
    if batch["cu_seqlens"] is None:
        return None
    boundaries = batch["cu_seqlens"].squeeze(0)
    # FLOPs are counted over the real documents, kernels see the padded ones.
    update_seqlen_stats_from_cu_seqlens(boundaries)
    padded = batch["cu_seqlens_padded"]
    padded = None if padded is None else padded.squeeze(0)
    seen_by_kernel = boundaries if padded is None else padded
    longest = int(cast(Tensor, batch["max_seqlen"]).item())
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=seen_by_kernel,
        cu_seqlens_kv=seen_by_kernel,
        cu_seqlens_q_padded=padded,
        cu_seqlens_kv_padded=padded,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
        tokens_per_sample=tokens_per_sample,
    )
