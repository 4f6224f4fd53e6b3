"""Which models each table or figure of the paper compares, in the order they are printed.

A model that stands in several experiments is trained once: results are kept by flags and seed.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from launch.ablations.models import (
    ULTRAMEM_ROW,
    Model,
    ablation,
    dense,
    in_bfloat16,
    member,
    moe,
    resized,
    with_initial_std,
)
from ultramem_megatron.errors import UltraMemError
from ultramem_megatron.presets import printed

_X10 = "ablation-151m-x10-"


@dataclass(frozen=True)
class Experiment:
    """Models to train alike; `baseline` names the one that differences are taken from.

    `rivals` are further ones.
    """

    name: str
    about: str
    models: tuple[Model, ...]
    baseline: str
    rivals: tuple[str, ...] = ()
    seeds: tuple[int, ...] = (1, 2, 3)
    steps: int = 1000
    """At 200 the scores of a memory are at the bottom of a transient, which ends near 1,000."""
    evaluations: int = 10
    """During training, evenly spaced, the last one at its end."""
    data: str = "prose"
    """prose: dictionaries and Python; dictionary: a thousand definitions, seen many times."""
    paper: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """Validation losses that the paper prints, by its size and by model; on its own data."""
    cumulative: bool = False
    """Each model changes the one before it."""


_TABLE_2 = (
    ("pkm", "pkm-151m-x10"),
    *(
        (row, _X10 + row)
        for row in (
            "no-softmax",
            "half-value-dim",
            "share-query",
            "split-skip",
            "qk-norm",
            "ive",
            "tdqkr",
            "mcs",
            "init",
            "value-lr",
        )
    ),
    ("ultramem", ULTRAMEM_ROW),
)

_TABLE_3 = (
    ("E=1", "qk-norm"),
    ("E=4", "ive"),
    ("E=9", "e9"),
    ("E=16", "e16"),
    ("r=1", "ive"),
    ("r=2", "tdqkr"),
    ("r=3", "r3"),
    ("r=4", "r4"),
    ("h=1", "tdqkr"),
    ("h=2", "mcs"),
    ("h=4", "h4"),
    ("h=8", "h8"),
)

# Figure 6b: keys per side and top-m, of the full and the small scale. Both grow by a root of two
# and two along a line of the figure, on which values over values read, n^2/(m*H), stay the same.
_KEYS = ((550, 80), (778, 113), (1100, 160), (1556, 226))
_TOPK = ((10, 4), (20, 8), (40, 16), (80, 32))
_LINES = 3


def _at_fixed_sparsity() -> Iterator[Model]:
    for line in range(_LINES):
        for (keys, small_keys), (topk, small_topk) in zip(_KEYS[line:], _TOPK, strict=False):
            yield resized(
                f"n={small_keys} m={small_topk}",
                "ultramem-151m-x12",
                {"num_keys": keys, "topk": topk},
                {"num_keys": small_keys, "topk": small_topk},
            )


def _printed(models: Iterable[Model], losses: Mapping[str, float]) -> dict[str, float]:
    return {model.name: losses[model.preset] for model in models}


_ROWS_2 = tuple(ablation(name, preset) for name, preset in _TABLE_2)
_ROWS_3 = tuple(ablation(name, _X10 + preset) for name, preset in _TABLE_3)
_SIX_SEEDS = (1, 2, 3, 4, 5, 6)
_AT_151M = ("dense-151m", "moe-151m-2in32", "ultramem-151m-x12")
_AT_1_6B = ("dense-1.6b", "moe-1.6b-2in34", "ultramem-1.6b-x12")

# What a token reads of the tables stands to what it reads of UltraMem's as in the presets: thrice
# as much in Memory+, twice in the others.
_FAMILY = (
    member(
        "memory+",
        "memory-plus-151m-x12",
        253,
        spans="1:1/2:2/4:4",
        num_keys=160,
        key_dim=24,
        value_dim=96,
        topk=8,
    ),
    member(
        "peer",
        "peer-151m-x12",
        409,
        spans="2:2",
        num_keys=113,
        key_dim=24,
        value_dim=96,
        pre_value_dim=96,
        topk=4,
    ),
    member(
        "ultramemv2",
        "ultramemv2-227m-1.2b",
        337,
        num_keys=80,
        share_values=4,
        key_dim=24,
        value_dim=48,
        pre_value_dim=48,
        topk=16,
    ),
)

_DEFAULTS: dict[str, Any] = {"init": "matched", "query_centering": True, "value_lr_mult": 4.0}


def _narrow(name: str, **changes: Any) -> Model:
    """Under Megatron's own initial weights, with which queries can become one."""
    return with_initial_std(_started(name, **changes), 0.02)


def _started(name: str, **changes: Any) -> Model:
    return ablation(name, ULTRAMEM_ROW, **changes)


EXPERIMENTS: dict[str, Experiment] = {
    experiment.name: experiment
    for experiment in (
        Experiment(
            "figure1a",
            "dense, MoE, product keys and UltraMem at equal FLOPs and parameters (figures 1a, 6a)",
            (
                dense("dense", "dense-1.6b"),
                moe("moe", "moe-1.6b-2in34"),
                ablation("pkm", "pkm-151m-x10"),
                Model("ultramem", "ultramem-1.6b-x12", ablation("", ULTRAMEM_ROW).small),
            ),
            "dense",
            rivals=("moe",),
            seeds=_SIX_SEEDS,
            paper={
                size: {
                    name: printed.TABLE_1_LOSS[preset]
                    for name, preset in zip(("dense", "moe", "ultramem"), presets, strict=True)
                }
                for size, presets in (("151M", _AT_151M), ("1.6B", _AT_1_6B))
            },
        ),
        Experiment(
            "family",
            "UltraMem beside Memory+, PEER and UltraMemV2 at equal FLOPs and parameters",
            (
                dense(),
                ablation("pkm", "pkm-151m-x10"),
                *_FAMILY,
                ablation("ultramem", ULTRAMEM_ROW),
            ),
            "ultramem",
        ),
        Experiment(
            "recall",
            "share of a dictionary's definitions that the model reproduces",
            (dense(), moe(), Model("ultramem", ULTRAMEM_ROW, ablation("", ULTRAMEM_ROW).small)),
            "dense",
            evaluations=4,
            data="dictionary",
        ),
        Experiment(
            "table2",
            "from product keys to UltraMem, one change a row",
            _ROWS_2,
            "pkm",
            seeds=_SIX_SEEDS,
            paper={"151M": _printed(_ROWS_2, printed.TABLE_2_LOSS)},
            cumulative=True,
        ),
        Experiment(
            "table3",
            "value expansion E, Tucker rank r, cores h",
            _ROWS_3,
            "E=1",
            paper={"151M": _printed(_ROWS_3, printed.TABLE_3_LOSS)},
        ),
        Experiment(
            "figure10",
            "norms of queries and keys; the authors' code's initialisation and the paper's",
            (
                ablation("ultramem", ULTRAMEM_ROW),
                ablation("no-norms", ULTRAMEM_ROW, qk_norm="none"),
                ablation("naive-init", ULTRAMEM_ROW, init="official"),
                _narrow("naive-init, std 0.02", init="official"),
                _narrow("matched, centred, std 0.02", init="matched", query_centering=True),
            ),
            "ultramem",
        ),
        Experiment(
            "start",
            "a newcomer's run: Megatron's initial weights, memories started in several ways",
            tuple(
                with_initial_std(model, 0.02)
                for model in (
                    dense(),
                    _started("official", init="official", value_lr_mult=1.0),
                    _started("paper", init="paper"),
                    _started("matched", init="matched"),
                    _started("matched, centred", init="matched", query_centering=True),
                    _started("the same, x4", **_DEFAULTS),
                    _started("the same, x1", **{**_DEFAULTS, "value_lr_mult": 1.0}),
                )
            ),
            "dense",
            steps=300,
            evaluations=6,
        ),
        Experiment(
            "moments",
            "AdamW's moments of value tables in fewer bytes",
            (
                ablation("float32", ULTRAMEM_ROW),
                *(
                    ablation(kind, ULTRAMEM_ROW, row_adam=True, table_moments=kind)
                    for kind in ("factored", "bfloat16", "int8")
                ),
            ),
            "float32",
            steps=400,
            evaluations=4,
        ),
        Experiment(
            "main_params",
            "value tables in bfloat16 with a float32 copy that AdamW trains, and without",
            tuple(
                in_bfloat16(ablation(name, ULTRAMEM_ROW, row_adam=True, table_main_params=kept))
                for name, kept in (("float32 copy", "float32"), ("no copy", "none"))
            ),
            "float32 copy",
            seeds=(1, 2),
            steps=400,
            evaluations=4,
        ),
        Experiment(
            "figure6b",
            "loss over sparse parameters, at three shares of values read",
            tuple(_at_fixed_sparsity()),
            "n=80 m=4",
        ),
    )
}


def find_experiment(name: str) -> Experiment:
    """Raises UltraMemError for an unknown name, listing the known."""
    if name not in EXPERIMENTS:
        raise UltraMemError(f"experiment {name!r} is unknown. Known: {', '.join(EXPERIMENTS)}.")
    return EXPERIMENTS[name]
