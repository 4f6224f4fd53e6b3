"""UltraMemV2 (arXiv 2508.18756) and its MoE twins; the baselines Memory+ and PEER."""

from ultramem_megatron.presets.models import (
    TRAINING_151M,
    TRANSFORMER_151M,
    UPKEEP,
    olmoe_training,
    swiglu_transformer,
)
from ultramem_megatron.presets.preset import Preset, Setting, assumed, code, inferred, paper

# Every memory of UltraMemV2: in each block, one head, two queries of two ranks, no penalties.
_V2 = (
    paper(
        spans="full",
        heads=1,
        retrieval="tdqkr",
        tucker_rank=2,
        cores=2,
        query_per_rank=True,
        values="prevalued",
        pre_value_activation="none",
        value_expansion=1,
        value_projection=True,
        softmax=False,
        init="matched",
        query_centering=False,
        aux_loss_weight=0.0,
        value_lr_mult=1.0,
    )
    | code(rank_layout="full", qk_norm="rmsnorm", query_conv_kernel=0)
    | assumed(value_lr_decay=1.0)
)

# Product keys without norms, the whole width of a key for each head.
_PRODUCT_KEYS = code(
    retrieval="pkm",
    tucker_rank=1,
    cores=1,
    share_query=False,
    value_expansion=1,
    softmax=True,
    qk_norm="none",
    query_conv_kernel=0,
) | assumed(init="pkm", query_centering=False, aux_loss_weight=0.0, value_lr_decay=1.0)


def _olmoe(layers: int, hidden: int, heads: int, inner: dict[str, Setting], *, tied: bool):
    """OLMoE: 64 experts in every layer, 8 for each token, weighted by the softmax over all."""
    width = int(inner["moe_ffn_hidden_size"].value)
    return (
        swiglu_transformer(layers, hidden, heads, width, tied=tied)
        | paper(num_experts=64, moe_router_topk=8)
        | inner
        | code(
            moe_router_pre_softmax=True,
            moe_router_load_balancing_type="aux_loss",
            moe_aux_loss_coeff=0.01,
            moe_z_loss_coeff=0.001,
        )
    )


# Meta's Memory+ of 373M parameters: its dense model with memories in the place of three MLPs.
_META_TRANSFORMER = code(
    num_layers=24,
    hidden_size=1024,
    num_attention_heads=16,
    ffn_hidden_size=2816,
    swiglu=True,
    normalization="RMSNorm",
    disable_bias_linear=True,
    position_embedding_type="rope",
    rotary_base=500_000,
    untie_embeddings_and_output_weights=True,
    seq_length=4096,
    max_position_embeddings=4096,
)
_META_TRAINING = (
    code(
        train_iters=128_000,
        lr_decay_iters=128_000,
        lr_warmup_iters=4000,
        lr=1e-4,
        min_lr=1e-6,
        lr_decay_style="linear",
        optimizer="adam",
        adam_beta1=0.9,
        adam_beta2=0.95,
        adam_eps=1e-8,
        weight_decay=0.1,
        clip_grad=1.0,
        bf16=True,
        attention_dropout=0.0,
        hidden_dropout=0.0,
    )
    | assumed(global_batch_size=512)
    | UPKEEP
)

FAMILY: dict[str, Preset] = {
    "olmoe-227m-1.2b": Preset(
        "arXiv 2508.18756, table 10: the MoE beside ultramemv2-227m-1.2b",
        _olmoe(20, 768, 12, inferred(moe_ffn_hidden_size=384), tied=True),
        olmoe_training(),
    ),
    "olmoe-1b-7b": Preset(
        "arXiv 2508.18756, table 10, and OLMoE's published code: beside ultramemv2-1b-7b",
        _olmoe(16, 2048, 16, code(moe_ffn_hidden_size=1024), tied=False),
        olmoe_training(),
    ),
    "ultramemv2-227m-1.2b": Preset(
        "arXiv 2508.18756, table 10, and its authors' published code",
        swiglu_transformer(20, 768, 12, 2496, tied=True),
        olmoe_training(),
        code(num_keys=360, key_dim=192, topk=32, value_dim=192, pre_value_dim=192)
        | code(share_values=10, share_order="ring", key_expansion=1)
        | _V2,
    ),
    "ultramemv2-1b-7b": Preset(
        "arXiv 2508.18756, table 10",
        swiglu_transformer(16, 2048, 16, 5632, tied=False),
        olmoe_training(),
        paper(num_keys=528, key_dim=512, topk=128, value_dim=768, pre_value_dim=384)
        | assumed(share_values=4, share_order="block", key_expansion=1)
        | _V2,
    ),
    "memory-plus-151m-x12": Preset(
        "arXiv 2412.09764 at the size of ultramem-151m-x12, beside the MLPs",
        TRANSFORMER_151M,
        TRAINING_151M,
        inferred(spans="2:2/6:6/10:10", num_keys=1347)
        | code(heads=4, topk=32, key_dim=256, value_dim=1024)
        | code(values="gated", value_projection=True, projection_bias=True)
        | code(share_values=3, share_order="same")
        | assumed(value_lr_mult=10.0)
        | _PRODUCT_KEYS,
    ),
    "memory-plus-373m-1024k": Preset(
        "the published code of arXiv 2412.09764 (its layers, counted from 1), in place of MLPs",
        _META_TRANSFORMER,
        _META_TRAINING,
        code(spans="5:5/13:13/21:21", replace_mlp=True, num_keys=1024)
        | code(heads=4, topk=32, key_dim=256, value_dim=1024)
        | code(values="gated", value_projection=True, projection_bias=True)
        | code(share_values=3, share_order="same", value_lr_fixed=1e-3)
        | _PRODUCT_KEYS,
    ),
    "peer-151m-x12": Preset(
        "arXiv 2407.04153 at the size of ultramem-151m-x12, beside the MLP",
        TRANSFORMER_151M,
        TRAINING_151M,
        inferred(spans="6:6", num_keys=953)
        | code(values="prevalued", pre_value_activation="gelu", value_projection=False)
        | code(heads=8, topk=16, value_dim=1024, pre_value_dim=1024, projection_bias=False)
        | assumed(key_dim=128, value_lr_mult=1.0)
        | _PRODUCT_KEYS,
    ),
}
