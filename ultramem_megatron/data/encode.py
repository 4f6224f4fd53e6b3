"""Documents to tokens, in several processes; the order of the documents stays.

Each process reads its documents from the spool itself and hands back arrays, so that what passes
between processes is small beside the work.
"""

import contextlib
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from ultramem_megatron.data import spool
from ultramem_megatron.data.tokenizer import END_OF_DOCUMENT
from ultramem_megatron.errors import UltraMemError

BATCH = 1 << 20  # bytes of text in one call of the tokenizer
WORTH = 4 << 20  # bytes of text that pay for starting another process
_AHEAD = 3  # batches given to each process before its first is asked back


@dataclass
class Encoder:
    """A tokenizer and a spool's file, open for reading."""

    tokenizer: Tokenizer
    file: int

    def __post_init__(self) -> None:
        # A document that spells a special token's name must not end early.
        self.tokenizer.encode_special_tokens = True
        end = self.tokenizer.token_to_id(END_OF_DOCUMENT)
        assert end is not None, "train() puts the end-of-document token into every vocabulary"
        self._end: int = end

    def encode(self, places: Iterable[spool.Place]) -> list[np.ndarray]:
        """Tokens of each document with the end-of-document token, int32."""
        texts = spool.read(self.file, places)
        found = self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array([*encoding.ids, self._end], dtype=np.int32) for encoding in found]


def encode(
    tokenizer: Tokenizer, file: Path, documents: spool.Documents, workers: int
) -> Iterator[tuple[int, list[np.ndarray]]]:
    """Bytes of text and tokens of some documents at a time, in the order of the documents.

    workers: processes at most; fewer where there is little to do.

    Raises:
        UltraMemError: one of the processes was killed.
    """
    useful = min(workers, documents.num_bytes // WORTH)
    batches = documents.batches(BATCH)
    if useful < 2:
        encoder = Encoder(tokenizer, documents.file)
        for size, places in batches:
            yield size, encoder.encode(places)
        return
    pool = ProcessPoolExecutor(
        useful,
        multiprocessing.get_context("spawn"),  # the tokenizer's threads do not survive a fork
        _start,
        (tokenizer.to_str(), file),
    )
    try:
        yield from _in_order(pool, batches, useful * _AHEAD)
    except BrokenProcessPool:
        raise UltraMemError(
            f"one of {useful} processes that encode was killed, most often for want of memory. "
            "Give fewer --workers."
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _in_order(
    pool: ProcessPoolExecutor, batches: Iterator[tuple[int, list[spool.Place]]], ahead: int
) -> Iterator[tuple[int, list[np.ndarray]]]:
    waiting: deque[tuple[int, Future[list[np.ndarray]]]] = deque()
    for size, places in batches:
        waiting.append((size, pool.submit(_encode, places)))
        if len(waiting) >= ahead:
            size, done = waiting.popleft()
            yield size, done.result()
    for size, done in waiting:
        yield size, done.result()


_encoder: Encoder | None = None  # of a worker process


def _start(tokenizer: str, file: Path) -> None:
    global _encoder
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent's to handle
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one thread: the processes are many
    _encoder = Encoder(Tokenizer.from_str(tokenizer), os.open(file, os.O_RDONLY))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None, "workers have one"
    with contextlib.suppress(OSError):
        parent.join()
    os._exit(1)  # it was killed; nobody will ask for more


def _encode(places: list[spool.Place]) -> list[np.ndarray]:
    assert _encoder is not None, "_start() comes first"
    return _encoder.encode(places)
