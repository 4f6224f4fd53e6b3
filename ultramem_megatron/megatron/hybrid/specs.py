"""The spec of a HybridStack with memories: each layer by its number, results side by side.

HybridStack takes one spec for each kind of layer, and hands on one tensor. So a kind's spec becomes
one that looks up its layer's own (not for heads of later tokens, whose layers have the same numbers
and no memories), and within a span the pending result travels beside the hidden
states, in a tensor twice as wide, as it does between pipeline stages: through every kind of layer,
through recomputation, and without a loop of our own. It costs two copies a layer of a span. A
branch (--ultramem-overlap) is no tensor: layers hand it on among themselves, and what it comes to
travels on from where it ends.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from megatron.core.models.hybrid.hybrid_block import HybridStackSubmodules
from megatron.core.models.hybrid.hybrid_layer_allocation import Symbols
from megatron.core.ssm.mamba_layer import MambaLayer
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_config import TransformerConfig

from ultramem_megatron.megatron.hybrid.mamba_layer import PassingMambaLayer
from ultramem_megatron.megatron.layer.feed_forward import check_replaced
from ultramem_megatron.megatron.layer.overlap import branch_end
from ultramem_megatron.megatron.layer.specs import memory_specs, overlapped, with_role
from ultramem_megatron.megatron.layer.transformer_layer import BranchUnderWay, LayerRole
from ultramem_megatron.megatron.optimizer.scalar_parameters import leave_to_scalar_optimizer
from ultramem_megatron.megatron.pipeline.layout import pipeline_chunks, spans_cross_stages
from ultramem_megatron.megatron.pipeline.pattern import kept_stages
from ultramem_megatron.memory.config import UltraMemConfig
from ultramem_megatron.memory.spans import span_covering

_FIELDS = {
    Symbols.MAMBA: "mamba_layer",
    Symbols.GDN: "gdn_layer",
    Symbols.ATTENTION: "attention_layer",
    Symbols.DS_ATTENTION: "dsa_layer",
    Symbols.MLA: "mla_layer",
    Symbols.MLP: "mlp_layer",
    Symbols.MOE: "moe_layer",
}
"""Of HybridStackSubmodules, as HybridStack reads them."""


class LayerByNumber:
    """Builds, in its own place, the layer whose spec has its number."""

    def __new__(
        cls, *args: Any, specs: Mapping[int, ModuleSpec], layer_number: int, **kwargs: Any
    ) -> Any:
        """specs: by layer number, from 1. Everything else is handed on to the layer."""
        return build_module(specs[layer_number], *args, layer_number=layer_number, **kwargs)


class StackWithMemory:
    """Builds, in its own place, a stack of other layers than the submodules that it shows.

    HybridModel builds heads for later tokens from those.
    """

    def __new__(
        cls, *args: Any, stack: ModuleSpec, submodules: HybridStackSubmodules, **kwargs: Any
    ) -> Any:
        """stack: spec of the decoder's. Everything else is handed on to it."""
        return build_module(stack, *args, **kwargs)


def stack_with_memory(
    stack: ModuleSpec,
    ultramem: UltraMemConfig,
    config: TransformerConfig,
    partition: str,
    node_size: int | None,
    overlap: bool = False,
) -> ModuleSpec:
    """Add memories to the spec of a HybridStack, which is not modified; for one model chunk.

    config: with the pattern kept (pattern.py). partition, node_size: how tables are cut over
    Megatron's expert-parallel group, as in TableSettings, if that has several ranks. overlap:
    memories compute beside the layers of their spans.
    """
    check_replaced(ultramem, config)
    leave_to_scalar_optimizer()
    symbols = "".join(kept_stages(config) or ())
    memories = memory_specs(ultramem, partition, node_size)
    roles = _roles(ultramem, config, overlap)
    kinds: dict[str, ModuleSpec] = {}
    for symbol in set(symbols):
        field = _FIELDS[symbol]
        specs = {
            number: _in_role(getattr(stack.submodules, field), memories.get(number), roles[number])
            for number, kind in enumerate(symbols, start=1)
            if kind == symbol
        }
        kinds[field] = ModuleSpec(LayerByNumber, params={"specs": specs})
    decoder = ModuleSpec(
        stack.module, params=stack.params, submodules=dataclasses.replace(stack.submodules, **kinds)
    )
    return ModuleSpec(StackWithMemory, params={"stack": decoder}, submodules=stack.submodules)


def _roles(
    ultramem: UltraMemConfig, config: TransformerConfig, overlap: bool
) -> dict[int, LayerRole]:
    crossing = spans_cross_stages(ultramem.spans, config)
    ends = {chunk.last for chunk in pipeline_chunks(config)} if crossing else set()
    results = {s: branch_end(s, config) if overlap else s.start for s in ultramem.spans}
    inside = {n for span, done in results.items() for n in range(done, span.end)}
    branches = {span: BranchUnderWay() for span, done in results.items() if done > span.start}
    wide_after = (ends | inside) - {config.num_layers}
    roles = {}
    for number in range(1, config.num_layers + 1):
        span = span_covering(ultramem.spans, number)
        role = LayerRole(span, unpacks=number - 1 in wide_after, packs=number in wide_after)
        if span in branches:
            role = dataclasses.replace(overlapped(role, config), under_way=branches[span])
        roles[number] = role
    return roles


def _in_role(layer: ModuleSpec, memory: ModuleSpec | None, role: LayerRole) -> ModuleSpec:
    if layer.module is not MambaLayer:
        return with_role(layer, memory, role)
    if role == LayerRole():
        return layer
    return ModuleSpec(
        PassingMambaLayer, params={**layer.params, "role": role}, submodules=layer.submodules
    )
