"""Pictures of the experiments: points are seeds, bars and bands one standard deviation of them."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from launch.ablations.results import Results, read, spread, summary
from ultramem_megatron.tools.pictures import colours, picture

_FEW_POINTS = 30
"""Up to here a curve shows where it was measured."""


def show(file: Path) -> None:
    """Draws an experiment beside its CSV and prints its table. Raises UltraMemError without one."""
    results = read(file.stem, file.parent)
    draw(results, file.with_suffix(".png"))
    experiment = results.experiment
    print(f"\n{experiment.name}: {experiment.about}\n\n{summary(results)}")


def draw(results: Results, file: Path) -> None:
    """Draws an experiment as a PNG."""
    drawing, size = _DRAWINGS[results.experiment.name]
    with picture(file, size, dpi=110) as figure:
        drawing(results, figure)


def _draw_models(axes: Any, results: Results, column: str) -> None:
    """Seeds as points, mean and deviation as a bar, one model a line."""
    for place, (model, colour) in enumerate(colours(results.models).items()):
        _draw_spread(axes, list(results.of(model, column).values()), place, colour)
    axes.set_yticks(range(len(results.models)), results.models)
    axes.set_ylim(len(results.models) - 0.5, -0.5)
    axes.grid(axis="x", alpha=0.3)


def _draw_spread(axes: Any, values: Sequence[float], place: float, colour: str) -> None:
    mean, deviation = spread(values)
    axes.errorbar(mean, place, xerr=deviation, fmt="D", color=colour, capsize=4)
    axes.plot(values, [place] * len(values), ".", color="black", alpha=0.5)


def _draw_table(results: Results, figure: Any) -> None:
    """Losses, which seeds shift for all models alike, and what is left of that in differences."""
    losses, differences = figure.subplots(1, 2, sharey=True)
    _draw_models(losses, results, "valid_loss")
    losses.set(xlabel="validation loss, nats per token")
    baseline = results.experiment.baseline
    [paper] = results.experiment.paper.values()
    for place, (model, colour) in enumerate(colours(results.models).items()):
        values = results.differences(model, baseline, "valid_loss")
        _draw_spread(differences, values, place, colour)
        hollow = {"mfc": "white", "color": "black", "label": "" if place else "the paper's"}
        differences.plot(paper[model] - paper[baseline], place, "s", **hollow)
    differences.grid(axis="x", alpha=0.3)
    differences.legend()
    differences.set(xlabel=f"minus {baseline}'s, same seed")
    figure.suptitle(results.experiment.about)


def _draw_recall(results: Results, figure: Any) -> None:
    for axes, (column, label) in zip(
        figure.subplots(1, 2, sharey=True),
        (("recall", "share of the definitions"), ("recall_tokens", "share of their tokens")),
        strict=True,
    ):
        _draw_models(axes, results, column)
        axes.set(xlabel=label)
    figure.get_layout_engine().set(wspace=0.1)  # so that the panels' last and first ticks part
    figure.suptitle("Definitions of the training text, reproduced when given the headword")


def _draw_curves(axes: Any, results: Results, metric: str) -> None:
    """A metric over tokens: mean over seeds, and a band of one deviation."""
    for model, colour in colours(results.models).items():
        points: dict[int, list[float]] = {}
        for line in results.curves:
            if (line["model"], line["metric"]) == (model, metric):
                points.setdefault(int(line["tokens"]), []).append(float(line["value"]))
        _draw_band(axes, points, model, colour)
    axes.set(xlabel="training tokens", ylabel=metric)
    axes.legend()


def _draw_band(axes: Any, points: Mapping[int, list[float]], label: str, colour: str) -> None:
    """Mean over the values at each number of tokens, and a band of one deviation."""
    if not points:
        return
    tokens = sorted(points)
    means, bars = zip(*(spread(points[t]) for t in tokens), strict=True)
    marker = "." if len(tokens) <= _FEW_POINTS else None
    axes.plot(tokens, means, marker=marker, color=colour, label=label)
    low, high = ([m + s * b for m, b in zip(means, bars, strict=True)] for s in (-1, 1))
    axes.fill_between(tokens, low, high, color=colour, alpha=0.2)


def _draw_figure1a(results: Results, figure: Any) -> None:
    axes = figure.subplots()
    _draw_curves(axes, results, "valid_loss")
    axes.set(ylabel="validation loss, nats per token", title="Equal FLOPs, on real text")


def _draw_family(results: Results, figure: Any) -> None:
    losses, curves = figure.subplots(1, 2)
    _draw_models(losses, results, "valid_loss")
    losses.set(xlabel="validation loss, nats per token")
    _draw_curves(curves, results, "valid_loss")
    curves.set(ylabel="validation loss, nats per token")
    figure.suptitle(results.experiment.about)


def _draw_figure10(results: Results, figure: Any) -> None:
    measured = {line["metric"] for line in results.curves}
    panels = {
        "top1_score": "top-1 score, last memory",
        "output_std": "output std, last memory",
        "query_cosine": "cosine between tokens' queries, last memory",
    }
    panels = {metric: label for metric, label in panels.items() if metric in measured}
    perplexity, *others = figure.subplots(1, 1 + len(panels))
    _draw_perplexity_ratio(perplexity, results, results.experiment.baseline)
    for axes, (metric, label) in zip(others, panels.items(), strict=True):
        _draw_curves(axes, results, metric)
        axes.set(ylabel=label)
        axes.get_legend().remove()  # the first panel's serves all
    figure.suptitle(results.experiment.about)


def _draw_start(results: Results, figure: Any) -> None:
    losses, *others = figure.subplots(1, 3)
    _draw_curves(losses, results, "valid_loss")
    losses.set(ylabel="validation loss, nats per token")
    panels = (
        ("query_cosine", "cosine between tokens' queries, last memory"),
        ("output_std", "output std, last memory"),
    )
    for axes, (metric, label) in zip(others, panels, strict=True):
        _draw_curves(axes, results, metric)
        axes.set(ylabel=label)


def _draw_perplexity_ratio(axes: Any, results: Results, baseline: str) -> None:
    """Training perplexity over the baseline's on the same batches; losses alone lie on each other.

    Means over seeds with a band of one deviation.
    """
    losses: dict[tuple[str, str], list[tuple[int, float]]] = {}
    for line in results.curves:
        if line["metric"] == "train_loss":
            points = losses.setdefault((line["model"], line["seed"]), [])
            points.append((int(line["tokens"]), float(line["value"])))
    for model, colour in colours(results.models).items():
        by_token: dict[int, list[float]] = {}
        for seed in {seed for name, seed in losses if name == model and (baseline, seed) in losses}:
            for own, other in zip(losses[model, seed], losses[baseline, seed], strict=True):
                by_token.setdefault(own[0], []).append(math.exp(own[1] - other[1]))
        _draw_band(axes, by_token, model, colour)
    axes.set(xlabel="training tokens", ylabel=f"training perplexity, {baseline}'s = 1")
    axes.legend()


def _draw_figure6b(results: Results, figure: Any) -> None:
    """A line for each ratio of values to values read, in hundreds: keys come in whole numbers."""
    axes = figure.subplots()
    flags = {model.name: model.small for model in results.experiment.models}
    lines: dict[float, list[tuple[float, float, float]]] = {}
    for model in results.models:
        keys, topk, heads = (
            int(flags[model][f"ultramem-{name}"]) for name in ("num-keys", "topk", "heads")
        )
        run = next(run for run in results.runs if run["model"] == model)
        ratio = int(run["sparse_params"]) / int(run["dense_params"])
        mean, deviation = spread(list(results.of(model, "valid_loss").values()))
        lines.setdefault(round(keys**2 / (topk * heads), -2), []).append((ratio, mean, deviation))
        axes.annotate(model, (ratio, mean), xytext=(5, 5), textcoords="offset points", fontsize=8)
    for sparsity, points in lines.items():
        ratios, means, deviations = zip(*points, strict=True)
        label = f"1 value in {sparsity:.0f} is read"
        axes.errorbar(ratios, means, yerr=deviations, fmt="D-", capsize=4, label=label)
    axes.margins(x=0.2)
    axes.legend()
    axes.set(
        xscale="log",
        xlabel="sparse over dense parameters",
        ylabel="validation loss, nats per token",
    )
    ticks = [2**power for power in range(round(math.log2(axes.get_xlim()[1])) + 1)]
    axes.set_xticks(ticks, [str(tick) for tick in ticks], minor=False)
    axes.minorticks_off()


_DRAWINGS: dict[str, tuple[Callable[[Results, Any], None], tuple[float, float]]] = {
    "figure1a": (_draw_figure1a, (6.5, 4.5)),
    "family": (_draw_family, (10, 4)),
    "recall": (_draw_recall, (8, 3)),
    "table2": (_draw_table, (10, 5)),
    "table3": (_draw_table, (10, 5)),
    "figure10": (_draw_figure10, (17, 4)),
    "start": (_draw_start, (13, 4)),
    "moments": (_draw_family, (10, 4)),
    "main_params": (_draw_family, (10, 4)),
    "figure6b": (_draw_figure6b, (6, 4)),
}
