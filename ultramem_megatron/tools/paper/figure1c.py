"""Figures 1c and 7b: weight bytes that a decode step reads, over batch size."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

_MODELS = {"Dense": "dense-1.6b", "MoE": "moe-1.6b-2in34", "UltraMem": "ultramem-1.6b-x12"}


def weight_access() -> list[dict[str, int | str]]:
    """One row per model and batch size; bytes in bf16, by the paper's count (section 4)."""
    from ultramem_megatron.tools.plan.sizes import (  # Megatron
        BATCHES,
        preset_sizes,
        weight_bytes_read,
    )

    return [
        {
            "model": name, "preset": preset, "batch": batch,
            "weight_bytes_read": weight_bytes_read(preset_sizes(preset).reads, batch),
        }
        for name, preset in _MODELS.items()
        for batch in BATCHES
    ]  # fmt: skip


def write_csv(path: Path) -> None:
    """The numbers of the figure."""
    rows = weight_access()
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def draw(path: Path, rows: Sequence[Mapping[str, int | str]]) -> None:
    """Bars in GB over batch size; above MoE's how many times UltraMem's bytes they are."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    found = {(row["model"], int(row["batch"])): float(row["weight_bytes_read"]) for row in rows}
    batches = sorted({batch for _, batch in found})
    figure, axes = pyplot.subplots(figsize=(7.5, 4), layout="constrained")
    for index, name in enumerate(_MODELS):
        places = [place + 0.27 * (index - 1) for place in range(len(batches))]
        axes.bar(places, [found[name, batch] / 1e9 for batch in batches], 0.25, label=name)
    for place, batch in enumerate(batches):
        ratio = found["MoE", batch] / found["UltraMem", batch]
        axes.annotate(f"{ratio:.1f}x", (place, found["MoE", batch] / 1e9), ha="center", va="bottom")
    axes.set_xticks(range(len(batches)), [str(batch) for batch in batches])
    axes.set(xlabel="batch size", ylabel="weights read per decode step, GB", ylim=(0, 47),
             title="1.6B models, bf16: MLP, expert and value weights (computed)")  # fmt: skip
    axes.legend(loc="upper left")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
