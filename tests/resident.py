"""What of a file is in this process' memory; Linux only."""

import os
import re
from pathlib import Path


def resident(file: Path) -> int:
    """Bytes of this process' memory that are pages of the file."""
    return mapped(str(file), "Rss")


def mapped(name: str, what: str) -> int:
    """Rss, Pss or another row of proc(5)'s smaps, in bytes, of files with `name` in theirs."""
    found, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            inside = name in line
        elif inside and line.startswith(f"{what}:"):
            found += int(line.split()[1]) * 1024
    return found


def forget(file: Path) -> None:
    """Out of the system's cache, which maps whole pieces of what was just written."""
    with file.open("rb") as opened:
        os.fsync(opened.fileno())
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
