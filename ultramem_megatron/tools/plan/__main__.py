"""What a model costs before it is run: sizes, FLOPs, weights read, memory and traffic of layouts.

    ultramem plan ultramem-1.6b-x12
    ultramem plan ultramem-1.6b-x12 --gpus 8 64 --use-distributed-optimizer \\
        --tensor-model-parallel-size 2 --sequence-parallel
    ultramem plan --num-layers 4 ... --ultramem-spans 2:3 ...     # no preset
    ultramem plan ultramem-1.6b-x12 --fit --gpus 64 --memory 80   # which layout?

All of Megatron's flags and ours may follow; they override the preset's. Nothing is trained, no
memory is taken: the model is built without storage, for each rank that differs. --fp8-format and
--fp4-format are planned as bf16.

--fit looks for the layouts that fit and sorts them by a model of the step's time: FLOPs, bytes and
bandwidths as given, nothing measured. Trust its order more than its seconds. Flags of a layout are
replaced; others, such as --global-batch-size, --bf16 and --overlap-grad-reduce, hold.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any

from ultramem_megatron.errors import CommandParser, UltraMemError, exit_on_user_error
from ultramem_megatron.presets import find_preset
from ultramem_megatron.tools.plan.fit_flags import add_fit_flags, fit_text, refuse_without_fit
from ultramem_megatron.tools.quiet import quiet


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(
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
    add_fit_flags(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Print what was asked for. Raises UltraMemError for what cannot be planned."""
    words = list(sys.argv[1:] if argv is None else argv)
    preset = words.pop(0) if words and not words[0].startswith("-") else None
    options, flags = _parser().parse_known_args(words)
    _refuse_moved(flags)
    if preset is None and not flags:
        raise UltraMemError(
            "Nothing to plan: give a preset (ultramem presets lists them) or Megatron's flags."
        )
    if options.gpus and min(options.gpus) < 1:
        raise UltraMemError(f"--gpus has {min(options.gpus)}; numbers of ranks must be at least 1.")
    if options.fit:
        print(fit_text(preset, flags, options))
        return
    refuse_without_fit(options)
    with quiet():
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


_MOVED = {
    "--tables": "ultramem paper tables",
    "--tables-csv": "ultramem paper tables --csv FILE",
    "--figure": "ultramem paper figure1c --plot FILE",
    "--csv": "ultramem paper figure1c --csv FILE",
}
"""Flags of 0.1, named until the next release."""


def _refuse_moved(flags: Sequence[str]) -> None:
    for flag in (word.partition("=")[0] for word in flags):
        if command := _MOVED.get(flag):
            raise UltraMemError(f"{flag} of plan is a command of its own now: {command}")


if __name__ == "__main__":
    with exit_on_user_error():
        main()
