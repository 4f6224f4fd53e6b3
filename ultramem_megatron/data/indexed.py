"""Writes tokens in Megatron's indexed format: PREFIX.bin (tokens) and PREFIX.idx (documents)."""

import logging
import warnings
from collections.abc import Iterable
from pathlib import Path

import numpy as np


def write(prefix: Path, documents: Iterable[list[int]], vocab_size: int) -> np.ndarray:
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
    for tokens in documents:
        builder.add_document(tokens, [len(tokens)])
        counts += np.bincount(tokens, minlength=vocab_size)
    builder.finalize(f"{prefix}.idx")
    return counts
