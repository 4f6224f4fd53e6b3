"""UltraMemV2 (arXiv 2508.18756), and the baselines Memory+ and PEER beside the 151M models."""

from ultramem_megatron.presets.models import (
    TRAINING_151M,
    TRANSFORMER_151M,
    olmoe_training,
    swiglu_transformer,
)
from ultramem_megatron.presets.preset import Preset, assumed, code, inferred, paper

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

FAMILY: dict[str, Preset] = {
    "ultramemv2-227m-1.2b": Preset(
        "arXiv 2508.18756, table 10, and its authors' published code",
        swiglu_transformer(20, 768, 12, 2496),
        olmoe_training(),
        code(num_keys=360, key_dim=192, topk=32, value_dim=192, pre_value_dim=192)
        | code(share_values=10, share_order="ring", key_expansion=1)
        | _V2,
    ),
    "ultramemv2-1b-7b": Preset(
        "arXiv 2508.18756, table 10",
        swiglu_transformer(16, 2048, 16, 5632),
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
