"""The published spec of a HybridStack with memories; Transformer Engine's classes are stand-ins."""

import copy
from types import SimpleNamespace

import pytest
from megatron.core.extensions import transformer_engine_spec_provider as provider
from megatron.core.models.hybrid.hybrid_layer_specs import hybrid_stack_spec
from megatron.core.transformer.identity_op import IdentityOp

from ultramem_megatron.megatron.hybrid.mamba_layer import PassingMambaLayer
from ultramem_megatron.megatron.hybrid.specs import stack_with_memory
from ultramem_megatron.megatron.layer.transformer_layer import LayerRole
from ultramem_megatron.megatron.pipeline.pattern import keep_pattern
from ultramem_megatron.memory.config import UltraMemConfig
from ultramem_megatron.memory.spans import Span

_PATTERN = "-*M|ME-"


@pytest.fixture
def stack(monkeypatch):
    return _stack(monkeypatch)


def _stack(monkeypatch, overlap=False):
    monkeypatch.setattr(provider, "TEColumnParallelLinear", "column")
    monkeypatch.setattr(provider, "TENorm", "norm")
    config = SimpleNamespace(
        num_layers=6,
        pipeline_model_parallel_size=2,
        virtual_pipeline_model_parallel_size=None,
        pipeline_model_parallel_layout=None,
        recompute_granularity=None,
    )
    keep_pattern(config, _PATTERN)
    design = UltraMemConfig(
        spans=(Span(1, 4), Span(5, 5)), num_keys=8, key_dim=16, value_dim=16, topk=4
    )
    spec = stack_with_memory(hybrid_stack_spec, design, config, "dimension", None, overlap)
    assert spec.submodules is hybrid_stack_spec.submodules  # of heads for later tokens
    return spec.params["stack"].submodules


def _layers(kind):
    return kind.params["specs"]


def test_each_layer_has_its_own_role(stack):
    by_number = {
        number: layer
        for kind in (stack.mlp_layer, stack.attention_layer, stack.mamba_layer, stack.moe_layer)
        for number, layer in _layers(kind).items()
    }
    roles = {number: layer.params.get("role", LayerRole()) for number, layer in by_number.items()}
    assert {n for n, role in roles.items() if role.packs} == {1, 2, 3}
    assert {n for n, role in roles.items() if role.unpacks} == {2, 3, 4}
    assert by_number[3].module is by_number[4].module is PassingMambaLayer
    reading = {n for n, layer in by_number.items() if getattr(layer.submodules, "memory", None)}
    assert reading == {1, 5}


def test_a_branch_ends_with_its_stage_and_its_result_travels_on(monkeypatch):
    stack = _stack(monkeypatch, overlap=True)
    roles = {
        number: layer.params["role"]
        for kind in (stack.mlp_layer, stack.attention_layer, stack.mamba_layer)
        for number, layer in _layers(kind).items()
        if number < 5
    }
    assert {number: role.branch_end for number, role in roles.items()} == dict.fromkeys(roles, 3)
    assert len({id(role.under_way) for role in roles.values()}) == 1
    assert {n for n, role in roles.items() if role.packs} == {3}
    assert {n for n, role in roles.items() if role.unpacks} == {4}


def test_a_fused_norm_is_taken_out_where_a_memory_reads(stack):
    reads, plain = (_layers(stack.mlp_layer)[number].submodules for number in (1, 6))
    assert reads.pre_mlp_layernorm == "norm"
    assert reads.mlp.keywords["submodules"].linear_fc1 == "column"
    assert plain.pre_mlp_layernorm is IdentityOp


def test_the_published_spec_stays_as_it_is(stack):
    published = hybrid_stack_spec.submodules
    assert published.mlp_layer.submodules.pre_mlp_layernorm is IdentityOp
    assert copy.copy(published.mlp_layer.submodules.mlp).keywords["submodules"].linear_fc1 != (
        "column"
    )
    assert stack.mla_layer is published.mla_layer
