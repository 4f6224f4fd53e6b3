"""Figure 9: the value dim at which both partitions of a value table move the same bytes.

Beside the paper's: from which value dim on a grid over nodes of 8 ranks is faster than number-wise,
and from which dimension-wise is faster than the grid, by the cost model's links.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ultramem_megatron.memory.tables.traffic import Exchange, paper_crossover, seconds_per_token
from ultramem_megatron.tools.pictures import picture
from ultramem_megatron.tools.rows import Row

_HIGHEST = 1700  # value dim that is drawn
_NODE = 8  # ranks
_GRID_TOPM = 84  # of which the grid is drawn
_MOST_SLICES = 2**12  # columns of a slice beyond which no crossing is looked for


def points() -> list[Row]:
    """One row per top-m and number of ranks P; of the grid where P is several whole nodes."""
    return [
        {
            "top_m": count,
            "ranks": p,
            "value_dim": round(paper_crossover(p, count), 3),
            "grid_from": _first_faster(count, p, "grid", "number"),
            "dimension_from": _first_faster(count, p, "dimension", "grid"),
        }
        for count in (2, 4, 16, 84)
        for p in range(2, 513)
    ]


def _first_faster(picks: int, ranks: int, wider: str, narrower: str) -> int | str:
    """The least value dim, a multiple of the nodes, at which `wider` is faster; "" for none."""
    if ranks == _NODE or ranks % _NODE:
        return ""
    nodes = ranks // _NODE
    low, high = 0, _MOST_SLICES  # it is not at low * nodes, and is at high * nodes
    while high - low > 1:
        middle = (low + high) // 2
        x = Exchange(ranks, picks, middle * nodes, expansion=1, cores=1, ranks_per_node=_NODE)
        if _seconds(wider, x) < _seconds(narrower, x):
            high = middle
        else:
            low = middle
    return high * nodes if high < _MOST_SLICES else ""


def _seconds(partition: str, x: Exchange) -> float:
    from ultramem_megatron.memory.tables.partitions import PARTITIONS  # it imports torch

    return seconds_per_token(PARTITIONS[partition].volume(x), x)


def draw(file: Path, rows: Sequence[Row]) -> None:
    """One curve per top-m; above it the one, below it the other partition moves fewer bytes."""
    curves: dict[int, list[tuple[int, float]]] = {}
    for row in rows:
        point = int(row["ranks"]), float(row["value_dim"])
        curves.setdefault(int(row["top_m"]), []).append(point)
    with picture(file, (7, 4.5)) as figure:
        axes = figure.subplots()
        for count, curve in curves.items():
            [line] = axes.plot(*zip(*curve, strict=True), label=f"top-m {count}")
            ranks, widths = zip(*((p, v) for p, v in curve if v <= _HIGHEST), strict=True)
            axes.fill_between(ranks, widths, _HIGHEST, color=line.get_color(), alpha=0.06)
        _draw_grid(axes, rows)
        axes.text(20, 1560, "above its line: dimension-wise\nmoves fewer bytes", va="top")
        axes.text(262, 260, "below its line: number-wise\nmoves fewer bytes")
        axes.set(xlabel="ranks P that share a table", ylabel="value dim", xlim=(2, 512))
        axes.set(title="Equal traffic of the two partitions (the paper's formulas, E = 1)")
        axes.set(ylim=(0, _HIGHEST))
        figure.legend(loc="outside right center")


def _draw_grid(axes: Any, rows: Sequence[Row]) -> None:
    """Dashed: above it the grid is faster than number-wise; `dimension_from` is off the picture."""
    of_grid = [row for row in rows if int(row["top_m"]) == _GRID_TOPM and row["grid_from"] != ""]
    curve = [(int(row["ranks"]), int(row["grid_from"])) for row in of_grid]
    label = f"above it, top-m {_GRID_TOPM}:\na grid is fastest"
    axes.plot(*zip(*curve, strict=True), "k--", linewidth=1, label=label)
