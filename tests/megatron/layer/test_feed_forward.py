"""The size of a feed-forward layer's output, computed from the config, against built layers."""

from typing import Any

import pytest

from tests.ranks import init_gloo, run_on_ranks

_MODELS: dict[str, dict[str, Any]] = {
    "gelu": {},
    "narrow": {"ffn_hidden_size": 100},
    "SwiGLU": {"gated_linear_unit": True, "activation_func": "silu"},
    "squared ReLU": {"activation_func": "squared_relu"},
    "large weights": {"init_method_std": 0.1},
    "muP": {"use_mup": True, "mup_base_hidden_size": 32},
    "Xavier": {"init_method": "xavier"},
    "a method of one's own": {"init_method": "own", "output_layer_init_method": "own"},
    "experts": {"num_moe_experts": 8, "moe_router_topk": 2},
    "experts, all shares": {
        "num_moe_experts": 4,
        "moe_router_topk": 2,
        "moe_router_pre_softmax": True,
        "moe_router_topk_scaling_factor": 2.5,
    },
    "experts, sigmoid": {
        "num_moe_experts": 4,
        "moe_router_topk": 3,
        "moe_router_score_function": "sigmoid",
    },
    "shared expert": {
        "num_moe_experts": 4,
        "moe_router_topk": 1,
        "moe_router_pre_softmax": True,
        "moe_ffn_hidden_size": 96,
        "moe_shared_expert_intermediate_size": 200,
        "add_bias_linear": False,
    },
    "a dense layer among experts": {"num_moe_experts": 4, "moe_layer_freq": [0, 1]},
}


def _activations() -> dict[str, Any]:
    import torch.nn.functional as F
    from megatron.core.activations import squared_relu

    return {"silu": F.silu, "squared_relu": squared_relu}


def _methods() -> dict[str, Any]:
    from torch.nn import init

    return {
        "xavier": init.xavier_uniform_,
        "own": lambda weight: init.uniform_(weight, -0.06, 0.06),
    }


def _built_and_computed(changes: dict[str, Any]) -> tuple[float, float]:
    """Standard deviations of layer 1's outputs: measured, and as computed from its config."""
    import torch
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.spec_utils import build_module

    from ultramem_megatron.megatron.layer.feed_forward import feed_forward_std

    functions = {"activation_func": _activations(), "init_method": _methods()}
    functions["output_layer_init_method"] = functions["init_method"]
    named = {
        name: functions[name][value] if name in functions else value
        for name, value in changes.items()
    }
    config = TransformerConfig(
        num_layers=2,
        hidden_size=64,
        num_attention_heads=2,
        use_cpu_initialization=True,
        moe_token_dispatcher_type="alltoall",
        **named,
    )
    is_dense = config.num_moe_experts is None or "moe_layer_freq" in changes
    spec = get_gpt_layer_local_spec(num_experts=None if is_dense else config.num_moe_experts)
    mlp = build_module(spec, config=config, layer_number=1).mlp
    x = torch.randn(2000, 1, 64)
    with torch.no_grad():
        output, bias = mlp(x)
    assert bias is None or not bias.any()
    return float(output.std()), feed_forward_std(config, 1)


def _on_rank() -> list[tuple[float, float]]:
    import torch
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    from ultramem_megatron.patches import registry

    registry.apply_all()
    init_gloo()
    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(7)
    torch.manual_seed(7)
    return [_built_and_computed(changes) for changes in _MODELS.values()]


@pytest.fixture(scope="module")
def results() -> dict[str, tuple[float, float]]:
    return dict(zip(_MODELS, run_on_ranks(1, _on_rank)[0], strict=True))


@pytest.mark.parametrize("model", _MODELS)
def test_what_is_computed_is_what_is_built(
    results: dict[str, tuple[float, float]], model: str
) -> None:
    built, computed = results[model]
    assert computed == pytest.approx(built, rel=0.1)


def _branches_and_scales() -> list[tuple[int, float]]:
    """Residual branches; what Megatron divides the standard deviation of output weights by."""
    from megatron.core.transformer import TransformerConfig

    from ultramem_megatron.megatron.layer.feed_forward import residual_branches

    sizes = {"hidden_size": 64, "num_attention_heads": 2, "init_method_std": 0.02}
    configs = [
        TransformerConfig(num_layers=layers, is_hybrid_model=hybrid, **sizes)
        for layers, hybrid in ((4, False), (8, True))
    ]
    return [
        (residual_branches(config), 0.02 / config.output_layer_init_method.keywords["std"])
        for config in configs
    ]


def test_a_layer_of_a_hybrid_has_half_the_branches_of_a_transformer_layer() -> None:
    for branches, divisor in run_on_ranks(1, _branches_and_scales)[0]:
        assert branches == 8
        assert divisor == pytest.approx(branches**0.5)
