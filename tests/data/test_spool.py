"""Documents on disk: cut, shuffled, split and read back; what an earlier version did in memory."""

import os
import random
from pathlib import Path

import pytest

from ultramem_megatron.data import spool
from ultramem_megatron.data.text import split_text

SEED = 1234


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "spool"


def documents_of(path: Path, texts: list[str], seed: int = SEED) -> spool.Documents:
    with path.open("wb") as file:
        spooled = spool.Spool(file)
        for text in texts:
            spooled.add([text])
    return spool.cut(os.open(path, os.O_RDONLY), spooled, seed)


def read_all(documents: spool.Documents) -> list[str]:
    return [text for _, text in documents.texts()]


def in_memory(texts: list[str], seed: int) -> list[str]:
    """The documents, by the shortest way."""
    characters = sum(map(len, texts))
    limit = max(1024, min(32_768, characters // 200))
    pieces = [piece for text in texts for piece in split_text([text], limit) if piece.strip()]
    random.Random(seed).shuffle(pieces)
    return pieces


TEXTS = [
    "".join(f"Sentence {i} says something — naïve.\n" for i in range(20_000)),
    "short",
    "x" * 5000 + " " * 9000 + "y" * 10,
    "日本語" * 2000,
]


@pytest.mark.parametrize("block", [7, 1000, 4 << 20])
def test_documents_are_those_that_memory_would_give(
    path: Path, monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    monkeypatch.setattr(spool, "BLOCK", block)
    documents = documents_of(path, TEXTS)
    assert read_all(documents) == in_memory(TEXTS, SEED)
    assert documents.num_bytes == sum(len(text.encode()) for text in read_all(documents))


def test_one_long_text_becomes_many_shuffled_documents(path: Path) -> None:
    body = TEXTS[0]
    documents = read_all(documents_of(path, [body]))
    assert len(documents) >= spool.MIN_PIECES
    assert sorted("".join(documents).splitlines()) == sorted(body.splitlines())
    assert documents != read_all(documents_of(path, [body], seed=2))
    assert "".join(documents) != body


def test_a_split_and_batches_keep_all_documents_in_order(path: Path) -> None:
    documents = documents_of(path, TEXTS)
    first, rest = documents.split(10)
    assert read_all(first) + read_all(rest) == read_all(documents)
    assert len(first.order) == 10
    batches = list(documents.batches(50_000))
    assert len(batches) > 5
    assert all(size >= 50_000 for size, _ in batches[:-1])
    read = [text for _, places in batches for text in spool.read(documents.file, places)]
    assert read == read_all(documents)
    assert sum(size for size, _ in batches) == documents.num_bytes
