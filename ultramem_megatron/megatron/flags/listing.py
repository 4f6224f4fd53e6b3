"""The --ultramem-* flags alone, in groups, with the values in force where a flag is not given.

    ultramem flags
    ultramem flags --ultramem-preset ultramem-1.6b-x12      # what a preset puts in their place

Megatron's own flags come with them in `ultramem train --help`.
"""

import argparse
import dataclasses
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from ultramem_megatron.errors import CommandParser, exit_on_user_error
from ultramem_megatron.megatron.flags.arguments import GROUPS, add_ultramem_arguments
from ultramem_megatron.memory.config import UltraMemConfig
from ultramem_megatron.presets import preset_fields

_WIDTH, _FLAG, _INDENT = 100, 36, " " * 8


def main(argv: Sequence[str] | None = None) -> None:
    """Print them. Raises UltraMemError for an unknown preset."""
    parser = CommandParser(
        prog="ultramem flags",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--ultramem-preset", metavar="NAME", help="of `ultramem presets`")
    preset = parser.parse_args(argv).ultramem_preset
    print(listing({} if preset is None else {"preset": preset, **preset_fields(preset)}))


def listing(given: Mapping[str, Any]) -> str:
    """Every flag in a few lines: name, value in force ('-': none), help. given: by field name."""
    optional = [
        field.name
        for field in dataclasses.fields(UltraMemConfig)
        if field.default is not dataclasses.MISSING
    ]
    chosen = {name: value for name, value in given.items() if name in optional}
    # Made for its defaults, some of which follow from others; its sizes are not shown.
    config = UltraMemConfig(spans=(), num_keys=1, key_dim=1, value_dim=1, **chosen)
    in_force = {**{name: getattr(config, name) for name in optional}, **given}
    parser = add_ultramem_arguments(argparse.ArgumentParser(add_help=False))
    parts = []
    for group in parser._action_groups:
        if (group.title or "").startswith(GROUPS):
            lines = [f"{group.title}   (flag, value in force)"]
            lines += textwrap.wrap(group.description or "", _WIDTH)
            lines += [_described(action, in_force) for action in group._group_actions]
            parts.append("\n".join(lines))
    return "\n\n".join(parts)


def _described(action: argparse.Action, in_force: Mapping[str, Any]) -> str:
    name = action.dest.removeprefix("ultramem_")
    value = _shown(in_force[name]) if name in in_force else "-"
    flag = action.option_strings[0]
    if isinstance(action, argparse.BooleanOptionalAction):
        flag = flag.replace("--", "--[no-]", 1)
    meaning = action.help or ""
    if name in in_force:
        meaning = meaning.partition(" Default: ")[0]
    if action.choices:
        meaning += f" One of: {', '.join(map(str, action.choices))}."
    return f"  {flag:<{_FLAG}}{value}\n" + textwrap.fill(
        meaning, _WIDTH, initial_indent=_INDENT, subsequent_indent=_INDENT, break_on_hyphens=False
    )


def _shown(value: Any) -> str:
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)


if __name__ == "__main__":
    with exit_on_user_error():
        main()
