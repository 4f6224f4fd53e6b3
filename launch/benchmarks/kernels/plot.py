"""Plots of the benchmark's CSV: latency over values and over tokens, and others' time over ours."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ultramem_megatron.tools.pictures import picture
from ultramem_megatron.tools.rows import read

Row = dict[str, str]
_BOTH = "forward+backward"
_MADE_BY = "ultramem bench kernels run --out DIR"
_NEEDED = ("sweep", "op", "candidate", "passes", "ms_min", "values", "hardware", "commit")
_MOE = "Megatron MoE, top-2 of 32, equal FLOPs"
_SHOWN = {
    "triton": ("this project, Triton", "tab:blue"),
    "native": ("this project, C++", "tab:blue"),
    "torch": ("this project, PyTorch", "tab:pink"),
    "plain": ("plain PyTorch", "tab:purple"),
    "reference": ("this project's reference", "tab:brown"),
    "embedding_bag, dense gradient": ("embedding_bag, dense gradient", "tab:olive"),
    "embedding_bag, sparse gradient": ("embedding_bag, sparse gradient", "tab:cyan"),
    "dense MLP, equal FLOPs": ("dense MLP, equal FLOPs", "tab:grey"),
    _MOE: (_MOE, "tab:orange"),
    "product-key-memory": ("package product-key-memory", "tab:green"),
    "ultra-mem": ("package ultra-mem", "tab:red"),
}
"""Candidate -> its name and colour in all pictures, ours first."""
_OTHERS = "black"
_SHAPE = {
    "tokens": "{} tokens",
    "values": "{} values",
    "hidden": "width {}",
    "topk": "m {}",
    "heads": "{} heads",
    "value_dim": "Dv {}",
    "expansion": "E {}",
    "dtype": "{}",
}
_TICKS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100)


def plot(file: Path) -> list[Path]:
    """Draw beside the CSV; returns the pictures. Raises UltraMemError for another CSV."""
    rows = read(file, _MADE_BY, _NEEDED)
    drawn = [
        _lines(rows, file, sweep, axis)
        for sweep, axis in (("values", "values in the table"), ("tokens", "tokens"))
        if any(row["sweep"] == sweep for row in rows)
    ]
    return [*drawn, _ratios(rows, file)]


def _lines(rows: Sequence[Row], file: Path, sweep: str, label: str) -> Path:
    """Milliseconds of lookup and layer, both passes, over one size."""
    to = file.with_name(f"latency_over_{sweep}.png")
    swept = [row for row in rows if (row["sweep"], row["passes"]) == (sweep, _BOTH)]
    with picture(to, (11, 5.5), dpi=110) as figure:
        for axes, op in zip(figure.subplots(1, 2), ("lookup", "layer"), strict=True):
            _latencies(axes, [row for row in swept if row["op"] == op], sweep)
            axes.set(xscale="log", yscale="log", xlabel=label, ylabel="ms", title=f"{op}, {_BOTH}")
        _legend(figure)
        _title(figure, swept)
    return to


def _latencies(axes: Any, rows: Sequence[Row], sweep: str) -> None:
    for candidate in _in_order(row["candidate"] for row in rows):
        own = [row for row in rows if row["candidate"] == candidate]
        points = sorted((int(row[sweep]), float(row["ms_min"])) for row in own)
        name, colour = _SHOWN.get(candidate, (candidate, _OTHERS))
        axes.plot(*zip(*points, strict=True), "o-", markersize=3, color=colour, label=name)


def _ratios(rows: Sequence[Row], file: Path) -> Path:
    """Time of every other candidate over ours, at the smallest and the largest table."""
    there = {row["candidate"] for row in rows}
    ours = next(name for name in ("triton", "native", "torch") if name in there)
    swept = [row for row in rows if (row["sweep"], row["passes"]) == ("values", _BOTH)]
    ops = list(dict.fromkeys(row["op"] for row in rows))
    to = file.with_name("ratios.png")
    with picture(to, (10, 1.7 * len(ops) + 1.2), dpi=110) as figure:
        heights = [len({r["candidate"] for r in swept if r["op"] == op}) for op in ops]
        panels = figure.subplots(len(ops), 1, sharex=True, squeeze=False, height_ratios=heights)
        for axes, op in zip(panels[:, 0], ops, strict=True):
            _ratio_dots(axes, [row for row in swept if row["op"] == op], ours)
            axes.set_title(op, fontsize=9, loc="left")
        panels[-1, 0].set(xlabel=f"time over that of {_SHOWN[ours][0]} (right of the line: slower)")
        _title(figure, swept)
    return to


def _ratio_dots(axes: Any, rows: Sequence[Row], ours: str) -> None:
    """Hollow at the smallest table, full at the largest; bars would need a zero."""
    sizes = sorted({int(row["values"]) for row in rows})
    times = {(row["candidate"], int(row["values"])): float(row["ms_min"]) for row in rows}
    names = [name for name in _in_order(row["candidate"] for row in rows) if name != ours]
    for size, filled in ((sizes[0], False), (sizes[-1], True)):
        shown = [name for name in names if (name, size) in times and (ours, size) in times]
        axes.scatter(
            [times[name, size] / times[ours, size] for name in shown],
            [names.index(name) for name in shown],
            facecolor="tab:blue" if filled else "white",
            edgecolor="tab:blue",
            label=f"{size:,} values",
            zorder=2,
        )
    axes.axvline(1, color="black", linewidth=0.7)
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    ticks = [tick for tick in _TICKS if low <= tick <= high]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.grid(axis="x", alpha=0.3)
    axes.set_yticks(range(len(names)), [_SHOWN.get(n, (n, ""))[0] for n in names], fontsize=8)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))


def _in_order(candidates: Iterable[str]) -> list[str]:
    order = list(_SHOWN)
    found = dict.fromkeys(candidates)
    return sorted(found, key=lambda name: order.index(name) if name in order else len(order))


def _legend(figure: Any) -> None:
    """Of all panels, below them."""
    found: dict[str, Any] = {}
    for axes in figure.axes:
        found |= dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    figure.legend(found.values(), found, loc="outside lower center", ncols=3, fontsize=8)


def _title(figure: Any, rows: Sequence[Row]) -> None:
    """What was the same for all rows, and on what it was measured."""
    same = {name: {row[name] for row in rows} for name in _SHAPE}
    shape = [text.format(*same[name]) for name, text in _SHAPE.items() if len(same[name]) == 1]
    first = rows[0]
    taken = f"{first['hardware']}, torch {first['torch']}, commit {first['commit']}"
    figure.suptitle(f"{', '.join(shape)}\n{taken}", fontsize=8)
