"""Which Tucker grid top-m runs; see dispatch.py."""

from torch import Tensor

from ultramem_megatron.kernels.dispatch import implementation
from ultramem_megatron.kernels.tucker_topk.eager import tucker_topk_eager
from ultramem_megatron.kernels.tucker_topk.reference import tucker_topk_reference


def tucker_topk(
    scores: Tensor, keys: Tensor, cores: Tensor, keys_per_side: int
) -> tuple[Tensor, Tensor]:
    """Addresses (T, H, m) and scores (T, H, m, C); see `tucker_topk_reference`."""
    chosen = implementation(scores.device)
    if chosen == "reference":
        return tucker_topk_reference(scores, keys, cores, keys_per_side)
    return tucker_topk_eager(scores, keys, cores, keys_per_side)
