"""Draws every picture of experiments, benchmarks and the paper's figures again, from its CSV.

    python -m launch.plots [NAME ...] [--results DIR]

Of experiments it prints the table too.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from launch.ablations import pictures
from launch.ablations.experiments import EXPERIMENTS
from launch.ablations.tuning import results as tuning
from launch.benchmarks import decode_figures, training_figure
from ultramem_megatron.errors import UltraMemError
from ultramem_megatron.tools import rows
from ultramem_megatron.tools.paper import figure1c, figure9, topology

RESULTS = Path(__file__).parent / "results"


def _figure1c(file: Path) -> None:
    numbers = rows.read(file, "ultramem paper figure1c --csv FILE", ("weight_bytes_read",))
    figure1c.draw(file.with_suffix(".png"), numbers)


def _figure9(file: Path) -> None:
    numbers = rows.read(file, "ultramem paper figure9 --csv FILE", ("top_m", "grid_from"))
    figure9.draw(file.with_suffix(".png"), numbers)


def _topology(file: Path) -> None:
    numbers = rows.read(file, "ultramem paper topology --csv FILE", ("num_keys", "second_best"))
    topology.draw(file.with_suffix(".png"), numbers)


PICTURES: dict[str, Callable[[Path], None]] = {
    **dict.fromkeys(EXPERIMENTS, pictures.show),
    "decode": decode_figures.draw,
    "h200/decode": decode_figures.draw,
    "h200/decode_graphs": decode_figures.draw_graphs,
    "training": training_figure.draw,
    "figure1c": _figure1c,
    "figure9": _figure9,
    "topology": _topology,
    "tuning": tuning.show,
}
"""By the name of the CSV; each draws beside the file that it is given."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m launch.plots", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="default: those with a CSV")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of CSVs and pictures")
    args = parser.parse_args(argv)
    try:
        names = args.names or [n for n in PICTURES if (args.results / f"{n}.csv").exists()]
        if unknown := [name for name in names if name not in PICTURES]:
            raise UltraMemError(f"{unknown[0]!r} is unknown. Known: {', '.join(PICTURES)}.")
        for name in names:
            PICTURES[name](args.results / f"{name}.csv")
    except UltraMemError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
