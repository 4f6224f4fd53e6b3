"""Which rows of a value table a batch may move: those that it reads, and ordinary text does not.

Sparse memory finetuning (arXiv 2510.15103, section 3): rows are ranked by TF-IDF, the frequency of
a row among the reads of the batch times log((B + 1) / (b + 1)), where b of the B batches of a
background text read it. N rows.
"""

import torch
from torch import Tensor


def rarity(background: Tensor, batches: int) -> Tensor:
    """log((B + 1) / (b + 1)) of each row, float64 (N,): 0 where every background batch reads it.

    background: b of each row, (N,) int64. batches: B. Computed on the CPU: a logarithm that another
    device rounds otherwise would break ties otherwise.
    """
    return ((batches + 1) / (background.cpu().double() + 1)).log()


def choose_rows(reads: Tensor, rarity: Tensor, most: int) -> Tensor:
    """Of the rows that a batch read, the `most` with the highest score, ascending, int64.

    reads: (N,) of the whole batch, integers. rarity: (N,) as above. Ties go to the lower rows. The
    frequency's denominator is the same for all rows of a batch and is left out.
    """
    rows = reads.nonzero().flatten()
    scores = reads[rows] * rarity[rows]
    best = torch.sort(scores, descending=True, stable=True).indices[:most]
    return rows[best].sort().values
