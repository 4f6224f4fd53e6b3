"""From Megatron's parsed flags to the model config that `pretrain()` builds from, all checked."""

import os
from argparse import Namespace
from collections.abc import Callable
from typing import Any

from megatron.training.argument_utils import (
    core_transformer_config_from_args,
    gpt_config_from_args,
    hybrid_config_from_args,
)

from ultramem_megatron.megatron.checkpoint.design import check_design
from ultramem_megatron.megatron.checkpoint.optimizer_layout import check_optimizer_layout
from ultramem_megatron.megatron.checkpoint.source import check_sums, settle_sums, source_of_weights
from ultramem_megatron.megatron.flags.arguments import config_from_args
from ultramem_megatron.megatron.flags.fsdp2_flags import refuse_torch_dcp
from ultramem_megatron.megatron.flags.missing_packages import refuse_missing_packages
from ultramem_megatron.megatron.flags.refusals import (
    refuse_unsupported_flags,
    require_eval_interval,
)
from ultramem_megatron.megatron.flags.refused_by_megatron import megatron_refuses
from ultramem_megatron.megatron.flags.slips import refuse_slips_of_training
from ultramem_megatron.megatron.flags.table_flags import settings_from_args
from ultramem_megatron.megatron.hybrid.model import UltraMemHybridModelConfig
from ultramem_megatron.megatron.hybrid.refusals import refuse_pattern
from ultramem_megatron.megatron.model import MemorySettings, UltraMemGPTModelConfig
from ultramem_megatron.megatron.pipeline.layout import check_pipeline, check_shared_tables
from ultramem_megatron.megatron.pipeline.pattern import keep_pattern
from ultramem_megatron.megatron.table_groups import initialize_model_parallel
from ultramem_megatron.megatron.upcycle import dense_checkpoint
from ultramem_megatron.memory.config import UltraMemConfig
from ultramem_megatron.memory.tables.settings import TableSettings


def model_config_from_args(
    args: Namespace, get_embedding_ranks: Callable[[list[int]], list[int]]
) -> MemorySettings:
    """The model that the flags describe; also makes the process groups of its value tables.

    get_embedding_ranks: as `pretrain()` takes it. Raises UltraMemError for a wrong flag, size,
    combination or checkpoint, before anything is built.
    """
    ultramem = config_from_args(args)
    refuse_unsupported_flags(args, ultramem)
    require_eval_interval(args)
    refuse_torch_dcp(args)
    settle_sums(args, ultramem is not None)
    refuse_slips_of_training(args)
    refuse_missing_packages(args)
    refuse_pattern(args, ultramem)
    with megatron_refuses():
        transformer = transformer_from_args(args)
    if ultramem is not None:
        check_pipeline(ultramem.spans, transformer)
        check_shared_tables(ultramem, transformer)
    source = None
    if os.environ["RANK"] == "0":  # one reader; its failure ends the others
        source = source_of_weights(args)
        if source is not None:
            check_sums(source, args)
            check_design(source, args, ultramem)
    if ultramem is None:
        return fill(args, transformer, None, TableSettings())
    upcycle_from = dense_checkpoint(args)
    tables = settings_from_args(args, ultramem)
    if source is not None:
        check_optimizer_layout(source, args, ultramem, tables)
    initialize_model_parallel(args, tables.size, get_embedding_ranks)
    config = fill(args, transformer, ultramem, tables)
    config.upcycle_from = upcycle_from
    return config


def transformer_from_args(args: Namespace) -> Any:
    """Megatron's TransformerConfig of the flags, which knows the pattern of a HybridModel."""
    transformer = core_transformer_config_from_args(args)
    if args.hybrid_layer_pattern is not None:
        keep_pattern(transformer, args.hybrid_layer_pattern)
    return transformer


def fill(
    args: Namespace, transformer: Any, ultramem: UltraMemConfig | None, tables: TableSettings
) -> MemorySettings:
    """The model config of flags, for training, decoding and planning alike; checks nothing.

    transformer: of `transformer_from_args`.
    """
    config: MemorySettings
    if args.hybrid_layer_pattern is None:
        config = gpt_config_from_args(
            args, config=transformer, model_config_cls=UltraMemGPTModelConfig
        )
    else:
        config = hybrid_config_from_args(
            args, config=transformer, model_config_cls=UltraMemHybridModelConfig
        )
    config.ultramem = ultramem
    config.table_partition, config.table_node_size = tables.partition, tables.node_size
    config.memory_overlap = args.ultramem_overlap
    # Absent from the flags stored in a checkpoint of Megatron's own.
    config.train_only_memory = getattr(args, "ultramem_train_only", None) == "memory"
    config.train_rows = getattr(args, "ultramem_train_rows", None)
    config.background_reads = getattr(args, "ultramem_background_reads", None)
    config.log_tables_interval = getattr(args, "ultramem_log_tables_interval", None)
    config.table_memory = getattr(args, "ultramem_table_memory", None) or "device"
    return config
