"""Trains what an experiment compares, and writes its CSV.

    python -m launch.ablations table2 [--seeds 1 2 3] [--jobs 2] [-- MEGATRON FLAGS]
    python -m launch.ablations all                                        # hours
    python -m launch.ablations table2 --scale full -- <data, layout>      # prints the commands

Small runs go through `ultramem train` on this machine. A finished run is never
repeated, and the CSV is written anew after each one, so that a call that was interrupted goes on
where it stopped. At full scale the models are the paper's, and one command line for each run is
printed for a cluster's scheduler.
"""

import argparse
import functools
import itertools
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from launch.ablations import pictures, recall, table
from launch.ablations.experiments import EXPERIMENTS, Experiment, find_experiment
from launch.ablations.models import SMALL_TRAINING, SMALL_TRANSFORMER, sizes
from launch.ablations.training import Training, train
from launch.stage import StageError
from ultramem_megatron.data import corpora, prepare
from ultramem_megatron.errors import UltraMemError
from ultramem_megatron.presets.flags import as_words
from ultramem_megatron.presets.flags import flags as preset_flags
from ultramem_megatron.tools import rows

VOCAB_SIZE = 2048
_ALL = "all"
RESULTS = Path(__file__).parents[1] / "results"


def build_parser() -> argparse.ArgumentParser:
    """The command line of `launch/ablate_*.sh`."""
    parser = argparse.ArgumentParser(
        prog="python -m launch.ablations",
        description="Train the models of one of the paper's experiments and write its CSV.",
    )
    add = parser.add_argument
    add("experiment", help=", ".join((*EXPERIMENTS, _ALL)))
    add("--scale", choices=("small", "full"), default="small", help="full: print commands")
    add("--seeds", type=int, nargs="+", help="default: those of the experiment")
    add("--steps", type=int, help="optimizer steps of a small run")
    add("--jobs", type=int, default=1, help="small runs at a time")
    add("--output", type=Path, default=Path("runs/ablations"), help="corpora, data, logs, records")
    add("--results", type=Path, default=RESULTS, help="folder of the CSV")
    parser.epilog = "Flags after -- go to Megatron, for every model."
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns its exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    end = words.index("--") if "--" in words else len(words)
    args = build_parser().parse_args(words[:end])
    args.extra = words[end + 1 :]
    try:
        names = list(EXPERIMENTS) if args.experiment == _ALL else [args.experiment]
        return max(run(find_experiment(name), args) for name in names)
    except (UltraMemError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def run(experiment: Experiment, args: argparse.Namespace) -> int:
    """Prints the commands of an experiment, or trains its models; returns the exit status."""
    seeds = tuple(args.seeds or experiment.seeds)
    if args.scale == "full":
        print("\n".join(full_commands(experiment, seeds, args.extra)))
        return 0
    return run_small(experiment, seeds, args)


def full_commands(
    experiment: Experiment, seeds: Sequence[int], extra: Sequence[str]
) -> Iterator[str]:
    """One shell command for each run of the paper's size; of a flag given twice the last counts."""
    for model, seed in itertools.product(experiment.models, seeds):
        words = preset_flags(model.preset, model=True, training=True)
        words += [*as_words(model.full), "--seed", str(seed), *extra]
        yield f"torchrun $LAUNCH -m ultramem_megatron train {shlex.join(words)}"


def run_small(experiment: Experiment, seeds: Sequence[int], args: argparse.Namespace) -> int:
    """Trains every model with every seed; returns 1 if some run failed, 0 otherwise."""
    data = prepare_data(experiment, args.output)
    steps, save = args.steps or experiment.steps, experiment.name == "recall"
    planned = [
        Training(model, seed, steps, experiment.evaluations, data, tuple(args.extra), save)
        for seed, model in itertools.product(seeds, experiment.models)
    ]
    measure = functools.partial(recall.measure, data=data) if save else None
    waiting = {training.key(): training for training in planned}
    records: dict[str, dict[str, Any]] = {}
    failed = 0
    started = time.monotonic()
    with ThreadPoolExecutor(args.jobs) as pool:
        work = {
            pool.submit(train, training, args.output / "records", measure): key
            for key, training in waiting.items()
        }
        for number, done in enumerate(as_completed(work), start=1):
            key = work[done]
            try:
                records[key] = done.result()
            except StageError as error:
                failed += 1
                print(f"error: {error}", file=sys.stderr, flush=True)
                continue
            left = (time.monotonic() - started) / number * (len(work) - number)
            print(_progress(number, len(work), waiting[key], records[key], left), flush=True)
            finished = [training for training in planned if training.key() in records]
            write_results(experiment, finished, records, args.results)
    if records:
        pictures.show(args.results / f"{experiment.name}.csv")
    return 1 if failed else 0


def prepare_data(experiment: Experiment, output: Path) -> Path:
    """Fetches and prepares the experiment's text; returns the folder of data sets."""
    text = corpora.fetch(output / "corpora")
    if experiment.data == "dictionary":
        text = output / "dictionary"
        recall.write_dictionary(output / "corpora" / "definitions.tsv", text)
    data = output / "data" / experiment.data
    prepare.prepare(text, data, VOCAB_SIZE)
    return data


def write_results(
    experiment: Experiment,
    finished: Sequence[Training],
    records: dict[str, dict[str, Any]],
    results: Path,
) -> None:
    """Writes <experiment>.csv and <experiment>_curves.csv, in the experiment's order."""
    runs: list[dict[str, Any]] = []
    curves: list[dict[str, Any]] = []
    tokens = int(SMALL_TRAINING["global-batch-size"]) * int(SMALL_TRANSFORMER["seq-length"])
    order = {model.name: number for number, model in enumerate(experiment.models)}
    for training in sorted(finished, key=lambda t: (order[t.model.name], t.seed)):
        model = training.model
        record = records[training.key()]
        counted = sizes(model.name, (*model.small_arguments(), *training.extra))
        runs.append(table.run_line(experiment.name, model.name, counted, record))
        curves += table.curve_lines(experiment.name, model.name, tokens, record)
    rows.write(results / f"{experiment.name}.csv", runs)
    rows.write(results / f"{experiment.name}_curves.csv", curves)


def _progress(
    number: int, total: int, training: Training, record: dict[str, Any], left: float
) -> str:
    loss = record["scalars"][table.VALIDATION][-1][1]
    measured = "".join(f", {k} {v:.3f}" for k, v in record.get("measured", {}).items())
    return (
        f"[{number}/{total}] {training.model.name}, seed {training.seed}: validation loss "
        f"{loss:.4f}{measured}, {record['seconds']:.0f} s; about {left / 60:.0f} min left"
    )


if __name__ == "__main__":
    sys.exit(main())
