"""What each way to teach a model costs at equal learning: a table in Markdown, a picture."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launch.ablations.results import markdown, spread
from ultramem_megatron.tools import rows
from ultramem_megatron.tools.pictures import colours, picture

LEARNT = 2.5
"""Loss on the new definitions, nats, at which forgetting is compared."""
_FORGOTTEN = ("old_loss", "old_recall", "heldout_loss")
_MADE_BY = "bash launch/ablate_tuning.sh"
Line = dict[str, str]
Course = list[dict[str, float]]
"""Of one method, rate and seed: what was seen, step by step."""


def show(file: Path) -> None:
    """Draws the picture beside the CSV and prints the table. Raises UltraMemError without one."""
    lines = rows.read(file, _MADE_BY, ("method", "rate", "seed", "step", "new_loss"))
    with picture(file.with_suffix(".png"), (11, 4.5), dpi=110) as figure:
        _draw(lines, figure)
    print(f"\nforgotten when the new definitions' loss is {LEARNT}:\n\n{summary(lines)}")


def summary(lines: Sequence[Line]) -> str:
    """At equal learning, and each method's rate that forgets least there; mean over seeds."""
    head = ["method", "rate", "steps", "old definitions' loss", "reproduced, %", "held-out loss"]
    methods = _methods(lines)
    start = [course[0] for course in courses(lines, methods[0], _rates(lines, methods[0])[0])]
    cells = [["before", "", "0", *_shown(start)]]
    for method in methods:
        best = best_rate(lines, method)
        if best is None:
            cells.append([method, "", "", *["not learnt so far"] * len(_FORGOTTEN)])
            continue
        rate, reached = best
        steps = sum(point["step"] for point in reached) / len(reached)
        cells.append([method, f"{rate:g}", f"{steps:.0f}", *_shown(reached)])
    return markdown(head, cells)


def best_rate(lines: Sequence[Line], method: str) -> tuple[float, Course] | None:
    """The rate at which the old loss rises least, of those that learn it with every seed."""
    found = []
    for rate in _rates(lines, method):
        reached = [at_equal_learning(course) for course in courses(lines, method, rate)]
        points = [point for point in reached if point is not None]
        if len(points) == len(reached):
            found.append((sum(point["old_loss"] for point in points), rate, points))
    if not found:
        return None
    _, rate, points = min(found, key=lambda one: one[:2])
    return rate, points


def courses(lines: Sequence[Line], method: str, rate: float) -> list[Course]:
    """One for each seed."""
    own = [line for line in lines if line["method"] == method and float(line["rate"]) == rate]
    seeds = dict.fromkeys(line["seed"] for line in own)
    return [[_numbers(line) for line in own if line["seed"] == seed] for seed in seeds]


def at_equal_learning(course: Course) -> dict[str, float] | None:
    """Where a course first comes down to LEARNT, linear between what was seen; None: nowhere."""
    for before, after in itertools.pairwise(course):
        if before["new_loss"] > LEARNT >= after["new_loss"]:
            share = (before["new_loss"] - LEARNT) / (before["new_loss"] - after["new_loss"])
            return {key: before[key] + share * (after[key] - before[key]) for key in before}
    return None


def _draw(lines: Sequence[Line], figure: Any) -> None:
    """Forgetting over learning: a course for each rate, its mean over seeds."""
    panels = (("old_loss", "loss of old definitions"), ("old_recall", "old definitions reproduced"))
    for axes, (column, label) in zip(figure.subplots(1, 2), panels, strict=True):
        for method, colour in colours(_methods(lines)).items():
            for number, rate in enumerate(_rates(lines, method)):
                steps = zip(*courses(lines, method, rate), strict=True)
                points = [
                    tuple(spread([one[key] for one in step])[0] for key in ("new_loss", column))
                    for step in steps
                ]
                name = None if number else method
                axes.plot(*zip(*points, strict=True), ".-", color=colour, label=name, alpha=0.8)
        axes.axvline(LEARNT, color="black", linestyle=":")
        axes.set(xlabel="loss of new definitions, nats per token", ylabel=label)
        axes.grid(alpha=0.3)
    figure.axes[0].legend(loc="upper right")
    figure.suptitle("Each line a learning rate, from right to left as training goes on")


def _shown(points: Course) -> list[str]:
    cells = []
    for key in _FORGOTTEN:
        values = [point[key] * (100 if key == "old_recall" else 1) for point in points]
        mean, deviation = spread(values)
        digits = 1 if key == "old_recall" else 3
        bar = "" if len(values) == 1 else f" ± {deviation:.{digits}f}"
        cells.append(f"{mean:.{digits}f}{bar}")
    return cells


def _numbers(line: Line) -> dict[str, float]:
    names = ("step", "new_loss", "new_recall", "old_loss", "old_recall", "heldout_loss")
    return {name: float(line[name]) for name in names}


def _methods(lines: Sequence[Line]) -> list[str]:
    return list(dict.fromkeys(line["method"] for line in lines))


def _rates(lines: Sequence[Line], method: str) -> list[float]:
    return list(dict.fromkeys(float(line["rate"]) for line in lines if line["method"] == method))
