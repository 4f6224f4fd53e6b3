"""Lookup-reduce in the plainest form: gather rows, weight them, add them up per group.

S table rows, V value dim, T tokens, P picks per token, C cores, E expansion groups.
Source: UltraMem, arXiv 2411.12364, section 3.4 (eq. 14-15) and 3.5 (eq. 17).
"""

from torch import Tensor


def lookup_reduce_reference(
    table: Tensor, rows: Tensor, groups: Tensor, scores: Tensor, num_groups: int
) -> Tensor:
    """out[t, e, v] = sum over picks p in group e of scores[t, p, core of v] * table[rows[t, p], v].

    table (S, V); rows, groups (T, P) int64; scores (T, P, C); V is a multiple of C. Returns
    (T, E, V) in the table's dtype.

    With table [[1, 1], [10, 10]], rows [[0, 1]], groups [[1, 1]], scores [[[2, 0], [3, 1]]] and two
    groups the result is [[[0, 0], [32, 10]]].
    """
    tokens, picks, cores = scores.shape
    width = table.shape[1]
    weights = scores.to(table.dtype).repeat_interleave(width // cores, dim=2)
    weighted = table[rows] * weights
    out = weighted.new_zeros(tokens, num_groups, width)
    return out.scatter_add(1, groups.unsqueeze(-1).expand(tokens, picks, width), weighted)
