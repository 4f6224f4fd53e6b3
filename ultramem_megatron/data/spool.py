"""All text of a corpus in one file on disk, cut into documents, in a shuffled order.

Reading a corpus once into a file of our own keeps memory small whatever its size, lets any document
be read at any time, and makes a change of the source during the work harmless.
"""

import codecs
import hashlib
import os
import random
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import BinaryIO

import numpy as np

from ultramem_megatron.data.text import BLOCK, split_text

MAX_PIECE = 32_768  # characters; longer texts become several documents, so that both sides of
MIN_PIECE = 1_024  # the train/validation split hold parts of a corpus of few, long files
MIN_PIECES = 200  # aimed at, by shortening the pieces down to MIN_PIECE

Place = tuple[int, int]
"""Offset and size of a document in a spool, bytes."""


class Spool:
    """Texts one after the other, UTF-8; without a file, their digest and sizes alone."""

    def __init__(self, file: BinaryIO | None) -> None:
        self._file = file
        self._digest = hashlib.sha256()
        self.lengths = array("q")  # bytes of each text
        self.num_bytes = 0
        self.characters = 0

    def add(self, chunks: Iterable[str]) -> bool:
        """Append a text, unless it is blank or its chunks end in an exception."""
        digest, characters, size, blank = hashlib.sha256(), 0, 0, True
        try:
            for chunk in chunks:
                raw = chunk.encode()
                digest.update(raw)
                size, characters = size + len(raw), characters + len(chunk)
                blank = blank and not chunk.strip()
                if self._file is not None:
                    self._file.write(raw)
            if not blank:
                self._keep(digest.digest(), size, characters)
        finally:
            if self._file is not None and self._file.tell() != self.num_bytes:
                self._file.seek(self.num_bytes)  # the next text takes its place
        return not blank

    def digest(self) -> bytes:
        """Of all texts; "ab" and "c" have another than "a" and "bc"."""
        return self._digest.digest()

    def _keep(self, digest: bytes, size: int, characters: int) -> None:
        self._digest.update(digest)
        self.lengths.append(size)
        self.num_bytes += size
        self.characters += characters


@dataclass(frozen=True)
class Documents:
    """Where documents lie in a spool, in the order in which they are used.

    Attributes:
        file: descriptor of the spool, open for reading.
        offsets, sizes: of each piece, in the order of the spool; bytes.
        order: which piece comes when.
    """

    file: int
    offsets: array[int]
    sizes: array[int]
    order: array[int]

    @property
    def num_bytes(self) -> int:
        """Bytes of all documents."""
        sizes, order = np.frombuffer(self.sizes, np.intc), np.frombuffer(self.order, np.int64)
        return int(sizes[order].sum(dtype=np.int64))

    def split(self, first: int) -> tuple["Documents", "Documents"]:
        """The first documents, and the others."""
        return replace(self, order=self.order[:first]), replace(self, order=self.order[first:])

    def batches(self, size: int) -> Iterator[tuple[int, list[Place]]]:
        """Bytes and places of some documents at a time, of `size` bytes or one document more."""
        places: list[Place] = []
        held = 0
        for piece in self.order:
            places.append((self.offsets[piece], self.sizes[piece]))
            held += self.sizes[piece]
            if held >= size:
                yield held, places
                places, held = [], 0
        if places:
            yield held, places

    def texts(self) -> Iterator[tuple[int, str]]:
        """Bytes and text of each document."""
        for piece in self.order:
            size = self.sizes[piece]
            yield size, read(self.file, [(self.offsets[piece], size)])[0]


def read(file: int, places: Iterable[Place]) -> list[str]:
    """Documents of a spool, given by (offset, size); bytes."""
    return [os.pread(file, size, offset).decode() for offset, size in places]


def cut(file: int, spool: Spool, seed: int) -> Documents:
    """Cuts long texts into documents and shuffles them, the same way for the same seed.

    file: descriptor of the spool's file, open for reading.
    """
    limit = max(MIN_PIECE, min(MAX_PIECE, spool.characters // MIN_PIECES))
    offsets, sizes, start = array("q"), array("i"), 0
    for length in spool.lengths:
        for size, blank in _pieces(file, start, length, limit):
            if not blank:
                offsets.append(start)
                sizes.append(size)
            start += size
    order = array("q", range(len(offsets)))
    random.Random(seed).shuffle(order)
    return Documents(file, offsets, sizes, order)


def _pieces(file: int, start: int, length: int, limit: int) -> Iterator[tuple[int, bool]]:
    """Bytes of each piece of a text, and whether it is blank."""
    if length <= limit:  # so are its characters; blank texts are left out already
        yield length, False
        return
    for piece in split_text(_chunks(file, start, length), limit):
        yield len(piece.encode()), not piece.strip()


def _chunks(file: int, start: int, length: int) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8")()
    for offset in range(start, start + length, BLOCK):
        yield decoder.decode(os.pread(file, min(BLOCK, start + length - offset), offset))
