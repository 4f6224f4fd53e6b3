"""The report as a page that one reads: a table for each part."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from launch.gpu_report.known import KNOWN, Known

_WORDS = (
    "Predicted figures are derived in launch/gpu_report/known.py, from the H200's rows, counts of "
    "launches and bytes; they are no measurements. Times without a unit are in microseconds."
)
Parts = Mapping[str, Sequence[Mapping[str, Any]]]

_H200 = "one H200, 2026-11-26"
_HEAD = f"| | here | {_H200} | predicted | target | floor |\n|---|---|---|---|---|---|"
_UNMEASURED = f"| | {_H200} | predicted, not measured | target | floor |\n|---|---|---|---|---|"


def write(folder: Path, parts: Parts) -> None:
    """folder/report.json and folder/report.md, each whole at any time."""
    with_known = {
        name: [{**row, **_known(row["what"])._asdict()} for row in rows]
        for name, rows in parts.items()
    }
    for file, text in (
        ("report.json", json.dumps(with_known, indent=1)),
        ("report.md", page(parts)),
    ):
        partial = folder / f".{file}.partial"
        partial.write_text(text, encoding="utf-8")
        partial.replace(folder / file)


def page(parts: Parts) -> str:
    """Markdown: all targets first, then part by part."""
    failed = sum(bool(row["error"]) for rows in parts.values() for row in rows)
    count = f"{failed} of {sum(map(len, parts.values()))} rows failed."
    sections = ["# GPU report", _WORDS, count, f"## All targets\n\n{_reached(parts)}"]
    for name, rows in parts.items():
        lines = [_line(row) for row in rows] or ["| nothing | | | | | |"]
        sections.append("\n".join([f"## {name}\n", _HEAD, *lines]))
    return "\n\n".join(sections) + "\n"


def _reached(parts: Parts) -> str:
    """Markdown: every target beside what this report measured."""
    here = {row["what"]: row for rows in parts.values() for row in rows}
    asked = [what for what, known in KNOWN.items() if known.target]
    unseen = {"value": "not measured", "unit": "", "error": ""}
    return "\n".join([_HEAD, *(_line(here.get(what, {"what": what, **unseen})) for what in asked)])


def targets() -> str:
    """Markdown: every target beside what was measured, what is predicted and the floor."""
    lines = [
        _cells(what, known.h200, known.predicted, known.target, known.floor)
        for what, known in KNOWN.items()
        if known.target
    ]
    return "\n".join([_UNMEASURED, *lines])


def _line(row: Mapping[str, Any]) -> str:
    known = _known(row["what"])
    here = f"**failed**: {row['error']}" if row["error"] else f"{row['value']} {row['unit']}"
    return _cells(row["what"], here, known.h200, known.predicted, known.target, known.floor)


def _cells(*cells: Any) -> str:
    return "| " + " | ".join("" if c is None else str(c).replace("|", "/") for c in cells) + " |"


def _known(what: str) -> Known:
    return KNOWN.get(what, Known())
