"""What of a file is in this process' memory; Linux only."""

import os
import re
from pathlib import Path


def resident(file: Path) -> int:
    """Bytes of this process' memory that are pages of the file."""
    found, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            inside = line.endswith(str(file))
        elif inside and line.startswith("Rss:"):
            found += int(line.split()[1]) * 1024
    return found


def forget(file: Path) -> None:
    """Out of the system's cache, which maps whole pieces of what was just written."""
    with file.open("rb") as opened:
        os.fsync(opened.fileno())
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
