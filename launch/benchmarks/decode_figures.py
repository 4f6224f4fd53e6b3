"""The paper's figures 1b, 1c, 6c and 7, drawn from the CSV of the decode benchmark."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from launch.benchmarks.decode_models import BARS
from ultramem_megatron.tools.pictures import colours, picture
from ultramem_megatron.tools.rows import read

Row = dict[str, str]

_COLOURS = colours(BARS)
_NAMES = {"dense": "dense", "moe": "MoE", "ultramem": "UltraMem"}
"""Of what reads weights: how products of experts are made changes nothing there."""
_BAR_BATCHES = (16, 64, 256, 1024)
_MADE_BY = "ultramem bench decode --out DIR"


def draw(file: Path) -> None:
    """Write decode_figure1b.png, and the same for 1c, 6c and 7, beside the CSV.

    Raises UltraMemError for a file that the benchmark did not write.
    """
    rows = read(file, _MADE_BY, ("kind", "batch", "median_ms", "bytes_counted"))
    over_batches = _first_models(rows)
    _figure(file, "1b", [_latency], over_batches)
    _figure(file, "1c", [_bars], over_batches)
    _figure(file, "7", [_latency, _access], over_batches)
    if len(rows) > len(over_batches):
        _figure(file, "6c", [_over_sparse_parameters], rows)


def draw_graphs(file: Path) -> None:
    """Write decode_graphs.png beside the CSV: latency, a panel for each number of KV heads.

    Its rows are of a script, so without what the benchmark counts. Raises UltraMemError.
    """
    rows = read(file, "the H200 session of 2026-11-26", ("kind", "batch", "median_ms", "flags"))
    panels: dict[str, list[Row]] = {}
    for row in rows:
        heads = "2 KV groups" if "--num-query-groups 2" in row["flags"] else "16 KV heads"
        panels.setdefault(heads, []).append(row)
    shown = rows[0]
    with picture(file.with_suffix(".png"), (5.5 * len(panels), 4)) as figure:
        axes = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
        for axis, (heads, own) in zip(axes, panels.items(), strict=True):
            _latency(axis, own)
            axis.set(title=heads)
        figure.suptitle(
            f"{shown['hardware']}, 1.6B, {shown['dtype']}, KV cache {shown['cache_length']}, "
            f"{shown['date']}\nattention: {shown['attention']}",
            fontsize=9,
        )


def _first_models(rows: Iterable[Row]) -> list[Row]:
    """Rows of the first model of each kind: the trio of equal FLOPs."""
    first: dict[str, str] = {}
    return [row for row in rows if row["model"] == first.setdefault(row["kind"], row["model"])]


def _figure(
    file: Path, name: str, panels: Sequence[Callable[[Any, list[Row]], None]], rows: list[Row]
) -> None:
    shown = rows[0]
    attention = shown.get("attention", "Megatron's static path, all keys rotated at every step")
    title = (
        f"{shown['hardware']}, {shown['dtype']}, KV cache {shown['cache_length']}, "
        f"{shown['date']}\nattention: {attention}"
    )
    to = file.with_name(f"decode_figure{name}.png")
    with picture(to, (5.5 * len(panels), 4)) as figure:
        axes = figure.subplots(1, len(panels), squeeze=False)
        for axis, panel in zip(axes[0], panels, strict=True):
            panel(axis, rows)
        figure.suptitle(title, fontsize=9)


def _latency(axis: Any, rows: list[Row]) -> None:
    _lines(axis, rows, lambda row: float(row["median_ms"]))
    axis.set(ylabel="one decode step, ms", title="latency")


def _access(axis: Any, rows: list[Row]) -> None:
    shown = [row for row in rows if row["kind"] in _NAMES]
    _lines(axis, shown, lambda row: int(row["bytes_counted"]) / 1e9)
    for kind in _NAMES:
        own = [row for row in rows if row["kind"] == kind]
        axis.plot(
            [int(row["batch"]) for row in own],
            [int(row["bytes_modelled"]) / 1e9 for row in own],
            ":",
            color=_COLOURS[kind],
        )
    axis.set(ylabel="weights read, GB", title="weight access: counted, and the model (dotted)")


def _lines(axis: Any, rows: list[Row], value: Callable[[Row], float]) -> None:
    for kind, own in _by_kind(rows):
        batches = [int(row["batch"]) for row in own]
        label = BARS[kind] + _graphed(own)
        axis.plot(batches, [value(row) for row in own], "o-", color=_COLOURS[kind], label=label)
    axis.set(xlabel="batch", xscale="log", yscale="log")
    axis.grid(alpha=0.3)
    axis.margins(y=0.25)  # room for the legend
    axis.legend(loc="upper left", fontsize="small")


def _by_kind(rows: list[Row]) -> Iterator[tuple[str, list[Row]]]:
    """Rows of each kind that has any: older files have no grouped products."""
    for kind in BARS:
        own = [row for row in rows if row["kind"] == kind]
        if own:
            yield kind, own


def _graphed(rows: list[Row]) -> str:
    return ", as a CUDA graph" if rows and rows[0].get("cuda_graph") == "1" else ""


def _bars(axis: Any, rows: list[Row]) -> None:
    """Weights read, and how many times more MoE reads than UltraMem."""
    batches = sorted({int(row["batch"]) for row in rows})
    shown = [batch for batch in _BAR_BATCHES if batch in batches] or batches
    read = {(row["kind"], int(row["batch"])): int(row["bytes_counted"]) / 1e9 for row in rows}
    width = 0.27
    for place, kind in enumerate(_NAMES):
        where = [i + (place - 1) * width for i in range(len(shown))]
        axis.bar(
            where,
            [read.get((kind, batch), 0) for batch in shown],
            width,
            color=_COLOURS[kind],
            label=_NAMES[kind],
        )
    for i, batch in enumerate(shown):
        if {("moe", batch), ("ultramem", batch)} <= read.keys():
            ratio = read["moe", batch] / read["ultramem", batch]
            axis.text(i, read["moe", batch], f"{ratio:.1f}x", ha="center", va="bottom")
    axis.set_xticks(range(len(shown)), [str(batch) for batch in shown])
    axis.set(xlabel="batch", ylabel="weights read, GB", title="weight access: MoE over UltraMem")
    axis.legend()


def _over_sparse_parameters(axis: Any, rows: list[Row]) -> None:
    """Latency at one batch over parameters, in multiples of the dense model's."""
    several = {row["model"] for row in rows} - {row["model"] for row in _first_models(rows)}
    batch = next(row["batch"] for row in rows if row["model"] in several)
    at_batch = [row for row in rows if row["batch"] == batch]
    dense = next(int(row["parameters"]) for row in rows if row["kind"] == "dense")
    for kind, own in _by_kind(at_batch):
        points = sorted((int(row["parameters"]) / dense, float(row["median_ms"])) for row in own)
        label = BARS[kind] + _graphed(own)
        axis.plot(*zip(*points, strict=True), "o-", color=_COLOURS[kind], label=label)
    axis.set(
        xlabel="parameters, in multiples of the dense model's",
        ylabel="one decode step, ms",
        title=f"batch {batch}",
        ylim=(0, None),
    )
    axis.legend()
