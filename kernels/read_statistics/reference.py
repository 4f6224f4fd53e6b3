"""Statistics of a forward in the plainest form: counts, means, a deviation and a cosine.

T tokens, P picks, C cores, Q queries, S = 2 sides, D width of the output.
"""

from typing import NamedTuple

import torch
from torch import Tensor

COMPARED = 256
"""Tokens whose queries are compared, at most twice as many."""


class Counting(NamedTuple):
    """Which counter a read of one of `num_values` values has.

    With `shared` none that of its row. Else the row's place is row * stride % num_values; the first
    `own` places have a counter each, the others share those behind: own + place % shared.
    """

    num_values: int
    own: int
    shared: int
    stride: int

    def of(self, rows: Tensor) -> Tensor:
        """The counter of each row, same shape, int64."""
        if not self.shared:
            return rows
        place = rows * self.stride % self.num_values
        return torch.where(place < self.own, place, self.own + place % self.shared)


@torch.no_grad()
def add_statistics_reference(
    sums: Tensor,
    hits: Tensor,
    counting: Counting,
    addresses: Tensor,
    query: Tensor,
    scores: Tensor,
    output: Tensor,
    topk: int,
) -> None:
    """Add one forward's figures to sums (4,), float32, and its reads to hits, int32, in place.

    The figures: mean of the scores (T, P, C) of each head's best pick, the first of every `topk`;
    mean of all scores; standard deviation of the output (..., D); mean cosine of the queries
    (T, Q, S, K), see `cosine_between`. addresses (T, P): int64, group * num_values + row.
    """
    add_reads(hits, counting.of(addresses % counting.num_values))
    figures = (scores[:, ::topk].mean(), scores.mean(), output.float().std(), cosine_between(query))
    sums += torch.stack([figure.float() for figure in figures])


def add_reads(reads: Tensor, rows: Tensor) -> None:
    """One more read (N,) for each of `rows`, any shape, int64."""
    flat = rows.flatten()
    reads.scatter_add_(0, flat, torch.ones_like(flat, dtype=reads.dtype))


def cosine_between(query: Tensor) -> Tensor:
    """Mean cosine between the queries of different tokens: near 1 all tokens read the same values.

    query: (T, Q, S, K). Of tokens at even distances, some hundreds at most, over queries and
    sides; a scalar, 0 for a single token.
    """
    some = query[:: max(1, len(query) // COMPARED)].float()
    count = len(some)
    # The square of a sum of unit vectors holds each pair twice, and each with itself.
    squares = torch.nn.functional.normalize(some, dim=-1).sum(0).square().sum(-1)
    return ((squares - count) / max(1, count * (count - 1))).mean()
