"""Norms, attention and recomputation that Megatron leaves to Transformer Engine, in PyTorch."""

from types import SimpleNamespace

import pytest
import torch

from tests.closeness import assert_close
from tests.ranks import RanksFailed, run_on_ranks
from tests.training_runs import run_pretrain, tiny_gpt
from tests.whole_model import AFTER_STEPS, STEADY, train, whole

_LATENT = {
    "multi_latent_attention": True,
    "disable_bias_linear": True,
    "q_lora_rank": 16,
    "kv_lora_rank": 8,
    "qk_head_dim": 8,
    "v_head_dim": 12,
    "qk_pos_emb_head_dim": 4,
}
_MEMORY = {"ultramem_spans": "1:2", "ultramem_num_keys": 12, "ultramem_topk": 6, "train_iters": 1}


def _norm(normalization, centred, residual):
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    from ultramem_megatron.patches import registry

    registry.apply_all()
    config = SimpleNamespace(
        layernorm_zero_centered_gamma=centred,
        persist_layer_norm=False,
        sequence_parallel=True,
        memory_efficient_layer_norm=False,
        fp32_residual_connection=residual,
        normalization=normalization,
    )
    norm = WrappedTorchNorm(config, 6, 1e-5)
    plain = getattr(torch.nn, normalization)(6, eps=1e-5)
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        norm.weight += 0.5
        plain.weight += 0.5
        same = torch.allclose(norm(x), plain(x), rtol=0, atol=1e-6)
        half = norm.to(torch.bfloat16)(x) if residual else None
    tagged = all(parameter.sequence_parallel for parameter in norm.parameters())
    return same, tagged, half is None or half.dtype == torch.bfloat16


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("normalization", ["LayerNorm", "RMSNorm"])
def test_norms_are_torchs_with_what_megatron_asks_for(normalization, centred, residual):
    assert run_on_ranks(1, _norm, normalization, centred, residual) == [(True, True, True)]


@pytest.mark.parametrize(
    "changes",
    [
        {"tensor_model_parallel_size": 2},
        {"tensor_model_parallel_size": 2, "sequence_parallel": True, "qk_layernorm": True},
        {"context_parallel_size": 2},
    ],
    ids=str,
)
def test_latent_attention_is_the_same_in_every_layout(changes):
    """Every gradient: keys' positions had that of a rank's own heads alone."""
    flags = {**_LATENT, **_MEMORY, **STEADY, "qk_layernorm": changes.get("qk_layernorm", False)}
    expected = whole(train(1, tiny_gpt(**flags)), "gradients")
    found = whole(train(2, tiny_gpt(**{**flags, **changes})), "gradients")
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert_close(found[name], gradient, AFTER_STEPS, name)


def test_recomputed_norms_change_nothing():
    recompute = {"recompute_granularity": "selective", "recompute_modules": "layernorm"}
    assert run_pretrain(1, tiny_gpt(**recompute)).losses == run_pretrain(1, tiny_gpt()).losses


def test_grouped_experts_are_the_same_experts():
    experts = {"num_experts": 4, "disable_bias_linear": True}
    grouped = run_pretrain(1, tiny_gpt(**experts, moe_grouped_gemm=True))
    assert grouped.losses == run_pretrain(1, tiny_gpt(**experts)).losses


def test_a_profile_is_asked_for_in_vain():
    profile = {"profile": True, "profile_step_start": 1, "profile_step_end": 2}
    assert run_pretrain(1, tiny_gpt(**profile)).losses == run_pretrain(1, tiny_gpt()).losses


@pytest.mark.parametrize(
    ("without", "flags", "message"),
    [
        ("cpu.torch_norms", {"apply_layernorm_1p": True}, "zero_centered_gamma not supported"),
        ("cpu.latent_attention", _LATENT, "unexpected keyword argument 'k_channels'"),
        (
            "defects.recompute_without_engine",
            {"recompute_granularity": "selective", "recompute_modules": "layernorm"},
            "FP8GlobalStateManager",
        ),
    ],
)
def test_the_patch_is_still_needed(without, flags, message):
    from ultramem_megatron.patches.registry import PATCH_MODULES

    others = [name for name in PATCH_MODULES if name != without]
    with pytest.raises(RanksFailed, match=message):
        run_pretrain(1, tiny_gpt(**flags), patches=others)
