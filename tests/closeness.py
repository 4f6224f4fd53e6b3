"""Comparisons that say what differs, with tolerances that come from the dtype.

How far two correct results may be apart, relative to their norm:

- Every operation rounds by at most u = eps / 2. Roundings of different operations are independent,
  so over a sum of n products they add up like sqrt(n), not n (Higham and Mary 2019, "A new approach
  to probabilistic rounding error analysis"): by norm to u sqrt(n) at most. Twice that is allowed.
- Two results of such a sum, in two orders, are twice as far apart: 2 eps sqrt(n).
- Results that pass through several sums one after the other: n is the sum of their lengths.
- A sum that cancels loses what its terms have more than itself: `condition` is their ratio.
- Kept in a narrower dtype than it was summed in, each result is rounded once more: eps for both.

Where a float64 truth and torch's own result in the same dtype are at hand, torch's error is the
measure instead: `assert_rounds_no_worse`.
"""

import math

import torch
from torch import Tensor

from ultramem_megatron.tools.verify_parallel.whole_model import relative_error

__all__ = ["assert_close", "assert_rounds_no_worse", "relative_error", "rounding"]


def rounding(
    dtype: torch.dtype, terms: int = 1, *, sums: torch.dtype | None = None, condition: float = 1.0
) -> float:
    """How far apart two results of `terms` products may be, relative to their norm.

    dtype: what the result is kept in. sums: what it is added up in, None for the same dtype.
    condition: norm of what is added up over the norm of the sum. The module says where it is from.
    """
    kept = 0.0 if sums is None else torch.finfo(dtype).eps
    return kept + 2 * torch.finfo(sums or dtype).eps * math.sqrt(terms) * condition


def assert_close(actual: Tensor, expected: Tensor, tolerance: float, name: str = "tensor") -> None:
    """Assert equal shapes and a relative error below `tolerance`; NaN anywhere fails."""
    assert actual.shape == expected.shape, f"{name}: {actual.shape} instead of {expected.shape}"
    assert torch.isfinite(actual).all(), f"{name} holds NaN or infinity"
    error = relative_error(actual, expected)
    assert error <= tolerance, f"{name}: relative error {error:.3e} > {tolerance:.1e}"


def assert_rounds_no_worse(
    found: Tensor, plain: Tensor, truth: Tensor, floor: float, name: str = "tensor"
) -> None:
    """`found` is at most twice as far from the float64 `truth` as `plain`, torch in its dtype.

    floor: what is allowed where torch happens to be exact, as of `rounding`.
    """
    assert found.dtype == plain.dtype, f"{name}: {found.dtype} instead of {plain.dtype}"
    own = relative_error(plain.double(), truth)
    assert_close(found.double(), truth, 2 * own + floor, name)
