"""What the backward of the lookup behind pre-values returns, whichever kernels run it."""

from typing import NamedTuple

from torch import Tensor


class Gradients(NamedTuple):
    """Of scores (T, P, C), inputs (T, K) and products (T, P)."""

    scores: Tensor
    x: Tensor
    dots: Tensor
