"""Text in records: JSON lines, Parquet files, a Hugging Face dataset on disk; one at a time."""

import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ultramem_megatron.data.files import Found, walk
from ultramem_megatron.data.own_folder import shown
from ultramem_megatron.errors import UltraMemError, how_to_get

_JSON = (".jsonl", ".ndjson", ".json", ".jsonl.gz", ".ndjson.gz", ".json.gz")
_TABLES = (".parquet", ".arrow")
_ROWS = 1024  # of a table, read at a time
_HUGGING_FACE, _HUGGING_FACE_SPLITS = "state.json", "dataset_dict.json"  # of save_to_disk()


RECORDS = "JSON lines (.jsonl, .ndjson, .json, also .gz) and tables (.parquet, .arrow)"
"""What is read where a key is given, for people."""


def is_dataset(path: Path) -> bool:
    """Whether only records can be meant: a table, or a dataset saved by Hugging Face's library."""
    return path.name.lower().endswith(_TABLES) or any(
        (path / name).is_file() for name in (_HUGGING_FACE, _HUGGING_FACE_SPLITS)
    )


def record_files(path: Path, found: Found, output: Path) -> Iterator[Path]:
    """Files with records: `path` itself, those of a saved dataset, or those below a folder.

    Raises:
        UltraMemError: the folder holds the splits of a dataset, of which one has to be chosen.
    """
    if path.is_file():
        yield path
    elif (path / _HUGGING_FACE_SPLITS).is_file():
        splits = sorted(item.name for item in path.iterdir() if (item / _HUGGING_FACE).is_file())
        raise UltraMemError(
            f"--text {shown(path)}: holds the splits {', '.join(splits)}. Give one of them: "
            f"--text {shown(path / (splits or ['train'])[0])}."
        )
    elif (path / _HUGGING_FACE).is_file():
        yield from _saved_files(path)
    else:
        for file in walk(path, found, {"__pycache__"}, output):
            if file.name.lower().endswith((*_JSON, *_TABLES)):
                yield file
            else:
                found.skipped.append(file)


def read_records(file: Path, key: str) -> Iterator[str]:
    """The text under `key` of every record; records without text are left out.

    Raises:
        UltraMemError: names the file and the record that is not as it should be.
    """
    read = _table if file.name.lower().endswith(_TABLES) else _json_lines
    for number, text in read(file, key):
        try:
            text.encode()
        except UnicodeEncodeError:
            wrong = f"{key!r} holds half a character (a lone surrogate); text is"
            raise _wrong(file, number, wrong) from None
        yield text.replace("\r\n", "\n")


def _json_lines(file: Path, key: str) -> Iterator[tuple[str, str]]:
    for count, line in enumerate(_lines(file), start=1):
        number = f"line {count}"
        if not line.strip():
            continue
        try:
            record = json.loads(line.removeprefix(b"\xef\xbb\xbf") if count == 1 else line)
        except (ValueError, RecursionError):
            raise _wrong(file, number, "is not JSON in UTF-8; one object a line is") from None
        if not isinstance(record, dict):
            raise _wrong(file, number, f"is no object with {key!r}; one object a line is")
        if key not in record:
            keys = ", ".join(sorted(record)) or "none"
            raise _wrong(file, number, f"has no key {key!r}; its keys: {keys}. Such a line is")
        if record[key] is None:
            continue
        if not isinstance(record[key], str):
            raise _wrong(file, number, f"{key!r} is no text but {record[key]!r:.40}; text is")
        yield number, record[key]


def _lines(file: Path) -> Iterator[bytes]:
    packed = file.name.lower().endswith(".gz")
    try:
        with gzip.open(file) if packed else file.open("rb") as lines:
            yield from lines
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise _damaged(file, error) from None


def _table(file: Path, key: str) -> Iterator[tuple[str, str]]:
    done = 0
    for column in _columns(file, key):
        for count, text in enumerate(column, start=done + 1):
            if text is not None:
                yield f"row {count}", text
        done += len(column)


def _columns(file: Path, key: str) -> Iterator[list[str | None]]:
    """The column `key` of a table, some rows at a time."""
    arrow = _pyarrow(file)
    try:
        if file.name.lower().endswith(".parquet"):
            table = arrow.parquet.ParquetFile(file)
            _check_column(arrow, file, table.schema_arrow, key)
            batches = table.iter_batches(_ROWS, columns=[key])
        else:  # Hugging Face's: a stream
            batches = arrow.ipc.open_stream(arrow.memory_map(str(file)))
            _check_column(arrow, file, batches.schema, key)
        for batch in batches:
            yield batch.column(key).to_pylist()
    except arrow.ArrowException as error:
        raise _damaged(file, error) from None


def _check_column(arrow: Any, file: Path, schema: Any, key: str) -> None:
    if schema.names.count(key) != 1:
        raise UltraMemError(
            f"--json-key {key}: {shown(file)} has no such column; it has {', '.join(schema.names)}."
        )
    kind, types = schema.field(key).type, arrow.types
    if types.is_dictionary(kind):
        kind = kind.value_type
    if not (types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)):
        raise UltraMemError(
            f"--json-key {key}: this column of {shown(file)} holds {kind}, not text. It has the "
            f"columns {', '.join(schema.names)}."
        )


def _pyarrow(file: Path) -> Any:
    try:
        import pyarrow
        import pyarrow.ipc
        import pyarrow.parquet
    except ImportError:
        raise UltraMemError(
            f"--text: {shown(file)} needs pyarrow, which is not installed. {how_to_get('pyarrow')}"
        ) from None
    return pyarrow


def _saved_files(folder: Path) -> Iterator[Path]:
    """The tables of a saved dataset, in its order; other files there are caches."""
    try:
        content = json.loads((folder / _HUGGING_FACE).read_text(encoding="utf-8"))
        names = [entry["filename"] for entry in content["_data_files"]]
        whole = names != [] and all(Path(name).name == name for name in names)
    except (OSError, ValueError, KeyError, TypeError):
        whole = False
    if not whole:
        raise UltraMemError(
            f"--text {shown(folder)}: its {_HUGGING_FACE} does not name the files of a dataset. "
            "Save the dataset again with save_to_disk()."
        )
    for name in names:
        yield folder / name


def _damaged(file: Path, error: Exception) -> UltraMemError:
    return UltraMemError(
        f"--text: {shown(file)} cannot be read: {str(error).splitlines()[0]}. "
        "Copy it again, or take it out of the folder."
    )


def _wrong(file: Path, number: str, what: str) -> UltraMemError:
    return UltraMemError(
        f"--text: {shown(file)}, {number} {what} expected. Correct it, or take it out."
    )
