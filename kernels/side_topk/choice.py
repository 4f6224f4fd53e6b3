"""Which side top-m runs; see dispatch.py."""

import torch
from torch import Tensor

from ultramem_megatron.kernels.dispatch import implementation
from ultramem_megatron.kernels.precision import as_multiplied
from ultramem_megatron.kernels.side_topk import native_path
from ultramem_megatron.kernels.side_topk.eager import EagerSideTopk
from ultramem_megatron.kernels.side_topk.reference import side_topk_reference
from ultramem_megatron.kernels.side_topk.shapes import side_topk_shapes
from ultramem_megatron.kernels.side_topk.sharing import per_head_and_rank, queries_apart


def side_topk(
    query: Tensor, keys: Tensor, directions: Tensor, topk: int, num_keys: int | None = None
) -> tuple[Tensor, Tensor]:
    """Indices (T, H, S, m) and scores (T, H, S, R, m); see `side_topk_reference`.

    query: (T, Q, S, R, K), of which head i reads query i // ceil(H / Q), or (T, Q, S, 1, K) that
    all ranks read. keys: (H, S, N, R, K), or what `kept_keys` or `normed_keys` give, with
    num_keys, N.

    What an implementation has no kernels for (float64; native: float16) PyTorch's own compute.
    """
    num_keys = keys.shape[2] if num_keys is None else num_keys
    chosen = implementation(query.device)
    if chosen == "triton" and query.dtype != torch.float64:
        from ultramem_megatron.kernels.side_topk.fused import FusedSideTopk  # needs Triton
        from ultramem_megatron.kernels.side_topk.one_product import stored

        heads = len(keys) if keys.dim() == 5 else keys.shape[0] * keys.shape[3]
        if query.shape[1] != queries_apart(heads, query.shape[1]):
            query = per_head_and_rank(query, heads, query.shape[3])
        rows = stored(keys, query.shape[1]) if keys.dim() == 5 else keys
        fused: tuple[Tensor, Tensor] = FusedSideTopk.apply(query, rows, directions, topk, num_keys)
        return fused
    if chosen == "native" and native_path.serves(query, keys):
        native: tuple[Tensor, Tensor]
        native = native_path.NativeSideTopk.apply(query, keys, directions, topk)
        return native
    query = per_head_and_rank(query, keys.shape[0], keys.shape[3])
    if chosen == "shapes":
        return side_topk_shapes(query, keys, topk)
    if chosen == "reference":
        return side_topk_reference(query, keys, directions, topk)
    eager: tuple[Tensor, Tensor] = EagerSideTopk.apply(query, keys, directions, topk)
    return eager


def kept_keys(keys: Tensor, queries: int) -> Tensor:
    """Keys (H, S, N, R, K) as each call would convert them, or as products on GPUs take them.

    queries: Q, as of `side_topk`.
    """
    if implementation(keys.device) == "triton" and keys.dtype != torch.float64:
        from ultramem_megatron.kernels.side_topk.one_product import stored

        return stored(keys, queries_apart(len(keys), queries))
    return as_multiplied(keys).transpose(2, 3).contiguous().transpose(2, 3)
