"""Milliseconds of a training step by model, drawn from the CSV of the training benchmark."""

from pathlib import Path

from ultramem_megatron.tools.pictures import colours, picture
from ultramem_megatron.tools.rows import read

_MADE_BY = "ultramem bench training --out DIR"


def draw(file: Path) -> None:
    """Bars of milliseconds a step, the optimizer's share hatched, beside the CSV.

    Raises UltraMemError for a file that the benchmark did not write.
    """
    rows = read(file, _MADE_BY, ("model", "step_ms", "optimizer_ms", "tokens_per_second"))
    names = [row["model"] for row in rows]
    step, low, high, optimizer = (
        [float(row[column]) for row in rows]
        for column in ("step_ms", "step_ms_p20", "step_ms_p80", "optimizer_ms")
    )
    spread = [
        [s - a for s, a in zip(step, low, strict=True)],
        [b - s for s, b in zip(step, high, strict=True)],
    ]
    with picture(file.with_suffix(".png"), (6, 3.6)) as figure:
        axes = figure.subplots()
        axes.bar(names, step, yerr=spread, color=list(colours(names).values()), capsize=4)
        axes.bar(
            names,
            optimizer,
            color="none",
            edgecolor="white",
            hatch="//",
            label="of it the optimizer",
        )
        for place, row in enumerate(rows):
            axes.annotate(
                f"{float(row['tokens_per_second']):,.0f} tokens/s",
                (place, high[place]),
                ha="center",
                va="bottom",
            )
        axes.set(ylabel="ms per training step, median", ylim=(0, 1.2 * max(high)))
        title = f"equal FLOPs per token, {rows[0]['scale']}; {rows[0]['hardware']}"
        axes.set_title(title, fontsize=9)
        axes.legend(loc="upper left", facecolor="lightgrey")
