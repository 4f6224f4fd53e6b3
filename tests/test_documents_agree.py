"""Tables in documents against what they list: flags with their defaults, patches."""

import argparse
import dataclasses
import re

from tests.documents import read
from ultramem_megatron.megatron.flags.arguments import add_ultramem_arguments
from ultramem_megatron.memory.config import UltraMemConfig
from ultramem_megatron.patches.registry import PATCH_MODULES


def _rows(document: str) -> list[list[str]]:
    """Cells of every row of its tables."""
    lines = [line for line in read(document).splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_every_flag_stands_in_the_table_with_its_default() -> None:
    rows = [row for row in _rows("ultramem_megatron/memory/README.md") if row[0].startswith("`--")]
    shown = {row[0].strip("`"): row[2] for row in rows}
    parser = add_ultramem_arguments(argparse.ArgumentParser(add_help=False))
    listed = [action for action in parser._actions if action.help != argparse.SUPPRESS]
    flags = {action.option_strings[0]: action.dest for action in listed}
    assert set(shown) == set(flags)
    assert len(shown) == len(rows)
    for field in dataclasses.fields(UltraMemConfig):
        flag = "--ultramem-" + field.name.replace("_", "-")
        if flag in shown and field.default is not dataclasses.MISSING:
            default = field.default
            default = ("no", "yes")[default] if isinstance(default, bool) else str(default)
            if field.default is None:
                default = "the root of E" if field.name == "key_expansion" else "with `matched`"
            assert shown[flag] == default, flag


def test_every_patch_stands_in_the_table() -> None:
    files = [re.fullmatch(r"`(\w+/\w+)\.py`", row[0]) for row in _rows("patches/README.md")]
    shown = sorted(found[1].replace("/", ".") for found in files if found)
    assert shown == sorted(PATCH_MODULES)
