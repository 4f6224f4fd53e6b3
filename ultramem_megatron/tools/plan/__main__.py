"""What a model costs before it is run: sizes, FLOPs, weights read, memory and traffic of layouts.

    ultramem plan ultramem-1.6b-x12
    ultramem plan ultramem-1.6b-x12 --gpus 8 64 --use-distributed-optimizer \\
        --tensor-model-parallel-size 2 --sequence-parallel
    ultramem plan --num-layers 4 ... --ultramem-spans 2:3 ...     # no preset
    ultramem plan --tables             # the paper's tables beside ours, markdown
    ultramem plan --figure figure1c.png --csv figure1c.csv

All of Megatron's flags and ours may follow; they override the preset's. Nothing is trained, no
memory is taken: the model is built without storage, for each rank that differs.
"""

import argparse
import contextlib
import io
import json
import logging
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ultramem_megatron.errors import UltraMemError, exit_on_user_error
from ultramem_megatron.presets import find_preset


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ultramem plan",
        usage="%(prog)s [PRESET] [--gpus N ...] [--json] [Megatron's and --ultramem flags]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add(
        "--gpus",
        type=int,
        nargs="+",
        metavar="N",
        help="numbers of ranks to lay the model out on (default: as few as the flags need)",
    )
    add("--json", action="store_true", help="print one JSON object: elements, bytes, FLOPs")
    add(
        "--tables",
        action="store_true",
        help="print tables 1-3 and figure 1c of the paper, and ours, as markdown",
    )
    add("--figure", type=Path, help="draw the weight bytes read by the 1.6B models (figure 1c)")
    add("--csv", type=Path, help="write the numbers of the figure into this file")
    add("--tables-csv", type=Path, help="write the numbers of the tables into this file")
    return parser  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    """Print what was asked for. Raises UltraMemError for what cannot be planned."""
    words = list(sys.argv[1:] if argv is None else argv)
    preset = words.pop(0) if words and not words[0].startswith("-") else None
    options, flags = _parser().parse_known_args(words)
    # Megatron tells what this machine lacks, which is of no account here.
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    if options.tables or options.figure or options.csv or options.tables_csv:
        _paper(options, preset, flags)
        return
    if preset is None and not flags:
        raise UltraMemError(
            "Nothing to plan: give a preset (ultramem presets lists them) or Megatron's flags."
        )
    if options.gpus and min(options.gpus) < 1:
        raise UltraMemError(f"--gpus has {min(options.gpus)}; numbers of ranks must be at least 1.")
    with contextlib.redirect_stdout(io.StringIO()):
        plan = make_plan(preset, flags, options.gpus)
    if options.json:
        print(json.dumps(plan, indent=1))
    else:
        from ultramem_megatron.tools.plan.report import text

        print(text(plan))


def make_plan(
    preset: str | None, flags: Sequence[str], gpus: Sequence[int] | None = None
) -> dict[str, Any]:
    """Everything that --json prints. Raises UltraMemError."""
    if preset is not None:
        find_preset(preset)
    from ultramem_megatron.tools.plan.build import command_line, parse, smallest_world
    from ultramem_megatron.tools.plan.layouts import describe_layout, uncrossed_layouts
    from ultramem_megatron.tools.plan.sizes import describe_sizes, model_sizes

    words = command_line(preset, flags)
    whole = parse(words)
    return {
        "preset": preset,
        "about": find_preset(preset).about if preset else "",
        **describe_sizes(
            model_sizes(whole), whole.transformer.params_dtype.itemsize, whole.args.seq_length
        ),
        "pipeline_layouts": uncrossed_layouts(whole),
        "layouts": [describe_layout(parse(words, n)) for n in gpus or [smallest_world(words)]],
    }


def _paper(options: argparse.Namespace, preset: str | None, flags: Sequence[str]) -> None:
    if preset or flags or options.gpus:
        given = " ".join([preset or "", *flags]).strip() or "--gpus"
        raise UltraMemError(
            "--tables, --tables-csv, --figure and --csv are about the paper's own models: give no "
            f"preset and no other flags (given: {given})."
        )
    with contextlib.redirect_stdout(io.StringIO()):
        from ultramem_megatron.tools.paper import figure1c as figures
        from ultramem_megatron.tools.paper import tables

        shown = tables.markdown() if options.tables else ""
        if options.tables_csv:
            tables.write_csv(options.tables_csv)
    if shown:
        print(shown)
    if options.csv:
        figures.write_csv(options.csv)
    if options.figure:
        figures.draw(options.figure, figures.weight_access())


if __name__ == "__main__":
    with exit_on_user_error():
        main()
