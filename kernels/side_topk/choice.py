"""Which side top-m runs; see dispatch.py."""

from torch import Tensor

from ultramem_megatron.kernels.dispatch import implementation
from ultramem_megatron.kernels.side_topk.eager import EagerSideTopk
from ultramem_megatron.kernels.side_topk.reference import side_topk_reference


def side_topk(query: Tensor, keys: Tensor, directions: Tensor, topk: int) -> tuple[Tensor, Tensor]:
    """Indices (T, H, S, m) and scores (T, H, S, R, m); see `side_topk_reference`."""
    chosen = implementation(query.device)
    if chosen == "reference":
        return side_topk_reference(query, keys, directions, topk)
    indices, scores = EagerSideTopk.apply(query, keys, directions, topk)
    return indices, scores
