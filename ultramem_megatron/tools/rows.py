"""Rows as CSV: a header, then a line for each; all with the same keys."""

import csv
import secrets
from collections.abc import Iterable, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

from ultramem_megatron.errors import UltraMemError
from ultramem_megatron.faults.results_folder import results_folder

Row = Mapping[str, Any]


def write(file: Path, rows: Iterable[Row]) -> None:
    """Write all of them or nothing: who is interrupted leaves what was there before."""
    # A name that nobody else's file has.
    partial = file.with_name(f".{file.name}.{secrets.token_hex(4)}.partial")
    write_as_made(partial, rows)
    partial.replace(file)


def write_as_made(file: Path, rows: Iterable[Row]) -> list[Row]:
    """Write each before the next is made, for those that take long to measure; returns them."""
    results_folder(file.parent)
    written: list[Row] = []
    remaining = iter(rows)
    with file.open("w", newline="", encoding="utf-8") as opened:
        first = next(remaining, None)
        if first is None:
            return written
        writer = csv.DictWriter(opened, list(first), lineterminator="\n")
        writer.writeheader()
        for row in chain([first], remaining):
            writer.writerow(row)
            opened.flush()
            written.append(row)
    return written


def read(file: Path, made_by: str, needed: Iterable[str] = ()) -> list[dict[str, str]]:
    """The rows of a CSV, each with at least the columns `needed`.

    made_by: the command that writes such files, for the message.

    Raises:
        UltraMemError: there is no such file, or it holds other rows or none.
    """
    if not file.is_file():
        raise UltraMemError(f"{file} is not there. Make it with: {made_by}")
    with file.open(newline="", encoding="utf-8") as opened:
        rows = list(csv.DictReader(opened))
    if not rows or not rows[0].keys() >= set(needed):
        raise UltraMemError(f"{file} holds no rows of this kind. Make them with: {made_by}")
    return rows
