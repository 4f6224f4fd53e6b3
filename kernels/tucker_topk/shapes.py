"""Tucker grid top-m without numbers, on the meta device. Letters as in reference.py."""

import torch
from torch import Tensor

from ultramem_megatron.kernels.shapes import kept_for_backward


def tucker_topk_shapes(
    scores: Tensor, keys: Tensor, cores: Tensor, best: int | None = None
) -> tuple[Tensor, Tensor]:
    """Addresses (T, H, best) and scores (T, H, best, C), and what compiled kernels keep.

    See `tucker_topk_reference`.
    """
    tokens, heads, _, topk = keys.shape
    shape = (tokens, heads, topk if best is None else best)
    positions = keys.new_empty(shape, dtype=torch.int32)
    picked = kept_for_backward((*shape, len(cores)), scores.dtype, scores, cores, positions)
    return keys.new_empty(shape), picked
