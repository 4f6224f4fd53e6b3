"""Which Tucker grid top-m runs; see dispatch.py."""

import torch
from torch import Tensor

from ultramem_megatron.kernels.dispatch import implementation
from ultramem_megatron.kernels.tucker_topk import native_path
from ultramem_megatron.kernels.tucker_topk.eager import tucker_topk_eager
from ultramem_megatron.kernels.tucker_topk.reference import tucker_topk_reference
from ultramem_megatron.kernels.tucker_topk.shapes import tucker_topk_shapes


def tucker_topk(
    scores: Tensor, keys: Tensor, cores: Tensor, keys_per_side: int
) -> tuple[Tensor, Tensor]:
    """Addresses (T, H, m) and scores (T, H, m, C); see `tucker_topk_reference`.

    What an implementation has no kernels for (float64) PyTorch's own compute.
    """
    chosen = implementation(scores.device)
    if chosen == "shapes":
        return tucker_topk_shapes(scores, keys, cores, keys_per_side)
    if chosen == "reference":
        return tucker_topk_reference(scores, keys, cores, keys_per_side)
    if chosen == "triton" and scores.dtype != torch.float64:
        from ultramem_megatron.kernels.tucker_topk.fused import FusedTuckerTopk  # needs Triton

        addresses, best = FusedTuckerTopk.apply(scores, keys, cores, keys_per_side)
        return addresses, best
    if chosen == "native" and native_path.serves(scores):
        addresses, best = native_path.NativeTuckerTopk.apply(scores, keys, cores, keys_per_side)
        return addresses, best
    return tucker_topk_eager(scores, keys, cores, keys_per_side)
