"""Plots of the benchmark's CSV: latency over values and over tokens, and speed ratios as bars."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ultramem_megatron.tools.pictures import picture
from ultramem_megatron.tools.rows import read

Row = dict[str, str]
_BOTH = "forward+backward"
_MADE_BY = "ultramem bench kernels run --out DIR"
_NEEDED = ("sweep", "op", "candidate", "passes", "ms_min", "values", "hardware", "commit")


def plot(file: Path) -> list[Path]:
    """Draw beside the CSV; returns the pictures. Raises UltraMemError for another CSV."""
    rows = read(file, _MADE_BY, _NEEDED)
    drawn = [
        _lines(rows, file, sweep, axis)
        for sweep, axis in (("values", "values in the table"), ("tokens", "tokens"))
        if any(row["sweep"] == sweep for row in rows)
    ]
    return [*drawn, _bars(rows, file)]


def _lines(rows: Sequence[Row], file: Path, sweep: str, label: str) -> Path:
    """Milliseconds of lookup and layer, both passes, over one size."""
    to = file.with_name(f"latency_over_{sweep}.png")
    with picture(to, (11, 4.5), dpi=110) as figure:
        for axes, op in zip(figure.subplots(1, 2), ("lookup", "layer"), strict=True):
            chosen = [r for r in rows if (r["sweep"], r["op"], r["passes"]) == (sweep, op, _BOTH)]
            _latencies(axes, chosen, sweep)
            axes.set(xscale="log", yscale="log", xlabel=label, ylabel="ms", title=f"{op}, {_BOTH}")
        _title(figure, rows)
    return to


def _latencies(axes: Any, rows: Sequence[Row], sweep: str) -> None:
    for candidate in dict.fromkeys(row["candidate"] for row in rows):
        own = [row for row in rows if row["candidate"] == candidate]
        points = sorted((int(row[sweep]), float(row["ms_min"])) for row in own)
        axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=candidate)
    axes.legend(fontsize=7)


def _bars(rows: Sequence[Row], file: Path) -> Path:
    """Time of every candidate over ours, at the smallest and the largest table."""
    ours = "triton" if any(row["candidate"] == "triton" for row in rows) else "torch"
    ops = list(dict.fromkeys(row["op"] for row in rows))
    to = file.with_name("ratios.png")
    with picture(to, (4.2 * len(ops), 4), dpi=110) as figure:
        for axes, op in zip(figure.subplots(1, len(ops), squeeze=False)[0], ops, strict=True):
            _ratio_bars(axes, [r for r in rows if (r["op"], r["passes"]) == (op, _BOTH)], ours)
            axes.set(title=f"{op}: time over {ours}'s", xscale="log")
            axes.axvline(1, color="black", linewidth=0.7)
        _title(figure, rows)
    return to


def _title(figure: Any, rows: Sequence[Row]) -> None:
    figure.suptitle(f"{rows[0]['hardware']}, commit {rows[0]['commit']}", fontsize=8)


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
            [times[name] / times[ours] for name in shown],
            height=0.38,
            label=f"{size:,} values",
        )
    axis.set_yticks(range(len(names)), names, fontsize=7)
    axis.legend(fontsize=7)
