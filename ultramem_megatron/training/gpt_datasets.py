"""Data sets of a GPT task, as Megatron's `pretrain()` takes them.

Megatron-LM keeps these in its script pretrain_gpt.py, which the megatron-core wheel does not hold.
"""

import functools
import json
from argparse import Namespace
from collections.abc import Sequence
from typing import Any

from megatron.core import parallel_state
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset
from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
from megatron.training import get_args, print_rank_0
from megatron.training.argument_utils import core_transformer_config_from_args
from megatron.training.utils import get_blend_and_blend_per_split

from ultramem_megatron.megatron.flags.refusals import refuse_other_tasks
from ultramem_megatron.training.gpt_batches import stage_needs_tokens


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
    return packed or stage_needs_tokens(config, vp_stage)


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
