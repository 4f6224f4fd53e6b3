"""Layer specs with memory: any GPT layer spec of Megatron in, the same with memories out."""

import copy
import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

from megatron.core import parallel_state
from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import (
    LayerNormImpl,
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from ultramem_megatron.megatron.layer.feed_forward import check_replaced
from ultramem_megatron.megatron.layer.memory_submodule import TransformerMemory
from ultramem_megatron.megatron.layer.overlap import branch_end
from ultramem_megatron.megatron.layer.transformer_layer import (
    LayerRole,
    UltraMemTransformerLayerSubmodules,
    with_memory_branch,
)
from ultramem_megatron.megatron.optimizer.scalar_parameters import leave_to_scalar_optimizer
from ultramem_megatron.megatron.pipeline.layout import (
    check_pipeline,
    check_shared_tables,
    spans_cross_stages,
)
from ultramem_megatron.memory.config import UltraMemConfig
from ultramem_megatron.memory.placement import placements
from ultramem_megatron.memory.spans import span_covering


def with_memory(
    spec: ModuleSpec | TransformerBlockSubmodules,
    ultramem: UltraMemConfig,
    config: TransformerConfig,
    vp_stage: int | None = None,
    pp_rank: int | None = None,
    *,
    partition: str = "dimension",
    node_size: int | None = None,
    overlap: bool = False,
) -> TransformerBlockSubmodules:
    """Add memories to the layers of one pipeline stage (or virtual chunk).

    spec: what Megatron's own spec functions return, one layer's ModuleSpec or a whole block's
    submodules; it is not modified. pp_rank: this rank's pipeline stage, by default the one of
    Megatron's parallel state. partition, node_size: how tables are cut over Megatron's
    expert-parallel group, as in TableSettings, if that has several ranks. overlap: memories compute
    beside the layers of their spans. Raises UltraMemError when a span cannot cross into another
    stage.
    """
    check_pipeline(ultramem.spans, config)
    check_shared_tables(ultramem, config)
    check_replaced(ultramem, config)
    leave_to_scalar_optimizer()  # here, as every model with memories comes by
    if pp_rank is None:
        pp_rank = parallel_state.get_pipeline_model_parallel_rank()
    offset = get_transformer_layer_offset(config, vp_stage, pp_rank)
    layers = _layer_specs(spec, get_num_layers_to_build(config, vp_stage, pp_rank))
    memories = memory_specs(ultramem, partition, node_size)
    with_memories = []
    for number, layer in enumerate(layers, start=offset + 1):
        role = _role(number, offset, len(layers), ultramem, config)
        if overlap:
            role = overlapped(role, config)
        with_memories.append(with_role(layer, memories.get(number), role))
    final_norm = spec.layer_norm if isinstance(spec, TransformerBlockSubmodules) else LayerNormImpl
    return TransformerBlockSubmodules(layer_specs=with_memories, layer_norm=final_norm)


def memory_specs(
    ultramem: UltraMemConfig, partition: str, node_size: int | None
) -> dict[int, ModuleSpec]:
    """A spec for each memory, by the number of the layer that reads; for one model chunk."""
    shared: dict[str, Any] = {"ultramem": ultramem, "values_by_table": {}}
    shared |= {"partition": partition, "node_size": node_size}
    return {
        placement.reads: ModuleSpec(TransformerMemory, {**shared, "placement": placement})
        for placement in placements(ultramem)
    }


def _layer_specs(
    spec: ModuleSpec | TransformerBlockSubmodules, num_layers: int
) -> Sequence[ModuleSpec]:
    if isinstance(spec, TransformerBlockSubmodules):
        return spec.layer_specs or []
    return [spec] * num_layers


def _role(
    number: int, offset: int, count: int, ultramem: UltraMemConfig, config: TransformerConfig
) -> LayerRole:
    """Role of layer `number` in a chunk of `count` layers after layer `offset`."""
    span = span_covering(ultramem.spans, number)
    if not spans_cross_stages(ultramem.spans, config):
        return LayerRole(span)
    return LayerRole(
        span,
        unpacks=number == offset + 1 and number > 1,
        packs=number == offset + count and number < config.num_layers,
    )


def overlapped(role: LayerRole, config: TransformerConfig) -> LayerRole:
    """The role with the end of its span's branch, if that runs beside any layer."""
    if role.span is None or branch_end(role.span, config) == role.span.start:
        return role
    return dataclasses.replace(role, branch_end=branch_end(role.span, config))


def with_role(layer: ModuleSpec, memory: ModuleSpec | None, role: LayerRole) -> ModuleSpec:
    """The spec of a TransformerLayer with its role, and its memory if it reads one."""
    fields = {
        field.name: getattr(layer.submodules, field.name)
        for field in dataclasses.fields(layer.submodules)
    }
    if role == LayerRole():
        return layer
    if memory is not None:
        fields |= {"memory": memory} | _separate_pre_mlp_norm(fields)
        if memory.params["ultramem"].replace_mlp:
            fields["mlp"] = IdentityOp
    return ModuleSpec(
        module=with_memory_branch(layer.module),
        params={**layer.params, "role": role},
        submodules=UltraMemTransformerLayerSubmodules(**fields),
    )


def _separate_pre_mlp_norm(fields: dict[str, Any]) -> dict[str, Any]:
    """Take the pre-MLP norm out of a fused norm-and-linear, so that the memory can read its output.

    Transformer Engine's dense layers fuse it into linear_fc1. Checkpoint names stay those of the
    fused layer, as Megatron's local layers also keep them.
    """
    if fields["pre_mlp_layernorm"] is not IdentityOp or fields["mlp"] is IdentityOp:
        return {}
    engine = TESpecProvider()
    mlp = fields["mlp"]
    if isinstance(mlp, functools.partial):
        submodules = copy.copy(mlp.keywords["submodules"])
        separated: Any = functools.partial(
            mlp.func, *mlp.args, **{**mlp.keywords, "submodules": submodules}
        )
    else:
        separated = copy.copy(mlp)
        submodules = separated.submodules = copy.copy(mlp.submodules)
    submodules.linear_fc1 = engine.column_parallel_linear()
    names = {**fields["sharded_state_dict_keys_map"]}
    names["pre_mlp_layernorm."] = "mlp.linear_fc1.layer_norm_"
    return {
        "pre_mlp_layernorm": engine.layer_norm(),
        "mlp": separated,
        "sharded_state_dict_keys_map": names,
    }
