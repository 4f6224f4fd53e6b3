"""Keys as all scores come out of one batched product: nothing copied, nothing added up after.

Keys that read the same numbers of a query lie beside each other, with rows of zeros up to a
multiple of 64: products and kernels are several times faster where rows of scores start at
multiples of 16 bytes, and the selection passes over the scores of zeros.

Letters as in reference.py; A = N, aligned. G queries, each of H/G heads. L slices of a query that
have products of their own: R, or 1 where all ranks read the same.
"""

from typing import NamedTuple

from torch import Tensor

ALIGNED = 64


class Products(NamedTuple):
    """Sizes of the scores (G, S, L, T, R/L, H/G, A), as products leave them: (G*S*L, T, ...)."""

    tokens: int
    queries: int
    sides: int
    slices: int
    ranks: int
    own_heads: int
    width: int

    @property
    def heads(self) -> int:
        """H."""
        return self.queries * self.own_heads

    def strides(self) -> tuple[int, int, int, int, int]:
        """In scores: from rank to rank, query to query, one's head to the next, side and token."""
        by_token = self.ranks // self.slices * self.own_heads * self.width
        by_slice = self.tokens * by_token
        by_rank = by_slice if self.slices > 1 else self.own_heads * self.width
        by_side = self.slices * by_slice
        return by_rank, self.sides * by_side, self.width, by_side, by_token


def products(query: Tensor, rows: Tensor) -> Products:
    """Of a query (T, G, S, L, K) with rows (G, S, R, H/G, A, K)."""
    tokens, queries, sides, slices, _ = query.shape
    return Products(tokens, queries, sides, slices, *rows.shape[2:5])


def stored(keys: Tensor, queries: int) -> Tensor:
    """The keys (H, S, N, R, K) as rows (G, S, R, H/G, A, K), contiguous."""
    rows = keys.unflatten(0, (queries, -1)).permute(0, 2, 4, 1, 3, 5)
    count = rows.shape[4]
    zeros = rows.new_zeros(*rows.shape[:4], count + -count % ALIGNED, rows.shape[5])
    return zeros.slice_scatter(rows, 4, 0, count)
