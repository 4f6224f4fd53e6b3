"""What this project does on a GPU, in one report: right or wrong, how fast, beside what is known.

    ultramem gpu-report --out DIR [--minutes 9] [--only parity,kernels] [--authors PATH]

Each part is a process of its own with a time limit; a failure is a row, not the end, and the report
is written anew after each part. Without a GPU it runs what can run on a CPU, small, and says so; it
is refused where there are GPUs that torch does not see, mostly because of an old driver.
Writes DIR/report.json and DIR/report.md.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ultramem_megatron.errors import CommandParser, UltraMemError
from ultramem_megatron.tools.bench import become

PARTS = {
    "environment": 1.0,
    "parity": 3.0,
    "kernels": 2.0,
    "authors": 3.0,
    "layer": 1.0,
    "trainings": 3.0,
    "decode": 3.0,
    "speed": 3.0,
    "overlap": 2.0,
    "host_tables": 1.0,
    "eight_bits": 1.0,
}
"""In order of value; the minutes that each may take, less where fewer are left."""

AUTHORS = "ULTRAMEM_AUTHORS_KERNELS"
"""Environment variable with the folder of --authors, for the part's own process."""

SOURCES = ("fused_lookup.cpp", "fused_lookup.cu")
"""What is built of it."""


def main(argv: Sequence[str] | None = None) -> None:
    """Become the report's own process. Raises UltraMemError, also without a checkout."""
    words = sys.argv[1:] if argv is None else list(argv)
    parse(words)
    become("gpu_report", words)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """out, a folder; minutes; only, names of PARTS. Raises UltraMemError."""
    parser = CommandParser(
        prog="ultramem gpu-report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument("--minutes", type=float, default=9, help="for all (default: %(default)s)")
    parser.add_argument("--only", default=",".join(PARTS), help="parts (default: %(default)s)")
    parser.add_argument(
        "--authors",
        type=Path,
        help="folder fuse_ops of the authors' Ultra-Sparse-Memory-Network: their lookup is built "
        "and timed beside ours",
    )
    options = parser.parse_args(argv)
    if not 0 < options.minutes < 1e6:
        raise UltraMemError(f"--minutes {options.minutes:g}: must be more than 0, 9 is usual.")
    options.only = _named(options.only)
    _check_sources(options.authors)
    return options


def _check_sources(folder: Path | None) -> None:
    missing = [name for name in SOURCES if folder and not (folder / name).is_file()]
    if missing:
        raise UltraMemError(
            f"--authors {folder}: there is no {missing[0]}. Give the folder fuse_ops of a clone of "
            f"github.com/ZihaoHuang-notabot/Ultra-Sparse-Memory-Network."
        )


def _named(words: str) -> list[str]:
    names = words.split(",")
    unknown = [name for name in names if name not in PARTS]
    if unknown:
        raise UltraMemError(f"--only {words}: there is no {unknown[0]}. Parts: {', '.join(PARTS)}.")
    return names
