"""The ten models of table 1, and the authors' published one."""

from ultramem_megatron.presets.preset import Preset, Setting, assumed, code, inferred, paper

_INFERRED_SIZES = "table 1; sizes inferred"


def _transformer(layers: int, hidden: int, heads: int) -> dict[str, Setting]:
    """A dense GPT whose matrices hold 12 * layers * hidden^2 parameters."""
    return (
        inferred(
            num_layers=layers,
            hidden_size=hidden,
            ffn_hidden_size=4 * hidden,
            disable_bias_linear=True,
        )
        | assumed(
            num_attention_heads=heads,
            normalization="LayerNorm",
            position_embedding_type="rope",
            untie_embeddings_and_output_weights=True,
        )
        | paper(seq_length=2048, max_position_embeddings=2048)
    )


# Megatron does not start, or not save, without. Of 238 checkpoints 23 and the latest are kept.
# The decay of lr is given too: a run cut short by --train-iters is the beginning of the whole one.
UPKEEP = assumed(eval_interval=1000, eval_iters=10, save_interval=1000, save_retain_interval=10_000)


def _training(peak_lr: float) -> dict[str, Setting]:
    """Table 4: 1.000e12 tokens."""
    return (
        paper(
            lr=peak_lr,
            min_lr=round(peak_lr / 10, 8),
            lr_decay_style="cosine",
            lr_warmup_fraction=0.01,
            lr_decay_iters=238_418,
            train_iters=238_418,
            global_batch_size=2048,
            optimizer="adam",
            adam_beta1=0.9,
            adam_beta2=0.95,
            weight_decay=0.1,
            attention_dropout=0.1,
            hidden_dropout=0.1,
        )
        | assumed(adam_eps=1e-8, clip_grad=1.0, bf16=True)
        | UPKEEP
    )


TRANSFORMER_151M, TRAINING_151M = _transformer(12, 1024, 16), _training(6e-4)
_680M, _TRAINING_680M = _transformer(24, 1536, 24), _training(2.5e-4)
_1600M, _TRAINING_1600M = _transformer(32, 2048, 16), _training(2e-4)
_6500M, _TRAINING_6500M = _transformer(32, 4096, 32), _training(1.2e-4)


def _experts(number: int, inner: int) -> dict[str, Setting]:
    """Megatron's MoE in every layer, two experts for each token."""
    return (
        paper(num_experts=number, moe_router_topk=2)
        | inferred(moe_ffn_hidden_size=inner)
        | assumed(moe_router_load_balancing_type="aux_loss", moe_aux_loss_coeff=0.01)
    )


# Table 5 and section 3, for every UltraMem model.
_COMMON = (
    paper(
        heads=2,
        topk=42,
        share_query=True,
        retrieval="tdqkr",
        tucker_rank=2,
        rank_layout="split",
        cores=2,
        value_expansion=4,
        value_projection=True,
        softmax=False,
        qk_norm="layernorm",
        init="paper",
        query_centering=False,
        aux_loss_weight=0.001,
        aux_loss_margin=0.15,
        value_lr_mult=10.0,
    )
    | assumed(value_lr_decay=1.0)
    | inferred(query_conv_kernel=5)
)


def swiglu_transformer(
    layers: int, hidden: int, heads: int, inner: int, *, tied: bool
) -> dict[str, Setting]:
    """A dense GPT as the authors' published code has it. tied: one matrix for both embeddings."""
    return code(
        num_layers=layers,
        hidden_size=hidden,
        num_attention_heads=heads,
        ffn_hidden_size=inner,
        swiglu=True,
        normalization="RMSNorm",
        disable_bias_linear=True,
        position_embedding_type="rope",
        untie_embeddings_and_output_weights=not tied,
        seq_length=4096,
        max_position_embeddings=4096,
    )


def olmoe_training() -> dict[str, Setting]:
    """5e11 tokens (arXiv 2508.18756, table 3); the rest is the schedule of OLMoE."""
    return (
        paper(train_iters=119_209, lr_decay_iters=119_209)
        | assumed(
            lr=4e-4,
            min_lr=4e-5,
            lr_decay_style="cosine",
            lr_warmup_iters=2500,
            global_batch_size=1024,
            optimizer="adam",
            adam_beta1=0.9,
            adam_beta2=0.95,
            weight_decay=0.1,
            clip_grad=1.0,
            bf16=True,
        )
        | UPKEEP
        | code(attention_dropout=0.0, hidden_dropout=0.0)
    )


MODELS: dict[str, Preset] = {
    "dense-151m": Preset(_INFERRED_SIZES, TRANSFORMER_151M, TRAINING_151M),
    "dense-680m": Preset(_INFERRED_SIZES, _680M, _TRAINING_680M),
    "dense-1.6b": Preset(_INFERRED_SIZES, _1600M, _TRAINING_1600M),
    "dense-6.5b": Preset(_INFERRED_SIZES, _6500M, _TRAINING_6500M),
    "moe-151m-2in32": Preset(_INFERRED_SIZES, TRANSFORMER_151M | _experts(32, 2528), TRAINING_151M),
    "moe-680m-2in33": Preset(_INFERRED_SIZES, _680M | _experts(33, 3584), _TRAINING_680M),
    "moe-1.6b-2in34": Preset(_INFERRED_SIZES, _1600M | _experts(34, 4672), _TRAINING_1600M),
    "ultramem-151m-x12": Preset(
        _INFERRED_SIZES,
        TRANSFORMER_151M,
        TRAINING_151M,
        inferred(spans="3:5/6:8/9:11", num_keys=1100, key_dim=500) | paper(value_dim=512) | _COMMON,
    ),
    "ultramem-680m-x12": Preset(
        "table 1; sizes inferred, one of several that fit",
        _680M,
        _TRAINING_680M,
        inferred(spans="3:7/8:12/13:17/18:22", num_keys=1632, key_dim=720)
        | paper(value_dim=768)
        | _COMMON,
    ),
    "ultramem-1.6b-x12": Preset(
        "table 1; spans from the paper, sizes inferred",
        _1600M,
        _TRAINING_1600M,
        paper(spans="3:7/8:12/13:17/18:22/23:27/28:32", value_dim=1024)
        | inferred(num_keys=1789, key_dim=800)
        | _COMMON,
    ),
    "ultramem-227m-1.2b": Preset(
        "the authors' published code (their spans, counted from 1)",
        swiglu_transformer(20, 768, 12, 2752, tied=True),
        olmoe_training(),
        code(
            spans="3:6/7:10/11:14/15:18",
            num_keys=808,
            key_dim=192,
            value_dim=384,
            topk=80,
            heads=2,
            share_query=True,
            retrieval="tdqkr",
            tucker_rank=2,
            rank_layout="full",
            cores=2,
            value_expansion=4,
            value_projection=True,
            softmax=False,
            qk_norm="rmsnorm",
            init="official",
            query_centering=False,
            aux_loss_weight=0.0,
            value_lr_mult=4.0,
            value_lr_decay=1.0,
            query_conv_kernel=0,
        ),
    ),
}
