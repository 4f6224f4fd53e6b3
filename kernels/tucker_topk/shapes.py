"""Tucker grid top-m without numbers, on the meta device. Letters as in reference.py."""

import torch
from torch import Tensor

from ultramem_megatron.kernels.tucker_topk.eager import scored_pairs


def tucker_topk_shapes(
    scores: Tensor, keys: Tensor, cores: Tensor, keys_per_side: int, best: int | None = None
) -> tuple[Tensor, Tensor]:
    """Addresses (T, H, best) and scores (T, H, best, C); see `tucker_topk_reference`."""
    tokens, heads, _, topk = keys.shape
    positions = torch.empty(
        tokens, heads, topk if best is None else best, dtype=torch.int64, device=scores.device
    )
    return scored_pairs(positions, scores, keys, cores.to(scores.dtype), keys_per_side)
