"""integrity.json, the sums of an iteration's files, and what it must be to be believed."""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

MANIFEST = "integrity.json"
_ALGORITHM = "sha256"
_DIGITS = frozenset("0123456789abcdef")


class ManifestError(ValueError):
    """What is wrong with a manifest; whoever reads it adds the folder."""


def sum_of(file: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal digits."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, _ALGORITHM).hexdigest()


def write_sums(folder: Path, known: Mapping[str, str]) -> None:
    """Write the manifest of a folder in which every file is complete.

    known: SHA-256 by file name, as its writers made them; other files are read and summed here.
    """
    others = {
        path.name: sum_of(path)
        for path in folder.iterdir()
        if path.is_file() and path.name != MANIFEST and path.name not in known
    }
    sums = dict(sorted({**known, **others}.items()))
    (folder / MANIFEST).write_text(json.dumps({"algorithm": _ALGORITHM, "files": sums}, indent=2))


def refuse_odd_files(folder: Path) -> None:
    """Raise ManifestError for what would be waited for or read for ever: pipes, devices, links.

    Links to files and folders are read as those.
    """
    with os.scandir(folder) as entries:
        odd = sorted(
            entry.name
            for entry in entries
            if not entry.is_file(follow_symlinks=False)  # as nearly all, without asking again
            and not (Path(entry).is_file() or Path(entry).is_dir())
        )
    if odd:
        raise ManifestError(f"{', '.join(odd)}: a pipe, a device or a link to nothing, no file")


def read_sums(folder: Path) -> dict[str, str]:
    """SHA-256 by file name: of every file of the folder but the manifest itself.

    Raises ManifestError: unreadable, not of this form, or without some file of the folder.
    """
    refuse_odd_files(folder)
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ManifestError(f"no readable {MANIFEST} ({error})") from None
    sums = _sums_in(manifest)
    unlisted = sorted(
        path.name
        for path in folder.iterdir()
        if path.is_file() and path.name != MANIFEST and path.name not in sums
    )
    if unlisted:
        raise ManifestError(f"{MANIFEST} has no sum of {', '.join(unlisted)}")
    return sums


def _sums_in(manifest: Any) -> dict[str, str]:
    if not isinstance(manifest, dict) or not isinstance(manifest.get("files"), dict):
        raise ManifestError(f"{MANIFEST} is no list of sums")
    algorithm = manifest.get("algorithm", _ALGORITHM)
    if algorithm != _ALGORITHM:
        raise ManifestError(f"{MANIFEST} has sums of the kind {algorithm!r:.40}, not {_ALGORITHM}")
    sums: dict[str, str] = manifest["files"]
    for name, found in sums.items():
        if not _is_name(name):
            raise ManifestError(f"{MANIFEST} names {name!r:.100}, which is no file of the folder")
        if not isinstance(found, str) or len(found) != 64 or not _DIGITS.issuperset(found):
            raise ManifestError(f"{MANIFEST} has no SHA-256 for {name}")
    if not sums:
        raise ManifestError(f"{MANIFEST} lists no file")
    return sums


def _is_name(name: str) -> bool:
    try:
        os.fsencode(name)
    except UnicodeEncodeError:  # half of a pair, which JSON can say
        return False
    return Path(name).name == name and name != ".." and "\0" not in name
