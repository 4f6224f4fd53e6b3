"""Small models of every kind that an export knows, and what each direction makes of them."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from tests.closeness import assert_close
from tests.decoding import KINDS, full_logits
from tests.training_runs import make_saving_fast, tiny_gpt

_MEMORY = {"ultramem_num_keys": 12, "ultramem_topk": 6}
MODELS: dict[str, dict[str, Any]] = {
    "convolution": {**_MEMORY, "ultramem_spans": "1:2/3:4", "ultramem_query_conv_kernel": 4},
    "swiglu": {
        **_MEMORY,
        "ultramem_spans": "2:3",
        "swiglu": True,
        "normalization": "RMSNorm",
        "disable_bias_linear": True,
        "add_qkv_bias": True,
        "group_query_attention": True,
        "num_query_groups": 2,
        "kv_channels": 12,
        "rotary_percent": 0.5,
        "rotary_base": 5000,
        "qk_layernorm": True,
        "norm_epsilon": 1e-3,
    },
    "learned": {
        **_MEMORY,
        "ultramem_spans": "full",
        "position_embedding_type": "learned_absolute",
        "untie_embeddings_and_output_weights": False,
        "ultramem_retrieval": "pkm",
        "ultramem_softmax": True,
        "ultramem_init": "official",
        "ultramem_qk_norm": "rmsnorm",
        "seed": 7,
    },
    "experts": {
        "num_experts": 6,
        "moe_ffn_hidden_size": 40,
        "disable_bias_linear": True,
        "moe_router_pre_softmax": True,
        "moe_router_topk": 3,
        "moe_router_dtype": "fp32",
    },
    "experts and memory": {
        **_MEMORY,
        "ultramem_spans": "2:3",
        "num_experts": 4,
        "disable_bias_linear": True,
        "swiglu": True,
        "moe_router_load_balancing_type": "none",
    },
    "ultramemv2": KINDS["ultramemv2"],
    "dense bf16": {"bf16": True},
    "hybrid": {
        **_MEMORY,
        "ultramem_spans": "1:4/6:6",
        "ultramem_query_conv_kernel": 3,
        "num_layers": None,
        "hybrid_layer_pattern": "E*-*-E",
        "num_experts": 4,
        "moe_ffn_hidden_size": 40,
        "disable_bias_linear": True,
        "moe_router_load_balancing_type": "none",
    },
    "mamba": {
        **_MEMORY,
        "ultramem_spans": "2:4/6:7",
        "ultramem_query_conv_kernel": 3,
        "num_layers": None,
        "hybrid_layer_pattern": "M-*ME-M",
        "num_experts": 4,
        "disable_bias_linear": True,
        "moe_router_load_balancing_type": "none",
        "mamba_head_dim": 8,
        "mamba_num_groups": 2,
        "mamba_state_dim": 6,
    },
    # Rounding changes which of two nearly equal values is picked, in either model.
    "bf16": {**_MEMORY, "ultramem_spans": "2:3", "bf16": True, "disable_bias_linear": True},
}
_PKM = {
    **_MEMORY,
    "ultramem_retrieval": "pkm",
    "ultramem_value_expansion": 1,
    "no_ultramem_share_query": True,
    "ultramem_qk_norm": "none",
    "ultramem_init": "pkm",
}
FAMILY: dict[str, dict[str, Any]] = {
    "ultramemv2": MODELS["ultramemv2"],
    "ring": {
        **MODELS["ultramemv2"],
        "ultramem_share_order": "ring",
        "ultramem_value_expansion": 4,
        "ultramem_query_conv_kernel": 3,
        "ultramem_pre_value_activation": "silu",
    },
    "noring": {**MODELS["ultramemv2"], "ultramem_share_order": "noring"},
    "memory+": {
        **_PKM,
        "ultramem_spans": "full",
        "ultramem_replace_mlp": True,
        "ultramem_softmax": True,
        "ultramem_values": "gated",
        "ultramem_projection_bias": True,
        "ultramem_share_values": 4,
        "ultramem_share_order": "same",
    },
    "peer": {
        **_PKM,
        "ultramem_spans": "2:3/4:4",
        "ultramem_softmax": True,
        "ultramem_values": "prevalued",
        "ultramem_pre_value_activation": "gelu",
        "no_ultramem_value_projection": True,
        "ultramem_value_dim": 32,
    },
}
"""UltraMemV2, Memory+ and PEER, each with what it alone has; and each of them in bf16."""
FAMILY["experts apart"] = {
    **FAMILY["peer"],
    "ultramem_softmax": False,
    "ultramem_relu_scores": True,
    "ultramem_values_per_head": True,
}
# Where memories in every layer pick by rounding, logits differ by a quarter: one model is enough.
_BF16 = {"bf16": True, "ultramem_spans": "2:2/3:3", "disable_bias_linear": True}
FAMILY |= {
    f"{name} bf16": {**changes, **_BF16, "ultramem_share_values": min(2, _shared)}
    for name, changes in FAMILY.items()
    if (_shared := changes.get("ultramem_share_values", 1))
}
FAMILY["every layer bf16"] = {**MODELS["ultramemv2"], "bf16": True}
TOLERANCES = {name: 0.12 for name in (*MODELS, *FAMILY) if "bf16" in name} | {"dense bf16": 0.02}
TOLERANCES["every layer bf16"] = 0.5
"""Where it is not that of float32."""


def flags(changes: dict[str, Any]) -> list[str]:
    """Megatron's flags of a model in the table."""
    return tiny_gpt(**{"num_layers": 4, "init_method_std": 0.2, **changes})


def tokens() -> torch.Tensor:
    """(2, 20) ids."""
    return torch.randint(500, (2, 20), generator=torch.Generator().manual_seed(3))


def shaken(model: Any) -> None:
    """Move every parameter, and the means of queries: none may hide a mistake by its value."""
    from ultramem_megatron.memory.layer import memory_layers

    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        noise = torch.rand(parameter.shape, generator=generator) - 0.5
        parameter.data += 0.2 * noise.to(parameter.dtype)
    for layer in memory_layers(model):
        if layer.query.common is not None:
            layer.query.common.mean.uniform_(-1, 1, generator=generator)


def round_trip(folder: Path, models: dict[str, dict[str, Any]], kind: str) -> dict[str, Any]:
    """Export each, make a checkpoint of it; logits of the original and of the last.

    kind: "hf" or "plain". Below the folder, each has its own: checkpoint, the kind, back.
    """
    from ultramem_megatron.inference.loading import load_model
    from ultramem_megatron.inference.untrained import untrained_model
    from ultramem_megatron.megatron.checkpoint.weights import save_weights
    from ultramem_megatron.tools.export.__main__ import main

    make_saving_fast()
    logits = {}
    for name, changes in models.items():
        model, args = untrained_model(flags(changes))
        shaken(model)
        save_weights(model, args, folder / name / "checkpoint")
        export = [*(["hf"] if kind == "hf" else []), f"{folder / name / kind}"]
        main(["--load", f"{folder / name}/checkpoint", "--to", *export])
        main(["--from", *export, "--save", f"{folder / name}/back"])
        back, _ = load_model(str(folder / name / "back"))
        logits[name] = full_logits(model, tokens()), full_logits(back, tokens())
    return logits


def in_transformers(folder: Path, scratch: Path, *names: str, prompt: str = "") -> dict[str, Any]:
    """What transformers makes of these below `folder`, without us and Megatron, elsewhere.

    prompt: of the model of text there, if there is one.
    """
    file = scratch / "results.pt"
    torch.save(tokens(), file)
    script = Path(__file__).with_name("opened_by_transformers.py")
    cache = {"HF_MODULES_CACHE": str(scratch / "modules"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(script), str(folder), str(file), prompt, *names]
    subprocess.run(command, check=True, cwd=scratch, env={**os.environ, **cache})
    found: dict[str, Any] = torch.load(file)
    return found


def assert_megatrons_logits(ours: Any, found: dict[str, Any], tolerance: float) -> None:
    """ours: what `round_trip` gives of a model; found: what transformers made of it."""
    original, back = ours
    assert torch.equal(back, original)
    for way in ("logits", "pieces", "eager"):
        assert_close(found[way].float(), original, tolerance, way)
    for row, length in enumerate(found["lengths"]):
        padded, wanted = found["padded"][row, -length:].float(), original[row, :length]
        assert_close(padded, wanted, tolerance, f"padded to {length}")
    assert found["hidden"]
    assert found["alone"]


def assert_one_continuation(found: dict[str, Any]) -> None:
    """With a cache and without, in batches and one by one, a model goes on as it does."""
    assert torch.equal(found["batch"], torch.stack(found["one by one"]))
    assert torch.equal(found["batch"], found["without a cache"])
    assert torch.equal(found["beams"], found["beams without a cache"])
