"""Which heads and ranks read the same query. Letters as in reference.py; Q queries."""

from torch import Tensor


def per_head_and_rank(query: Tensor, heads: int, ranks: int) -> Tensor:
    """(T, H, S, R, K) of a query as `side_topk` takes it; a view where each serves one, or one all.

    Of an odd number of heads the last has its query alone.
    """
    tokens, queries, sides, _, width = query.shape
    each = -(-heads // queries)
    shape = (tokens, queries, each, sides, ranks, width)
    return query.unsqueeze(2).expand(shape).flatten(1, 2)[:, :heads]


def queries_apart(heads: int, queries: int) -> int:
    """Of how many queries products are made: as many as there are, or one for each head."""
    return queries if heads % queries == 0 else heads
