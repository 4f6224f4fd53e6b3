"""Trains a model on a dictionary, teaches it new definitions in several ways, writes the CSV.

    python -m launch.ablations.tuning [--seeds 1 2 3] [--jobs 1]

A finished seed is never repeated.
"""

import argparse
import functools
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from launch.ablations.__main__ import RESULTS, prepare_data
from launch.ablations.experiments import find_experiment
from launch.ablations.training import Training, train
from launch.ablations.tuning import results
from launch.ablations.tuning.run import STEPS, tune
from launch.stage import StageError
from ultramem_megatron.errors import UltraMemError
from ultramem_megatron.tools import rows

BEFORE, EVALUATIONS = 500, 4  # steps of the training before, and how often it is validated


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns its exit status."""
    args = _parse(argv)
    try:
        lines = _trained(args)
        rows.write(args.results / "tuning.csv", lines)
        results.show(args.results / "tuning.csv")
    except (UltraMemError, StageError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m launch.ablations.tuning",
        description="Teach a trained model new definitions, and see what it forgets.",
    )
    add = parser.add_argument
    add("--seeds", type=int, nargs="+", default=[1, 2, 3], help="default: 1 2 3")
    add("--steps", type=int, default=BEFORE, help="optimizer steps of the training before")
    add("--tuning-steps", type=int, default=STEPS, help="and of each that follows")
    add("--jobs", type=int, default=1, help="seeds at a time")
    add("--output", type=Path, default=Path("runs/ablations"), help="corpora, data, logs, records")
    add("--results", type=Path, default=RESULTS, help="folder of the CSV")
    add("extra", nargs="*", metavar="-- FLAGS", help="Megatron's, for the training before")
    return parser.parse_args(argv)


def _trained(args: argparse.Namespace) -> list[dict[str, Any]]:
    recall = find_experiment("recall")
    model = recall.models[-1]
    data = prepare_data(recall, args.output)
    extra = tuple(args.extra)
    definitions = args.output / "corpora" / "definitions.tsv"

    def one(seed: int) -> list[dict[str, Any]]:
        training = Training(model, seed, args.steps, EVALUATIONS, data, extra, save=True)
        measure = functools.partial(
            tune, data=data, definitions=definitions, seed=seed, steps=args.tuning_steps
        )
        record = train(training, args.output / f"tuning-{args.tuning_steps}", measure)
        print(f"seed {seed}: {record['seconds']:.0f} s", flush=True)
        circumstances = {key: record[key] for key in ("date", "commit", "torch")}
        return [{"seed": seed, **row, **circumstances} for row in record["measured"]["courses"]]

    with ThreadPoolExecutor(args.jobs) as pool:
        return [row for found in pool.map(one, args.seeds) for row in found]


if __name__ == "__main__":
    sys.exit(main())
