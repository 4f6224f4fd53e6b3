"""The documents of the house as a reader finds them: links, headings, fenced blocks.

The info string of a fence says what becomes of its text:

    bash            run as it stands, from the top folder
    bash slow       run too, by `bash tests/run.sh --long`
    python          code of the reader's own: it compiles, and what it imports of ours is there
    text            shown only
    text output     shown, and exactly what the block before it prints
"""

import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import NamedTuple

from tests import ROOT

INFO = ("bash", "bash slow", "python", "text", "text output")

_FENCE = re.compile(r"^ *```(.*)\n((?:.*\n)*?) *```$", re.MULTILINE)
_LINK = re.compile(r"\]\(([^()\s]+)\)")
_HEADING = re.compile(r"^#+ +(.*)$", re.MULTILINE)


class Block(NamedTuple):
    """One fenced block."""

    document: str
    """From the top folder."""
    line: int
    info: str
    text: str

    @property
    def name(self) -> str:
        """Where to look for it: README.md:12."""
        return f"{self.document}:{self.line}"


@cache
def documents() -> tuple[str, ...]:
    """Every Markdown file of the checkout, tracked or new, as paths from the top folder."""
    found = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.md"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    return tuple(sorted(name for name in found if (ROOT / name).exists()))


def read(document: str) -> str:
    """Its text."""
    return (ROOT / document).read_text(encoding="utf-8")


@cache
def blocks(document: str) -> tuple[Block, ...]:
    """Its fenced blocks, in order."""
    text = read(document)
    return tuple(
        Block(document, text.count("\n", 0, found.start()) + 1, found[1].strip(), found[2])
        for found in _FENCE.finditer(text)
    )


def prose(document: str) -> str:
    """Its text without fenced blocks, line for line."""
    return _FENCE.sub(lambda found: "\n" * found[0].count("\n"), read(document))


def links(document: str) -> list[str]:
    """Targets of its links and pictures that lead to files, each with its #anchor."""
    return [link for link in _LINK.findall(prose(document)) if "://" not in link]


def anchors(document: str) -> set[str]:
    """The anchors that GitHub gives to its headings."""
    found: dict[str, int] = {}
    for heading in _HEADING.findall(prose(document)):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
        slug = re.sub(r"[^\w\- ]", "", plain).strip().replace(" ", "-")
        found[slug] = found.get(slug, -1) + 1
        if found[slug]:
            found[f"{slug}-{found[slug]}"] = 0
    return set(found)


def open_checkout(folder: Path) -> Path:
    """A folder to run blocks in: all of the checkout is there, and what they write stays there."""
    for entry in ROOT.iterdir():
        if not entry.name.startswith(".") and entry.name != "runs":
            (folder / entry.name).symlink_to(entry)
    (folder / ".venv").symlink_to(sys.prefix)
    front_door = folder / ".commands" / "ultramem"
    front_door.parent.mkdir()
    front_door.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m ultramem_megatron "$@"\n')
    front_door.chmod(0o755)
    return folder


def run(script: str, checkout: Path) -> subprocess.CompletedProcess[str]:
    """Run a script in such a folder, as in a shell in which .venv is active.

    `ultramem` is this checkout's, wherever the environment was installed from.
    """
    here = [str(checkout / ".commands"), str(Path(sys.executable).parent)]
    path = os.pathsep.join([*here, os.environ["PATH"]])
    return subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=checkout,
        env={**os.environ, "PATH": path, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
