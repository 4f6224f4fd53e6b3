"""Corpora: what is taken from the dictionaries, and what is said where they cannot be had."""

import gzip
import re
from pathlib import Path

import pytest

from ultramem_megatron.data import corpora
from ultramem_megatron.errors import UltraMemError

ENTRY = """Absolution \\Ab`so*lu"tion\\, n. [F. absolution.]
   1. An absolving, or {setting} free
      from guilt. [1913 Webster]
"""
NOUNS = """  1 This is the licence.
00001740 03 n 01 entity 0 003 ~ 00001930 n 0000 | that which is perceived; "he is one"
00001930 03 n 02 physical_entity 0 thing(a) 1 001 @ 00001740 n 0000 | an entity that exists
00001940 03 n 01 entity 1 001 @ 00001740 n 0000 | a second meaning of the word
00001950 03 n 01 stub 0 001 @ 00001740 n 0000 | too short
"""


def digits(number: int) -> str:
    """`number` in dictd's base 64."""
    alphabet = corpora._DICTD_DIGITS
    return alphabet[number // 64] + alphabet[number % 64]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "root"
    (folder / "usr/share/dictd").mkdir(parents=True)
    (folder / "usr/share/wordnet").mkdir()
    (folder / corpora.GCIDE).write_bytes(gzip.compress(b"#" * 70 + ENTRY.encode()))
    index = f"00-database-info\tA\tB\nabsolution\t{digits(70)}\t{digits(len(ENTRY))}\n"
    (folder / corpora.GCIDE_INDEX).write_text(index)
    for part in corpora.PARTS_OF_SPEECH:
        text = NOUNS if part == "noun" else ""
        (folder / "usr/share/wordnet" / f"data.{part}").write_text(text)
    return folder


def test_entries_are_lines_without_markup(root: Path) -> None:
    assert list(corpora.gcide_entries(root)) == [
        "absolution: 1. An absolving, or setting free from guilt."
    ]


def test_glosses_and_definitions(root: Path) -> None:
    glosses = list(corpora.wordnet_glosses(root))
    assert glosses[1] == (["physical entity", "thing"], "noun", "an entity that exists")
    assert list(corpora.noun_definitions(glosses)) == [
        ("entity", "that which is perceived"),
        ("physical entity", "an entity that exists"),
    ]


def test_another_edition_is_refused(root: Path) -> None:
    with pytest.raises(UltraMemError, match=r"gcide.dict.dz has SHA-256 .* --any-edition"):
        corpora.check(root)


def test_fetch_unpacks_once(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Path] = []

    def unpacked(folder: Path) -> Path:
        calls.append(folder)
        return root

    monkeypatch.setattr(corpora, "_unpacked", unpacked)
    out = tmp_path / "out"
    for _ in range(2):
        text = corpora.fetch(out, any_edition=True)
    assert len(calls) == 1
    assert sorted(file.name for file in text.iterdir()) == [
        "gcide.txt",
        "stdlib.txt",
        "wordnet.txt",
    ]
    assert (out / "definitions.tsv").read_text().startswith("entity\tthat which is perceived\n")
    with pytest.raises(UltraMemError, match="SHA-256"):
        corpora.fetch(out)  # the folder is of an unknown edition


def test_nothing_of_others_is_replaced(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corpora, "_unpacked", lambda _: root)
    out = tmp_path / "out"
    for name in ("packages/thesis.tex", "text/gcide.txt", "definitions.tsv"):
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text("mine")
    with pytest.raises(UltraMemError, match="out: was not made by this command"):
        corpora.fetch(out, any_edition=True)
    assert all(file.read_text() == "mine" for file in out.rglob("*") if file.is_file())
    corpora.fetch(tmp_path / "ours", any_edition=True)
    (tmp_path / "ours" / "packages").mkdir()
    (tmp_path / "ours" / "packages" / "thesis.tex").write_text("mine")
    (tmp_path / "ours" / "definitions.tsv").write_text("cut short")
    corpora.fetch(tmp_path / "ours", any_edition=True)
    assert (tmp_path / "ours" / "packages" / "thesis.tex").read_text() == "mine"
    assert (tmp_path / "ours" / "definitions.tsv").read_text() != "cut short"


@pytest.mark.parametrize(
    ("tools", "message"),
    [
        ((), r"error: apt-get and dpkg-deb not found: the dictionaries come from Debian's"),
        (("apt-get", "dpkg-deb"), r"error: apt-get download .* failed: no such host.*network"),
    ],
)
def test_offline(
    tools: tuple[str, ...],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    programs = tmp_path / "bin"
    programs.mkdir()
    for tool in tools:
        (programs / tool).write_text("#!/bin/sh\necho no such host >&2; exit 100\n")
        (programs / tool).chmod(0o755)
    monkeypatch.setenv("PATH", str(programs))
    assert corpora.main(["--output", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert re.search(message, error), error
