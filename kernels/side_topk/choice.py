"""Which side top-m runs; see dispatch.py."""

import torch
from torch import Tensor

from ultramem_megatron.kernels.dispatch import implementation
from ultramem_megatron.kernels.precision import as_multiplied
from ultramem_megatron.kernels.side_topk import native_path
from ultramem_megatron.kernels.side_topk.eager import EagerSideTopk
from ultramem_megatron.kernels.side_topk.reference import side_topk_reference
from ultramem_megatron.kernels.side_topk.shapes import side_topk_shapes


def side_topk(
    query: Tensor, keys: Tensor, directions: Tensor, topk: int, num_keys: int | None = None
) -> tuple[Tensor, Tensor]:
    """Indices (T, H, S, m) and scores (T, H, S, R, m); see `side_topk_reference`.

    num_keys: N, where `keys` are `kept_keys` and may have more. What an implementation has no
    kernels for (float64; native: float16) PyTorch's own compute.
    """
    num_keys = keys.shape[2] if num_keys is None else num_keys
    chosen = implementation(query.device)
    if chosen == "triton" and query.dtype != torch.float64:
        from ultramem_megatron.kernels.side_topk.fused import FusedSideTopk  # needs Triton
        from ultramem_megatron.kernels.side_topk.one_product import best_keys

        if not torch.is_grad_enabled():
            found = best_keys(query, keys, directions, topk, num_keys)
            if found is not None:
                return found
        fused: tuple[Tensor, Tensor] = FusedSideTopk.apply(query, keys, directions, topk, num_keys)
        return fused
    keys = keys[:, :, :num_keys]
    if chosen == "shapes":
        return side_topk_shapes(query, keys, topk)
    if chosen == "reference":
        return side_topk_reference(query, keys, directions, topk)
    if chosen == "native" and native_path.serves(query, keys):
        indices, scores = native_path.NativeSideTopk.apply(query, keys, directions, topk)
    else:
        indices, scores = EagerSideTopk.apply(query, keys, directions, topk)
    return indices, scores


def kept_keys(keys: Tensor, shared: bool) -> Tensor:
    """Keys (H, S, N, R, K) as each call would convert them; on some devices with more rows.

    shared: all heads read one query.
    """
    if implementation(keys.device) == "triton":
        from ultramem_megatron.kernels.side_topk.one_product import stored_for_one_product

        return stored_for_one_product(keys, shared)
    return as_multiplied(keys).transpose(2, 3).contiguous().transpose(2, 3)
