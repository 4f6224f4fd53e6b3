"""Command line: run everything and write a CSV and plots, or plot a CSV.

ultramem bench kernels run --out DIR [--quick] [--device cpu|cuda] [--sweep NAME ...]
ultramem bench kernels plot DIR/kernels.csv
"""

from collections.abc import Sequence
from pathlib import Path

import torch

from launch.benchmarks.kernels.plot import plot
from launch.benchmarks.kernels.run import run
from launch.benchmarks.kernels.shapes import SWEEPS
from ultramem_megatron.errors import CommandParser, UltraMemError, exit_on_user_error
from ultramem_megatron.faults.results_folder import results_folder


def main(argv: Sequence[str] | None = None) -> None:
    """Parse, run, plot."""
    parser = CommandParser(prog="ultramem bench kernels")
    commands = parser.add_subparsers(dest="command", required=True)
    running = commands.add_parser("run", help="Check and time everything; write CSV and plots.")
    running.add_argument("--out", type=Path, required=True, help="Folder of kernels.csv and plots.")
    running.add_argument("--quick", action="store_true", help="Tiny sizes: does it all work?")
    running.add_argument("--device", choices=("cpu", "cuda"), help="By default a GPU if there is.")
    running.add_argument(
        "--sweep", nargs="+", choices=SWEEPS, default=SWEEPS, help="Sizes to go over; all of them."
    )
    plotting = commands.add_parser("plot", help="Draw the plots of a CSV beside it.")
    plotting.add_argument("csv", type=Path)
    options = parser.parse_args(argv)
    if options.command == "run":
        results_folder(options.out)
        options.csv = options.out / "kernels.csv"
        run(options.csv, _device(options.device), options.quick, options.sweep)
    for picture in plot(options.csv):
        print(picture)


def _device(name: str | None) -> torch.device:
    has_gpu = torch.cuda.is_available()
    if name == "cuda" and not has_gpu:
        raise UltraMemError("--device cuda: PyTorch sees no GPU here. Leave it out, or give cpu.")
    return torch.device(name or ("cuda" if has_gpu else "cpu"))


if __name__ == "__main__":
    with exit_on_user_error():
        main()
