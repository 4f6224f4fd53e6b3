"""The paper's tables and figures that can be computed, from our own models.

    ultramem paper tables [--csv FILE]                   # tables 1-3 and figure 1c, beside ours
    ultramem paper figure1c [--plot FILE] [--csv FILE]   # weight bytes of a decode step
    ultramem paper figure9 [--plot FILE] [--csv FILE]    # where both partitions move the same
    ultramem paper topology [--plot FILE] [--csv FILE]   # best values in one row or column

Nothing is trained or timed.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from ultramem_megatron.errors import CommandParser, UltraMemError, exit_on_user_error
from ultramem_megatron.tools import rows
from ultramem_megatron.tools.paper import figure1c, figure9, topology
from ultramem_megatron.tools.quiet import quiet

_FIGURES = {"figure1c": figure1c, "figure9": figure9, "topology": topology}


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        prog="ultramem paper",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = parser.add_subparsers(dest="what", required=True, metavar="WHAT")
    tables = what.add_parser(
        "tables", help="tables 1-3 and figure 1c of the paper, and ours, as markdown"
    )
    tables.add_argument("--csv", type=Path, metavar="FILE", help="write the numbers here too")
    for name, figure in _FIGURES.items():
        about = (figure.__doc__ or "").strip()
        drawn = what.add_parser(name, help=about, description=about)
        drawn.add_argument("--plot", type=Path, metavar="FILE", help="draw it into this file")
        drawn.add_argument("--csv", type=Path, metavar="FILE", help="write its numbers here")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Print or write what was asked for. Raises UltraMemError where nothing was."""
    options = _parser().parse_args(argv)
    if options.what == "tables":
        _tables(options.csv)
    else:
        _figure(options.what, options.plot, options.csv)


def _tables(csv: Path | None) -> None:
    with quiet():
        from ultramem_megatron.tools.paper import tables

        shown = tables.markdown()
        if csv:
            rows.write(csv, tables.lines())
    print(shown)


def _figure(name: str, plot: Path | None, csv: Path | None) -> None:
    if not (plot or csv):
        raise UltraMemError(f"ultramem paper {name}: give --plot FILE, --csv FILE or both.")
    figure = _FIGURES[name]
    with quiet():
        numbers = figure.points()
    if csv:
        rows.write(csv, numbers)
    if plot:
        figure.draw(plot, numbers)


if __name__ == "__main__":
    with exit_on_user_error():
        main()
