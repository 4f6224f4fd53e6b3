"""What the kernels of the lookup behind pre-values take and return, whichever they are.

Letters as in reference.py.
"""

from typing import NamedTuple

from torch import Tensor


class Picks(NamedTuple):
    """Tables (N, V) and (N, K), what is picked of them, and the tokens' inputs.

    rows, groups: (T, P) int64. scores: (T, P, C), at least float32. x: (T, K) in the tables' dtype.
    """

    table: Tensor
    pre_table: Tensor
    rows: Tensor
    groups: Tensor
    scores: Tensor
    x: Tensor


class Gradients(NamedTuple):
    """Of scores (T, P, C), inputs (T, K) and products (T, P)."""

    scores: Tensor
    x: Tensor
    dots: Tensor
