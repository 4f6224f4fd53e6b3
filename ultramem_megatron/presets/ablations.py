"""Tables 2 and 3: from product keys to UltraMem, one change a row, on the 151M transformer."""

from ultramem_megatron.presets.models import TRAINING_151M, TRANSFORMER_151M
from ultramem_megatron.presets.preset import Preset, Setting, assumed, inferred, paper

_PREFIX = "ablation-151m-x10-"

_PKM = (
    inferred(
        spans="6:6",
        num_keys=1224,
        key_dim=2448,
        value_dim=1024,
        topk=21,
        heads=2,
        share_query=False,
    )
    | paper(
        retrieval="pkm",
        tucker_rank=1,
        cores=1,
        value_expansion=1,
        value_projection=False,
        softmax=True,
        qk_norm="none",
        query_centering=False,
        value_lr_mult=1.0,
        query_conv_kernel=0,
        aux_loss_weight=0.0,
    )
    | assumed(init="pkm")  # of product-key memories; the code of 2025 came later
)

# Table 2 is cumulative: each row changes the row before it.
_STEPS: tuple[tuple[str, dict[str, Setting]], ...] = (
    ("no-softmax", paper(softmax=False)),
    (
        "half-value-dim",
        inferred(num_keys=1728, topk=42) | paper(value_dim=512, value_projection=True),
    ),
    ("share-query", paper(share_query=True)),
    ("split-skip", inferred(spans="3:5/6:8/9:11", num_keys=1000, key_dim=500)),
    ("qk-norm", paper(qk_norm="layernorm")),
    ("ive", paper(value_expansion=4)),
    ("tdqkr", paper(retrieval="tdqkr", tucker_rank=2, aux_loss_weight=0.001)),
    ("mcs", paper(cores=2)),
    ("init", paper(init="paper")),
    ("value-lr", paper(value_lr_mult=10.0) | assumed(value_lr_decay=1.0)),
    ("query-conv", inferred(query_conv_kernel=5)),
)

# Table 3 varies one number of a row of table 2.
_VARIATIONS: tuple[tuple[str, str, dict[str, Setting]], ...] = (
    ("e9", "ive", paper(value_expansion=9)),
    ("e16", "ive", paper(value_expansion=16)),
    # 501: the multiple of three nearest to the 500 of the other rows.
    ("r3", "tdqkr", paper(tucker_rank=3) | inferred(key_dim=501)),
    ("r4", "tdqkr", paper(tucker_rank=4)),
    ("h4", "mcs", paper(cores=4)),
    ("h8", "mcs", paper(cores=8)),
)


def _row(about: str, memory: dict[str, Setting]) -> Preset:
    return Preset(f"{about}; sizes inferred", TRANSFORMER_151M, TRAINING_151M, memory)


def _table_2() -> dict[str, Preset]:
    memory = _PKM
    rows = {"pkm-151m-x10": _row("table 2, row 1", memory)}
    for number, (name, change) in enumerate(_STEPS, start=2):
        memory = memory | change
        rows[_PREFIX + name] = _row(f"table 2, row {number}", memory)
    return rows


def _table_3(table_2: dict[str, Preset]) -> dict[str, Preset]:
    return {
        _PREFIX + name: _row(
            f"table 3, {name[0].replace('e', 'E')} = {name[1:]}",
            {**table_2[_PREFIX + base].memory, **change},
        )
        for name, base, change in _VARIATIONS
    }


_TABLE_2 = _table_2()
ABLATIONS: dict[str, Preset] = _TABLE_2 | _table_3(_TABLE_2)
