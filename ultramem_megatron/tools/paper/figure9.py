"""Figure 9: the value dim at which both partitions of a value table move the same bytes."""

from collections.abc import Sequence
from pathlib import Path

from ultramem_megatron.memory.tables.traffic import paper_crossover
from ultramem_megatron.tools.pictures import picture
from ultramem_megatron.tools.rows import Row

_HIGHEST = 1700  # value dim that is drawn


def points() -> list[Row]:
    """One row per top-m and number of ranks P."""
    return [
        {"top_m": count, "ranks": p, "value_dim": round(paper_crossover(p, count), 3)}
        for count in (2, 4, 16, 84)
        for p in range(2, 513)
    ]


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
        axes.text(20, 1560, "above its line: dimension-wise\nmoves fewer bytes", va="top")
        axes.text(290, 130, "below its line: number-wise\nmoves fewer bytes")
        axes.set(xlabel="ranks P that share a table", ylabel="value dim", xlim=(2, 512))
        axes.set(title="Equal traffic of the two partitions (the paper's formulas, E = 1)")
        axes.set(ylim=(0, _HIGHEST))
        figure.legend(loc="outside right center")
