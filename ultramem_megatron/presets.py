"""Named memory designs for --ultramem-preset. Each fills the --ultramem-* flags left unset.

Sizes marked "inferred" are reconstructed from the paper's parameter and FLOP columns; the paper's
own table of model settings was not available. The transformer around a memory (--num-layers,
--hidden-size, ...) is Megatron's to set; `transformer` says which one a preset was made for.
"""

from dataclasses import dataclass
from typing import Any

from ultramem_megatron.errors import UltraMemError


@dataclass(frozen=True)
class Preset:
    """Fields of UltraMemConfig (spans as text), and what they belong to."""

    fields: dict[str, Any]
    transformer: str
    source: str


_X12 = {"topk": 42, "heads": 2, "tucker_rank": 2, "cores": 2, "value_expansion": 4,
        "query_conv_kernel": 5}  # fmt: skip

_PKM = {
    "spans": "6:6", "num_keys": 1224, "key_dim": 2448, "value_dim": 1024, "topk": 21, "heads": 2,
    "share_query": False, "retrieval": "pkm", "tucker_rank": 1, "cores": 1, "value_expansion": 1,
    "value_projection": False, "softmax": True, "qk_norm": "none", "init": "official",
    "aux_loss_weight": 0.0, "value_lr_mult": 1.0, "query_conv_kernel": 0,
}  # fmt: skip

# Table 2 is cumulative: each row changes the row before it.
_ABLATION_STEPS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("no-softmax", {"softmax": False}),
    ("half-value-dim", {"num_keys": 1728, "value_dim": 512, "topk": 42, "value_projection": True}),
    ("share-query", {"share_query": True}),
    ("split-skip", {"spans": "3:5/6:8/9:11", "num_keys": 1000, "key_dim": 500}),
    ("qk-norm", {"qk_norm": "layernorm"}),
    ("ive", {"value_expansion": 4}),
    ("tdqkr", {"retrieval": "tdqkr", "tucker_rank": 2, "aux_loss_weight": 0.001}),
    ("mcs", {"cores": 2}),
    ("init", {"init": "paper"}),
    ("value-lr", {"value_lr_mult": 10.0, "value_lr_decay": 1.0}),
    ("query-conv", {"query_conv_kernel": 5}),
)


def _ablation() -> dict[str, Preset]:
    transformer = "12 layers, hidden size 1024, GeLU MLP of 4096"
    rows = {"pkm-151m-x10": Preset(dict(_PKM), transformer, "table 2, row 1; sizes inferred")}
    fields = dict(_PKM)
    for number, (name, change) in enumerate(_ABLATION_STEPS, start=2):
        fields = fields | change
        rows[f"ablation-151m-x10-{name}"] = Preset(
            fields, transformer, f"table 2, row {number}; sizes inferred"
        )
    return rows


PRESETS: dict[str, Preset] = {
    "ultramem-151m-x12": Preset(
        _X12 | {"spans": "3:5/6:8/9:11", "num_keys": 1100, "key_dim": 500, "value_dim": 512},
        "12 layers, hidden size 1024, GeLU MLP of 4096",
        "table 1; sizes inferred",
    ),
    "ultramem-680m-x12": Preset(
        _X12
        | {"spans": "3:7/8:12/13:17/18:22", "num_keys": 1632, "key_dim": 720, "value_dim": 768},
        "24 layers, hidden size 1536, GeLU MLP of 6144",
        "table 1; sizes inferred, one of several that fit",
    ),
    "ultramem-1.6b-x12": Preset(
        _X12
        | {"spans": "3:7/8:12/13:17/18:22/23:27/28:32", "num_keys": 1789, "key_dim": 800,
           "value_dim": 1024},
        "32 layers, hidden size 2048, GeLU MLP of 8192",
        "table 1; spans from the paper, sizes inferred",
    ),
    "ultramem-227m-official": Preset(
        {"spans": "3:6/7:10/11:14/15:18", "num_keys": 808, "key_dim": 192, "value_dim": 384,
         "topk": 80, "heads": 2, "tucker_rank": 2, "rank_layout": "full", "cores": 2,
         "value_expansion": 4, "qk_norm": "rmsnorm", "init": "official", "aux_loss_weight": 0.0,
         "value_lr_mult": 4.0, "query_conv_kernel": 0},
        "20 layers, hidden size 768, SwiGLU MLP of 2752",
        "the authors' published code (their spans, counted from 1)",
    ),
    **_ablation(),
}  # fmt: skip


def preset_fields(name: str) -> dict[str, Any]:
    """Config fields of a preset. Raises UltraMemError for an unknown name, listing the known."""
    if name not in PRESETS:
        raise UltraMemError(
            f"--ultramem-preset {name!r} is unknown. Known presets: {', '.join(sorted(PRESETS))}."
        )
    return dict(PRESETS[name].fields)
