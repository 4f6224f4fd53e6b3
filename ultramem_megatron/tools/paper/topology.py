"""Topology bias (section 3.3): how many of the best values share the best one's row or column.

Additive scores of product keys put them there; a product of ranks less so. Untrained layers, random
inputs: what is seen is the retrieval alone.
"""

from collections.abc import Sequence
from pathlib import Path

from ultramem_megatron.tools.pictures import picture
from ultramem_megatron.tools.rows import Row

_KEYS = (160, 320, 640, 1000)
_TOPK, _HEADS, _HIDDEN, _KEY_WIDTH, _TOKENS = 42, 2, 64, 48, 128
_KINDS = {"product keys": ("pkm", 1), **{f"Tucker, r = {r}": ("tdqkr", r) for r in (2, 3, 4)}}


def points() -> list[Row]:
    """One row per retrieval and number of keys n: shares of the m - 1 values after the best."""
    return [
        {"retrieval": name, "num_keys": keys, "topk": _TOPK, **_shares(kind, rank, keys)}
        for keys in _KEYS
        for name, (kind, rank) in _KINDS.items()
    ]


def _shares(retrieval: str, rank: int, keys: int) -> dict[str, float]:
    import torch

    from ultramem_megatron.memory.config import UltraMemConfig
    from ultramem_megatron.memory.layer import UltraMemLayer
    from ultramem_megatron.memory.spans import Span

    config = UltraMemConfig(
        spans=(Span(1, 1),),
        retrieval=retrieval,
        tucker_rank=rank,
        cores=1,
        num_keys=keys,
        key_dim=_KEY_WIDTH,
        value_dim=1,
        value_expansion=1,
        topk=_TOPK,
        heads=_HEADS,
    )
    layer = UltraMemLayer(config, hidden_size=_HIDDEN, num_layers=1).eval()
    x = torch.randn(_TOKENS, _HIDDEN, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        addresses = layer.retrieve(layer.query(x)).addresses.view(_TOKENS, _HEADS, _TOPK)
    side = config.keys_per_side
    row, column = addresses // side, addresses % side
    in_line = (row[..., 1:] == row[..., :1]) | (column[..., 1:] == column[..., :1])
    second = in_line[..., 0].double().mean()
    return {
        "second_best": round(float(second), 4),
        "all": round(float(in_line.double().mean()), 4),
        "by_chance": round((2 * side - 2) / (side**2 - 1), 4),
    }


def draw(file: Path, rows: Sequence[Row]) -> None:
    """The share of the second best, and of all of the m best, over the number of keys."""
    with picture(file, (9, 3.8)) as figure:
        for axes, (column, label) in zip(
            figure.subplots(1, 2, sharey=True),
            (("second_best", "the second best value"), ("all", f"all {_TOPK} best values")),
            strict=True,
        ):
            for name in _KINDS:
                own = [row for row in rows if row["retrieval"] == name]
                keys = [int(row["num_keys"]) for row in own]
                axes.plot(keys, [float(row[column]) for row in own], "o-", label=name)
            chance = {int(row["num_keys"]): float(row["by_chance"]) for row in rows}
            axes.plot(list(chance), list(chance.values()), ":", color="grey", label="by chance")
            axes.set(xlabel="keys per side n", title=label, xscale="log", ylim=(0, None))
            axes.set_xticks(_KEYS, [str(keys) for keys in _KEYS])
            axes.minorticks_off()
        figure.axes[0].set(ylabel="share in the best value's row or column")
        figure.axes[1].legend()
