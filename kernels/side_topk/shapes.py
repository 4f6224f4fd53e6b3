"""Side top-m without numbers, on the meta device. Letters as in reference.py."""

import torch
from torch import Tensor

from ultramem_megatron.kernels.precision import at_least_float32
from ultramem_megatron.kernels.shapes import kept_for_backward


def side_topk_shapes(query: Tensor, keys: Tensor, topk: int) -> tuple[Tensor, Tensor]:
    """Indices (T, H, S, m) and scores (T, H, S, R, m); see `side_topk_reference`."""
    indices = query.new_empty((*query.shape[:3], topk), dtype=torch.int64)
    dtype = at_least_float32(query).dtype
    return indices, kept_for_backward((*query.shape[:4], topk), dtype, query, keys, indices)
