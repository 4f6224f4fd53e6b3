"""The model config and builder that Megatron's `pretrain()` takes: a GPT with memory layers.

What does not depend on the kind of model is in MemorySettings and MemoryModelBuilder.
"""

import contextlib
import copy
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any

from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnBackend
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.training import get_args, print_rank_0
from megatron.training.models.base import ModelBuilder, ModelConfig
from megatron.training.models.gpt import GPTModelBuilder, GPTModelConfig, default_layer_spec

from ultramem_megatron.kernels.adam_rows.compact import moment_bytes
from ultramem_megatron.megatron import hooks
from ultramem_megatron.megatron.background_reads import read_background
from ultramem_megatron.megatron.fsdp2 import refuse_uneven_shards
from ultramem_megatron.megatron.layer.feed_forward import (
    feed_forward_std,
    mlp_parameters,
    residual_branches,
)
from ultramem_megatron.megatron.layer.overlap import describe_overlap
from ultramem_megatron.megatron.layer.specs import with_memory
from ultramem_megatron.megatron.metrics import MemoryMonitor
from ultramem_megatron.megatron.optimizer.auxiliary_loss import finalize_with_auxiliary_loss
from ultramem_megatron.megatron.optimizer.train_rows import TrainedRows
from ultramem_megatron.megatron.pipeline.carrier import widen_pipeline_tensors
from ultramem_megatron.megatron.pipeline.layout import most_on_one_stage, spans_cross_stages
from ultramem_megatron.megatron.startup import (
    Storage,
    check_agreement,
    describe_memories,
    describe_start,
    describe_tables,
)
from ultramem_megatron.megatron.table_groups import table_groups
from ultramem_megatron.megatron.table_log import TableLog
from ultramem_megatron.megatron.train_only import freeze_untrained
from ultramem_megatron.megatron.upcycle import start_from_dense
from ultramem_megatron.memory.config import UltraMemConfig
from ultramem_megatron.memory.finite import refuse_non_finite
from ultramem_megatron.memory.layer import memory_layers
from ultramem_megatron.memory.placement import placements
from ultramem_megatron.memory.tables.settings import TableSettings
from ultramem_megatron.memory.tables.value_table import in_host_memory


@dataclass(kw_only=True)
class MemorySettings(ModelConfig):
    """What a model config has beside Megatron's own: the memories (None: a plain model).

    table_partition, table_node_size: how value tables are cut over Megatron's expert-parallel
    group, as in TableSettings; of no account where that has one rank. table_memory: "host": tables
    and their optimizer state stay in host memory (host_rows.py). memory_overlap: memories
    compute beside the layers of their spans (see branch.py); results are the same. upcycle_from:
    iteration folder of a dense checkpoint to start from. train_only_memory: freeze everything else.
    train_rows: and move, in a step, at most so many rows of each table, chosen by background_reads,
    a file of `ultramem count`; None: all of the memories. log_tables_interval: steps from one
    picture of the tables in TensorBoard and W&B to the next, None for none.
    """

    ultramem: UltraMemConfig | None = None
    table_partition: str = "dimension"
    table_node_size: int | None = None
    table_memory: str = "device"
    memory_overlap: bool = False
    upcycle_from: str | None = None
    train_only_memory: bool = False
    train_rows: int | None = None
    background_reads: str | None = None
    log_tables_interval: int | None = None


@dataclass(kw_only=True)
class UltraMemGPTModelConfig(MemorySettings, GPTModelConfig):
    """Megatron's GPTModelConfig and the design of its memory layers (None: a plain GPT)."""

    builder = "ultramem_megatron.megatron.model.UltraMemGPTModelBuilder"


class MemoryModelBuilder(ModelBuilder[Any, Any]):
    """What a builder of Megatron's does more where there are memories; it comes before that one."""

    def __init__(self, model_config: Any) -> None:
        if model_config.ultramem is not None:
            model_config = copy.copy(model_config)
            model_config.pre_wrap_hooks = [*model_config.pre_wrap_hooks, self._prepare_weights]
            transformer = model_config.transformer
            # Layers with and without memory differ, so checkpoint keys must name the layer.
            transformer.hetereogenous_dist_checkpoint = True
            if transformer.finalize_model_grads_func is None:
                transformer.finalize_model_grads_func = finalize_with_auxiliary_loss
        super().__init__(model_config)

    def build_model(self, *args: Any, **kwargs: Any) -> Any:
        """One chunk, as Megatron's builder; it takes no weights with NaN or infinity."""
        on_host = self._model_config.table_memory == "host"
        with in_host_memory() if on_host else contextlib.nullcontext():
            model = super().build_model(*args, **kwargs)
        model.register_load_state_dict_post_hook(_refuse_non_finite_weights)
        return model

    def build_distributed_models(
        self, pg_collection: ProcessGroupCollection, *args: Any, **kwargs: Any
    ) -> list[Any]:
        """All chunks of this rank, as Megatron's; also starts the memory layers' metrics."""
        config = self._model_config
        tables = self._table_settings(pg_collection.ep.size())
        # Hosts with unlike numbers of ranks would cut a grid unlike.
        parts = tables.kind.parts(tables.size, tables.node)
        check_agreement((config.ultramem, tables, parts, config.memory_overlap))
        models: list[Any] = super().build_distributed_models(pg_collection, *args, **kwargs)
        hooks.hang_for_every_model()
        if kwargs.get("use_torch_fsdp2") and _has_checkpoints():
            refuse_uneven_shards(models)
        if config.ultramem is not None:
            if spans_cross_stages(config.ultramem.spans, config.transformer):
                widen_pipeline_tensors(models)
            self._hang_hooks(models, config.ultramem, pg_collection)
            if config.train_rows is not None:
                self._choose_rows(models, config.ultramem, pg_collection)
            self._print_plan(config.ultramem, pg_collection, kwargs.get("ddp_config"))
        return models

    def _table_settings(self, ranks: int) -> TableSettings:
        config = self._model_config
        return TableSettings(ranks, config.table_partition, config.table_node_size)

    def _prepare_weights(self, chunks: list[Any]) -> list[Any]:
        """A pre-wrap hook: weights of a dense model, and what is frozen."""
        if self._model_config.upcycle_from is not None:
            start_from_dense(chunks, self._model_config.upcycle_from)
        freeze_untrained(chunks, self._model_config)
        return chunks

    def _hang_hooks(
        self, models: list[Any], ultramem: UltraMemConfig, groups: ProcessGroupCollection
    ) -> None:
        transformer = self._model_config.transformer
        layers = [layer for model in models for layer in memory_layers(model)]
        monitor = MemoryMonitor(
            {layer.layer_number: layer for layer in layers},
            ultramem,
            data_group=self._token_group(groups),
            pipeline_group=groups.pp,
        )
        hooks.MemoryHooks(
            ultramem,
            transformer.hidden_size,
            table_ranks=_table_ranks(groups),
            fullest_stage=most_on_one_stage((span.start for span in ultramem.spans), transformer),
            monitor=monitor,
            replaced=mlp_parameters(transformer) if ultramem.replace_mlp else 0,
            moves_few_rows=self._model_config.train_rows is not None,
            table_log=self._table_log(monitor.layers, ultramem, groups),
        ).hang()

    def _token_group(self, groups: ProcessGroupCollection) -> Any:
        """Under sequence parallelism tensor-parallel ranks, too, see other tokens."""
        return groups.tp_dp_cp if self._model_config.transformer.sequence_parallel else groups.dp_cp

    def _choose_rows(
        self, models: list[Any], ultramem: UltraMemConfig, groups: ProcessGroupCollection
    ) -> None:
        config = self._model_config
        layers = [layer for model in models for layer in memory_layers(model)]
        background = read_background(config.background_reads, ultramem)
        rows = TrainedRows(layers, background, config.train_rows, self._token_group(groups))
        transformer = config.transformer
        transformer.finalize_model_grads_func = rows.after(transformer.finalize_model_grads_func)

    def _table_log(
        self, layers: Mapping[int, Any], ultramem: UltraMemConfig, groups: ProcessGroupCollection
    ) -> TableLog | None:
        interval = self._model_config.log_tables_interval
        if interval is None:
            return None
        return TableLog(
            interval, layers, ultramem, stage_group=groups.tp_dp_cp, pipeline_group=groups.pp
        )

    def _print_plan(
        self, ultramem: UltraMemConfig, groups: ProcessGroupCollection, ddp_config: Any
    ) -> None:
        transformer = self._model_config.transformer
        settings = self._table_settings(_table_ranks(groups))
        replicas = (groups.expt_dp if table_groups(groups) else groups.dp_cp).size()
        sharded = ddp_config is not None and ddp_config.use_distributed_optimizer
        in_fp32 = ddp_config is not None and ddp_config.grad_reduce_in_fp32
        parameter_bytes = transformer.params_dtype.itemsize
        memory = self._model_config.table_memory
        in_fp32 |= memory == "host"
        storage = Storage(
            parameter_bytes,
            4 if in_fp32 else parameter_bytes,
            replicas if sharded else 1,
            memory,
            moment_bytes(ultramem.table_moments),
            ultramem.table_main_params == "float32",
        )
        tables = most_on_one_stage({place.table for place in placements(ultramem)}, transformer)
        print_rank_0(describe_memories(ultramem, transformer.hidden_size))
        stds = [feed_forward_std(transformer, place.adds) for place in placements(ultramem)]
        print_rank_0(describe_start(ultramem, residual_branches(transformer), stds))
        print_rank_0(describe_tables(ultramem, settings, storage, tables))
        if self._model_config.memory_overlap:
            print_rank_0(describe_overlap(ultramem.spans, transformer))


class UltraMemGPTModelBuilder(MemoryModelBuilder, GPTModelBuilder):
    """Builds GPT models with memory layers; without `ultramem` it is Megatron's own builder."""

    def __init__(self, model_config: UltraMemGPTModelConfig) -> None:
        super().__init__(model_config)
        if model_config.ultramem is not None:
            self._model_config.transformer_layer_spec = _spec_with_memory(model_config)


def _has_checkpoints() -> bool:
    args = get_args()
    return bool(args.save or args.load or args.pretrained_checkpoint)


def _refuse_non_finite_weights(model: Any, _incompatible: object) -> None:
    stored = model.state_dict().keys()
    buffers = ((name, buffer) for name, buffer in model.named_buffers() if name in stored)
    refuse_non_finite(chain(model.named_parameters(), buffers), "the model")


def _table_ranks(groups: ProcessGroupCollection) -> int:
    """Ranks that share each value table."""
    return int(groups.ep.size()) if table_groups(groups) is not None else 1


def _spec_with_memory(config: UltraMemGPTModelConfig) -> Any:
    """A spec function that adds memories to the user's spec, or to Megatron's default."""
    given = config.transformer_layer_spec
    ultramem = config.ultramem
    assert ultramem is not None

    def spec(model_config: GPTModelConfig, vp_stage: int | None = None) -> Any:
        base = _resolve(given, model_config, vp_stage)
        return with_memory(
            base,
            ultramem,
            model_config.transformer,
            vp_stage,
            partition=config.table_partition,
            node_size=config.table_node_size,
            overlap=config.memory_overlap,
        )

    return spec


def _resolve(given: Any, config: GPTModelConfig, vp_stage: int | None) -> Any:
    """The layer spec without memory, chosen as GPTModelBuilder does."""
    if given is None:
        spec = default_layer_spec(config, vp_stage)
    elif isinstance(given, ModuleSpec) or not callable(given):
        spec = given
    elif "vp_stage" in inspect.signature(given).parameters:
        spec = given(config, vp_stage=vp_stage)
    else:
        spec = given(config)
    if config.attention_backend == AttnBackend.local and hasattr(spec, "submodules"):
        spec = copy.deepcopy(spec)
        spec.submodules.self_attention.submodules.core_attention = DotProductAttention
    return spec
