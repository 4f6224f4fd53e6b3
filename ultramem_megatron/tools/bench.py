"""Run a benchmark of launch/benchmarks: they stand in a checkout, not in the wheel.

ultramem bench                                  lists them
ultramem bench decode --out runs/decode         runs one; its --help says more
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import ultramem_megatron
from ultramem_megatron.errors import CommandParser, UltraMemError

BENCHMARKS = {
    "kernels": "lookup, selections and a whole layer, each way of computing them",
    "layer": "forward and backward of a layer beside plain PyTorch's and beside its limit",
    "training": "tokens per second of dense, MoE, product keys and UltraMem",
    "decode": "latency and weight bytes of a decode step (figures 1b, 1c, 6c and 7)",
    "serving": "latency and throughput of vLLM, dense and UltraMem",
    "overlap": "exchanges between ranks with and without --ultramem-overlap",
    "recipes": "every case of the matrix of Megatron's flags, with memories and without",
    "tables": "decoding from tables on disk, with caches of their rows",
    "table_formats": "an exported folder with tables in float32, bfloat16, int8 and fp8",
    "optimizer": "AdamW on the rows that a step reads beside AdamW on all",
    "checkpoint": "seconds and bytes of saving and loading a table, in the background too",
    "data": "seconds and memory of preparing text, beside Megatron's own script",
    "fit": "steps on 1, 2 and 4 ranks of a CPU beside what plan --fit predicts",
    "scale": "what a rank of 64 to 16,384 costs before its first step, without that world",
}
"""By the name of their module in launch/benchmarks."""

_CHECKOUT = Path(ultramem_megatron.__file__).resolve().parents[1]


def main(argv: Sequence[str] | None = None) -> None:
    """Become the benchmark's own process. Raises UltraMemError without a checkout."""
    parser = CommandParser(
        prog="ultramem bench",
        description=__doc__,
        epilog=_listing(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("benchmark", nargs="?", choices=BENCHMARKS)
    parser.add_argument("flags", nargs=argparse.REMAINDER, help="the benchmark's own")
    options = parser.parse_args(argv)
    if options.benchmark is None:
        print(_listing())
    else:
        become(f"benchmarks.{options.benchmark}", options.flags)


def _listing() -> str:
    width = max(map(len, BENCHMARKS))
    return "\n".join(f"  {name:<{width}}  {about}" for name, about in BENCHMARKS.items())


def become(module: str, flags: Sequence[str]) -> None:
    """Run `module` of the checkout's launch/ in place of this process.

    Raises:
        UltraMemError: there is none beside what is installed.
    """
    if not (_CHECKOUT / "launch" / "benchmarks").is_dir():
        raise UltraMemError(
            f"{module}: benchmarks are not in the wheel that is installed here. Run bash "
            f"launch/setup.sh in a clone of the repository, then .venv/bin/ultramem there."
        )
    # Benchmarks start ranks, which must find the checkout too.
    paths = [str(_CHECKOUT), os.environ.get("PYTHONPATH")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    command = [sys.executable, "-m", f"launch.{module}", *flags]
    os.execve(sys.executable, command, environment)
