"""Records of runs as tidy rows: one for a run, and one for each point of a curve."""

from collections.abc import Iterable
from statistics import fmean
from typing import Any

from launch.ablations.models import Sizes

VALIDATION = "lm loss validation"
WINDOW = 10
"""Steps whose training losses are averaged."""
_LAST_MEMORY = {
    "ultramem/top-1-score": "top1_score",
    "ultramem/output-std": "output_std",
    "ultramem/query-cosine": "query_cosine",
}


def run_line(experiment: str, model: str, sizes: Sizes, record: dict[str, Any]) -> dict[str, Any]:
    """What one run came to; losses in nats per token."""
    scalars = record["scalars"]
    return {
        "experiment": experiment,
        "model": model,
        "seed": record["seed"],
        "steps": record["steps"],
        "dense_params": sizes.dense_params,
        "sparse_params": sizes.sparse_params,
        "flops_per_token": sizes.flops_per_token,
        "train_loss": round(scalars["lm loss"][-1][1], 5),
        "valid_loss": round(scalars[VALIDATION][-1][1], 5),
        **{name: round(value, 5) for name, value in record.get("measured", {}).items()},
        "seconds": record["seconds"],
        "date": record["date"],
        "commit": record["commit"],
        "torch": record["torch"],
    }


def curve_lines(
    experiment: str, model: str, tokens_per_step: int, record: dict[str, Any]
) -> Iterable[dict[str, Any]]:
    """Losses over training; top-1 score, output std and query cosine of the last memory.

    Training losses are means over every WINDOW steps, at the last of them.
    """
    for name, points in _curves(record["scalars"]).items():
        for step, value in points:
            yield {
                "experiment": experiment,
                "model": model,
                "seed": record["seed"],
                "step": step,
                "tokens": step * tokens_per_step,
                "metric": name,
                "value": round(value, 5),
            }


def _curves(scalars: dict[str, list[tuple[int, float]]]) -> dict[str, list[tuple[int, float]]]:
    curves = {"valid_loss": scalars[VALIDATION], "train_loss": _means(scalars["lm loss"])}
    for prefix, name in _LAST_MEMORY.items():
        tags = sorted(tag for tag in scalars if tag.startswith(prefix + "/"))
        if tags:
            curves[name] = scalars[tags[-1]]
    return curves


def _means(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    windows = (points[start : start + WINDOW] for start in range(0, len(points), WINDOW))
    return [(window[-1][0], fmean(value for _, value in window)) for window in windows]
