"""--ultramem-overlap in a HybridModel: branches go from layer to layer, and change no bit."""

import pytest

from tests.megatron.layer.test_overlap import (
    _BLOCK,
    _DIMENSION,
    _NUMBER,
    _OVERLAPS,
    _SP,
    _UNIFORM,
    assert_no_bit_changes,
)

_HYBRID = {
    "num_layers": None,
    "hybrid_layer_pattern": "M-*M-*M-",
    "ultramem_spans": "2:4/5:8",
    "mamba_state_dim": 8,
    "mamba_head_dim": 8,
    "mamba_num_groups": 2,
    "disable_bias_linear": True,
}
# Span 5:8 runs beside layer 6, where the stage ends, and crosses.
_CROSSING = {"pipeline_model_parallel_size": 2, "hybrid_layer_pattern": "M-*M-*|M-"}
_long = pytest.mark.long


@pytest.mark.parametrize(
    ("world_size", "layout"),
    [
        pytest.param(world_size, layout, id=name, marks=() if is_quick else _long)
        for is_quick, name, world_size, layout in [
            (True, "DP2 dimension", 2, {**_DIMENSION, **_OVERLAPS}),
            (False, "TP2 SP number", 2, {**_SP, **_NUMBER}),
            (False, "PP2 crossing, DP2", 4, {**_CROSSING, **_NUMBER}),
            (False, "recompute", 2, {**_UNIFORM, "recompute_num_layers": 3, **_NUMBER}),
            (False, "recompute of some layers", 2, {**_BLOCK, "recompute_num_layers": 5}),
            (False, "later tokens", 2, {"hybrid_layer_pattern": "M-*M-*M-/*-", **_DIMENSION}),
            (
                False,
                "experts",
                2,
                {
                    "hybrid_layer_pattern": "ME*ME*M-",
                    "num_experts": 4,
                    "moe_router_topk": 2,
                    "expert_model_parallel_size": 2,
                    **_NUMBER,
                },
            ),
        ]
    ],
)
def test_overlap_changes_no_bit(world_size, layout):
    assert_no_bit_changes(world_size, {**_HYBRID, **layout})
