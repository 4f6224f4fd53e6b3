"""What an experiment came to: its CSVs, mean and deviation over seeds, a table in Markdown.

Differences are taken between runs of the same seed, which saw the same text in the same order.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from launch.ablations.experiments import Experiment, find_experiment
from ultramem_megatron.tools import rows


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


def summary(results: Results) -> str:
    """A table in Markdown: losses, differences from the baseline, and the paper's."""
    if results.experiment.name == "recall":
        return _recall_summary(results)
    baseline, paper = results.experiment.baseline, results.experiment.printed_losses
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
