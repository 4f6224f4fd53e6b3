"""Plots of the benchmark's CSV: latency over values and over tokens, and speed ratios as bars."""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ultramem_megatron.errors import UltraMemError

Row = dict[str, str]
_BOTH = "forward+backward"
_NEEDED = {"sweep", "op", "candidate", "passes", "ms_min", "values", "hardware", "commit"}


def plot(file: Path) -> list[Path]:
    """Draw beside the CSV; returns the pictures. Raises UltraMemError for another CSV."""
    import matplotlib

    matplotlib.use("Agg")
    rows = _read(file)
    drawn = [
        _lines(rows, file, sweep, axis)
        for sweep, axis in (("values", "values in the table"), ("tokens", "tokens"))
        if any(row["sweep"] == sweep for row in rows)
    ]
    return [*drawn, _bars(rows, file)]


def _read(file: Path) -> list[Row]:
    if not file.is_file():
        raise UltraMemError(f"{file} is not there. Give the kernels.csv that `run` wrote.")
    with file.open(newline="") as handle:
        rows = list(csv.DictReader(handle))
    if not rows or not rows[0].keys() >= _NEEDED:
        raise UltraMemError(f"{file} holds no rows of this benchmark. Give what `run` wrote.")
    return rows


def _lines(rows: Sequence[Row], file: Path, sweep: str, label: str) -> Path:
    """Milliseconds of lookup and layer, both passes, over one size."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    for axis, op in zip(axes, ("lookup", "layer"), strict=True):
        chosen = [r for r in rows if (r["sweep"], r["op"], r["passes"]) == (sweep, op, _BOTH)]
        for candidate in dict.fromkeys(row["candidate"] for row in chosen):
            points = sorted(
                (int(row[sweep]), float(row["ms_min"]))
                for row in chosen
                if row["candidate"] == candidate
            )
            axis.plot(*zip(*points, strict=True), marker="o", markersize=3, label=candidate)
        axis.set(
            xscale="log", yscale="log", xlabel=label, ylabel="ms", title=f"{op}, forward+backward"
        )
        axis.legend(fontsize=7)
    return _save(figure, rows, file.with_name(f"latency_over_{sweep}.png"))


def _bars(rows: Sequence[Row], file: Path) -> Path:
    """Time of every candidate over ours, at the smallest and the largest table."""
    from matplotlib import pyplot

    ours = "triton" if any(row["candidate"] == "triton" for row in rows) else "torch"
    ops = list(dict.fromkeys(row["op"] for row in rows))
    figure, axes = pyplot.subplots(
        1, len(ops), figsize=(4.2 * len(ops), 4), layout="constrained", squeeze=False
    )
    for axis, op in zip(axes[0], ops, strict=True):
        _ratio_bars(axis, [r for r in rows if (r["op"], r["passes"]) == (op, _BOTH)], ours)
        axis.set(title=f"{op}: time over {ours}'s", xscale="log")
        axis.axvline(1, color="black", linewidth=0.7)
    return _save(figure, rows, file.with_name("ratios.png"))


def _ratio_bars(axis: Any, rows: Sequence[Row], ours: str) -> None:
    sizes = [int(row["values"]) for row in rows if row["sweep"] == "values"]
    names = list(dict.fromkeys(row["candidate"] for row in rows))
    for offset, size in ((-0.2, min(sizes)), (0.2, max(sizes))):
        times = {
            row["candidate"]: float(row["ms_min"])
            for row in rows
            if row["sweep"] == "values" and int(row["values"]) == size
        }
        shown = [name for name in names if name in times]
        axis.barh(
            [names.index(name) + offset for name in shown],
            [times[name] / times[ours] for name in shown], height=0.38, label=f"{size:,} values",
        )  # fmt: skip
    axis.set_yticks(range(len(names)), names, fontsize=7)
    axis.legend(fontsize=7)


def _save(figure: Any, rows: Sequence[Row], path: Path) -> Path:
    row = rows[0]
    figure.suptitle(f"{row['hardware']}, commit {row['commit']}", fontsize=8)
    figure.savefig(path, dpi=110)
    return path
