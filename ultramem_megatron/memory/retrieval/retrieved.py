"""What retrieval hands to the value table."""

from typing import NamedTuple

from torch import Tensor


class Retrieved(NamedTuple):
    """The values a token reads, as virtual addresses with one score per core.

    addresses: (T, H*m) int64 in 0..(e*n)^2-1, row key * (e*n) + column key.
    scores: (T, H*m, C) float32 (float64 for float64 inputs), within a head best first.
    """

    addresses: Tensor
    scores: Tensor

    @classmethod
    def by_head(cls, addresses: Tensor, scores: Tensor) -> "Retrieved":
        """Of addresses (T, H, m) and scores (T, H, m, C): a token's heads follow each other."""
        return cls(addresses.flatten(1), scores.flatten(1, 2))
