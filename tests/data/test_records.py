"""JSON lines, Parquet and saved datasets: one text whatever the form; refusals by record."""

import gzip
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.data.test_text import collected
from ultramem_megatron.data import prepare
from ultramem_megatron.data.records import read_records
from ultramem_megatron.errors import UltraMemError

TEXTS = [f"Record {i} — naïve.\n{'word ' * (i % 40)}" for i in range(300)]


def records(texts: Sequence[str | None]) -> list[dict[str, Any]]:
    return [{"id": i, "text": text} for i, text in enumerate(texts)]


def write_json(folder: Path, texts: Sequence[str | None]) -> Path:
    file = folder / "a.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records(texts)))
    return file


def write_json_in_two_files(folder: Path, texts: Sequence[str | None]) -> Path:
    lines = [json.dumps(record, ensure_ascii=False).encode() for record in records(texts)]
    (folder / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + b"\r\n".join(lines[:7]) + b"\n\n")
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(b"\n".join(lines[7:])))
    (folder / "README.md").write_text("Not a record.")
    return folder


def write_parquet(folder: Path, texts: Sequence[str | None]) -> Path:
    arrow = needed("pyarrow")
    table = arrow.Table.from_pylist(records(texts))
    needed("pyarrow.parquet").write_table(table, folder / "a.parquet", row_group_size=50)
    return folder / "a.parquet"


def write_dataset(folder: Path, texts: Sequence[str | None]) -> Path:
    """As `datasets.Dataset.save_to_disk()` leaves it."""
    new_stream = needed("pyarrow.ipc").new_stream
    table = needed("pyarrow").Table.from_pylist(records(texts))
    names = ["data-00000-of-00002.arrow", "data-00001-of-00002.arrow"]
    for name, part in zip(names, (table.slice(0, 120), table.slice(120)), strict=True):
        with new_stream(folder / name, table.schema) as stream:
            stream.write_table(part, max_chunksize=30)
    with new_stream(folder / "cache-1234.arrow", table.schema) as stream:
        stream.write_table(table)  # of a map(); no part of the dataset
    files = {"_data_files": [{"filename": name} for name in names], "_split": "train"}
    (folder / "state.json").write_text(json.dumps(files))
    (folder / "dataset_info.json").write_text("{}")
    return folder


def needed(module: str) -> Any:
    """The module, or a skipped test where the extra "data" is not installed."""
    return pytest.importorskip(module, reason="writes tables to read; pyarrow is optional")


FORMS = [write_json, write_json_in_two_files, write_parquet, write_dataset]


@pytest.mark.parametrize("write", FORMS)
def test_every_form_gives_the_same_texts(
    tmp_path: Path, write: Callable[[Path, Sequence[str | None]], Path]
) -> None:
    path = write(tmp_path, [*TEXTS[:100], None, "", *TEXTS[100:]])
    texts, found, _ = collected(path, "text")
    assert texts == tuple(TEXTS)
    assert [file.name for file in found.skipped] == ["README.md"] * path.is_dir() * (
        write is write_json_in_two_files
    )


def test_records_are_prepared_like_the_same_text(tmp_path: Path) -> None:
    lines = write_json(tmp_path, TEXTS)
    command = ["--text", str(lines), "--json-key", "text", "--vocab-size", "300"]
    for _ in range(2):
        assert prepare.main([*command, "--output", str(tmp_path / "data")]) == 0
    prepared = prepare.load(tmp_path / "data")
    assert prepared is not None
    assert prepared.text_bytes == sum(len(text.encode()) for text in TEXTS)
    assert prepared.documents == len(TEXTS)


def test_json_lines_without_a_key_are_text_as_they_are(tmp_path: Path) -> None:
    lines = write_json(tmp_path, TEXTS)
    assert collected(lines)[0] == (lines.read_text(),)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{", r"a.jsonl, line 2 is not JSON in UTF-8; one object a line is expected"),
        (b"[" * 100_000, r"a.jsonl, line 2 is not JSON"),
        (b'{"text": "caf\xe9"}', r"a.jsonl, line 2 is not JSON in UTF-8"),
        (b'["text"]', r"line 2 is no object with 'text'"),
        (b'{"content": "a", "id": 1}', r"line 2 has no key 'text'; its keys: content, id"),
        (b'{"text": 3}', r"line 2 'text' is no text but 3"),
        (b'{"text": "\\ud83d"}', r"line 2 'text' holds half a character"),
    ],
)
def test_lines_that_are_no_records_are_named(tmp_path: Path, line: bytes, message: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "fine"}\n' + line + b"\n")
    with pytest.raises(UltraMemError, match=message):
        collected(tmp_path, "text")


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("content", r"--json-key content: .*a.parquet has no such column; it has id, text"),
        ("id", r"--json-key id: this column of .*a.parquet holds int64, not text"),
    ],
)
def test_columns_that_hold_no_text_are_refused(tmp_path: Path, key: str, message: str) -> None:
    file = write_parquet(tmp_path, TEXTS)
    with pytest.raises(UltraMemError, match=message):
        collected(file, key)


def test_a_damaged_table_is_named(tmp_path: Path) -> None:
    file = write_parquet(tmp_path, TEXTS)
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(UltraMemError, match=r"a.parquet cannot be read: "):
        collected(tmp_path, "text")


@pytest.mark.parametrize(
    ("packed", "wrong"),
    [
        (
            gzip.compress(b'{"text": "fine"}\n' * 9999)[:-20],
            "ended before the end-of-stream marker",
        ),
        (b'{"text": "not packed"}\n', "Not a gzipped file"),
        (gzip.compress(b"")[:10] + b"\xff" * 99, "Error -3 while decompressing"),
    ],
)
def test_a_damaged_gz_is_named(tmp_path: Path, packed: bytes, wrong: str) -> None:
    (tmp_path / "A.JSONL.GZ").write_bytes(packed)
    with pytest.raises(
        UltraMemError, match=rf"A\.JSONL\.GZ cannot be read: .*{wrong}.*Copy it again"
    ):
        list(read_records(tmp_path / "A.JSONL.GZ", "text"))


def test_a_folder_without_records_says_what_they_are(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("plain")
    with pytest.raises(
        UltraMemError, match=r"no text under 'text' in 1 file.* With --json-key JSON"
    ):
        prepare.prepare(tmp_path, tmp_path.parent / "out", 300, json_key="text")


@pytest.mark.parametrize(
    "state", ["{", "[]", '{"_data_files": []}', '{"_data_files": [{"filename": "../data.arrow"}]}']
)
def test_a_dataset_that_names_other_files_is_refused(tmp_path: Path, state: str) -> None:
    (tmp_path / "state.json").write_text(state)
    with pytest.raises(UltraMemError, match=r"its state.json does not name the files"):
        collected(tmp_path, "text")


def test_one_split_has_to_be_chosen(tmp_path: Path) -> None:
    for split in ("train", "test"):
        (tmp_path / split).mkdir()
        (tmp_path / split / "state.json").write_text("{}")
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    with pytest.raises(UltraMemError, match=r"holds the splits test, train. Give one of them"):
        collected(tmp_path, "text")
    with pytest.raises(UltraMemError, match=r"holds records. .* --json-key NAME"):
        collected(tmp_path / "train")


def test_what_is_missing_to_read_tables_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(UltraMemError, match=r'pip install "\.\[data\]" in the'):
        collected(tmp_path, "text")
