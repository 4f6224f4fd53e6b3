"""What is changed in Megatron at run time, why, until when, and whether this machine needs it.

ultramem patches
ultramem patches megatron-lm --check PATH      # the patch for a fork of Megatron-LM
"""

import argparse
import textwrap
from collections.abc import Sequence
from importlib.metadata import version

from ultramem_megatron.errors import CommandParser, exit_on_user_error
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


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table of patches."""
    CommandParser(
        prog="ultramem patches",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    ).parse_args(argv)
    print(f"megatron-core {version('megatron-core')} is installed.\n")
    print("\n\n".join(describe(patch) for patch in all_patches()))


if __name__ == "__main__":
    with exit_on_user_error():
        main()
