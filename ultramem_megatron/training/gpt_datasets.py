"""What Megatron's `pretrain()` asks of a GPT task: data sets, batches, forward step and loss.

Megatron-LM keeps these in its script pretrain_gpt.py, which the megatron-core wheel does not hold.
Shapes: B micro-batch size, S sequence length on this context-parallel rank.
"""

import functools
import json
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
from megatron.core import parallel_state
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.rerun_state_machine import get_rerun_state_machine
from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.multi_token_prediction import get_mtp_ranks, mtp_on_this_rank
from megatron.core.utils import (
    StragglerDetector,
    flatten_batch_for_packed_sequences,
    get_attr_wrapped_model,
    get_batch_on_this_cp_rank,
    get_batch_on_this_tp_rank,
    get_model_config,
)
from megatron.training import get_args, get_timers, print_rank_0
from megatron.training.argument_utils import core_transformer_config_from_args
from megatron.training.training import update_seqlen_stats_from_cu_seqlens
from megatron.training.utils import get_blend_and_blend_per_split, is_first_or_last_pipeline_stage
from torch import Tensor

from ultramem_megatron.errors import UltraMemError

Batch = dict[str, Tensor | None]
LossAndReport = tuple[Tensor, Tensor, dict[str, Tensor]]

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
_SPIKE_FACTOR = 10
"""--check-for-spiky-loss reports a loss this many times the largest one seen."""

_straggler = StragglerDetector()


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


def _stage_needs_tokens(config: TransformerConfig, vp_stage: int | None) -> bool:
    """Whether this (virtual) stage embeds tokens, predicts them, or both."""
    return bool(is_first_or_last_pipeline_stage(vp_stage)) or _holds_mtp(config, vp_stage)


def get_batch(
    data_iterator: Iterator[dict[str, Any]] | None,
    config: TransformerConfig,
    vp_stage: int | None = None,
) -> Batch:
    """Next micro-batch, as this rank needs it.

    Tensor-parallel rank 0 reads it and broadcasts; every context-parallel rank keeps its part of
    the sequence. Entries a pipeline stage has no use for are None.

    Args:
        data_iterator: iterator of Megatron's data loader; used on tensor-parallel rank 0.
        config: the model's; tells where multi-token prediction takes place.
        vp_stage: virtual pipeline stage of the model chunk, None without virtual stages.

    Returns:
        One entry for every key of `_BATCH_KEYS`.
    """
    args = get_args()
    packed = args.dataloader_inter_document_masking
    needs_tokens = _stage_needs_tokens(config, vp_stage)
    if not needs_tokens and not packed:
        return dict.fromkeys(_BATCH_KEYS)
    batch = _broadcast_batch(args, data_iterator, packed, _holds_mtp(config, vp_stage))
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
    args: Namespace, data_iterator: Iterator[dict[str, Any]] | None, packed: bool, holds_mtp: bool
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
            has_cu_seqlens=packed,
            is_hybrid_cp=False,
            create_attention_mask_in_dataloader=args.create_attention_mask_in_dataloader,
            broadcast_src_rank=parallel_state.get_tensor_model_parallel_src_rank(),
            broadcast_group=parallel_state.get_tensor_model_parallel_group(),
            cp_size=args.context_parallel_size,
            tp_rank=tp_rank,
            micro_batch_size=args.micro_batch_size,
            seq_length=args.seq_length,
            mtp_on_this_rank=holds_mtp,
            pipeline_model_parallel_size=args.pipeline_model_parallel_size,
            is_pipeline_first_stage=parallel_state.is_pipeline_first_stage(),
            is_pipeline_last_stage=parallel_state.is_pipeline_last_stage(),
        ),
    )


def _packed_sequence(batch: Batch, tokens_per_sample: int) -> PackedSeqParams | None:
    """Document boundaries for attention kernels that take packed sequences; None without them."""
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


def loss_func(loss_mask: Tensor, token_losses: Tensor) -> LossAndReport:
    """Sum the losses of the tokens that count.

    Megatron divides afterwards: by the tokens of this micro-batch, or, under
    --calculate-per-token-loss, by those of the whole step.

    Args:
        loss_mask: float32 [B, S], 1 where the token counts.
        token_losses: [B, S], the model's output.

    Returns:
        Sum of losses (float32 scalar), number of tokens (int scalar), and what to report:
        "lm loss" as [sum, number of tokens].
    """
    mask = loss_mask.view(-1).float()
    loss = (token_losses.view(-1).float() * mask).sum()
    num_tokens = mask.sum().detach().to(torch.int)
    _validate_loss(loss)
    report = torch.stack([loss.detach(), num_tokens.to(loss.dtype)])
    return loss, num_tokens, {"lm loss": report}


def _validate_loss(loss: Tensor) -> None:
    """Hand NaN, infinite and sudden losses to Megatron's rerun state machine, where asked for."""
    args = get_args()
    machine = get_rerun_state_machine()
    checks: list[tuple[Callable[[Tensor], Any], str, bool]] = []
    if args.check_for_nan_in_loss_and_grad:
        checks.append((torch.isnan, "the loss of this rank is NaN", True))
        checks.append((torch.isinf, "the loss of this rank is infinite", True))
    if args.check_for_spiky_loss:
        spiky = functools.partial(
            machine.is_unexpectedly_large, threshold=_SPIKE_FACTOR, context="loss"
        )
        checks.append((spiky, f"the loss exceeds {_SPIKE_FACTOR} times the largest so far", False))
    for rejects, message, fatal in checks:
        # A repeated forward pass gives the same bits, hence no tolerance.
        machine.validate_result(
            result=loss, rejection_func=rejects, message=message, tolerance=0.0, fatal=fatal
        )


def forward_step(
    data_iterator: Iterator[dict[str, Any]] | None, model: Any, return_schedule_plan: bool = False
) -> tuple[Any, Callable[..., LossAndReport]]:
    """One micro-batch through the chunk of the model that this pipeline stage holds.

    Args:
        data_iterator: iterator of Megatron's data loader.
        model: GPTModel in its wrappers.
        return_schedule_plan: set by --overlap-moe-expert-parallel-comm; then the model's plan is
            returned in place of its output.

    Returns:
        Output of the stage, and the loss function for it.
    """
    args = get_args()
    timers = get_timers()
    timers("batch-generator", log_level=2).start()
    with _straggler(bdata=True):
        vp_stage = get_attr_wrapped_model(model, "vp_stage")
        batch = get_batch(data_iterator, get_model_config(model), vp_stage)
    packed_sequence = _packed_sequence(batch, args.seq_length)
    timers("batch-generator").stop()

    inputs = (batch["tokens"], batch["position_ids"], batch["attention_mask"])
    targets = {"labels": batch["labels"], "loss_mask": batch["loss_mask"]}
    with _straggler:
        if return_schedule_plan:
            output = model.build_schedule_plan(*inputs, **targets)
        else:
            output = model(*inputs, **targets, packed_seq_params=packed_sequence)
    # The schedule calls the loss function on the last stage only, and there the mask exists.
    return output, functools.partial(loss_func, cast(Tensor, batch["loss_mask"]))


def dataset_config(args: Namespace) -> GPTDatasetConfig:
    """Settings of the data sets, all from Megatron's own flags."""
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    sequences_per_dataset = None
    if args.per_dataset_sequences_path is not None:
        with open(args.per_dataset_sequences_path) as file:
            sequences_per_dataset = json.load(file)
    return GPTDatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        blend=blend,
        blend_per_split=blend_per_split,
        split=args.split,
        multiple_validation_sets=args.multiple_validation_sets,
        full_validation=args.full_validation,
        num_dataset_builder_threads=args.num_dataset_builder_threads,
        path_to_cache=args.data_cache_path,
        mmap_bin_files=args.mmap_bin_files,
        mid_level_dataset_surplus=args.mid_level_dataset_surplus,
        allow_ambiguous_pad_tokens=args.allow_ambiguous_pad_tokens,
        fast_cache_load=args.dataloader_fast_cache_load,
        defer_npy_index_mmap=args.dataloader_defer_npy_index_mmap,
        tokenizer=build_tokenizer(args),
        reset_position_ids=args.reset_position_ids,
        reset_attention_mask=args.reset_attention_mask,
        eod_mask_loss=args.eod_mask_loss,
        create_attention_mask=args.create_attention_mask_in_dataloader,
        object_storage_cache_path=args.object_storage_cache_path,
        sequences_per_dataset=sequences_per_dataset,
        inter_document_masking=args.dataloader_inter_document_masking,
        context_parallel_size=args.context_parallel_size,
        data_parallel_size=args.data_parallel_size,
        sequence_parallel_size=args.tensor_model_parallel_size * args.sequence_parallel,
    )


def _reads_data(packed: bool, vp_stage: int | None) -> bool:
    """Whether this rank builds data sets: tensor-parallel rank 0 of the stages that need them."""
    if parallel_state.get_tensor_model_parallel_rank() != 0:
        return False
    config = core_transformer_config_from_args(get_args())
    return packed or _stage_needs_tokens(config, vp_stage)


def train_valid_test_datasets_provider(
    num_samples: Sequence[int | None], vp_stage: int | None = None
) -> tuple[Any, Any, Any]:
    """Build the data sets for training, validation and test.

    Args:
        num_samples: samples wanted of each; None means one pass over the data.
        vp_stage: virtual pipeline stage the iterators are for.

    Returns:
        Three data sets; None in the place of one that this rank does not read.
    """
    args = get_args()
    refuse_other_tasks(args)
    config = dataset_config(args)
    dataset_class = MockGPTDataset if args.mock_data else GPTDataset
    reads_data = functools.partial(_reads_data, config.inter_document_masking, vp_stage)
    print_rank_0("> building train, validation and test data sets for GPT ...")
    builder = BlendedMegatronDatasetBuilder(dataset_class, num_samples, reads_data, config)
    train, valid, test = builder.build()
    return train, valid, test


# Every rank calls the provider; the data sets themselves decide who reads (see `_reads_data`).
train_valid_test_datasets_provider.is_distributed = True  # type: ignore[attr-defined]  # Megatron asks


def refuse_other_tasks(args: Namespace) -> None:
    """Raise for flags that ask for another task than pre-training a GPT.

    Raises:
        UltraMemError: names the flag and what to do.
    """
    foreign = {
        "--sft": args.sft,
        "--fim-data": args.fim_data,
        "--hybrid-layer-pattern": args.hybrid_layer_pattern is not None,
        "--hybrid-context-parallel": args.hybrid_context_parallel,
        "--logits-load-dir": args.logits_load_dir is not None,
    }
    for flag, is_set in foreign.items():
        if is_set:
            raise UltraMemError(
                f"{flag} is not supported by ultramem train (plain GPT pre-training); "
                f"remove the flag."
            )


def get_embedding_ranks(pipeline_ranks: list[int]) -> list[int]:
    """Ranks of one pipeline that hold the word embedding: first, last if tied, and those of MTP."""
    args = get_args()
    holders = {pipeline_ranks[0]}
    if len(pipeline_ranks) > 1:
        if not args.untie_embeddings_and_output_weights:
            holders.add(pipeline_ranks[-1])
        holders.update(get_mtp_ranks(pipeline_ranks, core_transformer_config_from_args(args)))
    return sorted(holders)
