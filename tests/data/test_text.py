"""Collecting text: what is read, what is passed over, and what every refusal says."""

from pathlib import Path

import pytest

from ultramem_megatron.data import text
from ultramem_megatron.errors import UltraMemError

ENOUGH = "All the words that are needed.\n" * 400


def write(folder: Path, files: dict[str, str | bytes]) -> Path:
    for name, content in files.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def test_folder_is_read_in_sorted_order_and_only_its_visible_text(tmp_path: Path) -> None:
    write(
        tmp_path,
        {
            "b.md": "second" + ENOUGH,
            "a/z.txt": b"\xef\xbb\xbfthird\r\n",  # in a subfolder; byte order mark, CRLF
            "a.rst": "first",
            "Notes": "zeroth, without an ending",
            ".hidden.txt": "not this",
            ".git/x.txt": "nor this",
            "__pycache__/x.txt": "nor this",
            "empty.txt": " \n",
            "picture.png": b"\x89PNG\r\n\x1a\n\0\0",
        },
    )
    corpus = text.collect(tmp_path)
    assert corpus.texts == ("zeroth, without an ending", "first", "second" + ENOUGH, "third\n")
    assert (corpus.files, corpus.skipped) == (4, 2)
    assert corpus.num_bytes == len("zeroth, without an endingfirstsecondthird\n" + ENOUGH)


def test_single_file_needs_no_text_ending(tmp_path: Path) -> None:
    file = write(tmp_path, {"book": "été " * 5000}) / "book"
    corpus = text.collect(file)
    assert corpus.texts == ("été " * 5000,)
    assert corpus.num_bytes == 6 * 5000


@pytest.mark.parametrize(
    ("files", "path", "message"),
    [
        ({}, "absent", r"--text .*absent: no such file or folder. Give an existing one"),
        ({}, ".", r"--text .*: the folder holds no files"),
        ({".hidden": ENOUGH}, ".", r"holds no files \(hidden ones do not count\)"),
        ({"a.txt": "", "b.bin": b"\0\1"}, ".", r"no text in 2 file\(s\)"),
        ({"a.txt": "short"}, ".", r"5 characters in 1 file\(s\), but at least 10000 are needed"),
        ({"a.txt": ENOUGH, "b.txt": b"caf\xe9"}, ".", r"b.txt is not UTF-8: byte 0xe9 at offset 3"),
        ({"b.txt": b"caf\xe9"}, "b.txt", r"b.txt is not UTF-8: .*iconv -f latin1 -t utf-8"),
        ({"x": b"ab\0"}, "x", r"x is not text: zero byte at offset 2"),
        ({"u.txt": "utf-16".encode("utf-16")}, ".", r"u.txt is not UTF-8: byte 0xff at offset 0"),
    ],
)
def test_unusable_text_is_refused_with_its_reason(
    tmp_path: Path, files: dict[str, str | bytes], path: str, message: str
) -> None:
    write(tmp_path, files)
    with pytest.raises(UltraMemError, match=message):
        text.collect(tmp_path / path)


def test_standard_library_is_found_without_its_tests_and_other_packages() -> None:
    corpus = text.collect(None)
    assert corpus.source.endswith("standard library")
    together = "".join(corpus.texts)
    assert "def namedtuple(typename, field_names" in together  # collections/__init__.py
    assert "class BaseTestProtocol" not in together
    assert "class _MegatronLM" not in together
    assert corpus.num_bytes > 3_000_000


def test_pieces_are_whole_and_end_at_lines() -> None:
    lines = [f"line {i} of the text" + "\n" * (1 + (i % 7 == 0)) for i in range(1000)]
    pieces = list(text.split_text("".join(lines), 500))
    assert "".join(pieces) == "".join(lines)
    assert all(len(piece) <= 500 and piece.endswith("\n") for piece in pieces)
    assert sum(piece.endswith("\n\n") for piece in pieces) > 0.9 * len(pieces)


def test_text_without_lines_is_cut_anyway_and_blank_pieces_are_left_out() -> None:
    assert list(text.split_text("x" * 25, 10)) == ["x" * 10, "x" * 10, "x" * 5]
    assert list(text.split_text("x" * 10 + " " * 30 + "y", 10)) == ["x" * 10, "y"]


def test_one_long_file_becomes_many_shuffled_documents() -> None:
    body = "".join(f"Sentence {i} says something.\n" for i in range(20_000))
    corpus = text.Corpus("book", 1, 0, (body,))
    documents = text.split_into_documents(corpus, seed=1)
    assert len(documents) >= text.MIN_PIECES
    assert sorted("".join(documents).splitlines()) == sorted(body.splitlines())
    assert documents == text.split_into_documents(corpus, seed=1)
    assert documents != text.split_into_documents(corpus, seed=2)
    assert "".join(documents) != body
