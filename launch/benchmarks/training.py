"""Tokens per second of whole models in training: dense, mixture of experts, product keys, UltraMem.

    ultramem bench training --out DIR [--scale small|151m] [--rounds 2]
    ultramem bench training --plot DIR/training.csv

All do the same FLOPs per token (checked before anything is timed) and train through Megatron's own
pretrain() on one device, in turns: each model runs once in every round. Experts are Megatron's
SequentialMLP, routed by a router that has just begun to learn. Writes DIR/training.csv and a plot.
"""

import argparse
import json
import logging
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from launch.benchmarks.environment import environment_columns
from launch.benchmarks.training_figure import draw
from launch.benchmarks.training_models import SCALES, Scale
from ultramem_megatron.errors import CommandParser, UltraMemError, exit_on_user_error
from ultramem_megatron.faults.results_folder import results_folder
from ultramem_megatron.tools.rows import write_as_made

_WARM_UP = 3  # steps of each run that are not counted
_MOST_UNEQUAL = 0.02
"""Largest relative difference of FLOPs per token, and of parameters between MoE and UltraMem."""


def check_equal(scale: Scale) -> dict[str, Any]:
    """Sizes of the models, by name. Raises AssertionError if they are no fair comparison."""
    from ultramem_megatron.tools.plan.build import command_line, parse
    from ultramem_megatron.tools.plan.sizes import model_sizes

    sizes = {
        name: model_sizes(parse(command_line(None, [*scale.common, *flags])))
        for name, flags in scale.models.items()
    }
    for quantity, names in (("flops_per_token", tuple(sizes)), ("total", ("moe", "ultramem"))):
        found = [getattr(sizes[name], quantity) for name in names]
        assert max(found) <= (1 + _MOST_UNEQUAL) * min(found), (quantity, names, found)
    return sizes


def _seconds(flags: Sequence[str], steps: int) -> dict[str, Any]:
    """One run in a process of its own, as Megatron trains one model per process."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "seconds.json"
        command = [
            sys.executable,
            "-m",
            "launch.benchmarks.training_steps",
            str(file),
            *flags,
            "--train-iters",
            str(_WARM_UP + steps),
            "--log-interval",
            "100000",
            "--data-cache-path",
            folder,
        ]
        done = subprocess.run(
            command, capture_output=True, text=True, env={**os.environ, "PYTHONWARNINGS": "ignore"}
        )
        if done.returncode:
            last = "\n".join((done.stdout + done.stderr).splitlines()[-15:])
            raise RuntimeError(f"Training ended with status {done.returncode}:\n{last}")
        found: dict[str, Any] = json.loads(file.read_text())
    return found


def measure(scale: Scale, name: str, steps: int, rounds: int) -> Iterator[dict[str, Any]]:
    """One row per model, when it has run in the last round; the dense one is the first."""
    sizes, tokens, of_dense = check_equal(scale), _tokens_per_step(scale), 0.0
    runs: dict[str, list[dict[str, Any]]] = {model: [] for model in scale.models}
    for number in range(rounds):
        for model, flags in scale.models.items():
            runs[model].append(_seconds([*scale.common, *flags], steps))
            median = statistics.median(runs[model][-1]["step"][_WARM_UP:])
            print(f"round {number + 1}  {model:<9} {1e3 * median:9.1f} ms a step", file=sys.stderr)
            if number + 1 < rounds:
                continue
            row = _row(model, runs[model], sizes[model], tokens)
            of_dense = row["tokens_per_second"] if model == "dense" else of_dense
            yield {
                "scale": name,
                **row,
                "times_dense": round(row["tokens_per_second"] / of_dense, 3),
                "rounds": rounds,
                **environment_columns(),
            }


def _tokens_per_step(scale: Scale) -> int:
    words = [*scale.common, *scale.models["dense"]]
    batch, length = (
        int(words[words.index(flag) + 1]) for flag in ("--global-batch-size", "--seq-length")
    )
    return batch * length


def _row(model: str, runs: list[dict[str, Any]], sizes: Any, tokens: int) -> dict[str, Any]:
    steps = [seconds for run in runs for seconds in run["step"][_WARM_UP:]]
    optimizer = [seconds for run in runs for seconds in run["optimizer"][_WARM_UP:]]
    fastest, *_, slowest = statistics.quantiles(steps, n=5)
    median = statistics.median(steps)
    return {
        "model": model,
        "total_params": sizes.total,
        "flops_per_token": sizes.flops_per_token,
        "tokens_per_step": tokens,
        "tokens_per_second": round(tokens / median, 1),
        "step_ms": round(1e3 * median, 2),
        "step_ms_p20": round(1e3 * fastest, 2),
        "step_ms_p80": round(1e3 * slowest, 2),
        "optimizer_ms": round(1e3 * statistics.median(optimizer), 2),
        "peak_bytes": max(run["peak_bytes"] for run in runs),
        "steps": len(steps),
    }


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    default = "151m" if torch.cuda.is_available() else "small"
    parser = CommandParser(prog="ultramem bench training", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--out", type=Path, help="folder for CSV and plot")
    add("--plot", type=Path, metavar="CSV", help="only draw what was measured before")
    add("--scale", choices=SCALES, default=default, help="sizes; here by default %(default)s")
    add("--steps", type=int, default=12, help="timed steps in each run (default 12)")
    add("--rounds", type=int, default=2, help="runs of each model, in turns (default 2)")
    options = parser.parse_args(argv)
    if (options.out is None) == (options.plot is None):
        raise UltraMemError("Give one of --out DIR (measure) and --plot CSV (draw).")
    for name in ("steps", "rounds"):
        if getattr(options, name) < 1:
            raise UltraMemError(f"--{name} is {getattr(options, name)}; it must be at least 1.")
    if options.steps * options.rounds < 2:
        raise UltraMemError("--steps 1 --rounds 1 has no spread; time at least two steps.")
    return options


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and draw. Raises UltraMemError for wrong flags."""
    options = _parse(argv)
    if options.plot:
        return draw(options.plot)
    logging.disable(logging.WARNING)  # Megatron's, of what this machine lacks
    results_folder(options.out)
    file = options.out / "training.csv"
    made = measure(SCALES[options.scale], options.scale, options.steps, options.rounds)
    rows = write_as_made(file, made)
    draw(file)
    for row in rows:
        print(
            f"{row['model']:<9} {row['tokens_per_second']:>10,.0f} tokens/s "
            f"{row['times_dense']:6.2f} x dense  {row['step_ms']:8.1f} ms a step, "
            f"{row['optimizer_ms']:.1f} of it optimizer"
        )
    print(f"{file} and a plot beside it")
    return None


if __name__ == "__main__":
    with exit_on_user_error():
        main()
