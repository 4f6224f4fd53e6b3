"""Figures 1c and 7b: weight bytes that a decode step reads, over batch size."""

from collections.abc import Sequence
from pathlib import Path

from ultramem_megatron.tools.pictures import colours, picture
from ultramem_megatron.tools.rows import Row

_MODELS = {"Dense": "dense-1.6b", "MoE": "moe-1.6b-2in34", "UltraMem": "ultramem-1.6b-x12"}


def points() -> list[Row]:
    """One row per model and batch size; bytes in bf16, by the paper's count (section 4)."""
    from ultramem_megatron.tools.plan.sizes import (  # Megatron
        BATCHES,
        preset_sizes,
        weight_bytes_read,
    )

    return [
        {
            "model": name,
            "preset": preset,
            "batch": batch,
            "weight_bytes_read": weight_bytes_read(preset_sizes(preset).reads, batch),
        }
        for name, preset in _MODELS.items()
        for batch in BATCHES
    ]


def draw(file: Path, rows: Sequence[Row]) -> None:
    """Bars in GB over batch size; above MoE's how many times UltraMem's bytes they are."""
    found = {(row["model"], int(row["batch"])): float(row["weight_bytes_read"]) for row in rows}
    batches = sorted({batch for _, batch in found})
    with picture(file, (7.5, 4)) as figure:
        axes = figure.subplots()
        for index, (name, colour) in enumerate(colours(_MODELS).items()):
            places = [place + 0.27 * (index - 1) for place in range(len(batches))]
            heights = [found[name, batch] / 1e9 for batch in batches]
            axes.bar(places, heights, 0.25, color=colour, label=name)
        for place, batch in enumerate(batches):
            ratio = found["MoE", batch] / found["UltraMem", batch]
            at = place, found["MoE", batch] / 1e9
            axes.annotate(f"{ratio:.1f}x", at, ha="center", va="bottom")
        axes.set_xticks(range(len(batches)), [str(batch) for batch in batches])
        axes.set(
            xlabel="batch size",
            ylabel="weights read per decode step, GB",
            ylim=(0, 47),
            title="1.6B models, bf16: MLP, expert and value weights (computed)",
        )
        axes.legend(loc="upper left")
