"""Collecting text: what is read, what is passed over, and what every refusal says."""

import io
import os
import re
from pathlib import Path

import pytest

from ultramem_megatron.data import text
from ultramem_megatron.data.collect import check_source, collect
from ultramem_megatron.data.files import Found
from ultramem_megatron.data.spool import Spool
from ultramem_megatron.errors import UltraMemError

ENOUGH = "All the words that are needed.\n" * 400


def write(folder: Path, files: dict[str, str | bytes]) -> Path:
    for name, content in files.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def collected(path: Path | None, key: str | None = None) -> tuple[tuple[str, ...], Found, Spool]:
    """The texts, what was found, and the spool."""
    file = io.BytesIO()
    spool, output = Spool(file), Path("no such folder")
    check_source(path, key, output)
    found = collect(path, key, output, spool)
    whole, texts, start = file.getvalue(), [], 0
    for length in spool.lengths:
        texts.append(whole[start : start + length].decode())
        start += length
    return tuple(texts), found, spool


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
    texts, found, spool = collected(tmp_path)
    assert texts == ("zeroth, without an ending", "first", "second" + ENOUGH, "third\n")
    assert (found.files, len(found.skipped)) == (4, 2)
    assert spool.num_bytes == len("zeroth, without an endingfirstsecondthird\n" + ENOUGH)


def test_single_file_needs_no_text_ending(tmp_path: Path) -> None:
    file = write(tmp_path, {"book": "été " * 5000}) / "book"
    texts, _, spool = collected(file)
    assert texts == ("été " * 5000,)
    assert (spool.num_bytes, spool.characters) == (6 * 5000, 4 * 5000)


def test_what_is_left_out_is_counted_and_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path, {"t/a.txt": ENOUGH, "t/no/b.txt": "b", "else/c.txt": "c", "d.txt": "linked"})
    (tmp_path / "t" / "folder").symlink_to(tmp_path / "else")
    (tmp_path / "t" / "nothing").symlink_to(tmp_path / "gone")
    (tmp_path / "t" / "file.txt").symlink_to(tmp_path / "d.txt")
    (tmp_path / "t" / "loop").symlink_to(tmp_path / "t")
    os.mkfifo(tmp_path / "t" / "pipe")
    scandir = os.scandir

    def forbidden(path: str) -> object:  # root, whom these tests may run as, may read all
        if str(path).endswith("/no"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", forbidden)
    texts, found, _ = collected(tmp_path / "t")
    assert texts == (ENOUGH, "linked")
    assert [path.name for path in found.unreadable] == ["no"]
    assert {path.name for path in found.links} == {"folder", "nothing", "loop"}
    printed = capsys.readouterr().out
    assert re.search(r"may not be read: 1 \(\S+/t/no\)", printed)
    assert re.search(r"links to folders or to nothing: 3 \(\S+/t/folder, ", printed)


def test_names_that_are_not_utf_8_are_read_and_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9"))
    write(folder, {"a.txt": ENOUGH, "empty.txt": ""})
    texts, found, _ = collected(folder)
    assert texts == (ENOUGH,)
    assert found.source == f"{tmp_path}/caf\\xe9"
    assert "caf\\xe9/empty.txt" in capsys.readouterr().out
    write(folder, {"a.txt": b"\xe9"})
    with pytest.raises(UltraMemError, match=r"caf\\xe9/a.txt is not UTF-8"):
        collected(folder)


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
        ({"u.txt": "utf-16".encode("utf-16")}, ".", r"for UTF-16: iconv -f utf-16 -t utf-8"),
        ({"cut.txt": "été".encode()[:-1]}, ".", r"cut.txt is not UTF-8: byte 0xc3 at offset 3"),
        ({"a.parquet": b"PAR1"}, "a.parquet", r"a.parquet: holds records. .* --json-key NAME"),
        ({"a.parquet": b"\0PAR1"}, ".", r"no text in 1 file.*a.parquet give --json-key"),
    ],
)
def test_unusable_text_is_refused_with_its_reason(
    tmp_path: Path, files: dict[str, str | bytes], path: str, message: str
) -> None:
    write(tmp_path, files)
    with pytest.raises(UltraMemError, match=message):
        collected(tmp_path / path)


@pytest.mark.parametrize("block", [1, 2, 3, 5, 64])
@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        (b"\xef\xbb\xbfone\r\n\r\ntwo\rthree\r", "one\n\ntwo\rthree\r"),
        ("é—🙂\r\n日本語".encode(), "é—🙂\n日本語"),
        (b"", ""),
        (b"abcdef\xe9", "is not UTF-8: byte 0xe9 at offset 6"),
        ("日本".encode() + b"\xff", "is not UTF-8: byte 0xff at offset 6"),
        (b"abcd\0", "is not text: zero byte at offset 4"),
    ],
)
def test_blocks_of_any_length_give_the_same_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int, raw: bytes, expected: str
) -> None:
    monkeypatch.setattr(text, "BLOCK", block)
    (tmp_path / "file").write_bytes(raw)
    try:
        found = "".join(text.read_text(tmp_path / "file"))
    except text.NotTextError as error:
        found = str(error).split(". ")[0]
    assert found == expected


def test_a_file_that_turns_out_not_to_be_text_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, {"a": "first", "b": b"long enough to be written\xff", "c": ENOUGH})
    with monkeypatch.context() as small:
        small.setattr(text, "BLOCK", 8)
        texts, _, spool = collected(tmp_path)
    assert texts == ("first", ENOUGH)
    (tmp_path / "b").unlink()
    assert collected(tmp_path)[2].digest() == spool.digest()


def test_the_digest_tells_texts_apart() -> None:
    digests = set()
    for texts in (["ab", "c"], ["a", "bc"], ["abc"], ["c", "ab"], ["ab", "c", "d"]):
        spool = Spool(None)
        for one in texts:
            spool.add(one)  # in chunks of a character
        whole = Spool(None)
        for one in texts:
            whole.add([one])
        assert whole.digest() == spool.digest()
        digests.add(spool.digest())
    assert len(digests) == 5


def test_standard_library_is_found_without_its_tests_and_other_packages() -> None:
    texts, found, spool = collected(None)
    assert found.source.endswith("standard library")
    together = "".join(texts)
    assert "def namedtuple(typename, field_names" in together  # collections/__init__.py
    assert "class BaseTestProtocol" not in together
    assert "class _MegatronLM" not in together
    assert spool.num_bytes > 3_000_000


@pytest.mark.parametrize("chunk", [1, 7, 499, 500, 501, 100_000])
def test_pieces_are_whole_and_end_at_lines(chunk: int) -> None:
    whole = "".join(f"line {i} of the text" + "\n" * (1 + (i % 7 == 0)) for i in range(1000))
    chunks = (whole[start : start + chunk] for start in range(0, len(whole), chunk))
    pieces = list(text.split_text(chunks, 500))
    assert "".join(pieces) == whole
    assert all(len(piece) <= 500 and piece.endswith("\n") for piece in pieces)
    assert sum(piece.endswith("\n\n") for piece in pieces) > 0.9 * len(pieces)
    assert pieces == list(text.split_text([whole], 500))


def test_text_without_lines_is_cut_anyway() -> None:
    assert list(text.split_text(["x" * 25], 10)) == ["x" * 10, "x" * 10, "x" * 5]
    blank = ["x" * 10 + " " * 30 + "y"]
    assert list(text.split_text(blank, 10)) == ["x" * 10, *[" " * 10] * 3, "y"]
