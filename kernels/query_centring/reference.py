"""Centring in the plainest form: a subtraction, sums, and a running mean of them.

D channels.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Centring(NamedTuple):
    """mean (D,), taken off; sums (D + 1,), to which inputs and their number are added, or None."""

    mean: Tensor
    sums: Tensor | None


def centred_reference(x: Tensor, centring: Centring) -> Tensor:
    """x (..., D) minus the mean, in its dtype; where there are sums x is added to them.

    With x [[1, 2], [3, 4]] and mean [1, 1] the result is [[0, 1], [2, 3]], and sums of zeros become
    [4, 6, 2].
    """
    mean, sums = centring
    if sums is not None:
        flat = x.detach().flatten(0, -2)
        sums[:-1].add_(flat.sum(0, dtype=mean.dtype))
        sums[-1:].add_(len(flat))
    return x - mean.to(x.dtype)


@torch.no_grad()
def update_mean_reference(mean: Tensor, updates: Tensor, sums: Tensor, momentum: float) -> None:
    """Move the mean (D,) to that of the sums (D + 1,), in place; the sums become zeros.

    updates (1,): how often it was moved; the first 1 / (1 - momentum) updates weigh the same. Sums
    of nothing, or not finite ones, leave mean and updates alone.

    With mean [1], one update and sums [6, 2] the mean becomes [2], of two updates.
    """
    total, count = sums[:-1], sums[-1:]
    # On the device throughout: a step waits for nothing.
    good = (count > 0) & total.isfinite().all()
    further = updates + 1
    share = torch.maximum(1 / further, torch.full_like(further, 1 - momentum))
    moved = torch.lerp(mean, total / count, share)
    mean.copy_(torch.where(good, moved, mean))
    updates.copy_(torch.where(good, further, updates))
    sums.zero_()
