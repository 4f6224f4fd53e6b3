"""Heat maps of the key grid, and usage of the tables over training."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ultramem_megatron.memory.retrieval.addresses import grid_counts
from ultramem_megatron.tools.inspect.reads import Reads
from ultramem_megatron.tools.pictures import picture

_USAGE = {"values-used": "values read since the last log, share", "usage-KL": "KL from even, nats"}


def draw_grid(reads: Sequence[Reads], file: Path) -> None:
    """One heat map a layer: row keys down, column keys across, reads as colour."""
    with picture(file, (4.5 * len(reads), 4)) as figure:
        all_axes = figure.subplots(1, len(reads), squeeze=False)
        for axes, layer in zip(all_axes[0], reads, strict=True):
            side = layer.keys_per_side
            counts = grid_counts(layer.grid, side)
            image = axes.imshow(counts, extent=(0, side, side, 0), cmap="magma")
            figure.colorbar(image, ax=axes, label="reads", shrink=0.8)
            axes.set(title=f"layer {layer.layer_number}", xlabel="column key", ylabel="row key")


def draw_usage(lines: Sequence[dict[str, Any]], file: Path) -> None:
    """Share of values used and its divergence from even use, a curve for each layer."""
    with picture(file, (10, 3.5)) as figure:
        panels = figure.subplots(1, len(_USAGE))
        for axes, (metric, label) in zip(panels, _USAGE.items(), strict=True):
            for layer in sorted({line["layer"] for line in lines}):
                points = [
                    (line["step"], line["value"])
                    for line in lines
                    if (line["layer"], line["metric"]) == (layer, metric)
                ]
                axes.plot(*zip(*points, strict=True), label=f"layer {layer}")
            axes.set(xlabel="optimizer step", ylabel=label)
            axes.legend()
