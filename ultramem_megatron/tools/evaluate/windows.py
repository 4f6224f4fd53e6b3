"""A stream of tokens cut into windows in which every token but the first is predicted once.

B batch, S window length.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """Windows side by side; a shorter one is filled up at its end."""

    tokens: Tensor  # (B, S) int64
    targets: Tensor  # (B, S) int64, the token after each
    counts: Tensor  # (B, S) bool, whether a target is one, not filling


def count_windows(tokens: int, length: int) -> int:
    """How many windows of `length` targets a stream has; the last may be shorter."""
    return max(0, -(-(tokens - 1) // length))


def batches(
    stream: np.ndarray, length: int, batch: int, replica: int = 0, replicas: int = 1
) -> Iterator[Batch]:
    """Every `replicas`-th window from window `replica` on, `batch` of them at a time.

    Window i reads tokens i*length .. (i+1)*length - 1 and predicts each one's successor. stream:
    (N,) integers of any width.
    """
    own = range(replica, count_windows(len(stream), length), replicas)
    for first in range(0, len(own), batch):
        yield _batch(stream, length, own[first : first + batch])


def rolling_windows(
    tokens: Sequence[int], prefix: int, length: int
) -> Iterator[tuple[list[int], list[int]]]:
    """Context and continuation of each window of a text, as lm-evaluation-harness cuts it.

    Every token is in one continuation. Windows read `length` tokens: the first starts with
    `prefix`, the last, which has fewer to predict, sees more of what is before them.
    """
    for start in range(0, len(tokens), length):
        end = min(start + length, len(tokens))
        before = list(tokens[end - length - 1 : start]) if start else [prefix]
        yield before, list(tokens[start:end])


def _batch(stream: np.ndarray, length: int, windows: range) -> Batch:
    tokens = torch.zeros(len(windows), length + 1, dtype=torch.int64)
    counts = torch.zeros(len(windows), length, dtype=torch.bool)
    for row, window in enumerate(windows):
        piece = stream[window * length : (window + 1) * length + 1].astype(np.int64)
        tokens[row, : len(piece)] = torch.from_numpy(piece)
        counts[row, : len(piece) - 1] = True
    longest = int(counts.sum(1).max())
    return Batch(tokens[:, :longest], tokens[:, 1 : longest + 1], counts[:, :longest])
