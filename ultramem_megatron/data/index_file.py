"""Megatron's indexed format: what PREFIX.idx says, and whether PREFIX.bin is what it describes.

The index is a header, the length of each sequence (int32, tokens), where each begins (int64,
bytes), and the sequences at which documents begin (int64). See Megatron's `indexed_dataset`.
"""

import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ultramem_megatron.errors import UltraMemError

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<QBQQ")
"""Version, code of the token type, sequences, entries of documents (one more than documents)."""
_VERSION = 1
_TOKEN_TYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
"""By Megatron's codes; 6 and 7 are of floating point, which no token is."""
_START = len(_MAGIC) + _HEADER.size
_LENGTH, _POINTER = np.dtype("<i4"), np.dtype("<i8")
_SAMPLE = 1 << 18  # entries looked at in each of three places: both ends and the middle
_OTHERS = "one of them is cut short, or they are of different data. Copy or make both again"


@dataclass(frozen=True)
class Index:
    """An index file, its header read.

    Attributes:
        prefix: path without the ending.
        tokens: type of the tokens in the .bin file.
        sequences: number of sequences.
        entries: number of entries that say where documents begin and the last one ends.
    """

    prefix: str
    tokens: np.dtype
    sequences: int
    entries: int

    @property
    def file(self) -> Path:
        """The index."""
        return Path(f"{self.prefix}.idx")

    @property
    def bin(self) -> Path:
        """The tokens."""
        return Path(f"{self.prefix}.bin")

    @property
    def documents(self) -> int:
        """Number of documents."""
        return self.entries - 1

    @classmethod
    def read(cls, prefix: str) -> "Index":
        """Reads the header of PREFIX.idx. Raises UltraMemError, naming the file; OSError."""
        file = Path(f"{prefix}.idx")
        size = file.stat().st_size
        with file.open("rb") as opened:
            magic, header = opened.read(len(_MAGIC)), opened.read(_HEADER.size)
        if magic != _MAGIC:
            raise UltraMemError(f"{file} is not an index of Megatron's: it begins otherwise.")
        if len(header) < _HEADER.size:
            raise UltraMemError(f"{file} is cut short: {size} bytes.")
        version, code, sequences, entries = _HEADER.unpack(header)
        if version != _VERSION:
            raise UltraMemError(f"{file} has version {version}; {_VERSION} is known.")
        if code not in _TOKEN_TYPES:
            raise UltraMemError(
                f"{file} has tokens of the unknown type {code}; known are "
                f"{', '.join(f'{c} ({t.__name__})' for c, t in _TOKEN_TYPES.items())}. Make the "
                "data set again."
            )
        if sequences == 0 or entries < 2:
            raise UltraMemError(f"{file} holds no documents.")
        end = _START + sequences * (_LENGTH.itemsize + _POINTER.itemsize)
        end += entries * _POINTER.itemsize
        if size < end:
            raise UltraMemError(f"{file} is cut short: {size:,} bytes of at least {end:,}.")
        return cls(prefix, np.dtype(_TOKEN_TYPES[code]), sequences, entries)

    def check_size(self) -> None:
        """Raises UltraMemError unless the .bin file is as long as the index says, and readable."""
        (last,) = self.lengths(self.sequences - 1, 1)
        (start,) = self.pointers(self.sequences - 1, 1)
        expected, found = int(start) + int(last) * self.tokens.itemsize, self.bin.stat().st_size
        os.close(os.open(self.bin, os.O_RDONLY))
        if found != expected:
            raise UltraMemError(
                f"{self.bin} has {found:,} bytes, its index {self.file.name} describes "
                f"{expected:,}: {_OTHERS}."
            )
        if found == 0:
            raise UltraMemError(f"{self.bin} is empty: all its documents are. Make it again.")

    def check_body(self) -> None:
        """Raises UltraMemError where lengths, beginnings and documents contradict each other.

        Looks at both ends and the middle; so at all of an index of up to 786,432 sequences.
        """
        for first, count in _places(self.sequences):
            lengths, starts = self.lengths(first, count), self.pointers(first, count)
            ends = starts + lengths.astype(np.int64) * self.tokens.itemsize
            if (lengths < 0).any() or (starts[1:] != ends[:-1]).any() or (first == 0 != starts[0]):
                self._contradicts(f"among sequences {first:,} to {first + count - 1:,}")
        for first, count in _places(self.entries):
            documents = self.document_entries(first, count)
            if (np.diff(documents) < 0).any() or (first == 0 != documents[0]):
                self._contradicts(f"among documents {first:,} to {first + count - 1:,}")
        if self.document_entries(self.entries - 1, 1)[0] != self.sequences:
            self._contradicts("where the last document ends")

    def lengths(self, first: int, count: int) -> np.ndarray:
        """Tokens of each sequence, int32 [count]."""
        return self._read(_LENGTH, _START, first, count)

    def pointers(self, first: int, count: int) -> np.ndarray:
        """Where each sequence begins in the .bin file, bytes, int64 [count]."""
        return self._read(_POINTER, _START + self.sequences * _LENGTH.itemsize, first, count)

    def document_entries(self, first: int, count: int) -> np.ndarray:
        """First sequences of documents, int64 [count]."""
        start = _START + self.sequences * (_LENGTH.itemsize + _POINTER.itemsize)
        return self._read(_POINTER, start, first, count)

    def _read(self, kind: np.dtype, start: int, first: int, count: int) -> np.ndarray:
        return np.fromfile(self.file, kind, count, offset=start + first * kind.itemsize)

    def _contradicts(self, where: str) -> None:
        raise UltraMemError(f"{self.file} contradicts itself {where}: damaged. Copy it again.")


def check_tokens(index: Index, vocab_size: int) -> None:
    """Raises UltraMemError where a token at either end or in the middle is not in the vocabulary.

    A partitioned embedding takes such tokens for zeros and trains on, without a word.
    """
    count = index.bin.stat().st_size // index.tokens.itemsize
    for first, size in _places(count):
        tokens = np.fromfile(
            index.bin, index.tokens, size, offset=first * index.tokens.itemsize
        ).astype(np.int64)
        for worst in (int(tokens.max()), int(tokens.min())):
            if not 0 <= worst < vocab_size:
                raise UltraMemError(
                    f"{index.bin} holds token {worst}, the model's vocabulary has {vocab_size} "
                    "entries: it was made with another tokenizer. Give --tokenizer-model and "
                    "--tokenizer-type as they were then, or make the data set again."
                )


def _places(count: int) -> Iterator[tuple[int, int]]:
    """First entry and number of entries: all, or those at both ends and in the middle."""
    if count <= 3 * _SAMPLE:
        yield 0, count
        return
    for first in (0, (count - _SAMPLE) // 2, count - _SAMPLE):
        yield first, _SAMPLE
