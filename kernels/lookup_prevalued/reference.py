"""Lookup of values behind pre-values, in the plainest form: the two lookups, one after the other.

N rows of both tables, V value dim, K pre-value dim, T tokens, P picks per token, C cores, E groups.
Source: UltraMemV2, arXiv 2508.18756 (pre-values); PEER, arXiv 2407.04153 (with gelu).
"""

from torch import Tensor

from ultramem_megatron.kernels.lookup_dot import lookup_dot_reference
from ultramem_megatron.kernels.lookup_prevalued.activations import activation
from ultramem_megatron.kernels.lookup_reduce import lookup_reduce_reference


def lookup_prevalued_reference(
    table: Tensor,
    pre_table: Tensor,
    rows: Tensor,
    groups: Tensor,
    scores: Tensor,
    x: Tensor,
    num_groups: int,
    act: str = "none",
) -> Tensor:
    """out[t, e, v] = sum over picks p in group e of a[t, p] s[t, p, core of v] V[rows[t, p], v].

    a[t, p] = act(<P[rows[t, p]], x[t]>), with V `table` (N, V), P `pre_table` (N, K), both in one
    dtype, s `scores` (T, P, C), x (T, K); rows, groups (T, P) int64; V is a multiple of C. act: see
    `activation`. Returns (T, E, V) in the table's dtype.

    With table [[1, 1], [10, 10]], pre_table [[1], [2]], rows [[0, 1]], groups [[0, 0]], scores
    [[[2, 0], [3, 1]]], x [[5]] and one group the result is [[[310, 100]]].
    """
    gates = activation(act)(lookup_dot_reference(pre_table, rows, x)).unsqueeze(2)
    return lookup_reduce_reference(table, rows, groups, scores * gates, num_groups)
