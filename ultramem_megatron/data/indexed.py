"""Writes tokens in Megatron's indexed format: PREFIX.bin (tokens) and PREFIX.idx (documents)."""

import logging
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

_COUNTED = 1 << 20  # tokens whose occurrences are counted at a time


def write(
    prefix: Path, documents: Iterable[Sequence[int] | np.ndarray], vocab_size: int
) -> np.ndarray:
    """Writes the documents and returns how often each token occurs.

    Args:
        prefix: path without ending; what goes after `--train-data-path` and the like.
        documents: token ids, the end-of-document token included.
        vocab_size: decides the width of a token on disk (2 bytes up to 65,500 entries).

    Returns:
        Counts, int64 [vocab_size].
    """
    # Takes seconds (it pulls in torch), and a preparation that is already done needs none of it.
    # Its complaints about missing GPU packages do not matter here.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=DType.optimal_dtype(vocab_size))
    counts = np.zeros(vocab_size, dtype=np.int64)
    uncounted: list[Sequence[int] | np.ndarray] = []
    held = 0
    for tokens in documents:
        builder.add_document(tokens, [len(tokens)])
        uncounted.append(tokens)
        held += len(tokens)
        if held >= _COUNTED:  # one by one it would take a pass over the vocabulary each
            counts += _count(uncounted, vocab_size)
            uncounted, held = [], 0
    builder.finalize(f"{prefix}.idx")
    return counts + _count(uncounted, vocab_size)


def _count(documents: Sequence[Sequence[int] | np.ndarray], vocab_size: int) -> np.ndarray:
    tokens = np.concatenate([np.zeros(0, np.int64), *documents])
    return np.bincount(tokens.astype(np.int64), minlength=vocab_size)
