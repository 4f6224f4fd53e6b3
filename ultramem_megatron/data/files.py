"""Which files a folder of text holds, and what is left out of it."""

import os
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from ultramem_megatron.data.own_folder import shown

_NAMED = 3  # of each kind of what is left out, so many are told by name


@dataclass
class Found:
    """What was found while text was collected.

    Attributes:
        source: where it came from, for people to read.
        files: number of files used.
        skipped: files passed over because they hold no text.
        unreadable: folders that may not be read.
        links: links to folders, which are not followed, and links to nothing.
    """

    source: str
    files: int = 0
    skipped: list[Path] = field(default_factory=list)
    unreadable: list[Path] = field(default_factory=list)
    links: list[Path] = field(default_factory=list)

    def left_out(self) -> Iterator[str]:
        """A line for each kind of what was left out."""
        for what, paths in (
            ("without text", self.skipped),
            ("folders that may not be read", self.unreadable),
            ("links to folders or to nothing", self.links),
        ):
            if paths:
                names = ", ".join(map(shown, paths[:_NAMED]))
                yield f"left out, {what}: {len(paths)} ({names}{', ...' * (len(paths) > _NAMED)})"


def walk(
    root: Path, found: Found, skipped: Collection[str] = (), output: Path | None = None
) -> Iterator[Path]:
    """All visible regular files below `root`, sorted, so that every machine sees one order.

    Args:
        root: a folder.
        found: is told which folders are left out.
        skipped: names of folders to pass over.
        output: a folder to pass over, as it is filled from this text.
    """
    for folder, subfolders, names in os.walk(root, onerror=_note(found)):
        visible = sorted(s for s in subfolders if s not in skipped and s[0] != ".")
        found.links += [Path(folder, s) for s in visible if Path(folder, s).is_symlink()]
        subfolders[:] = [s for s in visible if not _is_same(Path(folder, s), output)]
        for name in sorted(names):
            file = Path(folder, name)
            if name[0] == ".":
                continue
            if file.is_file():
                yield file
            elif file.is_symlink():
                found.links.append(file)


def _note(found: Found) -> Callable[[OSError], None]:
    def note(error: OSError) -> None:
        found.unreadable.append(Path(os.fsdecode(error.filename)))

    return note


def _is_same(folder: Path, other: Path | None) -> bool:
    return other is not None and other.exists() and folder.samefile(other)
