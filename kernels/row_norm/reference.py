"""The norms in the plainest form: PyTorch's.

H heads, S = 2 sides, N keys per side, R Tucker rank, K width of one rank's key; A = N, aligned to a
multiple of 64; G groups of heads that read one query each.
"""

import torch.nn.functional as F
from torch import Tensor


def row_norm_reference(x: Tensor, gain: Tensor, eps: float, centred: bool) -> Tensor:
    """x (..., W), each row over its root mean square, times a gain (W,).

    eps: added to the square. centred: rows less their mean first, a layer norm.

    The row [1, 3] becomes [-1, 1] centred, and [1, 3] / sqrt(5) if not.
    """
    norm = F.layer_norm if centred else F.rms_norm
    out: Tensor = norm(x, gain.shape, gain, eps=eps)
    return out


def normed_keys_reference(
    keys: Tensor, gain: Tensor, eps: float, centred: bool, queries: int
) -> Tensor:
    """Keys (H, S, N, R, K) in rows as wide as the gain: K, or R*K of all ranks together.

    queries: G, for implementations that lay keys out for the products. Those return
    (G, S, R, H/G, A, K), rows of zeros behind the keys; here it is (H, S, N, R, K).
    """
    by_row = keys.view(*keys.shape[:3], -1, len(gain))
    return row_norm_reference(by_row, gain, eps, centred).view_as(keys)
