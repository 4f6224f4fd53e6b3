"""Side top-m in the plainest form: all scores, their rank-1 combination, a stable sort, a gather.

T tokens, H heads, S = 2 sides (row, column), N keys per side, R Tucker rank, K width of one rank's
key, m top-m. Source: UltraMem, arXiv 2411.12364, eq. 4-5 (scores) and eq. 8 (filter).
"""

import torch
from torch import Tensor

from ultramem_megatron.kernels.precision import at_least_float32


def side_topk_reference(
    query: Tensor, keys: Tensor, directions: Tensor, topk: int
) -> tuple[Tensor, Tensor]:
    """The m keys of each side whose scores, combined over ranks, are largest.

    With scores[t,h,s,a,n] = <query[t,h,s,a], keys[h,s,n,a]> the keys are those of the m largest
    sum_a directions[s,h,a] * scores[t,h,s,a,n]; of equal ones the lowest n, NaN above all.

    query (T, H, S, R, K) and keys (H, S, N, R, K) of one floating dtype, directions (S, H, R).
    Returns their indices (T, H, S, m), int64, ascending, and their scores (T, H, S, R, m), float32
    (float64 for float64 inputs); differentiable in query and keys.

    With one token, head, side and rank, query [2], keys [1, 5, 5, 3] and direction 1, the best two
    are keys [1, 2] with scores [10, 10].
    """
    scores = at_least_float32(torch.einsum("thsak,hsnak->thsan", query, keys))
    combined = torch.einsum("thsan,sha->thsn", scores, directions.to(scores.dtype))
    best = combined.sort(dim=-1, descending=True, stable=True).indices[..., :topk]
    indices = best.sort(dim=-1).values
    index = indices.unsqueeze(3).expand(*scores.shape[:-1], topk)
    return indices, scores.gather(-1, index)
