"""Draws the pictures of experiments and benchmarks from their CSVs, and prints experiments' tables.

    python -m launch.plots [NAME ...] [--results DIR]

A point is a seed; a bar is one standard deviation over seeds. Differences are taken between runs of
the same seed, which saw the same text in the same order.
"""

import argparse
import csv
import math
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.ablations.experiments import EXPERIMENTS
from launch.benchmarks import decode_figures, training
from ultramem_megatron.errors import UltraMemError
from ultramem_megatron.tools.paper import figure1c as weight_figures
from ultramem_megatron.tools.paper import figure9

RESULTS = Path(__file__).parent / "results"

PAPER_VALIDATION: Mapping[str, Mapping[str, float]] = {
    "figure1a": {"dense": 2.49, "moe": 2.30, "ultramem": 2.24},
    "table2": {
        "pkm": 2.828, "no-softmax": 2.822, "half-value-dim": 2.800, "share-query": 2.803,
        "split-skip": 2.788, "qk-norm": 2.789, "ive": 2.772, "tdqkr": 2.764, "mcs": 2.761,
        "init": 2.758, "value-lr": 2.736, "ultramem": 2.736,
    },
    "table3": {
        "E=1": 2.789, "E=4": 2.772, "E=9": 2.764, "E=16": 2.762,
        "r=1": 2.772, "r=2": 2.764, "r=3": 2.7636, "r=4": 2.7638,
        "h=1": 2.764, "h=2": 2.761, "h=4": 2.765, "h=8": 2.770,
    },
}  # fmt: skip
"""Validation losses of the paper (tables 1-3), at its sizes and on its data."""


@dataclass(frozen=True)
class Results:
    """An experiment's lines: runs, and points of curves."""

    name: str
    runs: list[dict[str, str]]
    curves: list[dict[str, str]]

    @property
    def models(self) -> list[str]:
        """In the order of the CSV."""
        return list(dict.fromkeys(line["model"] for line in self.runs))

    def of(self, model: str, column: str) -> dict[int, float]:
        """A column by seed."""
        lines = (line for line in self.runs if line["model"] == model)
        return {int(line["seed"]): float(line[column]) for line in lines}

    def differences(self, model: str, baseline: str, column: str) -> list[float]:
        """This model's minus the baseline's, for the seeds that both have."""
        one, other = self.of(model, column), self.of(baseline, column)
        return [one[seed] - other[seed] for seed in sorted(one.keys() & other.keys())]


def read(name: str, folder: Path) -> Results:
    """Reads an experiment's CSVs.

    Raises:
        UltraMemError: there are none.
    """
    lines = []
    for file in (folder / f"{name}.csv", folder / f"{name}_curves.csv"):
        if not file.exists():
            raise UltraMemError(f"no {file}. Make it with: bash launch/ablate_{name}.sh")
        lines.append(_lines(file))
    return Results(name, *lines)


def _lines(file: Path) -> list[dict[str, str]]:
    with file.open(newline="", encoding="utf-8") as opened:
        return list(csv.DictReader(opened))


def spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard deviation (of a sample; NaN for a single value)."""
    deviation = statistics.stdev(values) if len(values) > 1 else float("nan")
    return statistics.fmean(values), deviation


def summary(results: Results) -> str:
    """A table in Markdown: losses, differences from the baseline, and the paper's."""
    if results.name == "recall":
        return _recall_summary(results)
    baseline = EXPERIMENTS[results.name].baseline
    paper = PAPER_VALIDATION.get(results.name, {})
    columns = ["validation loss", f"minus {baseline}'s", "paper: loss", f"minus {baseline}'s"]
    head = ["model", "dense + sparse, M", "FLOPs, M", "seeds", *columns[: 4 if paper else 2]]
    rows = []
    for model in results.models:
        losses = list(results.of(model, "valid_loss").values())
        difference = spread(results.differences(model, baseline, "valid_loss"))
        cells = [model, *_sizes(results, model), str(len(losses)), _with_bar(*spread(losses))]
        cells.append("" if model == baseline else _with_bar(*difference, sign="+"))
        if paper:
            known = paper.get(model)
            cells += ["" if known is None else f"{known:g}"]
            is_other = known is not None and model != baseline
            cells += [f"{known - paper[baseline]:+.3f}" if is_other and known else ""]
        rows.append(cells)
    return _markdown(head, rows)


def _recall_summary(results: Results) -> str:
    """Shares in percent; the loss is of definitions the model was not trained on."""
    shares = ("recall", "recall_tokens", "heldout", "heldout_tokens")
    head = ["model", "reproduced, %", "tokens, %", "not trained on: %", "tokens, %", "loss"]
    rows = []
    for model in results.models:
        cells = [spread([100 * v for v in results.of(model, c).values()]) for c in shares]
        loss = spread(list(results.of(model, "valid_loss").values()))
        rows.append([model, *(f"{m:.1f} ± {d:.1f}" for m, d in cells), _with_bar(*loss)])
    return _markdown(head, rows)


def _markdown(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows])


def _sizes(results: Results, model: str) -> tuple[str, str]:
    line = next(line for line in results.runs if line["model"] == model)
    dense, sparse, flops = (
        int(line[column]) / 1e6 for column in ("dense_params", "sparse_params", "flops_per_token")
    )
    return f"{dense:.3f} + {sparse:.3f}", f"{flops:.3f}"


def _with_bar(mean: float, deviation: float, sign: str = "") -> str:
    bar = "" if deviation != deviation else f" ± {deviation:.3f}"
    return f"{mean:{sign}.3f}{bar}"


def _draw_models(axes: Any, results: Results, column: str) -> None:
    """Seeds as points, mean and deviation as a bar, one model a line."""
    for place, model in enumerate(results.models):
        _draw_spread(axes, list(results.of(model, column).values()), place)
    axes.set_yticks(range(len(results.models)), results.models)
    axes.set_ylim(len(results.models) - 0.5, -0.5)
    axes.grid(axis="x", alpha=0.3)


def _draw_spread(axes: Any, values: Sequence[float], place: float) -> None:
    mean, deviation = spread(values)
    axes.errorbar(mean, place, xerr=deviation, fmt="D", color="tab:blue", capsize=4)
    axes.plot(values, [place] * len(values), ".", color="black", alpha=0.5)


def _draw_table(results: Results, figure: Any) -> None:
    """Losses, which seeds shift for all models alike, and what is left of that in differences."""
    losses, differences = figure.subplots(1, 2, sharey=True)
    _draw_models(losses, results, "valid_loss")
    losses.set(xlabel="validation loss, nats per token")
    baseline = EXPERIMENTS[results.name].baseline
    paper = PAPER_VALIDATION[results.name]
    for place, model in enumerate(results.models):
        values = results.differences(model, baseline, "valid_loss")
        _draw_spread(differences, values, place)
        hollow = {"mfc": "white", "color": "tab:orange", "label": "" if place else "the paper's"}
        differences.plot(paper[model] - paper[baseline], place, "s", **hollow)
    differences.grid(axis="x", alpha=0.3)
    differences.legend()
    differences.set(xlabel=f"minus {baseline}'s, same seed")
    figure.suptitle(EXPERIMENTS[results.name].about)


def _draw_recall(results: Results, figure: Any) -> None:
    for axes, (column, label) in zip(
        figure.subplots(1, 2, sharey=True),
        (("recall", "definitions reproduced, share"), ("recall_tokens", "their tokens, share")),
        strict=True,
    ):
        _draw_models(axes, results, column)
        axes.set(xlabel=label)
    figure.suptitle("Definitions of the training text, given the headword")


def _draw_curves(axes: Any, results: Results, metric: str) -> None:
    """A metric over tokens: mean over seeds, and a band of one deviation."""
    for model in results.models:
        points: dict[int, list[float]] = {}
        for line in results.curves:
            if (line["model"], line["metric"]) == (model, metric):
                points.setdefault(int(line["tokens"]), []).append(float(line["value"]))
        _draw_band(axes, points, model)
    axes.set(xlabel="training tokens", ylabel=metric)
    axes.legend()


def _draw_band(axes: Any, points: Mapping[int, list[float]], label: str) -> None:
    """Mean over the values at each number of tokens, and a band of one deviation."""
    if not points:
        return
    tokens = sorted(points)
    means, bars = zip(*(spread(points[t]) for t in tokens), strict=True)
    marker = "." if len(tokens) <= _FEW_POINTS else None
    (drawn,) = axes.plot(tokens, means, marker=marker, label=label)
    low, high = ([m + s * b for m, b in zip(means, bars, strict=True)] for s in (-1, 1))
    axes.fill_between(tokens, low, high, color=drawn.get_color(), alpha=0.2)


def _draw_figure1a(results: Results, figure: Any) -> None:
    axes = figure.subplots()
    _draw_curves(axes, results, "valid_loss")
    axes.set(ylabel="validation loss, nats per token", title="Equal FLOPs, on real text")


def _draw_figure10(results: Results, figure: Any) -> None:
    perplexity, *others = figure.subplots(1, 3)
    _draw_perplexity_ratio(perplexity, results, EXPERIMENTS[results.name].baseline)
    panels = (("top1_score", "top-1 score, last memory"), ("output_std", "output std, last memory"))
    for axes, (metric, label) in zip(others, panels, strict=True):
        _draw_curves(axes, results, metric)
        axes.set(ylabel=label)


def _draw_perplexity_ratio(axes: Any, results: Results, baseline: str) -> None:
    """Training perplexity over the baseline's on the same batches; losses alone lie on each other.

    Means over _WINDOW steps, then over seeds with a band of one deviation.
    """
    losses: dict[tuple[str, str], list[tuple[int, float]]] = {}
    for line in results.curves:
        if line["metric"] == "train_loss":
            points = losses.setdefault((line["model"], line["seed"]), [])
            points.append((int(line["tokens"]), float(line["value"])))
    for model in results.models:
        by_token: dict[int, list[float]] = {}
        for seed in {seed for name, seed in losses if name == model and (baseline, seed) in losses}:
            pairs = list(zip(losses[model, seed], losses[baseline, seed], strict=True))
            for start in range(0, len(pairs), _WINDOW):
                window = pairs[start : start + _WINDOW]
                gap = statistics.fmean(own[1] - other[1] for own, other in window)
                by_token.setdefault(window[-1][0][0], []).append(math.exp(gap))
        _draw_band(axes, by_token, model)
    axes.set(xlabel="training tokens", ylabel=f"training perplexity, {baseline}'s = 1")
    axes.legend()


def _draw_figure6b(results: Results, figure: Any) -> None:
    """A line for each ratio of values to values read, in hundreds: keys come in whole numbers."""
    axes = figure.subplots()
    flags = {model.name: model.small for model in EXPERIMENTS[results.name].models}
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
    axes.set(xscale="log", xlabel="sparse over dense parameters",
             ylabel="validation loss, nats per token")  # fmt: skip
    ticks = [2**power for power in range(round(math.log2(axes.get_xlim()[1])) + 1)]
    axes.set_xticks(ticks, [str(tick) for tick in ticks], minor=False)
    axes.minorticks_off()


_DRAWINGS: dict[str, tuple[Callable[[Results, Any], None], tuple[float, float]]] = {
    "figure1a": (_draw_figure1a, (6.5, 4.5)),
    "recall": (_draw_recall, (8, 3)),
    "table2": (_draw_table, (10, 5)),
    "table3": (_draw_table, (10, 5)),
    "figure10": (_draw_figure10, (13, 4)),
    "figure6b": (_draw_figure6b, (6, 4)),
}


_OTHERS: dict[str, Callable[[Path], None]] = {
    "decode": decode_figures.draw,
    "training": training.plot,
    "figure1c": lambda file: weight_figures.draw(file.with_suffix(".png"), _lines(file)),
    "figure9": lambda file: figure9.draw(file.with_suffix(".png"), _lines(file)),
}
"""Draw beside the CSV: of measurements, which say on which machine, and of what is computed."""


_WINDOW = 10
"""Steps whose training losses are averaged."""

_FEW_POINTS = 30
"""Up to here a curve shows where it was measured."""


def draw(results: Results, file: Path) -> None:
    """Draws an experiment as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    drawing, size = _DRAWINGS[results.name]
    figure = pyplot.figure(figsize=size, layout="constrained")
    drawing(results, figure)
    figure.savefig(file, dpi=110)
    pyplot.close(figure)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m launch.plots", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="default: those with a CSV")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of CSVs and pictures")
    args = parser.parse_args(argv)
    known = [*EXPERIMENTS, *_OTHERS]
    names = args.names or [name for name in known if (args.results / f"{name}.csv").exists()]
    try:
        if unknown := [name for name in names if name not in known]:
            raise UltraMemError(f"{unknown[0]!r} is unknown. Known: {', '.join(known)}.")
        for name in names:
            if name in _OTHERS:
                _OTHERS[name](args.results / f"{name}.csv")
                continue
            results = read(name, args.results)
            draw(results, args.results / f"{name}.png")
            print(f"\n{name}: {EXPERIMENTS[name].about}\n\n{summary(results)}")
    except UltraMemError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
