"""The paper's figure 9: where both partitions of a value table move the same number of bytes."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

from ultramem_megatron.memory.tables.traffic import paper_crossover


def equal_traffic() -> list[dict[str, str | float]]:
    """Value dim at which both partitions move the same, for each top-m over P."""
    return [
        {"top_m": count, "ranks": p, "value_dim": round(paper_crossover(p, count), 3)}
        for count in (2, 4, 16, 84)
        for p in range(2, 513)
    ]


def write_csv(path: Path) -> None:
    """The numbers of figure 9."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["top_m", "ranks", "value_dim"])
        writer.writeheader()
        writer.writerows(equal_traffic())


def draw(path: Path, rows: Sequence[Mapping[str, str | float]]) -> None:
    """One curve per top-m; above it the one, below it the other partition moves fewer bytes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    curves: dict[int, list[tuple[int, float]]] = {}
    for row in rows:
        point = int(row["ranks"]), float(row["value_dim"])
        curves.setdefault(int(row["top_m"]), []).append(point)
    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    for count, points in curves.items():
        axes.plot(*zip(*points, strict=True), label=f"top-m {count}")
    sizes, highest = zip(*curves[min(curves)], strict=True)
    axes.fill_between(sizes, highest, 1700, color="tab:green", alpha=0.12)
    axes.text(20, 1580, "dimension-wise moves fewer bytes", color="tab:green")
    axes.text(190, 120, "number-wise moves fewer bytes", color="tab:gray")
    axes.set(xlabel="ranks P that share a table", ylabel="value dim",
             xlim=(2, 512), ylim=(0, 1700),
             title="Equal traffic of the two partitions (the paper's formulas, E = 1)")  # fmt: skip
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
