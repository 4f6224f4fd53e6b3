"""What is changed in Megatron at run time, why, until when, and whether this machine needs it.

ultramem patches
ultramem patches megatron-lm --check PATH      # the patch for a fork of Megatron-LM
ultramem patches --against PATH                # what another Megatron, not installed, would break
"""

import argparse
import sys
import textwrap
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from ultramem_megatron.errors import CommandParser, exit_on_user_error
from ultramem_megatron.patches.against import report
from ultramem_megatron.patches.patch import Patch
from ultramem_megatron.patches.registry import all_patches, is_applied

_WIDTH = 100


def describe(patch: Patch) -> str:
    """Several lines about one patch."""
    rows = (
        ("changes", ", ".join(patch.symbols)),
        ("because", patch.reason),
        ("versions", f"megatron-core {patch.versions}"),
        ("delete when", patch.delete_when),
        ("active here", "yes" if patch.active() else "no"),
        ("applied", "yes" if is_applied(patch.name) else "no"),
    )
    lines = [patch.name]
    for label, text in rows:
        indent = " " * 16
        body = textwrap.fill(text, _WIDTH, initial_indent=indent, subsequent_indent=indent)
        lines.append(f"  {label:<12}  {body.lstrip()}")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table of patches, or what would break."""
    parser = CommandParser(
        prog="ultramem patches",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--against",
        type=Path,
        metavar="PATH",
        help="A checkout of Megatron-LM, or a folder of packages: names used here that are gone "
        "there or take something else. Its source is read, not run. Status 1 if there are any.",
    )
    options = parser.parse_args(argv)
    if options.against:
        return _compare(options.against)
    print(f"megatron-core {version('megatron-core')} is installed.\n")
    print("\n\n".join(describe(patch) for patch in all_patches()))
    return 0


def _compare(folder: Path) -> int:
    found = report(folder, all_patches())
    print("\n".join(found))
    print(
        f"{len(found)} names changed between megatron-core {version('megatron-core')} and {folder}"
    )
    return 1 if found else 0


if __name__ == "__main__":
    with exit_on_user_error():
        sys.exit(main())
