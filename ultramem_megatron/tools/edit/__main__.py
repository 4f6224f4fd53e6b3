"""Which values does a model read a fact from, and what does it say without them?

    ultramem edit FOLDER --prompt TEXT --fact TEXT
    ultramem edit FOLDER OUT --prompt TEXT --fact TEXT --zero 1:17 1:33 --scale 3:5=0.5

The first lists the values that fire where the fact is said, those that contribute most first. The
second writes a folder OUT as FOLDER, in which named values (LAYER:VALUE) are switched off, scaled
or replaced, and shows what the model says before and after.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ultramem_megatron.errors import CommandParser, UltraMemError, exit_on_user_error

if TYPE_CHECKING:
    from ultramem_megatron.tools.edit.contributions import Contribution
    from ultramem_megatron.tools.edit.edits import Edit
    from ultramem_megatron.tools.edit.fact import Said


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; see --help. Raises UltraMemError."""
    parser = CommandParser(
        prog="ultramem edit",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("folder", type=Path, help="written by ultramem export --to hf, or quantize")
    add("out", type=Path, nargs="?", help="a new folder")
    add("--prompt", required=True, help="the text before the fact")
    add("--fact", required=True, help="what follows the prompt, its blank included: ' Paris'")
    several: dict[str, Any] = {"nargs": "+", "default": []}
    add("--zero", **several, metavar="LAYER:VALUE", help="switch off")
    add("--zero-most", type=int, default=0, metavar="N", help="and the N that contribute most")
    add("--scale", **several, metavar="LAYER:VALUE=FACTOR", help="multiply")
    add("--replace", **several, metavar="LAYER:VALUE=VALUE", help="by another of its table")
    add("--top", type=int, default=10, help="values listed (default: %(default)s)")
    add("--tokens", type=int, default=12, help="of the continuation (default: %(default)s)")
    options = parser.parse_args(argv)
    for name, least in (("zero_most", 0), ("top", 1), ("tokens", 1)):
        if getattr(options, name) < least:
            flag = "--" + name.replace("_", "-")
            raise UltraMemError(
                f"{flag} {getattr(options, name)}: must be a whole number >= {least}."
            )
    return options


def main(argv: Sequence[str] | None = None) -> None:
    """List, write, show. Raises UltraMemError for what the user can put right."""
    options = parse(argv)

    from ultramem_megatron.tools.edit.contributions import contributions
    from ultramem_megatron.tools.edit.edits import check_edits, parse_edits, shared_edits
    from ultramem_megatron.tools.edit.fact import read_fact, said
    from ultramem_megatron.tools.edit.write import write_edited
    from ultramem_megatron.tools.export.hf_folder import refuse_full
    from ultramem_megatron.tools.export.opened_folder import open_folder
    from ultramem_megatron.tools.inspect.hf_reads import memories_of

    edits = parse_edits(options.zero, options.scale, options.replace)
    _check_out(options, bool(edits) or options.zero_most > 0)
    if options.out is not None:
        refuse_full(options.out)
    opened = open_folder(options.folder)
    fact = read_fact(opened, options.prompt, options.fact)
    fired = contributions(opened, fact)
    holders = opened.model.config.table_holders
    check_edits(edits, {n: m.number for n, m in memories_of(opened).items()}, holders)
    edits += _most(fired, options.zero_most, edits, holders)
    _list(fired, options.top)
    _show("before" if edits else "it says", said(opened, fact, options.tokens))
    if edits:
        write_edited(options.folder, options.out, edits)
        _show("after", said(open_folder(options.out), fact, options.tokens))
        print(*shared_edits(edits, holders), f"wrote {options.out}/", sep="\n")


def _check_out(options: argparse.Namespace, edited: bool) -> None:
    if edited and options.out is None:
        raise UltraMemError(
            "There is no folder to write to: nothing is changed in place. Give FOLDER OUT."
        )
    if options.out is not None and not edited:
        raise UltraMemError(
            f"{options.out}: nothing to write, no value is named. Give --zero, --zero-most, "
            f"--scale or --replace, or leave the second folder out."
        )


def _most(
    fired: "Sequence[Contribution]", number: int, edits: "Sequence[Edit]", holders: dict[int, str]
) -> "list[Edit]":
    """Zero for those of the most contributing values that no edit names, through any reader."""
    from ultramem_megatron.tools.edit.edits import Edit

    named = {(holders[edit.layer], edit.value) for edit in edits}
    most = {(holders[one.layer], one.value): one for one in reversed(fired[:number])}
    return [Edit(one.layer, one.value, 0.0) for row, one in most.items() if row not in named]


def _list(fired: "Sequence[Contribution]", top: int) -> None:
    print(f"{len(fired)} values fire where the fact is said; share of their memory's output:")
    print(f"{'value':>14}  {'share':>7}  reads")
    for one in fired[:top]:
        print(f"{f'{one.layer}:{one.value}':>14}  {one.share:>7.1%}  {one.reads}")


def _show(when: str, what: "Said") -> None:
    print(f"{when}: log-probability of the fact {what.log_probability:.3f}")
    print(f"{when}: the prompt goes on {what.continuation!r}", flush=True)


if __name__ == "__main__":
    with exit_on_user_error():
        main()
