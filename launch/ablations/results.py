"""What an experiment came to: its CSVs, mean and deviation over seeds, a table in Markdown.

Differences are taken between runs of the same seed, which saw the same text in the same order.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from launch.ablations.experiments import Experiment, find_experiment
from ultramem_megatron.tools import rows

_RESAMPLES = 10_000


@dataclass(frozen=True)
class Results:
    """An experiment's lines: runs, and points of curves."""

    experiment: Experiment
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
    """Reads the CSVs of the experiment `name`.

    Raises:
        UltraMemError: there are none, or they hold something else.
    """
    made_by = f"bash launch/ablate_{name}.sh"
    runs = rows.read(folder / f"{name}.csv", made_by, ("model", "seed", "valid_loss"))
    curves = rows.read(folder / f"{name}_curves.csv", made_by, ("model", "tokens", "metric"))
    return Results(find_experiment(name), runs, curves)


def spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard deviation (of a sample; NaN for a single value)."""
    deviation = statistics.stdev(values) if len(values) > 1 else float("nan")
    return statistics.fmean(values), deviation


def interval(values: Sequence[float]) -> tuple[float, float]:
    """95 % of the means of samples drawn from these with repetition (percentile bootstrap).

    The same for the same values. Of few seeds it is too narrow: it knows no others. NaN below 3.
    """
    if len(values) < 3:
        return math.nan, math.nan
    drawn = np.random.default_rng(0).choice(values, (_RESAMPLES, len(values)))
    low, high = np.quantile(drawn.mean(1), (0.025, 0.975))
    return float(low), float(high)


def summary(results: Results) -> str:
    """A table in Markdown: losses, differences from the baseline, and the paper's."""
    if results.experiment.name == "recall":
        return _recall_summary(results)
    experiment = results.experiment
    papers = [f"the paper's {size}" for size in experiment.paper]
    head = ["model", "dense + sparse, M", "FLOPs, M", "seeds", "validation loss"]
    rivals = (experiment.baseline, *experiment.rivals)
    for rival in rivals:
        head += [f"minus {rival}'s", *papers]
    if experiment.cumulative:
        head += ["minus the row before's", *papers]
    rows = []
    for model, before in zip(results.models, [None, *results.models], strict=False):
        losses = list(results.of(model, "valid_loss").values())
        cells = [model, *_sizes(results, model), str(len(losses)), _with_bar(*spread(losses))]
        for rival in rivals:
            cells += _compared(results, model, rival)
        if experiment.cumulative:
            cells += _compared(results, model, before)
        rows.append(cells)
    return markdown(head, rows)


def _compared(results: Results, model: str, other: str | None) -> list[str]:
    """The difference of two models' losses, and what it is in the paper, size by size."""
    papers = results.experiment.paper.values()
    if other is None or other == model:
        return [""] * (1 + len(papers))
    cells = [_difference(results.differences(model, other, "valid_loss"))]
    for losses in papers:
        known = model in losses and other in losses
        cells.append(f"{losses[model] - losses[other]:+.3f}" if known else "")
    return cells


def _difference(values: Sequence[float]) -> str:
    """Mean and interval, without a sign where the interval does not settle it."""
    low, high = interval(values)
    if math.isnan(low):
        return " and ".join(f"{value:+.3f}" for value in values)
    if low <= 0 <= high:
        return f"not resolved: {low:+.3f} to {high:+.3f}"
    return f"{statistics.fmean(values):+.3f} ({low:+.3f} to {high:+.3f})"


def _recall_summary(results: Results) -> str:
    """Shares in percent; the loss is of definitions the model was not trained on."""
    shares = ("recall", "recall_tokens", "heldout", "heldout_tokens")
    head = ["model", "reproduced, %", "tokens, %", "not trained on: %", "tokens, %", "loss"]
    rows = []
    for model in results.models:
        cells = [spread([100 * v for v in results.of(model, c).values()]) for c in shares]
        loss = spread(list(results.of(model, "valid_loss").values()))
        rows.append([model, *(f"{m:.1f} ± {d:.1f}" for m, d in cells), _with_bar(*loss)])
    return markdown(head, rows)


def markdown(head: list[str], rows: list[list[str]]) -> str:
    """A table."""
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
