"""Reads the text of a corpus, whatever its form, into a spool."""

import sysconfig
from collections.abc import Iterator
from pathlib import Path

from ultramem_megatron.data.files import Found, walk
from ultramem_megatron.data.own_folder import shown
from ultramem_megatron.data.progress import metered, say
from ultramem_megatron.data.records import RECORDS, is_dataset, read_records, record_files
from ultramem_megatron.data.spool import Spool
from ultramem_megatron.data.text import NotTextError, must_be_text, read_text, standard_library
from ultramem_megatron.errors import UltraMemError

MIN_CHARACTERS = 10_000  # less than this leaves no validation text worth the name


def check_source(path: Path | None, json_key: str | None, output: Path) -> None:
    """Raises UltraMemError if there is nothing to collect under `path`, before it is read."""
    if path is None:
        if json_key is not None:
            raise UltraMemError(f"--json-key {json_key}: needs --text PATH, which holds records.")
        return
    if not path.is_file() and not path.is_dir():
        raise UltraMemError(f"--text {shown(path)}: no such file or folder. Give an existing one.")
    if json_key is None and is_dataset(path):
        raise UltraMemError(
            f"--text {shown(path)}: holds records. Name the column with their text: --json-key NAME"
        )
    if path.is_dir() and output.is_dir() and path.samefile(output):
        raise UltraMemError(
            f"--output {shown(output)}: is the folder of the text. Give another one."
        )


def collect(path: Path | None, json_key: str | None, output: Path, spool: Spool) -> Found:
    """Puts the text under `path`, or the standard library's sources where it is None, into `spool`.

    Args:
        path: a file or a folder.
        json_key: None for plain text, or what names the text in the records of JSON lines and
            tables.
        output: a folder inside `path` to pass over.
        spool: takes the texts in the order of the sorted file names.

    Raises:
        UltraMemError: the path holds no text or too little, or is not as it should be.
    """
    found = Found(f"Python {sysconfig.get_python_version()} standard library")
    if path is not None:
        found.source = shown(path)
    for _ in metered(_collected(path, json_key, output, spool, found)):
        pass
    if path is not None:
        for line in found.left_out():
            say(f"  {line}")
    _check_enough(path, json_key, found, spool)
    return found


def _collected(
    path: Path | None, json_key: str | None, output: Path, spool: Spool, found: Found
) -> Iterator[tuple[int, None]]:
    """Collects; yields bytes of text after every few."""
    if path is not None and json_key is not None:
        files = record_files(path, found, output)
    elif path is None:
        files = standard_library(found)
    else:
        files = iter([path]) if path.is_file() else walk(path, found, {"__pycache__"}, output)
    for file in files:
        before = spool.num_bytes
        if json_key is None:
            # The library's few files that are not UTF-8 are so on purpose.
            required = path is not None and (path == file or must_be_text(file))
            _add_plain(file, required, spool, found)
            yield spool.num_bytes - before, None
        else:
            yield from _add_records(file, json_key, spool)
            _count(file, spool.num_bytes > before, found)


def _add_plain(file: Path, required: bool, spool: Spool, found: Found) -> None:
    try:
        _count(file, spool.add(read_text(file)), found)
    except NotTextError as error:
        if required:
            raise UltraMemError(f"--text: {shown(file)} {error}") from None
        found.skipped.append(file)


def _add_records(file: Path, key: str, spool: Spool) -> Iterator[tuple[int, None]]:
    for text in read_records(file, key):
        before = spool.num_bytes
        spool.add([text])
        yield spool.num_bytes - before, None


def _count(file: Path, used: bool, found: Found) -> None:
    if used:
        found.files += 1
    else:
        found.skipped.append(file)


def _check_enough(path: Path | None, json_key: str | None, found: Found, spool: Spool) -> None:
    text = f"--text {shown(path) if path is not None else '(default)'}"
    seen = found.files + len(found.skipped)
    if not seen:
        unread = ", or may not be read" if found.unreadable else ""
        raise UltraMemError(
            f"{text}: the folder holds no files (hidden ones do not count{unread})."
        )
    if not found.files and json_key is not None:
        raise UltraMemError(
            f"{text}: no text under {json_key!r} in {seen} file(s). With --json-key {RECORDS} "
            "are read."
        )
    if not found.files:
        records = [file for file in found.skipped if is_dataset(file)]
        advice = f" For the text in {shown(records[0])} give --json-key." if records else ""
        raise UltraMemError(
            f"{text}: no text in {seen} file(s): all are empty or not UTF-8 text.{advice}"
        )
    if spool.characters < MIN_CHARACTERS:
        raise UltraMemError(
            f"{text}: {spool.characters} characters in {found.files} file(s), but at least "
            f"{MIN_CHARACTERS} are needed to train and validate on. Add more text."
        )
