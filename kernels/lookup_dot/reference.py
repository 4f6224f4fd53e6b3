"""Lookup-dot in the plainest form: gather rows, multiply, sum.

N table rows, K their width, T tokens, P picks per token.
Source: UltraMemV2, arXiv 2508.18756 (pre-values); PEER, arXiv 2407.04153 (input weights).
"""

from torch import Tensor

from ultramem_megatron.kernels.precision import at_least_float32


def lookup_dot_reference(table: Tensor, rows: Tensor, x: Tensor) -> Tensor:
    """out[t, p] = <table[rows[t, p]], x[t]>.

    table (N, K); rows (T, P) int64; x (T, K), taken in the table's dtype. Returns (T, P), float32
    (float64 for a float64 table).

    With table [[1, 2], [10, 20]], rows [[1, 0, 1]] and x [[3, 1]] the result is [[50, 5, 50]].
    """
    vectors = at_least_float32(x.to(table.dtype)).unsqueeze(1)
    return (at_least_float32(table[rows]) * vectors).sum(2)
