"""The filter's update in the plainest form: a decomposition, and a sign.

C cores, H heads, R Tucker rank. Source: UltraMem, arXiv 2411.12364, eq. 7-10 and 16.
"""

import torch
from torch import Tensor

from ultramem_megatron.kernels.precision import at_least_float32


@torch.no_grad()
def update_filter_reference(cores: Tensor, u: Tensor, t: Tensor) -> Tensor:
    """Make u and t (H, R) the leading singular pair of the sum of the cores, in place.

    cores: (C, H, R, R), any floating dtype; u and t: of its dtype, at least float32. The pair is
    determined up to a common sign, which decides which quadrant of the grid is shortlisted: the
    sign nearer to what was in u and t (in L1) is kept, that of the decomposition on a tie. Returns
    the singular values (H, R), largest first.

    With one core [[0, 2], [1, 0]], u was (-1, 0) and t (0, -1): they stay, and 2 and 1 come back.
    """
    left, values, right = torch.linalg.svd(at_least_float32(cores).sum(0))
    new_u, new_t = left[..., :, 0], right[..., 0, :]
    kept = _distance(new_u, new_t, u, t)
    flipped = _distance(-new_u, -new_t, u, t)
    sign = torch.where(flipped < kept, -1.0, 1.0).to(u.dtype).unsqueeze(-1)
    u.copy_(sign * new_u)
    t.copy_(sign * new_t)
    return values


def _distance(u: Tensor, t: Tensor, old_u: Tensor, old_t: Tensor) -> Tensor:
    return (u - old_u).abs().sum(-1) + (t - old_t).abs().sum(-1)
